"""Do learner, critic, reference and engine work together on every architecture? `python -m bench.architectures`

A small randomly initialised model of each takes three steps of PPO, and learner and engine must agree on every token
before the first and after the sync that follows each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.results import Report, Result
from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.config.settings import (
    CriticSettings,
    GeneratorSettings,
    PolicySettings,
    ReferenceSettings,
    WeightSettings,
)
from rlhf_ray.models.buckets import UNTRAINED, Snapshot
from rlhf_ray.models.loading import load_policy_tokenizer
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.roles.critic_learner import CriticLearner
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import Rollout
from tests.making import ALGORITHM, KL_COEFFICIENT, learner_settings, shard_of

PARITY = 1e-4
RATIO_ROUNDING = 1e-5
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
    "gpt_neox": Architecture("gpt_neox", {key: LLAMA_LIKE[key] for key in LLAMA_LIKE if key != "num_key_value_heads"}),
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
    "qwen3_moe": Architecture("qwen3_moe", {**MIXTURE, "head_dim": 32, "num_experts": 4, "moe_intermediate_size": 80}),
}


def cases() -> list[tuple[str, bool]]:
    """Every architecture, untied and tied where both exist."""
    return [(name, tied) for name, kind in ARCHITECTURES.items() for tied in kind.tied]


def configuration(name: str, tied: bool, tokenizer: Any) -> Any:
    """Of a small model that speaks the tokenizer's language."""
    from transformers import AutoConfig

    kind = ARCHITECTURES[name]
    return AutoConfig.for_model(
        kind.model_type,
        **kind.settings,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_model(name: str, tied: bool, tokenizer: Any, folder: Path) -> str:
    """A randomly initialised model; norms and biases are random too, so that each shows if it is lost on the way."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name, tied, tokenizer), dtype=torch.float32)
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


def snapshot_of(policy: PolicyLearner, version: int) -> Snapshot:
    """The learner's weights, in several buckets."""
    layout = policy.weight_layout(100_000)
    buckets = [policy.weight_bucket(index) for index in range(len(layout))]
    names = frozenset(name for names in layout for name in names)
    return Snapshot(version, names, [bucket for bucket in buckets if bucket is not None])


@dataclass(frozen=True)
class Agreement:
    """Of one architecture; log-probs are in nats.

    Attributes:
        tokens: fewest that were compared.
        before: largest difference of the engine's and the learner's log-probs before training.
        after: the largest of those after the sync that followed each step.
        stale: the least, over the steps, that the largest such difference was before the sync.
        reference: largest difference of the learner and the frozen reference before training.
        ratio_error: largest distance of a first minibatch's mean ratio from 1.
        value_change: largest change of a value by a step of the critic, at least in each step.
    """

    tokens: int
    before: float
    after: float
    stale: float
    reference: float
    ratio_error: float
    value_change: float

    @property
    def fault(self) -> str:
        """What does not hold, or nothing."""
        wrong = {
            "few tokens": self.tokens < 50,
            "engine and learner differ before training": self.before > PARITY,
            "engine and learner differ after a sync": self.after > PARITY,
            "a step changes too little to prove anything": self.stale < 100 * PARITY,
            "reference and learner differ": self.reference > PARITY,
            "the ratio of a first minibatch is not 1": self.ratio_error > RATIO_ROUNDING,
            "the critic learns nothing": self.value_change < 1e-3,
        }
        return ", ".join(name for name, found in wrong.items() if found)


def agreement(model: str, tokenizer: Any, rank: Rank, steps: int = 3, lora: LoraSettings | None = None) -> Agreement:
    """Train policy and critic on what the engine samples, and compare after every sync.

    Args:
        lora: train adapters on the policy.
    """
    learner = learner_settings(micro_batch_tokens=128)
    policy = PolicyLearner(PolicySettings(model=model, learner=learner, lora=lora), ALGORITHM, rank, total_steps=20)
    critic = CriticLearner(
        CriticSettings(learner=learner), model, ALGORITHM, rank, total_steps=20, max_response_tokens=16, seed=0
    )
    frozen = Reference(model, ReferenceSettings(dtype="float32"), 1.0)
    # Where vLLM runs transformers' own class, it patches it, for the learners of this process too.
    type(policy._engine.unwrapped.language_model.base_model).do_not_compile = True
    plan = plan_for(tokenizer)
    generator = Generator(
        model,
        GeneratorSettings(dtype="float32", kv_cache_gib=0.01, max_concurrent_sequences=16),
        CONTEXT_TOKENS,
        tokenizer.eos_token_id,
        WeightSettings(),
    )

    def apart(rollout: Rollout) -> float:
        return _largest(policy.logprobs(rollout).data, rollout.logprobs)

    rollout = generator.generate(plan, UNTRAINED)
    before, tokens = apart(rollout), len(rollout.logprobs)
    reference = _largest(policy.logprobs(rollout).data, frozen.logprobs(rollout).data)
    after: list[float] = []
    stale: list[float] = []
    ratio_errors: list[float] = []
    value_changes: list[float] = []
    for version in range(1, steps + 1):
        values = critic.values(rollout)
        shards = [shard_of(rollout, policy.logprobs(rollout), values)]
        ratio_errors.append(policy.train(version, shards, KL_COEFFICIENT).first_ratio_error)
        critic.train(version, shards, KL_COEFFICIENT)
        value_changes.append(_largest(critic.values(rollout).data, values.data))
        stale.append(apart(rollout))
        rollout = generator.generate(plan, snapshot_of(policy, version))
        after.append(apart(rollout))
        tokens = min(tokens, len(rollout.logprobs))
    return Agreement(tokens, before, max(after), min(stale), reference, max(ratio_errors), min(value_changes))


def _largest(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(np.abs(one - other).max())


def agreement_of(name: str, tied: bool, tokenizer_folder: str, lora: LoraSettings | None = None) -> Agreement:
    """One case, in a process of its own: vLLM keeps one distributed group a process, and patches classes."""
    torch.set_num_threads(1)
    tokenizer = load_policy_tokenizer(tokenizer_folder, "tokenizer")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        rank = Rank(0, 1, "127.0.0.1", int(listener.getsockname()[1]))
    with TemporaryDirectory() as folder:
        return agreement(write_model(name, tied, tokenizer, Path(folder)), tokenizer, rank, lora=lora)


def processes() -> ProcessPoolExecutor:
    """One process a case, one after another, forked from one that has imported the engines."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.core", "bench.architectures", "deepspeed"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with tiny")
    parser.add_argument("--only", nargs="*", help="names of architectures")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR")
    report = Report("architectures")
    with processes() as pool:
        for name, tied in cases():
            if arguments.only and name not in arguments.only:
                continue
            label = f"{name}, {'tied' if tied else 'untied'}"
            found = pool.submit(agreement_of, name, tied, str(arguments.data / "tiny" / "policy")).result()
            results = [
                Result(f"{label}: engine against learner before training", found.before, "nats", f"<= {PARITY:g} nats"),
                Result(f"{label}: the same after each sync", found.after, "nats", f"<= {PARITY:g} nats"),
                Result(f"{label}: the same before a sync", found.stale, "nats", f">= {100 * PARITY:g} nats"),
                Result(f"{label}: learner against reference", found.reference, "nats", f"<= {PARITY:g} nats"),
                Result(f"{label}: |ratio - 1| of a first minibatch", found.ratio_error, "", f"<= {RATIO_ROUNDING:g}"),
                Result(f"{label}: change of a value by a critic's step", found.value_change, "", ">= 0.001"),
            ]
            report.add(results, label)


if __name__ == "__main__":
    main()
