"""A learner's checkpoint for another number of ranks, another ZeRO stage or another compute type than wrote it.

DeepSpeed writes what each rank has: its part of one long row of all weights, and of the optimizer's moments. Here every
parameter is put together from the parts, and cut up again as the ranks of now have it. How that is, they show by
writing a checkpoint of their own, whose numbers are then replaced; loading it is DeepSpeed's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

_MOMENTS = ("exp_avg", "exp_avg_sq")
_COUNTS = ("steps_done", "global_steps", "global_samples", "skipped_steps")
_LAYOUT = "layout.json"

STATE = "state"
"""Folder of DeepSpeed's files in a learner's folder of a checkpoint."""


@dataclass(frozen=True)
class Layout:
    """What decides how a checkpoint is divided among files.

    Attributes:
        zero_stage: as DeepSpeed was told.
        ranks: that wrote it.
        dtype: they compute in.
        groups: of parameters, with weight decay and without.
    """

    zero_stage: int
    ranks: int
    dtype: str
    groups: int

    @classmethod
    def of(cls, state: Path) -> Layout | None:
        """Of a checkpoint; None for one from before this was written down."""
        path = state / _LAYOUT
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def write(self, state: Path) -> None:
        (state / _LAYOUT).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class _Piece(NamedTuple):
    """Part of a parameter: `length` numbers from `offset` on, at `start` of a rank's row of number `row`."""

    name: str
    row: int
    start: int
    length: int
    offset: int


class SavedLearner:
    """Weights and moments of a checkpoint by parameter, whole and in float32; read when they are asked for.

    Args:
        state: folder with DeepSpeed's files.
        layout: it was written in.
        names: of the parameters that are trained now.
    """

    def __init__(self, state: Path, layout: Layout, names: Sequence[str]) -> None:
        self._model = _read(_model_files(state)[0])
        self.counts: dict[str, Any] = {name: self._model[name] for name in _COUNTS if name in self._model}
        self._rows: list[list[dict[str, torch.Tensor]]] = []
        self._pieces: dict[str, list[tuple[int, _Piece]]] = {}
        self._numbers: dict[str, int] = {}
        if layout.zero_stage == 0:
            self._numbers = {name: number for number, name in enumerate(self._model["trained"])}
            self._base: Mapping[int, Any] = self._model["optimizer"]["state"]
            steps = [each["step"] for each in self._base.values()]
        else:
            states = [_read(path)["optimizer_state_dict"] for path in _optimizer_files(state, layout.ranks)]
            self._rows = [_rows_of(each, layout) for each in states]
            for rank, pieces in enumerate(_pieces(states, layout, self._model)):
                for piece in pieces:
                    self._pieces.setdefault(piece.name, []).append((rank, piece))
            steps = [each["step"] for each in _base_state(states[0], layout).values()]
        self.step: torch.Tensor | None = steps[0] if steps else None
        known = self._numbers if layout.zero_stage == 0 else self._pieces
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"{state} has nothing of {missing[0]} and {len(missing) - 1} more parameters that are trained now; "
                "the same trainable_top_layers and lora as before"
            )

    def tensor(self, name: str, kind: str, shape: torch.Size) -> torch.Tensor:
        """One parameter's `weight` or moment.

        Args:
            kind: `weight`, `exp_avg` or `exp_avg_sq`.
            shape: of the parameter now, for what is wrong.
        """
        if self._numbers:
            found = self._model["module"][name] if kind == "weight" else self._base[self._numbers[name]][kind]
        else:
            parts = [
                self._rows[rank][piece.row][kind][piece.start : piece.start + piece.length]
                for rank, piece in self._pieces[name]
            ]
            found = torch.cat(parts)
        if found.numel() != shape.numel():
            raise ValueError(f"the checkpoint's {name} has {found.numel()} numbers; the model's has {shape.numel()}")
        return found.float().reshape(shape)


def write_anew(
    saved: SavedLearner,
    template: Path,
    target: Path,
    layout: Layout,
    rank: int,
    parameters: Mapping[str, torch.Size],
    aliases: Mapping[str, str],
) -> None:
    """Write this rank's files of a checkpoint in its layout.

    Args:
        saved: the numbers.
        template: checkpoint of the untrained ranks of now.
        target: folder for the files.
        layout: of the ranks of now.
        rank: whose files.
        parameters: shapes of the trained parameters by name.
        aliases: other names of parameters that are shared, to their own.
    """
    target.mkdir(parents=True, exist_ok=True)
    models = _model_files(template)
    if layout.zero_stage == 3 or rank == 0:
        path = models[rank] if layout.zero_stage == 3 else models[0]
        model = _read(path)
        model.update(saved.counts)
        if layout.zero_stage < 3:
            for name in model["module"]:
                own = aliases.get(name, name)
                if own in parameters:
                    found = saved.tensor(own, "weight", parameters[own])
                    model["module"][name] = found.to(model["module"][name].dtype)
        if layout.zero_stage == 0 and saved.step is not None:
            # A step of its own for each: a shared one would be counted up for all of them, again and again.
            model["optimizer"]["state"] = {
                number: {"step": saved.step.clone(), **{each: saved.tensor(name, each, shape) for each in _MOMENTS}}
                for number, (name, shape) in enumerate(parameters.items())
            }
        torch.save(model, target / path.name)
    if layout.zero_stage == 0:
        return
    paths = _optimizer_files(template, layout.ranks)
    files = [_read(path) for path in paths]
    states = [each["optimizer_state_dict"] for each in files]
    kinds = ("weight", *(_MOMENTS if saved.step is not None else ()))
    rows = [{kind: torch.zeros_like(row["weight"]) for kind in kinds} for row in _rows_of(states[rank], layout)]
    for piece in _pieces(states, layout, _read(models[0]))[rank]:
        for kind in kinds:
            whole = saved.tensor(piece.name, kind, parameters[piece.name]).flatten()
            rows[piece.row][kind][piece.start : piece.start + piece.length] = whole[
                piece.offset : piece.offset + piece.length
            ]
    states[rank][_weights_key(layout)] = [row["weight"] for row in rows]
    if saved.step is not None:
        _base(states[rank], layout)["state"] = {
            number: {"step": saved.step.clone(), **{each: row[each] for each in _MOMENTS}}
            for number, row in enumerate(rows)
        }
    torch.save(files[rank], target / paths[rank].name)


def _pieces(states: Sequence[Any], layout: Layout, model: Any) -> list[list[_Piece]]:
    """Of each rank, in the order of its rows."""
    if layout.zero_stage == 3:
        return [list(_padded_pieces(states[rank], layout, model, rank)) for rank in range(layout.ranks)]
    seen: dict[str, int] = {}
    pieces: list[list[_Piece]] = []
    for state in states:
        pieces.append([])
        for row, fragments in enumerate(state["param_slice_mappings"]):
            for name, address in fragments.items():
                pieces[-1].append(_Piece(name, row, address.start, address.numel, seen.get(name, 0)))
                seen[name] = seen.get(name, 0) + address.numel
    return pieces


def _padded_pieces(state: Any, layout: Layout, model: Any, rank: int) -> Iterator[_Piece]:
    """ZeRO-3 gives each rank an equal part of every parameter, the last ones filled up with zeros."""
    row, start = 0, 0
    lengths = [len(each) for each in state[_weights_key(layout)]]
    for shapes in model["param_shapes"]:
        for name, shape in shapes.items():
            part = math.ceil(shape.numel() / layout.ranks)
            while start + part > lengths[row]:
                row, start = row + 1, 0
            offset = min(part * rank, shape.numel())
            yield _Piece(name, row, start, min(part, shape.numel() - offset), offset)
            start += part


def _rows_of(state: Any, layout: Layout) -> list[dict[str, torch.Tensor]]:
    """A rank's rows of weights, with the moments beside them where there are any yet."""
    base = _base_state(state, layout)
    return [
        {"weight": weights, **{each: base[number][each] for each in _MOMENTS if number in base}}
        for number, weights in enumerate(state[_weights_key(layout)])
    ]


def _weights_key(layout: Layout) -> str:
    return "fp32_flat_groups" if layout.zero_stage == 3 else "single_partition_of_fp32_groups"


def _base(state: Any, layout: Layout) -> Any:
    return state["optimizer_state_dict" if layout.zero_stage == 3 else "base_optimizer_state"]


def _base_state(state: Any, layout: Layout) -> Mapping[int, Any]:
    found: Mapping[int, Any] = _base(state, layout)["state"]
    return found


def _optimizer_files(state: Path, ranks: int) -> list[Path]:
    found = _by_rank(state.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    if len(found) != ranks:
        raise ValueError(f"{state} has the optimizer's state of {len(found)} ranks; {ranks} wrote it")
    return found


def _model_files(state: Path) -> list[Path]:
    return _by_rank(state.glob("*mp_rank_00_model_states.pt"))


def _by_rank(paths: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)", path.name)
        return int(match[1]) if match else 0

    return sorted(paths, key=rank)


def _read(path: Path) -> Any:
    """DeepSpeed's own file, written by this run. Numbers stay on the disk until they are used."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
