"""Rollouts, shards and settings for tests of the roles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_ray.algorithms.experience import ExperienceShard
from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.config.settings import LearnerSettings, SFTConfig
from rlhf_ray.rollout import FINISH_LENGTH, FINISH_STOP, RewardColumn, Rollout, TokenColumn

ALGORITHM = AlgorithmSettings(entropy_coefficient=0.01, value_clip=0.2)
KL_COEFFICIENT = 0.05


def rounding(terms: int, magnitude: float = 1.0) -> float:
    """How far apart two float32 computations of the same sum may come out.

    Each of them rounds after every term, by half an epsilon of the sum at most. Which terms are added first depends on
    the kernel, and the kernel on the CPU's instructions and on the shape, so a test may not ask for less.

    Args:
        terms: of the longest sum on the way, such as the hidden size.
        magnitude: of what is compared.
    """
    return float(np.finfo(np.float32).eps) * terms * magnitude


HIDDEN_SIZE = 64
"""Of the tiny models: how many terms the sums have that their logits and scores, of size 1 at most, are made of."""
SCORE_ROUNDING = rounding(HIDDEN_SIZE)


def learner_settings(**chosen: Any) -> LearnerSettings:
    """Float32, and an AdamW step that is smooth in the gradient.

    With the usual ε an entry whose gradient is nothing but rounding moves by a full learning rate, and two exact
    computations of one step could not be told from a wrong one.
    """
    return LearnerSettings(
        **{"dtype": "float32", "learning_rate": 1e-2, "adam_epsilon": 1e-3, "zero_stage": 1, **chosen}
    )


def rollout_of(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    first_prompt_id: int = 0,
    samples_per_prompt: int = 1,
    logprobs: Sequence[float] | None = None,
    finished: bool = True,
) -> Rollout:
    """A rollout of given token ids; log-probs are zeros unless given."""
    count = sum(len(response) for response in responses)
    sample_ids = np.arange(len(prompts)) + first_prompt_id * samples_per_prompt
    return Rollout(
        tokens=np.concatenate([np.array([*p, *r], dtype=np.int32) for p, r in zip(prompts, responses, strict=True)]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        response_lengths=np.array([len(response) for response in responses], dtype=np.int32),
        logprobs=np.zeros(count, dtype=np.float32) if logprobs is None else np.array(logprobs, dtype=np.float32),
        policy_versions=np.zeros(count, dtype=np.int32),
        finish_reasons=np.full(len(prompts), FINISH_STOP if finished else FINISH_LENGTH, dtype=np.int8),
        sample_ids=sample_ids,
        prompt_ids=sample_ids // samples_per_prompt,
    )


def random_rollout(index: int, num_prompts: int = 2, samples_per_prompt: int = 2, vocabulary: int = 300) -> Rollout:
    """Random tokens in uneven lengths; the same for the same index."""
    random = np.random.default_rng(index)
    prompts = [random.integers(3, vocabulary, random.integers(2, 9)) for _ in range(num_prompts)]
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    responses = [random.integers(3, vocabulary, random.integers(1, 14)) for _ in repeated]
    count = sum(len(response) for response in responses)
    return rollout_of(
        [prompt.tolist() for prompt in repeated],
        [response.tolist() for response in responses],
        first_prompt_id=index * num_prompts,
        samples_per_prompt=samples_per_prompt,
        logprobs=(random.normal(size=count) * 0.1 - 5.7).tolist(),
    )


def shard_of(rollout: Rollout, policy: TokenColumn | None, values: TokenColumn | None = None) -> ExperienceShard:
    """Random scores and values; the reference a little off the policy."""
    random = np.random.default_rng(int(rollout.prompt_ids[0]) + 1000)
    count = len(rollout.logprobs)
    noise = (random.normal(size=count) * 0.1).astype(np.float32)
    base = rollout.logprobs if policy is None else policy.data
    return ExperienceShard(
        rollout=rollout,
        rewards=RewardColumn(random.normal(size=rollout.num_samples), ("",) * rollout.num_samples, "made"),
        reference=TokenColumn(base + noise),
        values=values or TokenColumn((random.normal(size=count) * 0.1).astype(np.float32)),
        policy=policy,
    )


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all tensors of two models."""
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def weights_in(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    from safetensors.torch import load_file

    return load_file(folder / name)


def unread_config(runs: Path, every_steps: int, copy_to: str | None = None) -> SFTConfig:
    """Of a run named `x` that reads nothing and keeps two checkpoints."""
    return SFTConfig.model_validate(
        {
            "run": {"name": "x"},
            "paths": {"runs": str(runs)},
            "text": {"path": "unread"},
            "policy": {"model": "unread"},
            "checkpoint": {"every_steps": every_steps, "keep": 2, "copy_to": copy_to},
            "tracking": {"progress": "off"},
        }
    )
