"""The typed client of the reward service. It needs httpx and pydantic, and nothing else."""

from __future__ import annotations

from rlhf_ray.reward.client.clients import AsyncRewardClient, RewardClient
from rlhf_ray.reward.client.schema import Messages, PromptResponse, ResponsePair, Text, TokenIds

__all__ = [
    "AsyncRewardClient",
    "Messages",
    "PromptResponse",
    "ResponsePair",
    "RewardClient",
    "Text",
    "TokenIds",
]
