"""The learner of the policy: PPO on rollouts, or supervised on text, with one engine and one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms.experience import Experience, ExperienceShard, ExperienceStats
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.losses import POLICY_LOSSES, mismatch, policy_loss, sequence_log_ratios
from rlhf_ray.algorithms.off_policy import (
    ImportanceSums,
    effective_sample_fraction,
    importance_log_ratios,
    importance_shares,
    importance_sums,
    importance_weights,
)
from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.config.settings import PolicySettings
from rlhf_ray.data.text import TextExample
from rlhf_ray.models.adapters import adapter_parameters, adapters_off, add_adapters, save_adapters
from rlhf_ray.models.buckets import WeightBucket
from rlhf_ray.models.loading import load_tokenizer, resolve_attention, resolve_dtype, train_only_top_layers
from rlhf_ray.models.packing import PackedBatch, micro_batches, pack
from rlhf_ray.models.token_loss import Objective, SequenceObjective, TokenObjective
from rlhf_ray.models.token_models import PolicyModel, gathered, load_policy_model
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine, StepReport, mean_grad_norm
from rlhf_ray.roles.learner import (
    Meter,
    balanced_packs,
    checkpoint_folder,
    minibatches,
    read_shards,
    sample_use,
    token_column,
    total_weight,
)
from rlhf_ray.roles.policy_weights import PolicyWeights
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.rollout import ProbeColumn, Rollout, SampleUse, TokenColumn, TrunkColumn

POLICY_PREFIX = "language_model."
"""Before the Hugging Face names of a `PolicyModel`'s weights."""

_SUMS = (
    *("loss", "normalizer", "entropy", "clip", "approx_kl", "ratio", "weight", "importance"),
    *("importance_count", "importance_plain", "importance_square", "importance_truncated", "importance_masked"),
    *("kl_reference", "mismatch_kl", "mismatch_ratio", "tokens"),
)
_MAXIMA = ("max_abs_log_ratio", "mismatch_max_abs")


@dataclass(frozen=True)
class PolicyReport:
    """What one step of PPO did to the policy. Means are over response tokens with a score.

    Attributes:
        samples: what became of this rank's samples; everything else is over all ranks.
        importance_effective_fraction: see `effective_sample_fraction`; None without importance weights, as are the
            shares of tokens or sequences whose weight was truncated or masked.
        first_approx_kl, first_ratio_error: of the first minibatch before its update; both are 0 where the old log-probs
            are the learner's own.
    """

    stats: ExperienceStats
    samples: SampleUse
    loss: float
    entropy: float
    clip_fraction: float
    approx_kl: float
    max_abs_log_ratio: float
    grad_norm: float
    learning_rate: float
    importance_weight_mean: float
    importance_effective_fraction: float | None
    importance_truncated_fraction: float | None
    importance_masked_fraction: float | None
    first_approx_kl: float
    first_ratio_error: float
    mismatch_kl: float
    mismatch_max_abs: float
    mismatch_mean_ratio: float


@dataclass(frozen=True)
class TextReport:
    """One supervised step."""

    loss: float
    tokens: int
    grad_norm: float
    learning_rate: float


def build_policy(settings: PolicySettings, dtype: str, temperature: float = 1.0, seed: int = 0) -> PolicyModel:
    """The policy before training, with what is trained of it.

    Args:
        dtype: compute type, already resolved.
        temperature: of the sampling.
        seed: keys the adapters' first weights.
    """
    learner = settings.learner
    model = load_policy_model(
        settings.model,
        dtype=dtype,
        temperature=temperature,
        float32_logits=learner.float32_logits,
        attention=resolve_attention(learner.attention),
    )
    train_only_top_layers(model.language_model, learner.trainable_top_layers)
    if settings.lora is not None:
        add_adapters(model.language_model, settings.lora, "policy.lora.target_modules", keyed_seed(seed, "adapters"))
    return model


class PolicyLearner:
    """One rank of the policy learner. Every method is a collective of all ranks.

    Args:
        settings: model and training.
        algorithm: of the run; supervised training has no use for it.
        rank: this process in its group.
        total_steps: optimizer steps of the whole run.
        temperature, max_response_tokens: of the sampling, 1 for supervised training.
        seed: keys the minibatches and the adapters' first weights.
        shares_trunk: shards may come with the states behind the frozen layers.
        shares_gpu: an engine wakes up on this rank's GPU when it samples.
    """

    def __init__(
        self,
        settings: PolicySettings,
        algorithm: AlgorithmSettings,
        rank: Rank,
        *,
        total_steps: int,
        temperature: float = 1.0,
        max_response_tokens: int = 1,
        seed: int = 0,
        shares_trunk: bool = False,
        shares_gpu: bool = False,
    ) -> None:
        learner = settings.learner
        on_gpu = learner.gpus > 0
        self._dtype = resolve_dtype(learner.dtype, on_gpu)
        self._algorithm, self._max_response_tokens, self._seed = algorithm, max_response_tokens, seed
        self._micro_batch_tokens = learner.micro_batch_tokens
        self._model, self._shares_gpu = settings.model, shares_gpu

        def build() -> PolicyModel:
            model = build_policy(settings, self._dtype, temperature=temperature, seed=seed)
            if shares_trunk and learner.trainable_top_layers is not None:
                model.cut_above(learner.trainable_top_layers)
            return model

        self._engine = DeepSpeedEngine(build, learner, rank, self._dtype, total_steps)
        self._weights = PolicyWeights(self._engine, self._engine.unwrapped.language_model)

    def logprobs(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        """Log-probs of every response token of this rank's shard, as the learner computes them now.

        Args:
            trunk: of the rollout, where its frozen layers have been computed already.
        """
        return token_column(self._engine, rollout, trunk, self._micro_batch_tokens, self._engine.module)

    def reference_logprobs(self, rollout: Rollout) -> TokenColumn:
        """Log-probs without the adapters: those of the model before training, bit for bit."""
        with adapters_off(self._engine.unwrapped):
            return self.logprobs(rollout)

    def train(self, step: int, shards: Sequence[ExperienceShard], kl_coefficient: float) -> PolicyReport:
        """All epochs and minibatches of one step.

        Args:
            step: keys the minibatches.
            shards: this rank's rows and columns.
            kl_coefficient: β.
        """
        engine, algorithm = self._engine, self._algorithm
        rollouts = [shard.rollout for shard in shards]
        rows, experience = read_shards(shards, algorithm, kl_coefficient, self._max_response_tokens, engine)
        run = engine.measure if step < algorithm.critic_warmup_steps else engine.optimizer_step
        meter = Meter(engine, _SUMS, _MAXIMA)
        before_update: dict[str, float] = {}
        updates: list[StepReport] = []
        for samples in minibatches(rows, rollouts, algorithm, self._seed, step):
            packs = balanced_packs(rows, samples, self._micro_batch_tokens, engine)
            normalizer = total_weight(experience.normalizer, packs, engine)
            loss = _MinibatchLoss(engine, algorithm, experience, kl_coefficient, normalizer, meter)
            updates.append(run(packs, loss))
            before_update = before_update or meter.total()
        total = meter.total()
        # The engine's log-probs are not the learner's own: those are only computed with the old weights at first.
        apart = before_update if algorithm.old_logprobs == "engine" else total
        weight, first_weight = total["weight"] or 1.0, before_update["weight"] or 1.0
        num_weights = total["importance_count"]
        return PolicyReport(
            stats=_with_own_kl(experience, total["kl_reference"]),
            samples=sample_use(shards, experience),
            loss=total["loss"] / (total["normalizer"] or 1.0),
            entropy=total["entropy"] / weight,
            clip_fraction=total["clip"] / weight,
            approx_kl=total["approx_kl"] / weight,
            max_abs_log_ratio=total["max_abs_log_ratio"],
            grad_norm=mean_grad_norm(updates),
            learning_rate=updates[-1].learning_rate,
            importance_weight_mean=total["importance"] / weight,
            importance_effective_fraction=effective_sample_fraction(
                num_weights, total["importance_plain"], total["importance_square"]
            ),
            importance_truncated_fraction=total["importance_truncated"] / num_weights if num_weights else None,
            importance_masked_fraction=total["importance_masked"] / num_weights if num_weights else None,
            first_approx_kl=before_update["approx_kl"] / first_weight,
            first_ratio_error=abs(before_update["ratio"] - before_update["weight"]) / first_weight,
            mismatch_kl=apart["mismatch_kl"] / apart["tokens"],
            mismatch_max_abs=apart["mismatch_max_abs"],
            mismatch_mean_ratio=apart["mismatch_ratio"] / apart["tokens"],
        )

    def train_text(self, examples: Sequence[TextExample]) -> TextReport:
        """One supervised step on this rank's rows: mean negative log-likelihood of the learned tokens of all ranks."""
        engine = self._engine
        lengths = [len(example.token_ids) for example in examples]
        fewest = len(micro_batches(lengths, self._micro_batch_tokens))
        groups = micro_batches(lengths, self._micro_batch_tokens, engine.most(fewest))
        packs = [
            pack([examples[i].token_ids for i in group], [examples[i].learn_from for i in group]) for group in groups
        ]
        tokens = sum(len(each.targets) for each in packs)
        [all_tokens] = engine.all_reduce(torch.tensor([tokens], dtype=torch.float64)).tolist()
        meter = Meter(engine, ("loss",))
        report = engine.optimizer_step(packs, partial(self._text_loss, meter, all_tokens))
        return TextReport(
            loss=meter.total()["loss"],
            tokens=int(all_tokens),
            grad_norm=report.grad_norm,
            learning_rate=report.learning_rate,
        )

    def _text_loss(self, meter: Meter, all_tokens: float, batch: PackedBatch, counts: bool) -> torch.Tensor:
        """A micro-batch's part of the negative log-likelihood."""
        batch = batch.to(self._engine.device)
        summed, _, _ = self._engine.module(batch, lambda part, logprobs, entropies: -logprobs.sum())
        loss = summed / all_tokens
        if counts:
            meter.add(loss=loss)
        return loss

    def probe(self, probe: tuple[NDArray[np.int32], ...]) -> ProbeColumn:
        """Log-probs at temperature 1 of every token of the probe but each row's first.

        Args:
            probe: rows of token ids, the same on all ranks.
        """
        batch = pack(probe, [1] * len(probe)).to(self._engine.device)
        with self._engine.unwrapped.at_temperature(1.0):
            [logprobs] = self._engine.forward_each([batch], self._engine.module)
        if self._shares_gpu:
            # The proof of new weights comes before they are loaded, and the engine needs the room by then.
            torch.cuda.empty_cache()
        return ProbeColumn(logprobs.float().cpu().numpy(), self._dtype)

    def weight_layout(self, max_bytes: int) -> list[tuple[str, ...]]:
        """Cut the trained weights into buckets; gives the names in each."""
        return self._weights.lay_out(max_bytes)

    def weight_bucket(self, index: int) -> WeightBucket | None:
        """One bucket of the weights as they are now, from rank 0."""
        return self._weights.bucket(index)

    def open_sender(self, group: dict[str, Any]) -> dict[str, Any]:
        """Meet the engines for vLLM's NCCL transport; gives what they must be told of each broadcast."""
        return self._weights.open_sender(group)

    def broadcast_weights(self) -> None:
        """Send the weights over NCCL to the engines that wait for them."""
        self._weights.broadcast()

    def save_checkpoint(self, folder: str) -> None:
        self._engine.save_checkpoint(checkpoint_folder(folder, "policy"))

    def load_checkpoint(self, folder: str) -> None:
        self._engine.load_checkpoint(checkpoint_folder(folder, "policy"))

    def export(self, folder: str) -> None:
        """The policy as a Hugging Face directory with its tokenizer, adapters merged in, written by rank 0."""
        self._engine.save_pretrained(Path(folder), self._engine.unwrapped.language_model, POLICY_PREFIX)
        if self._engine.rank.rank == 0:
            load_tokenizer(self._model, "policy.model").save_pretrained(folder)

    def export_adapters(self, folder: str) -> None:
        """The adapters as a directory that peft loads onto the model before training, written by rank 0."""
        model = self._engine.unwrapped.language_model
        adapters = adapter_parameters(model)
        with gathered(list(adapters.values()), read_only=True):
            if self._engine.rank.rank == 0:
                factors = {name: factor.detach().to("cpu", copy=True) for name, factor in adapters.items()}
                save_adapters(Path(folder), model, factors)


@dataclass(frozen=True)
class _MinibatchLoss:
    """The loss of one minibatch's micro-batches.

    Attributes:
        normalizer: weight of the minibatch over all ranks.
        meter: where each micro-batch is measured.
    """

    engine: DeepSpeedEngine
    algorithm: AlgorithmSettings
    experience: Experience
    kl_coefficient: float
    normalizer: float
    meter: Meter

    def __call__(self, batch: PackedBatch, counts: bool) -> torch.Tensor:
        batch = batch.to(self.engine.device)
        objective: Objective = partial(self._of_tokens, batch.columns, counts, None)
        if POLICY_LOSSES[self.algorithm.policy_loss].by_sequence or self._importance_by_sequence:
            objective = SequenceObjective(partial(self._of_sequences, batch.columns, counts))
        loss, _, _ = self.engine.module(batch, objective)
        return loss / self.normalizer

    @property
    def _importance_by_sequence(self) -> bool:
        return self.algorithm.importance is not None and self.algorithm.importance.level == "sequence"

    def _of_sequences(self, columns: torch.Tensor, counts: bool, logprobs: torch.Tensor) -> TokenObjective:
        """The loss of a batch's tokens, given what depends on whole sequences, which are never split over batches."""
        _, sequences = torch.unique_consecutive(self.experience.samples[columns], return_counts=True)
        return partial(self._of_tokens, columns, counts, self._terms(columns, logprobs, sequences))

    def _terms(self, at: torch.Tensor, logprobs: torch.Tensor, sequences: torch.Tensor | None) -> _OffPolicyTerms:
        """How far some tokens are off-policy, without gradient.

        Args:
            at: where they stand in the experience.
            logprobs: of the policy in training.
            sequences: `[S]` lengths of the whole sequences that they make up; None: not whole sequences.
        """
        experience, by_sequence = self.experience, sequences if self._importance_by_sequence else None
        active = experience.weights[at] != 0
        old_logprobs = logprobs if experience.old_logprobs is None else experience.old_logprobs[at]
        return _OffPolicyTerms(
            None if sequences is None else sequence_log_ratios(logprobs, old_logprobs, active, sequences),
            importance_log_ratios(old_logprobs, experience.engine_logprobs[at], active, by_sequence),
            importance_shares(active, by_sequence),
        )

    def _of_tokens(
        self,
        columns: torch.Tensor,
        counts: bool,
        terms: _OffPolicyTerms | None,
        part: slice,
        logprobs: torch.Tensor,
        entropies: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum over some tokens: surrogate, entropy bonus, KL penalty.

        Args:
            columns: where the batch's tokens stand in the experience.
            counts: false where nothing may be measured again.
            terms: of the whole batch, where the loss needs whole sequences.
            part: of the batch.
        """
        experience, algorithm, at = self.experience, self.algorithm, columns[part]
        weights, engine_logprobs = experience.weights[at], experience.engine_logprobs[at]
        # Where there is one update only, the old log-probs are those of this very pass.
        old_logprobs = logprobs.detach() if experience.old_logprobs is None else experience.old_logprobs[at]
        here = self._terms(at, logprobs.detach(), None) if terms is None else terms.of(part)
        corrected = importance_weights(here.importance, algorithm.importance) if algorithm.importance else None
        importance = torch.ones_like(weights) if corrected is None else corrected.used
        surrogate = policy_loss(
            logprobs, old_logprobs, experience.advantages[at], weights, algorithm, importance, here.log_ratios
        )
        entropy_sum = _weighted_sum(weights, entropies)
        loss = surrogate.loss_sum
        if algorithm.entropy_coefficient:
            loss = loss - algorithm.entropy_coefficient * entropy_sum
        kl_sum = torch.zeros_like(entropy_sum)
        if experience.reference_logprobs is not None:
            reference_logprobs = experience.reference_logprobs[at]
            kl_sum = torch.where(experience.counted[at], old_logprobs - reference_logprobs, 0.0).sum()
            if algorithm.kl.placement == "loss":
                penalty = kl_estimate(logprobs, reference_logprobs, algorithm.kl.estimator)
                loss = loss + self.kl_coefficient * _weighted_sum(weights, penalty)
        if counts:
            sampled = experience.sampled[at]
            own = logprobs if algorithm.old_logprobs == "engine" else old_logprobs
            apart = mismatch(own, engine_logprobs, sampled)
            off_policy = importance_sums(corrected, here.shares) if corrected else ImportanceSums()
            self.meter.add(
                loss=surrogate.loss_sum,
                normalizer=experience.normalizer[at].sum(),
                entropy=entropy_sum,
                clip=surrogate.clip_fraction_sum,
                approx_kl=surrogate.approx_kl_sum,
                ratio=surrogate.ratio_sum,
                weight=weights.sum(),
                importance=_weighted_sum(weights, importance),
                **{f"importance_{name}": value for name, value in vars(off_policy).items()},
                kl_reference=kl_sum,
                mismatch_kl=apart.kl_sum,
                mismatch_ratio=apart.ratio_sum,
                tokens=sampled.sum(),
                max_abs_log_ratio=surrogate.max_abs_log_ratio,
                mismatch_max_abs=apart.max_abs,
            )
        return loss


@dataclass(frozen=True)
class _OffPolicyTerms:
    """`[R]` each, of a batch's tokens or some of them.

    Attributes:
        log_ratios: see `sequence_log_ratios`; None where the loss is by token.
        importance: see `importance_log_ratios`.
        shares: see `importance_shares`.
    """

    log_ratios: torch.Tensor | None
    importance: torch.Tensor
    shares: torch.Tensor

    def of(self, part: slice) -> _OffPolicyTerms:
        """The same of some tokens."""
        log_ratios = None if self.log_ratios is None else self.log_ratios[part]
        return _OffPolicyTerms(log_ratios, self.importance[part], self.shares[part])


def _weighted_sum(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Tokens of weight 0 may hold anything."""
    return torch.where(weights != 0, weights * values, 0.0).sum()


def _with_own_kl(experience: Experience, kl_sum: float) -> ExperienceStats:
    """The step's statistics; where old log-probs were not known before training, with the KL that it has measured."""
    stats = experience.stats
    if experience.old_logprobs is not None or experience.reference_logprobs is None:
        return stats
    return replace(stats, kl_reference=kl_sum / stats.num_valid if stats.num_valid else float("nan"))
