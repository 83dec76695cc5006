"""What policy learner and critic learner share: reading their shards, cutting minibatches, keeping their state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.algorithms.experience import Experience, ExperienceShard, ExperienceSpec, build_experience
from rlhf_ray.models.packing import PackedBatch, RolloutRows
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.rollout import Rollout, TokenColumn


@dataclass(frozen=True)
class TrainSpec:
    """How often and in which pieces the samples of a step are trained on."""

    epochs: int
    minibatches: int
    micro_batch_tokens: int
    seed: int


@dataclass(frozen=True)
class StepData:
    """This rank's part of a step: its rows, and flat `[R]` tensors over them in the order of its shards."""

    rows: RolloutRows
    experience: Experience
    weights: torch.Tensor
    old_logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    values: torch.Tensor | None
    returns: torch.Tensor | None


def read_step(
    shards: Sequence[ExperienceShard], spec: ExperienceSpec, kl_coefficient: float, engine: DeepSpeedEngine
) -> StepData:
    """Columns become advantages, over all ranks, and then flat tensors on this rank's device."""
    experience = build_experience(list(shards), spec=spec, kl_coefficient=kl_coefficient, all_reduce=engine.all_reduce)

    def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present).to(engine.device) if len(present) == len(parts) else None

    def required(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(engine.device)

    each = experience.shards
    return StepData(
        rows=RolloutRows([shard.rollout for shard in shards]),
        experience=experience,
        weights=required([shard.weights for shard in each]),
        old_logprobs=required([shard.old_logprobs for shard in each]),
        engine_logprobs=required([shard.engine_logprobs for shard in each]),
        reference_logprobs=joined([shard.reference_logprobs for shard in each]),
        advantages=required([shard.advantages for shard in each]),
        values=joined([shard.values for shard in each]),
        returns=joined([shard.returns for shard in each]),
    )


def minibatches(
    data: StepData, shards: Sequence[ExperienceShard], spec: TrainSpec, step: int
) -> Iterator[list[PackedBatch]]:
    """The packs of each minibatch of each epoch.

    Minibatch m takes the m-th slice of a keyed permutation of every shard. So it is the same set of samples however
    many ranks share the shards, every rank has its part in it, and no order of arrival matters.
    """
    for epoch in range(spec.epochs):
        slices: list[list[int]] = [[] for _ in range(spec.minibatches)]
        for index, shard in enumerate(shards):
            samples = np.array(data.rows.samples_of(index))
            key = int(shard.rollout.prompt_ids[0])
            order = keyed_generator(spec.seed, "minibatch", step, epoch, key).permutation(len(samples))
            for chosen, part in zip(slices, np.array_split(samples[order], spec.minibatches), strict=True):
                chosen += part.tolist()
        for chosen in slices:
            yield data.rows.pack(chosen, spec.micro_batch_tokens)


def token_columns(
    engine: DeepSpeedEngine,
    rollouts: Sequence[Rollout],
    micro_batch_tokens: int,
    forward: Callable[[PackedBatch], torch.Tensor],
) -> list[TokenColumn]:
    """One float a response token for each rollout, from forward passes without gradients.

    Args:
        forward: `[R]` of a pack.
    """
    rows = RolloutRows(rollouts)
    packs = rows.pack(range(len(rows)), micro_batch_tokens)
    column = np.zeros(rows.num_columns, dtype=np.float32)
    results = engine.forward_each([pack.to(engine.device) for pack in packs], forward)
    for pack, result in zip(packs, results, strict=True):
        column[pack.columns.numpy()] = result.float().cpu().numpy()
    return [TokenColumn(column[rows.columns_of(index)].copy()) for index in range(len(rollouts))]


class Meter:
    """Sums over micro-batches, added up over the ranks at the end of a step."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64)
        self.maximum = 0.0

    def add(self, **values: torch.Tensor | float) -> None:
        """Add to sums by name; none can be forgotten."""
        self._sums += torch.tensor([float(values[name]) for name in self._names], dtype=torch.float64)

    def total(self, engine: DeepSpeedEngine) -> dict[str, float]:
        """Sums over all ranks."""
        return dict(zip(self._names, engine.all_reduce(self._sums).tolist(), strict=True))


def checkpoint_folder(folder: str, role: str) -> Path:
    """Where a learner keeps its state inside a checkpoint."""
    path = Path(folder) / role
    path.mkdir(parents=True, exist_ok=True)
    return path
