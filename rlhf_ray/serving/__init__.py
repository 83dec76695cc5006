"""The reward model as a service: a Ray Serve application that every family of reward clients can call."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_ray.serving.client import AsyncRewardClient, RewardClient

__all__ = ["AsyncRewardClient", "RewardClient"]


def __getattr__(name: str) -> object:
    """The clients are imported when they are first asked for; the service itself does not need them."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from rlhf_ray.serving import client

    return vars(client)[name]
