"""What a run leaves behind: the policy, its judgement on held-out prompts, the plot, the page, and the summary."""

from __future__ import annotations

from dataclasses import asdict

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.models.buckets import UNTRAINED, Snapshot
from rlhf_ray.ppo.evaluation import (
    before_file,
    evaluate,
    held_out_kl,
    held_out_line,
    held_out_metrics,
    held_out_summary,
    load_samples,
    pair_samples,
    save_samples,
)
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.ppo.state import LoopState
from rlhf_ray.reward.core.evaluator import EvaluatedSample
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.runtime.answers import Deferred
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.ledger import check_ledger
from rlhf_ray.tracking.report import plot_ppo, write_samples, write_samples_page

AFTER = "held_out_after.jsonl"


def judge_before(config: PPOConfig, inputs: Inputs, roles: Roles, run: Run) -> None:
    """Held-out prompts with the weights that the engines started with, unless the run has done so already."""
    if inputs.held_out is None:
        return
    path = run.folder.path / before_file(config, inputs)
    if not path.exists():
        run.tracker.phase("judging the policy before training")
        save_samples(path, _evaluate(config, inputs, roles, UNTRAINED, with_kl=False))


def judge_during(
    config: PPOConfig, inputs: Inputs, roles: Roles, run: Run, state: LoopState, snapshot: Deferred[Snapshot]
) -> dict[str, float | int | None]:
    """Held-out prompts every `evaluation.every_steps`; the best policy is written where one is to be kept.

    Args:
        state: after the step; remembers the best.
        snapshot: the weights of this step.

    Returns:
        Metrics of the step, or nothing when it is not due.
    """
    settings = config.evaluation
    if inputs.held_out is None or settings.every_steps is None or state.step % settings.every_steps:
        return {}
    run.tracker.phase("judging the policy")
    metrics = held_out_metrics(_evaluate(config, inputs, roles, snapshot, with_kl=roles.references is not None))
    found = metrics.get(f"held_out/{settings.keep_best}")
    if found is not None and (not state.best or found > state.best["value"]):
        state.best = {"step": state.step, "value": found}
        run.tracker.phase("writing the best policy so far")
        roles.policy.call_all(PolicyLearner.export, str(run.folder.policy_best.absolute()))
        run.tracker.events.write("best_policy", step=state.step, metric=settings.keep_best, value=found)
    return metrics


def write_results(
    config: PPOConfig, inputs: Inputs, roles: Roles, run: Run, state: LoopState, snapshot: Deferred[Snapshot]
) -> None:
    """The policy as a Hugging Face directory, the judgement, the plot and the page; the summary last."""
    folder, tracker = run.folder, run.tracker
    rows = tracker.metrics.read().rows
    summary: dict[str, object] = {
        "name": config.run.name,
        "steps": rows[-1]["step"],
        "samples": rows[-1]["samples"],
    }
    evaluations = {source.settings.name: source.card.evaluation for source in inputs.rewards if source.card is not None}
    if len(evaluations) == 1:
        [summary["reward_model"]] = evaluations.values()
    elif evaluations:
        summary["reward_models"] = evaluations
    summary["ledger"] = _check_ledger(config, run, state.step)
    if state.best:
        summary["best"] = {**state.best, "metric": config.evaluation.keep_best}
    pairs = []
    if inputs.held_out is not None:
        tracker.phase("judging the policy after training")
        before = load_samples(folder.path / before_file(config, inputs))
        after = _evaluate(config, inputs, roles, snapshot, with_kl=True)
        save_samples(folder.path / AFTER, after)
        held_out = held_out_summary(before, after)
        summary["held_out"] = held_out
        summary["kl/reference"] = held_out_kl(after) if roles.has_reference else None
        pairs = pair_samples(before, after)
        tracker.display.message(held_out_line(held_out))
    else:
        summary["kl/reference"] = rows[-1]["kl/reference"]
    tracker.phase("writing the policy")
    roles.policy.call_all(PolicyLearner.export, str(folder.policy.absolute()))
    if config.policy.lora is not None:
        roles.policy.call_all(PolicyLearner.export_adapters, str(folder.policy_adapters.absolute()))
    title = f"{config.run.name} · {config.policy.model}"
    plot_ppo(folder.metrics, folder.plot, title)
    summary["wall_s"] = tracker.wall_s
    if pairs:
        write_samples(folder.samples, pairs)
        shown = pairs[: config.evaluation.page_samples]
        write_samples_page(folder.samples_page, title, summary, shown, folder.plot)
    tracker.finish(summary)


def _check_ledger(config: PPOConfig, run: Run, steps: int) -> dict[str, object]:
    """See that each sample was used exactly once; where not, events, display and summary say so."""
    sampling = config.sampling
    check = check_ledger(run.folder.ledger, sampling.prompts_drawn * sampling.samples_per_prompt, steps)
    run.tracker.events.write("ledger_checked", cause="; ".join(check.problems) or None, samples=check.trained)
    for problem in check.problems:
        run.tracker.display.message(f"warning: {run.folder.ledger}: {problem}")
    return asdict(check)


def _evaluate(
    config: PPOConfig, inputs: Inputs, roles: Roles, snapshot: Snapshot | Deferred[Snapshot], with_kl: bool
) -> list[EvaluatedSample]:
    assert inputs.held_out is not None, "called with held-out prompts only"
    return evaluate(roles, inputs.held_out, config.evaluation, config.sampling, config.run.seed, snapshot, with_kl)
