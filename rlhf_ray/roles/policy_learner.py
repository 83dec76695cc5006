"""The learner of the policy: PPO on rollouts, or supervised on text, with one engine and one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms.experience import ExperienceShard, ExperienceSpec, ExperienceStats
from rlhf_ray.algorithms.kl import KLEstimator, kl_estimate
from rlhf_ray.algorithms.losses import Mismatch, mismatch, policy_loss, truncated_importance_weights
from rlhf_ray.config.settings import PolicySettings
from rlhf_ray.data.text import TextExample
from rlhf_ray.models.buckets import WeightBucket
from rlhf_ray.models.loading import load_tokenizer, resolve_attention, resolve_dtype, train_only_top_layers
from rlhf_ray.models.packing import PackedBatch, micro_batches, pack
from rlhf_ray.models.token_models import PolicyModel, load_policy_model
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine, Rank
from rlhf_ray.roles.learner import Meter, TrainSpec, checkpoint_folder, minibatches, read_step, token_columns
from rlhf_ray.roles.policy_weights import PolicyWeights
from rlhf_ray.rollout import ProbeColumn, Rollout, TokenColumn

_PREFIX = "language_model."


@dataclass(frozen=True)
class PolicyLossSpec:
    """The policy's loss."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coefficient: float
    importance_cap: float | None
    kl_in_loss: bool
    kl_estimator: KLEstimator


@dataclass(frozen=True)
class PolicyReport:
    """What one step of PPO did to the policy, over all ranks. Means are over response tokens with a score.

    Attributes:
        first_approx_kl, first_ratio_error: of the first minibatch before its update; both are 0 where the old log-probs
            are the learner's own.
    """

    stats: ExperienceStats
    loss: float
    entropy: float
    clip_fraction: float
    approx_kl: float
    max_abs_log_ratio: float
    grad_norm: float
    learning_rate: float
    importance_weight_mean: float
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


class PolicyLearner:
    """One rank of the policy learner. Every method is a collective of all ranks.

    Args:
        settings: model and training.
        rank: this process in its group.
        total_steps: optimizer steps of the whole run.
        temperature: of the sampling, 1 for supervised training.
    """

    def __init__(self, settings: PolicySettings, rank: Rank, total_steps: int, temperature: float = 1.0) -> None:
        learner = settings.learner
        on_gpu = learner.gpus > 0
        self._dtype = resolve_dtype(learner.dtype, on_gpu)
        self._micro_batch_tokens = learner.micro_batch_tokens
        self._model = settings.model

        def build() -> PolicyModel:
            model = load_policy_model(
                settings.model,
                dtype=self._dtype,
                temperature=temperature,
                float32_logits=learner.float32_logits,
                attention=resolve_attention(learner.attention, on_gpu),
            )
            train_only_top_layers(model.language_model, learner.trainable_top_layers)
            return model

        self._engine = DeepSpeedEngine(build, learner, rank, self._dtype, total_steps)
        self._weights = PolicyWeights(self._engine, self._engine.unwrapped.language_model)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[TokenColumn]:
        """The policy's log-probs of every response token, as the learner computes them now."""
        return token_columns(
            self._engine, rollouts, self._micro_batch_tokens, lambda batch: self._engine.module(batch)[0]
        )

    def train(
        self,
        step: int,
        shards: Sequence[ExperienceShard],
        experience: ExperienceSpec,
        spec: TrainSpec,
        loss_spec: PolicyLossSpec,
        kl_coefficient: float,
    ) -> PolicyReport:
        """All epochs and minibatches of one step.

        Args:
            step: keys the minibatches.
            shards: this rank's rows and columns; `policy` columns make the ratio exact.
            kl_coefficient: β.
        """
        engine = self._engine
        data = read_step(shards, experience, kl_coefficient, engine)
        importance = None
        own_logprobs = all(shard.policy is not None for shard in shards)
        apart = mismatch(data.old_logprobs, data.engine_logprobs) if own_logprobs else Mismatch(0.0, 0.0, 0.0, 0)
        if own_logprobs and loss_spec.importance_cap is not None:
            importance = truncated_importance_weights(data.old_logprobs, data.engine_logprobs, loss_spec.importance_cap)
        meter = Meter(("loss", "entropy", "clip", "approx_kl", "ratio", "weight", "importance"))
        first: dict[str, float] | None = None
        norms: list[float] = []
        rate = 0.0
        for packs in minibatches(data, shards, spec, step):
            normalizer = self._normalizer([data.weights[pack.columns] for pack in packs])
            before_update = first is None

            def loss(
                batch: PackedBatch, counts: bool, normalizer: float = normalizer, measure: bool = before_update
            ) -> torch.Tensor:
                nonlocal apart
                batch = batch.to(engine.device)
                at = batch.columns
                logprobs, entropy = engine.module(
                    batch, "differentiable" if loss_spec.entropy_coefficient else "measured"
                )
                weights = data.weights[at]
                parts = policy_loss(
                    logprobs,
                    data.old_logprobs[at],
                    data.advantages[at],
                    weights,
                    clip_low=loss_spec.clip_low,
                    clip_high=loss_spec.clip_high,
                    dual_clip=loss_spec.dual_clip,
                    importance_weights=None if importance is None else importance[at],
                )
                entropy_sum = torch.where(weights != 0, weights * entropy, 0.0).sum()
                total = parts.loss_sum - loss_spec.entropy_coefficient * entropy_sum
                if loss_spec.kl_in_loss and data.reference_logprobs is not None:
                    penalty = kl_estimate(logprobs, data.reference_logprobs[at], loss_spec.kl_estimator)
                    total = total + kl_coefficient * torch.where(weights != 0, weights * penalty, 0.0).sum()
                if not counts:
                    return total / normalizer
                if measure and not own_logprobs:
                    apart = apart + mismatch(logprobs, data.engine_logprobs[at])
                meter.add(
                    loss=parts.loss_sum.detach(),
                    entropy=entropy_sum.detach(),
                    clip=parts.clip_fraction_sum,
                    approx_kl=parts.approx_kl_sum,
                    ratio=parts.ratio_sum,
                    weight=weights.sum(),
                    importance=weights.sum() if importance is None else (weights * importance[at]).sum(),
                )
                meter.maximum = max(meter.maximum, float(parts.max_abs_log_ratio))
                return total / normalizer

            report = engine.optimizer_step(packs, loss)
            norms.append(report.grad_norm)
            rate = report.learning_rate
            if first is None:
                first = meter.total(engine)
        total = meter.total(engine)
        assert first is not None, "there is at least one minibatch"
        weight = total["weight"] or 1.0
        sums = engine.all_reduce(torch.tensor([apart.kl_sum, apart.ratio_sum, apart.count], dtype=torch.float64))
        apart_kl, apart_ratio, apart_count = sums.tolist()
        return PolicyReport(
            stats=data.experience.stats,
            loss=total["loss"] / weight,
            entropy=total["entropy"] / weight,
            clip_fraction=total["clip"] / weight,
            approx_kl=total["approx_kl"] / weight,
            max_abs_log_ratio=self._maximum(meter.maximum),
            grad_norm=sum(norms) / len(norms),
            learning_rate=rate,
            importance_weight_mean=total["importance"] / weight,
            first_approx_kl=first["approx_kl"] / (first["weight"] or 1.0),
            first_ratio_error=abs(first["ratio"] - first["weight"]) / (first["weight"] or 1.0),
            mismatch_kl=apart_kl / max(apart_count, 1),
            mismatch_max_abs=self._maximum(apart.max_abs),
            mismatch_mean_ratio=apart_ratio / max(apart_count, 1),
        )

    def train_text(self, examples: Sequence[TextExample]) -> TextReport:
        """One supervised step on this rank's rows: mean negative log-likelihood of the learned tokens of all ranks."""
        engine = self._engine
        groups = micro_batches([len(example.token_ids) for example in examples], self._micro_batch_tokens)
        packs = [
            pack([examples[i].token_ids for i in group], [examples[i].learn_from for i in group]) for group in groups
        ]
        tokens = sum(len(each.targets) for each in packs)
        all_tokens = float(engine.all_reduce(torch.tensor([tokens], dtype=torch.float64))[0])
        meter = Meter(("loss",))

        def loss(batch: PackedBatch, counts: bool) -> torch.Tensor:
            logprobs, _ = engine.module(batch.to(engine.device))
            if counts:
                meter.add(loss=-logprobs.detach().sum())
            return -logprobs.sum() / all_tokens

        report = engine.optimizer_step(packs, loss)
        return TextReport(
            loss=meter.total(engine)["loss"] / all_tokens,
            tokens=int(all_tokens),
            grad_norm=report.grad_norm,
            learning_rate=report.learning_rate,
        )

    def probe(self, probe: tuple[NDArray[np.int32], ...]) -> ProbeColumn:
        """Log-probs at temperature 1 of every token of the probe but each row's first.

        Args:
            probe: rows of token ids, the same on all ranks.
        """
        model = self._engine.unwrapped
        sampling_temperature, model.temperature = model.temperature, 1.0
        try:
            batch = pack(probe, [1] * len(probe)).to(self._engine.device)
            [logprobs] = self._engine.forward_each([batch], lambda batch: self._engine.module(batch)[0])
        finally:
            model.temperature = sampling_temperature
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
        """The policy as a Hugging Face directory with its tokenizer, written by rank 0."""
        self._engine.save_pretrained(Path(folder), self._engine.unwrapped.language_model, _PREFIX)
        if self._engine.rank.rank == 0:
            load_tokenizer(self._model, "policy.model").save_pretrained(folder)

    def _normalizer(self, weights: list[torch.Tensor]) -> float:
        """Total weight of the minibatch over all ranks, 1 where no sample of it has a score."""
        own = sum(float(each.double().sum()) for each in weights)
        return float(self._engine.all_reduce(torch.tensor([own], dtype=torch.float64))[0]) or 1.0

    def _maximum(self, own: float) -> float:
        """Largest over the ranks."""
        spread = torch.zeros(self._engine.rank.world_size, dtype=torch.float64)
        spread[self._engine.rank.rank] = own
        return float(self._engine.all_reduce(spread).max())
