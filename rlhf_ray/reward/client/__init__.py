"""The typed client of the reward service. It needs httpx and pydantic, and nothing else."""

from __future__ import annotations

from rlhf_ray.reward.client.calls import Messages, PromptResponse, ResponsePair, Text, TokenIds
from rlhf_ray.reward.client.clients import AsyncRewardClient, RewardClient

__all__ = [
    "AsyncRewardClient",
    "Messages",
    "PromptResponse",
    "ResponsePair",
    "RewardClient",
    "Text",
    "TokenIds",
]
