"""The loop: sample, score, learn, sync; again. Sampling may run ahead (`ppo/admission.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.algorithms.kl import KLController
from rlhf_ray.algorithms.parity import Parity
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import RoleFailure
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.admission import Admission
from rlhf_ray.ppo.guards import check_finite, check_scores, kl_beyond
from rlhf_ray.ppo.held_out import HeldOut
from rlhf_ray.ppo.inputs import Inputs, read_inputs
from rlhf_ray.ppo.metrics import COLUMNS, StepClock, step_row, warn_if_off_policy
from rlhf_ray.ppo.object_store import check_object_store
from rlhf_ray.ppo.recovery import Recovery
from rlhf_ray.ppo.results import write_results
from rlhf_ray.ppo.roles import RoleClasses, Roles, RoleStarter, role_requests
from rlhf_ray.ppo.state import LoopState, check_resumable, draw_settings, learner_shapes
from rlhf_ray.ppo.step import learner_columns, shards_of_groups, train_critic, train_policy, wait_for_columns
from rlhf_ray.roles.generator import Generator
from rlhf_ray.rollout import refuse_rollouts_in_this_process
from rlhf_ray.runtime.answers import Answer, Deferred, collect
from rlhf_ray.runtime.learner_group import connected
from rlhf_ray.runtime.run import Run
from rlhf_ray.runtime.supervisor import Supervisor
from rlhf_ray.runtime.timeline import Timeline
from rlhf_ray.runtime.weight_transfer import Sync, WeightSync, probe_rows
from rlhf_ray.tracking.ledger import Ledger
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.tracker import check_folder, run_folder_path, take_up_copy


def run_ppo(config: PPOConfig, resume: bool = False) -> None:
    """Everything `rlhf-ray ppo` does.

    Raises:
        BadInput: before any actor starts.
        Finished: it was to be resumed, and there is nothing left to do.
        RoleFailure: a role failed, died or did not answer.
        Stopped: by SIGTERM or SIGINT; there is a checkpoint of the last step.
    """
    check_folder(config, resume)
    take_up_copy(config, resume)
    inputs = read_inputs(config)
    if resume:
        check_resumable(config, inputs.prompts, RunFolder(Path(run_folder_path(config))))
    run_roles(config, inputs, RoleClasses(), resume)


def run_roles(config: PPOConfig, inputs: Inputs, classes: RoleClasses, resume: bool = False) -> None:
    """The run behind `run_ppo`, once everything is read and checked.

    Args:
        classes: what is built in the roles' processes.
    """
    title = f"PPO {config.run.name} · {config.policy.model}"
    with (
        connected(config.cluster, [role_requests(config)], partial(check_object_store, config, inputs.size)),
        Run(config, "ppo", title, config.steps, COLUMNS, config.checkpoint, resume) as run,
    ):
        refuse_rollouts_in_this_process()
        try:
            run.tracker.phase("starting the roles and loading their models")
            watching = Supervisor(run.tracker.events, config.cluster.silent_after_s, run.tracker.display.message)
            with watching as supervisor:
                starter = RoleStarter(config, inputs, run.folder.logs, classes, supervisor.watch)
                recovery, done = Recovery(config, starter, run), False
                roles = recovery.start()
                for group in roles.groups():
                    for replica in group:
                        run.tracker.events.write("role_started", role=replica.name, node=replica.node)
                while not done:
                    try:
                        PPO(config, inputs, roles, run).train()
                        done = True
                    except RoleFailure as failure:
                        roles = recovery.after(supervisor.failure or failure)
        finally:
            refuse_rollouts_in_this_process(False)


class PPO:
    """One run's loop over its roles."""

    def __init__(self, config: PPOConfig, inputs: Inputs, roles: Roles, run: Run) -> None:
        self._config, self._inputs, self._roles, self._run = config, inputs, roles, run
        self._timeout_s = config.cluster.call_timeout_s
        self._kl = KLController(config.algorithm.kl)
        self._state = LoopState(
            kl_controller=self._kl.state_dict(),
            max_staleness=config.algorithm.max_staleness,
            learners=learner_shapes(config),
            prompts=draw_settings(config, inputs.prompts),
        )
        self._held_out = HeldOut(config, inputs, roles, run)
        self._ledger = Ledger(run.folder.ledger)
        self._admission = Admission(config, inputs.prompts, roles)
        self._timeline = Timeline(roles.groups(), run.folder.trace, config.tracking.trace_steps, self._timeout_s)
        self._weights = WeightSync(
            roles.policy,
            roles.generators,
            config.weights,
            config.generator.tensor_parallel,
            probe_rows(
                [prompt.token_ids for prompt in inputs.prompts], config.weights.probe_tokens, inputs.context_tokens
            ),
            self._timeout_s,
            config.algorithm.in_flight_updates,
        )
        self._syncs: deque[Sync | Parity] = deque()
        """One for each version from that of the next step's samples to the newest, verified or under way."""
        self._snapshot: Deferred[Snapshot] | None = None
        """The newest weights, between two steps."""

    def train(self) -> None:
        """From the first step, or from the latest checkpoint, to the end."""
        config, run, admission = self._config, self._run, self._admission
        self._held_out.judge_before()
        restored = run.restore(LoopState)
        if restored is None:
            self._held_out.forget_best()
        else:
            found, checkpoint = restored
            self._state = replace(found, learners=self._state.learners, prompts=self._state.prompts)
            self._kl.load_state_dict(found.kl_controller or self._kl.state_dict())
            collect(self._roles.load_checkpoint(str(checkpoint)), self._timeout_s)
            admission.read(found.rollouts, checkpoint)
        run.tracker.phase("first sync of the weights")
        sync = self._weights.begin(self._state.step)
        parity = self._verify(sync, collect(sync.all_answers(), self._timeout_s))
        self._syncs.extend([Parity(**each) for each in self._state.syncs] or [parity] * admission.max_staleness)
        admission.hand_out(sync.version, sync.snapshot)
        self._snapshot = sync.snapshot
        del sync  # it would keep the snapshot
        run.keep(self._state.step, self._state, self._save_checkpoint)  # a stop may have been asked for meanwhile
        clock = StepClock(self._timeout_s)
        while self._state.step < config.steps:
            cause = kl_beyond(self._step(clock), config.algorithm.kl.stop_above)
            if cause is not None:
                # Before the checkpoint: a run that is resumed there would not know that it had ended.
                run.tracker.events.write("run_ended_early", cause=cause, step=self._state.step, guard="kl")
                run.tracker.display.message(f"ending early: {cause}")
                break
            clock = clock.next()
            run.keep(self._state.step, self._state, self._save_checkpoint)
        self._verify_all()
        assert self._snapshot is not None, "there is one between two steps"
        write_results(config, self._inputs, self._roles, run, self._state, self._held_out, self._snapshot)

    def _step(self, clock: StepClock) -> float | None:
        """Train on the step whose turn it is, and hand out the next one; gives the KL divergence from the reference."""
        config, roles, state = self._config, self._roles, self._state
        self._run.tracker.phase("sampling")
        step = self._admission.next()
        trained, sampling = step.trained, config.sampling
        if sampling.spare_prompts or config.generator.sleep:
            scored = wait_for_columns(step.shards, step.rewards, (), clock)
        if config.generator.sleep:
            roles.generators.call_all(Generator.sleep)
        if sampling.spare_prompts:
            choice = scored.choice(sampling)
            trained = shards_of_groups(roles, step.shards, step.rewards, choice.places, sampling.prompts_per_shard)
        trained = learner_columns(roles, trained, config.algorithm.asks_old_logprobs)
        headers = wait_for_columns(step.shards, step.rewards, trained, clock)
        if headers.failure_causes:
            self._run.tracker.events.write("scores_failed", step=state.step + 1, causes=headers.failure_causes)
        check_scores(headers, state.step + 1)
        # Whoever still needs these weights holds them; kept here, they would take up the room of the new ones.
        self._snapshot = None

        self._run.tracker.phase("learning")
        coefficient = self._kl.coefficient
        policy = train_policy(roles, trained, state.step, coefficient)
        critic = train_critic(roles, trained, state.step, coefficient)
        # The policy's weights leave while the critic is still learning, and the next step is sampled with them.
        newest = self._weights.begin(state.step + 1, self._admission.owed())
        self._admission.hand_out(newest.version, newest.snapshot)
        self._syncs.append(newest)
        # What the next step is sampled with must be proven by the time that it is trained on.
        due = self._syncs.popleft()
        done = clock.wait({"train": [*policy, *critic], "sync": due.all_answers() if isinstance(due, Sync) else []})
        parity = self._verify(due, done["sync"]) if isinstance(due, Sync) else due
        policy_report, critic_report = done["train"][0], done["train"][len(policy)] if critic else None
        check_finite(state.step + 1, policy_report, critic_report)

        sampled_for = state.step
        state.advance(headers.num_samples, headers.num_response_tokens)
        warn_if_off_policy(self._run.tracker.events, state.step, policy_report)
        kl = policy_report.stats.kl_reference
        if kl is not None:
            self._kl.update(kl, policy_report.stats.num_samples)
        state.kl_controller = self._kl.state_dict()
        busy = self._timeline.read(state.step)
        choice = headers.choice(sampling)
        self._ledger.write(
            state.step,
            [report.samples for report in done["train"][: len(policy)]],
            spare=choice.left_out(np.concatenate([shard.plan.sample_ids for shard in step.shards])),
            versions=headers.versions,
            digests=[header.digest for header in headers.rollouts],
            causes=headers.failure_causes,
        )
        self._snapshot = newest.snapshot
        judged: dict[str, float | int | None] = {}
        if self._held_out.is_due(state.step):
            with clock.phase("held_out"):
                judged = self._held_out.judge_during(state.step, self._snapshot)
        events = self._run.tracker.events
        row = step_row(
            state, headers, choice, policy_report, critic_report, parity, sampled_for, coefficient, clock, busy
        )
        row |= {"recovery/lost": events.count("role_lost"), "recovery/rolled_back": events.count("rolled_back")}
        self._run.tracker.step(row | judged)
        return kl

    def _verify(self, sync: Sync, values: Sequence[Any]) -> Parity:
        """Engines that could not prove it have ended the run; those that needed a second attempt are reported."""
        parity = sync.worst(values)
        if parity.first_fault:
            self._run.tracker.events.write("sync_repeated", cause=parity.first_fault, version=sync.version)
        return parity

    def _verify_all(self) -> None:
        for index, sync in enumerate(self._syncs):
            if isinstance(sync, Sync):
                self._syncs[index] = self._verify(sync, collect(sync.all_answers(), self._timeout_s))

    def _save_checkpoint(self, folder: str) -> list[Answer[None]]:
        """The learners' state; and the rows of steps that were sampled with weights that are gone, with the proofs of
        these weights: a resumed run goes on as if it had been left alone."""
        self._verify_all()
        older = self._admission.with_older_weights(self._state.step)
        writing = self._admission.write(older, Path(folder))
        self._state.rollouts = [each.step for each in older]
        self._state.syncs = [asdict(sync) for sync in self._syncs if isinstance(sync, Parity)]
        return [*self._roles.save_checkpoint(folder), *writing]
