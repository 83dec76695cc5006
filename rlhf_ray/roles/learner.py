"""What policy learner and critic learner share: cutting their samples into minibatches, measuring, keeping state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from rlhf_ray.algorithms.experience import Experience, ExperienceShard, build_experience
from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.models.packing import PackedBatch, RolloutRows
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.roles.deepspeed_engine import DeepSpeedEngine
from rlhf_ray.roles.rank_group import RankEngine
from rlhf_ray.rollout import Rollout, SampleUse, TokenColumn, TrunkColumn, id_ranges


def minibatches(
    rows: RolloutRows, rollouts: Sequence[Rollout], algorithm: AlgorithmSettings, seed: int, step: int
) -> Iterator[list[int]]:
    """The samples of each minibatch of each epoch.

    Minibatch m takes the m-th slice of a keyed permutation of every shard. So it is the same set of samples however
    many ranks share the shards, every rank has its part in it, and no order of arrival matters.
    """
    for epoch in range(algorithm.epochs):
        slices: list[list[int]] = [[] for _ in range(algorithm.minibatches)]
        for index, rollout in enumerate(rollouts):
            samples = np.array(rows.samples_of(index))
            key = int(rollout.prompt_ids[0])
            order = keyed_generator(seed, "minibatch", step, epoch, key).permutation(len(samples))
            for chosen, part in zip(slices, np.array_split(samples[order], algorithm.minibatches), strict=True):
                chosen += part.tolist()
        yield from slices


def read_shards(
    shards: Sequence[ExperienceShard],
    algorithm: AlgorithmSettings,
    kl_coefficient: float,
    max_response_tokens: int,
    engine: DeepSpeedEngine,
) -> tuple[RolloutRows, Experience]:
    """This rank's samples, ready to be packed, and what the losses need of them, on its device. A collective.

    Args:
        kl_coefficient: β.
        max_response_tokens: where responses were cut off.
    """
    rows = RolloutRows([shard.rollout for shard in shards], [shard.trunk for shard in shards])
    experience = build_experience(shards, algorithm, kl_coefficient, max_response_tokens, engine.all_reduce)
    return rows, experience.to(engine.device, torch.float32)


def sample_use(shards: Sequence[ExperienceShard], experience: Experience) -> SampleUse:
    """What becomes of this rank's samples."""
    ids = np.concatenate([shard.rollout.sample_ids for shard in shards])
    ok, masked, uniform = (each.cpu().numpy() for each in (experience.ok, experience.masked, experience.uniform))
    parts = (ok & ~masked & ~uniform, ~ok, masked, uniform)
    return SampleUse(*(id_ranges(ids[part]) for part in parts))


def balanced_packs(
    rows: RolloutRows, samples: Sequence[int], micro_batch_tokens: int, engine: RankEngine
) -> list[PackedBatch]:
    """Packs of a minibatch: about equally long, and as many as the rank with the most tokens needs.

    A rank with fewer packs would go along with passes that count for nothing; in shorter passes its samples cost what
    they cost, and each of them takes less memory. A collective.
    """
    return rows.pack(samples, micro_batch_tokens, engine.most(rows.count_packs(samples, micro_batch_tokens)))


def total_weight(weights: torch.Tensor, packs: Sequence[PackedBatch], engine: DeepSpeedEngine) -> float:
    """What the sums of a minibatch are divided by: its weight over all ranks, 1 where nothing of it counts."""
    columns = torch.cat([pack.columns for pack in packs]).to(weights.device)
    return float(engine.all_reduce(weights[columns].double().sum()[None])) or 1.0


def token_column(
    engine: RankEngine,
    rollout: Rollout,
    trunk: TrunkColumn | None,
    micro_batch_tokens: int,
    forward: Callable[[PackedBatch], torch.Tensor],
) -> TokenColumn:
    """One float for each response token of a rollout, from forward passes without gradients.

    Args:
        trunk: of the rollout, to begin with.
        forward: `[R]` of a pack.
    """
    rows = RolloutRows([rollout], [trunk])
    packs = balanced_packs(rows, range(len(rows)), micro_batch_tokens, engine)
    column = np.zeros(rows.num_columns, dtype=np.float32)
    results = engine.forward_each([pack.to(engine.device) for pack in packs], forward)
    for pack, result in zip(packs, results, strict=True):
        column[pack.columns.numpy()] = result.float().cpu().numpy()
    return TokenColumn(column)


class Meter:
    """Sums and maxima over micro-batches, kept on the device: reading them there would stop it after every pass.

    Args:
        sums: names of what is added up.
        maxima: names of what only the largest is kept of.
    """

    def __init__(self, engine: DeepSpeedEngine, sums: Sequence[str], maxima: Sequence[str] = ()) -> None:
        self._engine, self._names, self._maxima_names = engine, list(sums), list(maxima)
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=engine.device)
        self._maxima = torch.zeros(len(self._maxima_names), dtype=torch.float64, device=engine.device)

    def add(self, **values: torch.Tensor | float) -> None:
        """Take in one micro-batch, by name; none can be forgotten."""
        self._sums += self._vector(values, self._names)
        if self._maxima_names:
            self._maxima = torch.maximum(self._maxima, self._vector(values, self._maxima_names))

    def total(self) -> dict[str, float]:
        """Sums and maxima so far, over all ranks."""
        totals = dict(zip(self._names, self._engine.all_reduce(self._sums).tolist(), strict=True))
        if self._maxima_names:
            largest = self._engine.all_max(self._maxima).tolist()
            totals |= zip(self._maxima_names, largest, strict=True)
        return totals

    def _vector(self, values: dict[str, torch.Tensor | float], names: Sequence[str]) -> torch.Tensor:
        return torch.stack(
            [torch.as_tensor(values[name], device=self._engine.device).detach().double() for name in names]
        )


def checkpoint_folder(folder: str, role: str) -> Path:
    """Where a learner keeps its state inside a checkpoint."""
    path = Path(folder) / role
    path.mkdir(parents=True, exist_ok=True)
    return path
