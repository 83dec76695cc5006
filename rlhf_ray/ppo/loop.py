"""The loop: sample, score, learn, sync; again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import ray

from rlhf_ray.algorithms.kl import kl_controller
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import BadInput, FailureKind, RoleFailure, Stopped
from rlhf_ray.ppo.cast import Cast, role_requests, start_cast
from rlhf_ray.ppo.evaluation import (
    evaluate,
    held_out_kl,
    held_out_line,
    held_out_summary,
    load_samples,
    pair_samples,
    save_samples,
)
from rlhf_ray.ppo.inputs import Inputs, read_inputs
from rlhf_ray.ppo.metrics import COLUMNS, StepClock, step_row
from rlhf_ray.ppo.state import LoopState
from rlhf_ray.ppo.step import Columns, Shard, StepHeaders, generate, learner_columns, plan_shards, refer, score, train
from rlhf_ray.roles.critic_learner import CriticReport
from rlhf_ray.roles.evaluator import EvaluatedSample
from rlhf_ray.roles.policy_learner import PolicyReport
from rlhf_ray.rollout import refuse_rollouts_in_this_process
from rlhf_ray.runtime.cluster import check_resources, connect
from rlhf_ray.runtime.stopping import stop_signals
from rlhf_ray.runtime.waiting import collect
from rlhf_ray.runtime.weight_transfer import Parity, open_transport, verify
from rlhf_ray.tracking.report import plot_ppo, write_samples, write_samples_page
from rlhf_ray.tracking.run_folder import CHECKPOINT_STATE, RunFolder
from rlhf_ray.tracking.tracker import Tracker, changed_settings, check_folder, open_folder

BEFORE = "held_out_before.jsonl"
AFTER = "held_out_after.jsonl"


def run_ppo(config: PPOConfig, resume: bool = False) -> None:
    """Everything `rlhf-ray ppo` does.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a role failed, died or did not answer.
        Stopped: by SIGTERM or SIGINT; there is a checkpoint of the last step.
    """
    check_folder(config, resume)
    inputs = read_inputs(config)
    connect(config.cluster)
    try:
        check_resources(role_requests(config))
        changed = changed_settings(config) if resume else []
        folder = open_folder(config, resume)
        title = f"PPO {config.run.name} · {config.policy.model}"
        with Tracker(config, "ppo", folder, title, config.steps, COLUMNS) as tracker, stop_signals() as stop:
            refuse_rollouts_in_this_process()
            if changed:
                tracker.events.write("settings_changed", changes=changed)
                tracker.display.message(f"resuming with other settings than before: {'; '.join(changed)}")
            tracker.phase("starting the roles and loading their models")
            cast = start_cast(config, inputs, folder.logs)
            for group in cast.groups():
                for member in group.members:
                    tracker.events.write("role_started", role=member.name, node=member.node)
            PPO(config, inputs, cast, tracker, folder, stop).run(resume)
    finally:
        refuse_rollouts_in_this_process(False)
        ray.shutdown()


class PPO:
    """One run's loop over its cast.

    Args:
        config: of the run.
        inputs: what was read.
        cast: the roles, built.
        tracker: the run's logs.
        folder: the run's folder.
        stop: signals received so far; with one the run ends after the step under way.
    """

    def __init__(
        self,
        config: PPOConfig,
        inputs: Inputs,
        cast: Cast,
        tracker: Tracker,
        folder: RunFolder,
        stop: Sequence[int] = (),
    ) -> None:
        self._config, self._inputs, self._cast = config, inputs, cast
        self._tracker, self._folder, self._stop = tracker, folder, stop
        self._kl = kl_controller(config.algorithm.kl)
        self._state = LoopState()
        self._transport = open_transport(config.weights, cast.policy, cast.generators, config.generator.tensor_parallel)

    def run(self, resume: bool) -> None:
        """From the first step, or from the latest checkpoint, to the end."""
        if resume:
            self._load_checkpoint()
        self._tracker.phase("first sync of the weights")
        self._sync(StepClock())
        self._evaluate_before()
        while self._state.step < self._config.steps:
            if self._stop:
                self._stop_here()
            kl = self._step()
            if self._state.step % self._config.checkpoint.every_steps == 0:
                self._save_checkpoint()
            if self._kl_too_large(kl):
                break
        self._finish()

    def _stop_here(self) -> None:
        self._save_checkpoint()
        cause, step = f"signal {self._stop[0]}", self._state.step
        self._tracker.events.write("run_stopped", cause=cause, step=step)
        raise Stopped(f"stopped by {cause} after step {step}; continue with --resume")

    def _step(self) -> float | None:
        """Sample, score, learn, sync."""
        cast, config, clock = self._cast, self._config, StepClock()
        drawn = self._inputs.prompts.draw(config.run.seed, self._state.step, config.sampling.prompts_per_step)
        shards = generate(cast, plan_shards(drawn, config.sampling, config.run.seed, "train"), drawn)
        scored = score(cast, shards)
        references = refer(cast, shards)
        values = learner_columns(cast.critic, "values", shards) if cast.critic else None
        asks = config.algorithm.asks_old_logprobs
        policy = learner_columns(cast.policy, "logprobs", shards) if asks else None
        columns = [
            Columns(
                rewards=rewards,
                reference=references[index].reference if references else None,
                values=values[index].reference if values else None,
                policy=policy[index].reference if policy else None,
            )
            for index, (rewards, _) in enumerate(scored)
        ]

        self._tracker.phase("sampling")
        with clock.phase("generate"):
            rollouts = cast.generators.wait([shard.header for shard in shards])
        self._tracker.phase("scoring")
        with clock.phase("reward"):
            rewards = cast.scorers.wait([header for _, header in scored])
        for name, stored in (("reference", references), ("values", values), ("old_logprobs", policy)):
            with clock.phase(name):
                collect([column.done for column in stored or ()], config.cluster.call_timeout_s)
        headers = StepHeaders(tuple(rollouts), tuple(rewards))
        self._check_scores(headers)

        self._tracker.phase("learning")
        coefficient = self._kl.coefficient
        with clock.phase("train"):
            policy_report, critic_report = self._learn(shards, columns, coefficient)
        if policy_report.stats.kl_reference is not None:
            self._kl.update(policy_report.stats.kl_reference, headers.num_samples)
        sampled_version = self._state.step
        self._state.step += 1
        self._state.samples += headers.num_samples
        self._state.tokens += headers.num_response_tokens
        self._tracker.phase("syncing the weights")
        parity = self._sync(clock)
        self._tracker.step(
            step_row(
                self._state,
                headers,
                policy_report,
                critic_report,
                parity,
                sampled_version,
                coefficient,
                clock,
                self._tracker.wall_s,
            )
        )
        return policy_report.stats.kl_reference

    def _learn(
        self, shards: list[Shard], columns: list[Columns], coefficient: float
    ) -> tuple[PolicyReport, CriticReport | None]:
        """Policy and critic learn at the same time, from the same columns."""
        cast, step = self._cast, self._state.step
        pending = train(cast.policy, shards, columns, step, coefficient)
        if cast.critic is not None:
            pending += train(cast.critic, shards, columns, step, coefficient)
        reports = collect(pending, self._config.cluster.call_timeout_s)
        critic_report = reports[len(cast.policy)] if cast.critic is not None else None
        return reports[0], critic_report

    def _sync(self, clock: StepClock) -> Parity:
        """The learner's weights into every generator, and the proof."""
        weights, sampling = self._config.weights, self._config.sampling
        version = self._state.step
        with clock.phase("sync"):
            self._transport.send(version)
        probe = [
            (number, self._inputs.prompts[number % len(self._inputs.prompts)])
            for number in range(weights.probe_prompts)
        ]
        [plan] = plan_shards(
            probe,
            sampling.model_copy(update={"prompts_per_shard": len(probe)}),
            self._config.run.seed,
            "probe",
            samples_per_prompt=1,
            max_response_tokens=min(weights.probe_tokens, sampling.max_response_tokens),
        )
        with clock.phase("probe"):
            return verify(weights, self._cast.policy, self._cast.generators, plan, version, self._cast.exact)

    def _check_scores(self, headers: StepHeaders) -> None:
        """A failed score is counted and set aside; a step without any is the end."""
        causes = headers.failure_causes
        if causes:
            self._tracker.events.write("scores_failed", step=self._state.step + 1, causes=causes)
        if headers.num_failures == headers.num_samples:
            raise RoleFailure(
                FailureKind.FATAL, "reward", "?", f"not one sample of step {self._state.step + 1} has a score: {causes}"
            )

    def _kl_too_large(self, kl: float | None) -> bool:
        limit = self._config.algorithm.kl.stop_above
        if limit is None or kl is None or kl <= limit:
            return False
        cause = f"kl/reference is {kl:.2f} nats, above algorithm.kl.stop_above {limit:g}"
        self._tracker.events.write("run_ended_early", cause=cause, step=self._state.step)
        self._tracker.display.message(f"ending early: {cause}")
        return True

    def _save_checkpoint(self) -> None:
        path = self._folder.checkpoint_path(self._state.step)
        self._tracker.phase("saving a checkpoint")
        if (path / CHECKPOINT_STATE).exists():
            return  # of this very step: nothing has changed since
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        self._ask_learners("save_checkpoint", path)
        self._state.kl_controller = self._kl.state_dict()
        self._state.save(path)
        self._folder.prune(self._config.checkpoint.keep)
        self._tracker.events.write("checkpoint_saved", step=self._state.step, path=str(path))

    def _load_checkpoint(self) -> None:
        latest = self._folder.latest_checkpoint()
        if latest is None:
            raise BadInput(
                str(self._folder.path), "has no complete checkpoint", "a run that reached one, or no --resume"
            )
        step, path = latest
        self._tracker.phase(f"loading the checkpoint of step {step}")
        self._state = LoopState.load(path)
        self._kl.load_state_dict(self._state.kl_controller)
        self._ask_learners("load_checkpoint", path)
        dropped = self._tracker.metrics.truncate_after(step)
        self._tracker.events.write("checkpoint_loaded", step=step, path=str(path), dropped_rows=dropped)

    def _ask_learners(self, method: str, path: Path) -> None:
        """All ranks of all learners at once."""
        learners = [group for group in (self._cast.policy, self._cast.critic) if group is not None]
        pending = [
            item
            for group in learners
            for rank in range(len(group))
            for item in group.submit(rank, method, str(path.absolute()))
        ]
        collect(pending, self._config.cluster.call_timeout_s)

    def _evaluate_before(self) -> None:
        path = self._folder.path / BEFORE
        if self._inputs.held_out is None or path.exists():
            return
        self._tracker.phase("judging the policy before training")
        save_samples(path, self._evaluate(with_kl=False))

    def _evaluate(self, with_kl: bool) -> list[EvaluatedSample]:
        assert self._inputs.held_out is not None, "called with held-out prompts only"
        return evaluate(
            self._cast,
            self._inputs.held_out,
            self._config.evaluation,
            self._config.sampling,
            self._config.run.seed,
            with_kl,
        )

    def _finish(self) -> None:
        """The policy as a Hugging Face directory, the judgement, the plot and the page; the summary last."""
        folder, config = self._folder, self._config
        summary: dict[str, object] = {
            "name": config.run.name,
            "steps": self._state.step,
            "samples": self._state.samples,
        }
        card = self._inputs.reward_card
        if card is not None:
            summary["reward_model"] = card.evaluation
        pairs = []
        if self._inputs.held_out is not None:
            self._tracker.phase("judging the policy after training")
            before, after = load_samples(folder.path / BEFORE), self._evaluate(with_kl=True)
            save_samples(folder.path / AFTER, after)
            summary["held_out"] = held_out_summary(before, after)
            summary["kl/reference"] = held_out_kl(after) if self._cast.references is not None else None
            pairs = pair_samples(before, after)
            self._tracker.display.message(held_out_line(held_out_summary(before, after)))
        else:
            # From the log: a run that was stopped after its last step has none of its own when it is resumed.
            summary["kl/reference"] = self._tracker.metrics.read().rows[-1]["kl/reference"]
        self._tracker.phase("writing the policy")
        self._cast.policy.call_all("export", str(folder.policy.absolute()))
        title = f"{config.run.name} · {config.policy.model}"
        plot_ppo(folder.metrics, folder.plot, title)
        summary["wall_s"] = self._tracker.wall_s
        if pairs:
            write_samples(folder.samples, pairs)
            shown = pairs[: config.evaluation.page_samples]
            write_samples_page(folder.samples_page, title, summary, shown, folder.plot)
        self._tracker.finish(summary)
