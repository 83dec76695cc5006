"""The layers that are never trained, computed once a token for every role.

Where only the top layers of policy and critic are trained, the layers below are the same in reference, critic and
policy, before and after every step. Their output at the boundary is the same too, so one role computes it and keeps it
as a column; the others begin there.

A model is run as it is, because architectures differ in what they do around their layers. With states given, frozen
layers do nothing but hand them on. (Layers of transformers 5 take and give back the hidden states as a tensor.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from rlhf_ray.rollout import TrunkColumn


class _Reached(Exception):
    """The boundary was reached; the layers above need not be computed."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states


def _break_off(states: torch.Tensor) -> None:
    raise _Reached(states)


class FrozenTrunk:
    """The frozen layers of one model.

    Args:
        layers: from the first on; at least one.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        if not layers:
            raise ValueError("a trunk has at least one frozen layer")
        self._given: torch.Tensor | None = None
        self._reached: Callable[[torch.Tensor], None] | None = None
        for number, layer in enumerate(layers, start=1):
            layer.forward = partial(self._forward, layer.forward, number == len(layers))

    def _forward(
        self, original: Callable[..., Any], is_last: bool, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._given is not None:
            return self._given if is_last else hidden_states
        states = original(hidden_states, *args, **kwargs)
        if is_last and self._reached is not None:
            self._reached(states)
        return states

    def states(self, run: Callable[[], Any], *, to_the_end: bool = False) -> torch.Tensor:
        """`[1, T, H]` hidden states behind the last frozen layer.

        Args:
            run: the model's forward pass; it goes no further than that layer.
            to_the_end: it goes on all the same, as ZeRO-3 needs it: weights are gathered and freed around each module,
                and in a pass that breaks off, they would not be freed.
        """
        found: list[torch.Tensor] = []
        self._reached = found.append if to_the_end else _break_off
        try:
            run()
        except _Reached as reached:
            found.append(reached.states)
        finally:
            self._reached = None
        if not found:
            raise RuntimeError("the forward pass did not come to the last frozen layer")
        return found[0]

    @contextmanager
    def begun_at(self, states: torch.Tensor | None) -> Iterator[None]:
        """Forward passes in the block begin behind the last frozen layer.

        Args:
            states: `[1, T, H]` from `states`; None: they begin at the first layer.
        """
        self._given = states
        try:
            yield
        finally:
            self._given = None


def column_of(states: torch.Tensor) -> TrunkColumn:
    """`[T, H]` states as a column."""
    states = states.cpu()
    # NumPy has no bfloat16.
    data = states.view(torch.uint16) if states.dtype == torch.bfloat16 else states
    return TrunkColumn(data.numpy(), str(states.dtype).removeprefix("torch."))


def states_of(column: TrunkColumn) -> torch.Tensor:
    """`[T, H]` of a column, a copy: arrays out of the object store are read-only, which torch has no notion of."""
    return torch.tensor(column.data).view(getattr(torch, column.dtype))
