"""The learner of the critic: values of rollouts, and their regression on the returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rlhf_ray.algorithms.experience import Experience, ExperienceShard
from rlhf_ray.algorithms.losses import explained_variance, value_loss
from rlhf_ray.algorithms.segments import Moments
from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.config.settings import CriticSettings
from rlhf_ray.models.loading import resolve_attention, resolve_dtype, train_only_top_layers
from rlhf_ray.models.packing import PackedBatch
from rlhf_ray.models.token_models import CriticModel, load_critic_model
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine, StepReport, mean_grad_norm
from rlhf_ray.roles.learner import (
    Meter,
    balanced_packs,
    checkpoint_folder,
    minibatches,
    read_shards,
    token_column,
    total_weight,
)
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.rollout import Rollout, TokenColumn, TrunkColumn


@dataclass(frozen=True)
class CriticReport:
    """What one step did to the critic, over all ranks."""

    loss: float
    clip_fraction: float
    explained_variance: float
    return_mean: float
    grad_norm: float
    learning_rate: float


class CriticLearner:
    """One rank of the critic learner. Every method is a collective of all ranks.

    Args:
        settings: how it is trained.
        model: where the backbone comes from.
        algorithm: of the run.
        rank: this process in its group.
        total_steps: optimizer steps of the whole run.
        max_response_tokens: where responses are cut off.
        seed: keys the minibatches.
        shares_trunk: shards may come with the states behind the frozen layers.
    """

    def __init__(
        self,
        settings: CriticSettings,
        model: str,
        algorithm: AlgorithmSettings,
        rank: Rank,
        *,
        total_steps: int,
        max_response_tokens: int,
        seed: int,
        shares_trunk: bool = False,
    ) -> None:
        learner = settings.learner
        on_gpu = learner.gpus > 0
        dtype = resolve_dtype(learner.dtype, on_gpu)
        self._algorithm, self._max_response_tokens, self._seed = algorithm, max_response_tokens, seed
        self._micro_batch_tokens = learner.micro_batch_tokens

        def build() -> CriticModel:
            critic = load_critic_model(model, dtype=dtype, attention=resolve_attention(learner.attention))
            train_only_top_layers(critic.backbone, learner.trainable_top_layers)
            if shares_trunk and learner.trainable_top_layers is not None:
                critic.cut_above(learner.trainable_top_layers)
            return critic

        self._engine = DeepSpeedEngine(build, learner, rank, dtype, total_steps)

    def values(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        """Value of the state before each response token of this rank's shard.

        Args:
            trunk: of the rollout, where its frozen layers have been computed already.
        """
        return token_column(self._engine, rollout, trunk, self._micro_batch_tokens, self._engine.module)

    def train(self, step: int, shards: Sequence[ExperienceShard], kl_coefficient: float) -> CriticReport:
        """All epochs and minibatches of one step.

        Args:
            step: keys the minibatches.
            shards: this rank's rows and columns, those that the policy learner is given.
            kl_coefficient: β.
        """
        engine, algorithm = self._engine, self._algorithm
        rollouts = [shard.rollout for shard in shards]
        rows, experience = read_shards(shards, algorithm, kl_coefficient, self._max_response_tokens, engine)
        values, returns = experience.values, experience.returns
        if values is None or returns is None:
            raise ValueError("the critic learns from values and returns; the shards have none")
        counted = experience.counted
        variance = explained_variance(values, returns, counted, engine.all_reduce)
        return_moments = Moments.of(returns, counted).reduced(engine.all_reduce)
        meter = Meter(engine, ("loss", "clip", "weight"))
        updates: list[StepReport] = []
        for samples in minibatches(rows, rollouts, algorithm, self._seed, step):
            packs = balanced_packs(rows, samples, self._micro_batch_tokens, engine)
            normalizer = total_weight(experience.value_weights, packs, engine)
            loss = partial(self._loss, experience, meter, normalizer)
            updates.append(engine.optimizer_step(packs, loss))
        total = meter.total()
        weight = total["weight"] or 1.0
        return CriticReport(
            loss=total["loss"] / weight,
            clip_fraction=total["clip"] / weight,
            explained_variance=variance,
            return_mean=return_moments.mean if return_moments.count else 0.0,
            grad_norm=mean_grad_norm(updates),
            learning_rate=updates[-1].learning_rate,
        )

    def _loss(
        self, experience: Experience, meter: Meter, normalizer: float, batch: PackedBatch, counts: bool
    ) -> torch.Tensor:
        """A micro-batch's part of the minibatch's loss."""
        batch = batch.to(self._engine.device)
        at = batch.columns
        assert experience.values is not None, "checked by train"
        assert experience.returns is not None, "checked by train"
        weights = experience.value_weights[at]
        parts = value_loss(
            self._engine.module(batch),
            experience.values[at],
            experience.returns[at],
            weights,
            self._algorithm.value_clip,
        )
        if counts:
            meter.add(loss=parts.loss_sum, clip=parts.clip_fraction_sum, weight=weights.sum())
        return parts.loss_sum / normalizer

    def save_checkpoint(self, folder: str) -> None:
        self._engine.save_checkpoint(checkpoint_folder(folder, "critic"))

    def load_checkpoint(self, folder: str) -> None:
        self._engine.load_checkpoint(checkpoint_folder(folder, "critic"))
