"""Reward models from Python, without a configuration or a cluster."""

from __future__ import annotations

from rlhf_ray.reward.model import RewardModel

__all__ = ["RewardModel"]
