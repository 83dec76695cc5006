"""What a run leaves behind: the policy, its judgement on held-out prompts, the plot, the page, and the summary."""

from __future__ import annotations

from dataclasses import asdict

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.evaluation import held_out_kl, held_out_line, held_out_summary, pair_samples, save_samples
from rlhf_ray.ppo.held_out import HeldOut
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.ppo.roles import Roles
from rlhf_ray.ppo.state import LoopState
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.runtime.answers import Deferred
from rlhf_ray.runtime.run import Run
from rlhf_ray.tracking.ledger import check_ledger
from rlhf_ray.tracking.report import plot_ppo, write_samples, write_samples_page

AFTER = "held_out_after.jsonl"


def write_results(
    config: PPOConfig,
    inputs: Inputs,
    roles: Roles,
    run: Run,
    state: LoopState,
    held_out: HeldOut,
    snapshot: Deferred[Snapshot],
) -> None:
    """The policy as a Hugging Face directory, the judgement, the plot and the page; the summary last."""
    folder, tracker = run.folder, run.tracker
    rows = tracker.metrics.read()
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
    pairs = []
    if inputs.held_out is not None:
        before, after = held_out.before(), held_out.judge_after(state.step, snapshot)
        save_samples(folder.path / AFTER, after)
        judged = held_out_summary(before, after)
        summary["held_out"] = judged
        summary["kl/reference"] = held_out_kl(after)
        pairs = pair_samples(before, after)
        tracker.display.message(held_out_line(judged))
        best = held_out.best()
        if best is not None:
            summary["best"] = asdict(best)
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
