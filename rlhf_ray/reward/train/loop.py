"""The loop of reward-model training: every member of an ensemble in turn, judged on the way, stopped and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.randomness import batch_rows, keyed_seed
from rlhf_ray.reward.core.card import MemberLayout, Probe
from rlhf_ray.reward.core.loading import written_head_hash
from rlhf_ray.reward.judge.accuracy import pair_credit
from rlhf_ray.reward.judge.calibration import negative_log_likelihood
from rlhf_ray.reward.judge.inputs import TrainingInputs, UsedPairs
from rlhf_ray.reward.train.learner import RewardLearner
from rlhf_ray.reward.train.pairs import EncodedPair, encoded_pairs
from rlhf_ray.runtime.actor_group import ActorGroup
from rlhf_ray.runtime.learner_group import ranks
from rlhf_ray.runtime.run import Run

_PROBES = 16


@dataclass
class TrainingState:
    """The loop's position.

    Attributes:
        step: optimizer steps done, over all members.
        member: independent member under way.
        member_step: its steps done.
        best: its best validation accuracy and negative log-likelihood so far.
        best_step: when that was.
        judgements_since_best: judgements without a better one.
        probes: logits of the probes, a list for each member that has been written.
        head_hashes: of those members' heads.
    """

    step: int = 0
    member: int = 0
    member_step: int = 0
    best: tuple[float, float] | None = None
    best_step: int = 0
    judgements_since_best: int = 0
    probes: list[list[list[float]]] = field(default_factory=list)
    head_hashes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # JSON, which a checkpoint is written in, has no tuples.
        self.best = None if self.best is None else (self.best[0], self.best[1])


@dataclass(frozen=True)
class TrainedMembers:
    """What the learner had in memory when the models were written.

    Attributes:
        probes: texts with its logits.
        head_hashes: of each model.
        steps: optimizer steps, over all members.
    """

    probes: tuple[Probe, ...]
    head_hashes: tuple[str, ...]
    steps: int


def steps_per_member(config: RewardModelConfig, num_pairs: int) -> int:
    """Optimizer steps of one model."""
    training = config.training
    return training.steps or training.epochs * math.ceil(num_pairs / training.batch_size)


class RewardTraining:
    """One run's training.

    Args:
        config: of the run.
        inputs: what was read.
        layout: of the members.
        group: the learner's processes.
        run: the run's folder, logs and checkpoints.
    """

    def __init__(
        self,
        config: RewardModelConfig,
        inputs: TrainingInputs,
        layout: MemberLayout,
        group: ActorGroup[RewardLearner],
        run: Run,
    ) -> None:
        self._config, self._inputs, self._layout, self._group, self._run = config, inputs, layout, group, run
        self._tracker, self._folder = run.tracker, run.folder
        self._state = TrainingState()
        self._steps = steps_per_member(config, len(inputs.training.pairs))
        texts = list(dict.fromkeys([*inputs.training.chosen, *inputs.training.rejected]))
        self._probe_texts = texts[:: max(len(texts) // _PROBES, 1)][:_PROBES]

    def train(self) -> TrainedMembers:
        """Train every member and write it into the reward model's folder.

        Raises:
            Stopped: by a signal; there is a checkpoint of the last step.
        """
        checkpoint = None
        restored = self._run.restore(TrainingState)
        if restored is not None:
            self._state, checkpoint = restored
        state = self._state
        while state.member < len(self._layout.folders):
            self._train_member(checkpoint)
            checkpoint = None
            state.member, state.member_step = state.member + 1, 0
            state.best, state.best_step, state.judgements_since_best = None, 0, 0
        probes = tuple(
            Probe(token_ids=text, logits=tuple(logit for member in state.probes for logit in member[index]))
            for index, text in enumerate(self._probe_texts)
        )
        return TrainedMembers(probes, tuple(state.head_hashes), state.step)

    def _train_member(self, checkpoint: Path | None) -> None:
        config, state = self._config, self._state
        seed = config.run.seed if state.member == 0 else keyed_seed(config.run.seed, "member", state.member) % (1 << 31)
        several = f" of member {state.member + 1}" if len(self._layout.folders) > 1 else ""
        self._tracker.phase(f"loading the model{several}")
        self._group.build_all(
            *(
                partial(
                    RewardLearner, config.model, config.learner, config.training, self._layout, rank, self._steps, seed
                )
                for rank in ranks(self._group)
            )
        )
        if checkpoint is not None:
            self._group.call_all(RewardLearner.load_checkpoint, str(checkpoint))
            if state.best is not None and not self._has_the_best():
                # It went on after the checkpoint, and found one that was better there.
                state.best, state.best_step, state.judgements_since_best = None, 0, 0
        pairs = encoded_pairs(self._inputs.training, self._inputs.attributes, config.ensemble, seed)
        while state.member_step < self._steps and not self._is_stale():
            self._step(pairs, seed)
            self._run.keep(state.step, state, partial(self._group.ask_all, RewardLearner.save_checkpoint))
        if config.training.evaluate_every is None:
            self._write_member()

    def _step(self, pairs: Sequence[EncodedPair], seed: int) -> None:
        config, state, group = self._config, self._state, self._group
        started = time.monotonic()
        rows = batch_rows(len(pairs), config.training.batch_size, seed, state.member_step)
        report = group.wait(
            [
                rank.ask(RewardLearner.train_pairs, [pairs[row] for row in rows[number :: len(group)]])
                for number, rank in enumerate(group)
            ]
        )[0]
        seconds = time.monotonic() - started
        state.step += 1
        state.member_step += 1
        row = {
            "step": state.step,
            "member": state.member,
            "epoch": state.member_step * config.training.batch_size / len(pairs),
            "loss": report.loss,
            "accuracy": report.accuracy,
            "margin/mean": report.margin_mean,
            "score/mean": report.score_mean,
            "score/std": report.score_std,
            "tokens/real": report.tokens,
            "tokens/computed": report.computed_tokens,
            "grad_norm": report.grad_norm,
            "lr": report.learning_rate,
            "throughput/pairs_per_s": len(rows) / seconds,
            "time/step_s": seconds,
        }
        every = config.training.evaluate_every
        if every is not None and (state.member_step % every == 0 or state.member_step == self._steps):
            row |= self._validate()
        self._tracker.step(row)

    def _validate(self) -> dict[str, float]:
        """Judge the member; the best so far is written."""
        used = self._inputs.validation
        assert used is not None, "checked with the settings"
        accuracy, loss = validation_figures(self._group, used, self._layout)
        state = self._state
        if state.best is None or (accuracy, -loss) > (state.best[0], -state.best[1]):
            state.best, state.best_step, state.judgements_since_best = (accuracy, loss), state.member_step, 0
            self._write_member()
        else:
            state.judgements_since_best += 1
        return {"validation/accuracy": accuracy, "validation/loss": loss}

    def _is_stale(self) -> bool:
        state, patience = self._state, self._config.training.patience
        if patience is None or state.judgements_since_best < patience:
            return False
        cause = f"no better validation accuracy since step {state.best_step} of member {state.member}"
        self._tracker.events.write("member_ended_early", cause=cause, step=state.step)
        self._tracker.display.message(f"ending early: {cause}")
        return True

    def _has_the_best(self) -> bool:
        """Whether the weights in the member's folder are those that the checkpoint calls the best."""
        folder = self._folder.reward_model / self._layout.folders[self._state.member]
        return written_head_hash(folder) == self._state.head_hashes[self._state.member]

    def _write_member(self) -> None:
        state = self._state
        folder = self._folder.reward_model / self._layout.folders[state.member]
        hashes = self._group.call_all(RewardLearner.export, str(folder.absolute()))
        state.head_hashes[state.member :] = hashes[:1]
        logits = score_with(self._group, self._probe_texts).tolist()
        state.probes[state.member :] = [logits]


def score_with(group: ActorGroup[RewardLearner], texts: Sequence[tuple[int, ...]]) -> NDArray[np.float64]:
    """`[n, labels]` logits from the learners; every rank needs a text, for the forward pass is a collective."""
    answers = group.wait(
        [
            rank.ask(RewardLearner.score_tokens, list(texts[number :: len(group)]) or [texts[0]])
            for number, rank in enumerate(group)
        ]
    )
    result = np.zeros((len(texts), answers[0].shape[1]))
    for rank, own in enumerate(answers[: len(texts)]):
        result[rank :: len(group)] = own
    return result


def validation_figures(group: ActorGroup[RewardLearner], used: UsedPairs, layout: MemberLayout) -> tuple[float, float]:
    """Accuracy and mean negative log-likelihood of the preference, averaged over heads."""
    logits = score_with(group, [*used.chosen, *used.rejected])
    scores = logits[:, : layout.heads].mean(axis=1)
    differences = scores[: len(used.pairs)] - scores[len(used.pairs) :]
    probability = np.array([pair.chosen_probability for pair in used.pairs])
    decided = probability != 0.5
    credit = pair_credit(differences[decided], probability[decided])
    return float(credit.mean()) if decided.any() else 0.5, negative_log_likelihood(differences, probability)
