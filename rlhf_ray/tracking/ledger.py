"""`ledger.jsonl`: which samples each step trained, which it set aside and why. It proves that each is used once.

A sample's id says where it belongs: the samples of step s (from 1) of a run with n samples a step are (s − 1)·n to
s·n − 1, because prompts are drawn in one fixed order. What the learners say they used is compared with that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.rollout import SampleUse, id_ranges, ids_in
from rlhf_ray.tracking.logs import append_row, drop_torn_line, read_log

USES = (*SampleUse.__dataclass_fields__, "spare")
"""What the learners did with their samples; `spare` ones did not reach them."""
_SHOWN = 3
"""Ranges of ids that a message names."""


class Ledger:
    """One row a step.

    Args:
        path: the file; made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        drop_torn_line(path)

    def write(
        self,
        step: int,
        uses: Sequence[SampleUse],
        *,
        spare: NDArray[np.int64],
        versions: tuple[int, int],
        digests: Sequence[str],
        causes: Mapping[str, int],
    ) -> None:
        """Append a step that has been trained.

        Args:
            step: its number, from 1.
            uses: what each rank of the policy's learner did with its samples.
            spare: ids of samples that were drawn and did not reach the learners, because enough others did.
            versions: oldest and newest of the weights that its tokens were sampled with.
            digests: of its shards: equal for two runs whose samples are equal bit-for-bit.
            causes: of failed scores, and how often each occurred.
        """
        merged = {
            name: id_ranges(np.concatenate([ids_in(vars(use)[name]) for use in uses]))
            for name in SampleUse.__dataclass_fields__
        }
        merged["spare"] = id_ranges(spare)
        digest = hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()
        append_row(self._path, {"step": step, **merged, "causes": causes, "versions": versions, "digest": digest})


@dataclass(frozen=True)
class LedgerCheck:
    """What a ledger proves.

    Attributes:
        steps: that were trained.
        trained, set_aside: samples.
        missing: samples that should have been drawn by then, and that no step used.
        repeated: samples that were used more than once.
        misplaced: samples that a step used without having drawn them.
        problems: the first of these, a line for each kind; empty: every sample was used exactly once.
    """

    steps: int
    trained: int
    set_aside: int
    missing: int
    repeated: int
    misplaced: int
    problems: tuple[str, ...]


def check_ledger(path: Path, samples_per_step: int, steps: int) -> LedgerCheck:
    """Compare a ledger with the prompts' order.

    Args:
        path: the file.
        samples_per_step: that are drawn, the same at every step.
        steps: done by the run.
    """
    rows = [(int(row["step"] or 0), row) for row in read_log(path)]
    uses = {name: [ids_in(row.get(name) or ()) for _, row in rows] for name in USES}  # type: ignore[arg-type]
    by_row = [np.concatenate(parts) for parts in zip(*uses.values(), strict=True)]
    used, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *by_row]), return_counts=True)
    missing = np.setdiff1d(np.arange(steps * samples_per_step), used)
    repeated = used[counts > 1]
    misplaced = [ids[ids // samples_per_step != step - 1] for (step, _), ids in zip(rows, by_row, strict=True)]
    found = {
        "missing": missing,
        "used more than once": repeated,
        "used by a step that did not draw them": np.concatenate([np.zeros(0, np.int64), *misplaced]),
    }
    totals = {name: sum(map(len, each)) for name, each in uses.items()}
    return LedgerCheck(
        steps=len(rows),
        trained=totals["trained"],
        set_aside=sum(totals.values()) - totals["trained"],
        missing=len(missing),
        repeated=len(repeated),
        misplaced=sum(map(len, misplaced)),
        problems=tuple(f"{len(ids):,} samples {what}: {_named(ids)}" for what, ids in found.items() if len(ids)),
    )


def _named(ids: NDArray[np.int64]) -> str:
    ranges = id_ranges(ids)
    named = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in ranges[:_SHOWN])
    return named + (" …" if len(ranges) > _SHOWN else "")
