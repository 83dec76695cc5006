"""The loop: sample, score, learn, sync; again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.algorithms.kl import kl_controller
from rlhf_ray.algorithms.parity import Parity
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.inputs import Inputs, read_inputs
from rlhf_ray.ppo.metrics import COLUMNS, StepClock, StepHeaders, step_row
from rlhf_ray.ppo.results import judge_before, write_results
from rlhf_ray.ppo.roles import Roles, role_requests, start_roles
from rlhf_ray.ppo.scoring import refuse_failures
from rlhf_ray.ppo.state import LoopState, check_resumable, learner_shapes
from rlhf_ray.ppo.step import (
    add_columns,
    generate,
    plan_shards,
    train_critic,
    train_policy,
    wait_for_columns,
)
from rlhf_ray.rollout import refuse_rollouts_in_this_process
from rlhf_ray.runtime.answers import Deferred, collect
from rlhf_ray.runtime.learner_group import connected
from rlhf_ray.runtime.run import Run
from rlhf_ray.runtime.timeline import Timeline
from rlhf_ray.runtime.weight_transfer import Sync, WeightSync, probe_rows
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.tracker import check_folder, run_folder_path


def run_ppo(config: PPOConfig, resume: bool = False) -> None:
    """Everything `rlhf-ray ppo` does.

    Raises:
        BadInput: before any actor starts.
        RoleFailure: a role failed, died or did not answer.
        Stopped: by SIGTERM or SIGINT; there is a checkpoint of the last step.
    """
    check_folder(config, resume)
    if resume:
        check_resumable(config, RunFolder(Path(run_folder_path(config))))
    inputs = read_inputs(config)
    title = f"PPO {config.run.name} · {config.policy.model}"
    with (
        connected(config.cluster, [role_requests(config)]),
        Run(config, "ppo", title, config.steps, COLUMNS, config.checkpoint, resume) as run,
    ):
        refuse_rollouts_in_this_process()
        try:
            run.tracker.phase("starting the roles and loading their models")
            roles = start_roles(config, inputs, run.folder.logs)
            for group in roles.groups():
                for replica in group:
                    run.tracker.events.write("role_started", role=replica.name, node=replica.node)
            PPO(config, inputs, roles, run).train()
        finally:
            refuse_rollouts_in_this_process(False)


class PPO:
    """One run's loop over its roles."""

    def __init__(self, config: PPOConfig, inputs: Inputs, roles: Roles, run: Run) -> None:
        self._config, self._inputs, self._roles, self._run = config, inputs, roles, run
        self._timeout_s = config.cluster.call_timeout_s
        self._kl = kl_controller(config.algorithm.kl)
        self._state = LoopState(learners=learner_shapes(config))
        self._timeline = Timeline(roles.groups(), run.folder.trace, config.tracking.trace_steps, self._timeout_s)
        prompts = [prompt.token_ids for prompt in inputs.prompts]
        probe = probe_rows(prompts, config.weights.probe_tokens, inputs.context_tokens)
        self._weights = WeightSync(
            roles.policy, roles.generators, config.weights, config.generator.tensor_parallel, probe, self._timeout_s
        )
        self._snapshot: Deferred[Snapshot] | None = None

    def train(self) -> None:
        """From the first step, or from the latest checkpoint, to the end."""
        config, run = self._config, self._run
        judge_before(config, self._inputs, self._roles, run)
        restored = run.restore(LoopState)
        if restored is not None:
            found, checkpoint = restored
            self._state = replace(found, learners=self._state.learners)
            self._kl.load_state_dict(self._state.kl_controller)
            collect(self._roles.load_checkpoint(str(checkpoint)), self._timeout_s)
        run.tracker.phase("first sync of the weights")
        sync = self._weights.begin(self._state.step)
        self._verify(sync, collect([*sync.parity, *sync.answers], self._timeout_s))
        run.keep(self._state.step, self._state, self._save_checkpoint)  # a stop may have been asked for meanwhile
        while self._state.step < config.steps:
            kl = self._step()
            run.keep(self._state.step, self._state, self._save_checkpoint)
            if self._kl_too_large(kl):
                break
        write_results(config, self._inputs, self._roles, run, self.snapshot)

    def _step(self) -> float | None:
        """Sample, score, learn, sync; gives the KL divergence from the reference."""
        config, roles, state, clock = self._config, self._roles, self._state, StepClock(self._timeout_s)
        self._run.tracker.phase("sampling")
        drawn = self._inputs.prompts.draw(config.run.seed, state.step, config.sampling.prompts_per_step)
        plans = plan_shards(drawn, config.sampling, config.run.seed, "train")
        shards = generate(roles, plans, drawn, self.snapshot)
        columns = add_columns(roles, shards, config.algorithm.asks_old_logprobs)
        headers = wait_for_columns(shards, columns, clock)
        self._check_scores(headers)
        # Every generator has these weights by now; kept, they would take up the room of the new ones.
        self._snapshot = None

        self._run.tracker.phase("learning")
        coefficient = self._kl.coefficient
        policy = train_policy(roles, shards, columns, state.step, coefficient)
        critic = train_critic(roles, shards, columns, state.step, coefficient)
        # The policy's weights leave while the critic is still learning.
        sync = self._weights.begin(state.step + 1)
        done = clock.wait({"train": [*policy, *critic], "sync": [*sync.parity, *sync.answers]})
        parity = self._verify(sync, done["sync"])
        policy_report, critic_report = done["train"][0], done["train"][len(policy)] if critic else None

        sampled_version = state.step
        state.advance(headers.num_samples, headers.num_response_tokens)
        kl = policy_report.stats.kl_reference
        if kl is not None:
            self._kl.update(kl, headers.num_samples)
        state.kl_controller = self._kl.state_dict()
        busy = self._timeline.read(state.step)
        row = step_row(state, headers, policy_report, critic_report, parity, sampled_version, coefficient, clock, busy)
        self._run.tracker.step(row)
        return kl

    @property
    def snapshot(self) -> Deferred[Snapshot]:
        """The weights to sample with."""
        assert self._snapshot is not None, "no weights have been verified yet"
        return self._snapshot

    def _verify(self, sync: Sync, reports: Sequence[Any]) -> Parity:
        """From here on, the engines sample with these weights."""
        sync, parity, first_faults = self._weights.verified(sync, reports[: len(sync.parity)])
        if first_faults:
            self._run.tracker.events.write("sync_repeated", cause="; ".join(first_faults), version=sync.version)
        self._snapshot = sync.snapshot
        return parity

    def _save_checkpoint(self, folder: str) -> None:
        collect(self._roles.save_checkpoint(folder), self._timeout_s)

    def _check_scores(self, headers: StepHeaders) -> None:
        """A failed score is counted and set aside; a step with no scores aborts the run."""
        causes = headers.failure_causes
        if causes:
            self._run.tracker.events.write("scores_failed", step=self._state.step + 1, causes=causes)
        refuse_failures(headers.rewards, self._state.step + 1)
        if headers.num_failures == headers.num_samples:
            raise RoleFailure(
                FailureKind.FATAL, "reward", "?", f"not one sample of step {self._state.step + 1} has a score: {causes}"
            )

    def _kl_too_large(self, kl: float | None) -> bool:
        limit = self._config.algorithm.kl.stop_above
        if limit is None or kl is None or kl <= limit:
            return False
        cause = f"kl/reference is {kl:.2f} nats, above algorithm.kl.stop_above {limit:g}"
        self._run.tracker.events.write("run_ended_early", cause=cause, step=self._state.step)
        self._run.tracker.display.message(f"ending early: {cause}")
        return True
