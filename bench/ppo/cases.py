"""What is measured: models, types, sizes, and how the roles are laid out over the cores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

PROMPTS_PER_STEP = 16
SAMPLES_PER_PROMPT = 4
SAMPLES = PROMPTS_PER_STEP * SAMPLES_PER_PROMPT


@dataclass(frozen=True)
class Case:
    """One model in one type, and what is promised of it.

    Attributes:
        response_tokens: of every sample.
        micro_batch_samples: sequences in one forward and backward pass; memory only, for everybody but TRL.
        over_trl: how many times as fast as TRL a step must be.
        layout: of our roles, unless another one is asked for.
    """

    model: str
    dtype: str
    response_tokens: int
    micro_batch_samples: int
    over_trl: float
    layout: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.dtype}"


CASES = (
    Case("tiny", "float32", 64, 64, 1.35, "two-references"),
    Case("smollm2", "float32", 32, 32, 1.7, "two-references"),
    Case("smollm2", "bfloat16", 32, 32, 3.0, "two-references"),
)


@dataclass(frozen=True)
class Layout:
    """Who computes on which core, for two cores. Roles of a synchronous step take turns, so each turn should use both.

    Attributes:
        why: what speaks for it.
        overrides: of `grpo.yaml`.
    """

    why: str
    overrides: Mapping[str, Any]


_TWO_ENGINES = {"generator.replicas": 2, "generator.threads": 1, "sampling.prompts_per_shard": 8}
_TWO_REFERENCES = {"reference.replicas": 2, "reference.threads": 1}
LAYOUTS = {
    "two-ranks": Layout(
        "one thread per process: no barriers within a layer, but a second copy of the weights and an all-reduce",
        _TWO_ENGINES | _TWO_REFERENCES | {"policy.learner.replicas": 2, "policy.learner.threads": 1},
    ),
    "two-threads": Layout(
        "one learner and one reference of two threads: one copy of the weights, no all-reduce, but a barrier after "
        "every operation; the reference's threads meet a generator that is still busy, and spin",
        _TWO_ENGINES | {"reference.threads": 2, "policy.learner.threads": 2},
    ),
    "two-references": Layout(
        "one learner of two threads, two references of one: each starts as soon as its generator's shard is there",
        _TWO_ENGINES | _TWO_REFERENCES | {"policy.learner.threads": 2},
    ),
    "small-shards": Layout(
        "four shards: references read the first ones while generators sample the last; batches are half as large",
        _TWO_ENGINES | _TWO_REFERENCES | {"policy.learner.threads": 2, "sampling.prompts_per_shard": 4},
    ),
    "two-ranks-small-shards": Layout(
        "the same with two learners",
        _TWO_ENGINES | _TWO_REFERENCES | {"policy.learner.replicas": 2, "sampling.prompts_per_shard": 4},
    ),
    "one-generator": Layout(
        "one generator with all samples in one batch and two threads: a larger batch, but barriers",
        {"generator.threads": 2, "reference.threads": 2, "policy.learner.threads": 2, "sampling.prompts_per_shard": 16},
    ),
    "two-ranks-zero-2": Layout(
        "two learners that also share gradients (ZeRO-2): less memory than ZeRO-1, another way to reduce",
        _TWO_ENGINES | _TWO_REFERENCES | {"policy.learner.replicas": 2, "policy.learner.zero_stage": 2},
    ),
    "two-threads-passive": Layout(
        "two threads that sleep at barriers in place of spinning, which leaves the core to whoever has work",
        _TWO_ENGINES
        | {"reference.threads": 2, "reference.env.OMP_WAIT_POLICY": "passive"}
        | {"policy.learner.threads": 2, "policy.learner.env.OMP_WAIT_POLICY": "passive"},
    ),
}


@dataclass(frozen=True)
class Prepared:
    """A case's files, and its sizes in tokens.

    Attributes:
        model: directory of a copy whose responses never end before the limit.
        prompts: JSONL; every prompt has `prompt_tokens` tokens.
        parameters: trained ones, tied ones counted once.
    """

    case: Case
    model: Path
    prompts: Path
    prompt_tokens: int
    parameters: int

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.case.response_tokens


def prepare(case: Case, data: Path, folder: Path) -> Prepared:
    """Write a case's model and prompts.

    Args:
        data: folder with the presets `tiny` and, for SmolLM2, `smollm2-135m`.
    """
    from transformers import AutoTokenizer

    model = folder / case.model
    parameters = (_write_tiny if case.model == "tiny" else _copy_smollm2)(data, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (data / "tiny" / "prompts.jsonl").read_text("utf-8").splitlines()]
    lengths = [len(tokenizer(row["prompt"]).input_ids) for row in rows]
    [(common, count)] = Counter(lengths).most_common(1)
    if count < PROMPTS_PER_STEP:
        raise RuntimeError(f"only {count} prompts have one length; a step needs {PROMPTS_PER_STEP}")
    prompts = folder / f"{case.model}.jsonl"
    chosen = (json.dumps(row) + "\n" for row, length in zip(rows, lengths, strict=True) if length == common)
    prompts.write_text("".join(chosen), encoding="utf-8")
    return Prepared(case, model, prompts, common, parameters)


def _write_tiny(data: Path, target: Path) -> int:
    """A random Llama of 4 M parameters with the tiny preset's tokenizer, which never samples its end of sequence.

    The first entry of the residual stream is the same for every token and changed by no layer; tied to it, the end of
    sequence has a logit far below all others.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(data / "tiny" / "policy")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            dtype="float32",
        )
    )
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        embedding[tokenizer.eos_token_id, 0] = -30.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return int(model.num_parameters())


def _copy_smollm2(data: Path, target: Path) -> int:
    """SmolLM2 with another end of sequence: a token of its pretraining that it samples once in 1e8 tokens."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    source = data / "smollm2-135m"
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = "<filename>"
    config = AutoConfig.from_pretrained(source)
    config.eos_token_id = tokenizer.eos_token_id
    weights = target / "model.safetensors"
    weights.unlink(missing_ok=True)
    weights.symlink_to((source / "model.safetensors").absolute())
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    with safe_open(weights, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
