"""Do learner, critic and engine agree on every architecture, before training and after every sync?

`python -m bench.architectures [NAME …]`
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from rlhf_ray.config.settings import GeneratorSettings, PolicySettings, ReferenceSettings
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.deepspeed_engine import Rank
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.roles.learner import TrainSpec
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import Rollout
from tests.making import KL_COEFFICIENT, LOSS, SPEC, learner_settings, shard_of

CONTEXT_TOKENS = 64
HIDDEN = 128
LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}
MIXTURE = {**LLAMA_LIKE, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """A small randomly initialised model of one kind.

    Attributes:
        model_type: as transformers names it.
        settings: of its configuration.
        tied: whether the output projection may share the embedding; both are tried where it may.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    tied: tuple[bool, ...] = (False, True)


ARCHITECTURES = {
    "llama": Architecture("llama", LLAMA_LIKE),
    "qwen2": Architecture("qwen2", LLAMA_LIKE),
    "qwen3": Architecture("qwen3", {**LLAMA_LIKE, "head_dim": 32}),
    "mistral": Architecture("mistral", {**LLAMA_LIKE, "sliding_window": 16}),
    "gpt2": Architecture("gpt2", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT_TOKENS}),
    "opt": Architecture(
        "opt",
        {
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_TOKENS,
        },
    ),
    "gpt_neox": Architecture("gpt_neox", {**LLAMA_LIKE, "num_key_value_heads": None}),
    "gemma2": Architecture(
        "gemma2",
        {
            **LLAMA_LIKE,
            "head_dim": 32,
            "query_pre_attn_scalar": 48,
            "sliding_window": 16,
            # Small enough to bend what such a model computes.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        tied=(True,),
    ),
    "phi3": Architecture("phi3", LLAMA_LIKE),
    "olmo2": Architecture("olmo2", LLAMA_LIKE),
    "granite": Architecture(
        "granite",
        {
            **LLAMA_LIKE,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
        },
    ),
    "mixtral": Architecture("mixtral", {**MIXTURE, "num_local_experts": 4}),
    "qwen3_moe": Architecture("qwen3_moe", {**MIXTURE, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 96}),
}


def cases() -> list[tuple[str, bool]]:
    """Every architecture, untied and tied where both exist."""
    return [(name, tied) for name, kind in ARCHITECTURES.items() for tied in kind.tied]


def write_model(name: str, tied: bool, tokenizer: Any, folder: Path) -> str:
    """A randomly initialised model; norms and biases are random too, so that each shows if it is lost on the way."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = ARCHITECTURES[name]
    config = AutoConfig.for_model(
        kind.model_type,
        **{key: value for key, value in kind.settings.items() if value is not None},
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plan_for(tokenizer: Any, tokens: int = 24) -> ShardPlan:
    texts = ["I think the movie was", "They say the song is", "You know the cast", "We found the ending seems"]
    return ShardPlan(
        index=0,
        prompt_ids=tuple(range(len(texts))),
        prompts=tuple(np.array(tokenizer(text).input_ids, dtype=np.int32) for text in texts),
        samples_per_prompt=2,
        seeds=tuple(keyed_seed(0, "sample", index) for index in range(2 * len(texts))),
        temperature=1.0,
        max_response_tokens=tokens,
    )


def sync(policy: PolicyLearner, generator: Generator, version: int) -> None:
    """The learner's weights into the engine of the same process."""
    generator.load_weights(policy.weight_buckets(100_000), version)


@dataclass(frozen=True)
class Agreement:
    """Of one architecture; log-probs are in nats.

    Attributes:
        before: largest difference of the engine's and the learner's log-probs before training.
        after: the same after the sync that followed each step.
        stale: the least that a step moved them.
        reference: largest difference of the learner and the frozen reference before training.
        ratio_error: largest distance of the mean ratio of a first minibatch from 1.
        value_losses: the critic's, of each step.
    """

    before: float
    after: tuple[float, ...]
    stale: float
    reference: float
    ratio_error: float
    value_losses: tuple[float, ...]


def agreement(model: str, tokenizer: Any, rank: Rank, steps: int = 3) -> Agreement:
    """Train policy and critic on what the engine samples, and compare after every sync."""
    settings = learner_settings()
    policy = PolicyLearner(PolicySettings(model=model, learner=settings), rank, 20)
    critic = CriticLearner(model, settings, rank, 20, seed=0)
    reference = Reference(model, ReferenceSettings(dtype="float32"), 1.0)
    # Where vLLM runs transformers' own class, it patches it, for the learners of this process too.
    type(policy._engine.unwrapped.language_model.base_model).do_not_compile = True
    plan = plan_for(tokenizer)
    generator = engine(model, tokenizer)
    if True:
        rollout, _ = generator.generate(plan)
        before = policy.compare(rollout).max_abs
        own, frozen = policy.logprobs([rollout])[0], reference.logprobs([rollout])[0]
        apart = float(np.abs(own.data - frozen.data).max())
        after: list[float] = []
        stale: list[float] = []
        ratio_errors: list[float] = []
        losses: list[float] = []
        for version in range(1, steps + 1):
            shards = [shard_of(rollout, policy.logprobs([rollout])[0], critic.values([rollout])[0])]
            spec = TrainSpec(epochs=1, minibatches=2, micro_batch_tokens=128, seed=0)
            report = policy.train(version, shards, SPEC, spec, LOSS, KL_COEFFICIENT)
            ratio_errors.append(report.first_ratio_error)
            losses.append(critic.train(version, shards, SPEC, spec, 0.2, KL_COEFFICIENT).loss)
            stale.append(policy.compare(rollout).max_abs)
            sync(policy, generator, version)
            rollout, _ = generator.generate(plan)
            after.append(policy.compare(rollout).max_abs)
    return Agreement(before, tuple(after), min(stale), apart, max(ratio_errors), tuple(losses))


def engine(model: str, tokenizer: Any) -> Generator:
    settings = GeneratorSettings(dtype="float32", kv_cache_gib=0.01, max_concurrent_sequences=16)
    return Generator(model, settings, CONTEXT_TOKENS, tokenizer.eos_token_id, "object_store")
