"""The reward model as a service: a Ray Serve application that every family of reward clients can call.

The client's names are here for users; they are loaded when they are asked for, without torch and Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_ray.serving.client import AsyncRewardClient, RewardClient
    from rlhf_ray.serving.client_calls import Messages, PromptResponse, ResponsePair, Text, TokenIds

__all__ = [
    "AsyncRewardClient",
    "Messages",
    "PromptResponse",
    "ResponsePair",
    "RewardClient",
    "Text",
    "TokenIds",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlhf_ray.serving import client, client_calls

    return getattr(client, name, None) or getattr(client_calls, name)
