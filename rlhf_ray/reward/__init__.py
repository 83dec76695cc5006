"""The reward model, from Python, from the command line and as a service; PPO is one of its users.

Rooms, each of which imports only from those before it: `client`, `core`, `judge`, `train`; `serve` beside the last two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.reward.model import RewardModel

__all__ = ["RewardModel"]


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for, so that the client's users need no torch."""
    if name != "RewardModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_ray.reward.model import RewardModel

    return RewardModel
