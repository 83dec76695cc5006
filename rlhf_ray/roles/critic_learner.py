"""The learner of the critic: values of rollouts, and their regression on the returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_ray.algorithms.experience import ExperienceShard, ExperienceSpec
from rlhf_ray.algorithms.losses import explained_variance, value_loss
from rlhf_ray.config.settings import LearnerSettings
from rlhf_ray.models.loading import resolve_attention, resolve_dtype, train_only_top_layers
from rlhf_ray.models.packing import PackedBatch
from rlhf_ray.models.token_models import CriticModel, load_critic_model
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine, Rank
from rlhf_ray.roles.learner import Meter, TrainSpec, checkpoint_folder, minibatches, read_step, token_columns
from rlhf_ray.rollout import Rollout, TokenColumn


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
        model: where the backbone comes from.
        settings: how it is trained.
        rank: this process in its group.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, model: str, settings: LearnerSettings, rank: Rank, total_steps: int) -> None:
        on_gpu = settings.gpus > 0
        dtype = resolve_dtype(settings.dtype, on_gpu)
        self._micro_batch_tokens = settings.micro_batch_tokens

        def build() -> CriticModel:
            critic = load_critic_model(model, dtype=dtype, attention=resolve_attention(settings.attention, on_gpu))
            train_only_top_layers(critic.backbone, settings.trainable_top_layers)
            return critic

        self._engine = DeepSpeedEngine(build, settings, rank, dtype, total_steps)

    def values(self, rollouts: Sequence[Rollout]) -> list[TokenColumn]:
        """Value of the state before each response token."""
        return token_columns(self._engine, rollouts, self._micro_batch_tokens, self._engine.module)

    def train(
        self,
        step: int,
        shards: Sequence[ExperienceShard],
        experience: ExperienceSpec,
        spec: TrainSpec,
        value_clip: float | None,
        kl_coefficient: float,
    ) -> CriticReport:
        """All epochs and minibatches of one step."""
        engine = self._engine
        data = read_step(shards, experience, kl_coefficient, engine)
        values, returns = data.values, data.returns
        if values is None or returns is None:
            raise ValueError("the critic learns from values and returns; the shards have none")
        counted = data.weights != 0
        variance = explained_variance(values, returns, counted, engine.all_reduce)
        sums = engine.all_reduce(torch.stack([returns[counted].double().sum(), counted.double().sum()]).cpu())
        meter = Meter(("loss", "clip", "weight"))
        norms: list[float] = []
        rate = 0.0
        for packs in minibatches(data, shards, spec, step):
            own = sum(float(data.weights[pack.columns].double().sum()) for pack in packs)
            normalizer = float(engine.all_reduce(torch.tensor([own], dtype=torch.float64))[0]) or 1.0

            def loss(batch: PackedBatch, counts: bool, normalizer: float = normalizer) -> torch.Tensor:
                batch = batch.to(engine.device)
                at = batch.columns
                weights = data.weights[at]
                parts = value_loss(engine.module(batch), values[at], returns[at], weights, value_clip)
                if counts:
                    meter.add(loss=parts.loss_sum.detach(), clip=parts.clip_fraction_sum, weight=weights.sum())
                return parts.loss_sum / normalizer

            report = engine.optimizer_step(packs, loss)
            norms.append(report.grad_norm)
            rate = report.learning_rate
        total = meter.total(engine)
        weight = total["weight"] or 1.0
        return CriticReport(
            loss=total["loss"] / weight,
            clip_fraction=total["clip"] / weight,
            explained_variance=variance,
            return_mean=float(sums[0] / max(float(sums[1]), 1.0)),
            grad_norm=sum(norms) / len(norms),
            learning_rate=rate,
        )

    def save_checkpoint(self, folder: str) -> None:
        self._engine.save_checkpoint(checkpoint_folder(folder, "critic"))

    def load_checkpoint(self, folder: str) -> None:
        self._engine.load_checkpoint(checkpoint_folder(folder, "critic"))
