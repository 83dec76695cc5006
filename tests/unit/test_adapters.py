"""Adapters on the policy: merged, switched off, exported and resumed, they are what the arithmetic says."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rlhf_ray.config.load import dump_config, load_config
from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.config.settings import PolicySettings, PPOConfig, ReferenceSettings
from rlhf_ray.data.text import TextExample
from rlhf_ray.failures import BadInput
from rlhf_ray.models.adapters import (
    adapter_parameters,
    adapters_off,
    add_adapters,
    check_adapters,
    find_targets,
    plain_weights,
)
from rlhf_ray.models.loading import resolve_attention
from rlhf_ray.models.packing import pack
from rlhf_ray.models.token_models import PolicyModel
from rlhf_ray.ppo.export import export_policy
from rlhf_ray.ppo.roles import role_requests
from rlhf_ray.roles.deepspeed_engine import Rank
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import Rollout
from tests.conftest import REPOSITORY
from tests.making import (
    ALGORITHM,
    HIDDEN_SIZE,
    KL_COEFFICIENT,
    largest_difference,
    learner_settings,
    parameters_of,
    random_rollout,
    rounding,
    shard_of,
    weights_in,
)
from tests.unit.test_token_models import GPT, LLAMA, mixture

KEY = "policy.lora.target_modules"
ADAPTED = ("policy.lora={rank: 4}", "reference.dtype=auto")
ROLLOUTS = [random_rollout(index) for index in range(3)]
BATCH = pack([np.arange(3, 23, dtype=np.int32)], [1])
LOGITS = rounding(HIDDEN_SIZE, 8.0)
"""Log-probs of logits of size 8 at most, which are sums over the hidden size."""

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("Llama", LLAMA, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    "tied": (
        "Llama",
        {**LLAMA, "tie_word_embeddings": True},
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    "biases": ("Qwen2", LLAMA, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    "transposed": ("GPT2", GPT, ["c_attn", "c_fc", "c_proj"]),
    "fused": ("Phi3", {**LLAMA, "pad_token_id": 0}, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    "fused with biases": (
        "GPTNeoX",
        {name: LLAMA[name] for name in LLAMA if name != "num_key_value_heads"},
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    ),
}


def learner_of(
    model: str, rank: Rank, lora: LoraSettings | None = LoraSettings(rank=4, alpha=8), **settings: Any
) -> PolicyLearner:
    policy = PolicySettings(model=model, learner=learner_settings(**settings), lora=lora)
    return PolicyLearner(policy, ALGORITHM, rank, total_steps=20)


def train(learner: PolicyLearner, step: int = 0) -> PolicyReport:
    shards = [shard_of(rollout, learner.logprobs(rollout)) for rollout in ROLLOUTS]
    return learner.train(step, shards, KL_COEFFICIENT)


def built(name: str) -> Any:
    """A randomly initialised model with adapters that are not 0."""
    import transformers

    torch.manual_seed(0)
    kind, config, _ = ARCHITECTURES[name]
    resolve_attention("auto")
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**config), attn_implementation="packed_sdpa"
    )
    add_adapters(model, LoraSettings(rank=3, alpha=5, rslora=True), KEY, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()


def logprobs_of(model: Any) -> torch.Tensor:
    return PolicyModel(model)(BATCH)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_weights_compute_what_adapters_compute(name: str, tmp_path: Path):
    import transformers

    model = built(name)
    kind, config, ends = ARCHITECTURES[name]
    plain = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**config), attn_implementation="packed_sdpa"
    ).eval()
    merged = plain_weights(model)
    assert merged.keys() == parameters_of(plain).keys()
    adapted = {name for name, weight in merged.items() if weight.adapter is not None}
    assert {name.split(".")[-2] for name in adapted} == set(ends)
    plain.load_state_dict({name: weight.value() for name, weight in merged.items()}, strict=False)
    found, expected = logprobs_of(plain), logprobs_of(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)
    plain.load_state_dict({name: weight.parameter for name, weight in merged.items()}, strict=False)
    without = logprobs_of(plain)
    assert float((without - expected).abs().max()) > 1e-2, "the adapters change too little to prove anything"
    with adapters_off(model):
        assert torch.equal(logprobs_of(model), without)
    assert torch.equal(logprobs_of(model), expected), "they are on again"


def test_a_merged_weight_is_rounded_once():
    """Against float64: half a unit in the last place of bfloat16, and float32's rounding of a sum of 3 products."""
    model = built("llama").bfloat16()
    for weight in plain_weights(model).values():
        if weight.adapter is not None:
            down, up = (part.double() for part in weight.parts[1:])
            exact = weight.parameter.double() + 5 / 3**0.5 * (up @ down)
            assert weight.value().dtype == torch.bfloat16
            error = (weight.value().double() - exact).abs()
            half = torch.finfo(torch.bfloat16).eps / 2
            assert bool((error <= exact.abs() * half * (1 + 1e-3) + 1e-6).all())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_layers_that_share_a_module_with_an_adapter_are_sent(name: str):
    """An engine fuses neighbours, with their biases, and reloads what it has fused as a whole."""
    import transformers

    kind, config, ends = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config))
    attention = next(end for end in ("q_proj", "c_attn", "qkv_proj", "query_key_value") if end in ends)
    add_adapters(model, LoraSettings(target_modules=[attention]), KEY, seed=1)
    weights = plain_weights(model)
    [block] = {name.rpartition(f".{attention}.")[0].rpartition(".")[2] for name in weights if f".{attention}." in name}
    assert {name for name, weight in weights.items() if weight.is_sent} == {
        name for name in weights if f".{block}." in name
    }


def config_of(*overrides: str) -> PPOConfig:
    return load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reference.dtype=float32", r"reference: with policy\.lora the policy without its adapters is the reference"),
        ("reference.model=other", r"reference: with policy\.lora .* remove the section"),
        ("reference=null", r"algorithm\.kl\.controller: 'adaptive' .* needs a reference section"),
        (
            "policy.learner.trainable_top_layers=1",
            r"lora: trains adapters only, but .*trainable_top_layers is 1",
        ),
        ("policy.lora.dropout=0.1", r"lora\.dropout: 0\.1; the ratio .* would not be 1"),
        ("policy.lora.rank=0", r"policy\.lora\.rank is 0"),
        ("policy.lora.target_modules=[]", r"policy\.lora\.target_modules"),
        ("policy.lora.target_modules=all", r"policy\.lora\.target_modules"),
    ],
)
def test_contradictions_are_refused_by_name(override: str, message: str):
    with pytest.raises(BadInput, match=message):
        config_of(*ADAPTED, override)


def test_adapters_take_the_references_place():
    """A resolved configuration is read back as it was."""
    roles = [request.role for request in role_requests(config_of(*ADAPTED))]
    assert roles == ["generator", "reward", "policy", "critic", "evaluator"]
    assert "reference" in [request.role for request in role_requests(config_of())]
    written = yaml.safe_load(dump_config(config_of(*ADAPTED)))
    assert PPOConfig.model_validate(written) == config_of(*ADAPTED)
    without = config_of(*ADAPTED, "reference=null", "algorithm.kl={coefficient: 0, controller: fixed}")
    assert without.reference is None


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_experts_are_refused_by_name(kind: str):
    model = mixture(kind)
    for targets in ("all-linear", ["gate_up_proj"], ["experts"], ["q_proj", "down_proj"]):
        with pytest.raises(BadInput, match=r"the experts' down_proj, gate_up_proj are one parameter of all experts.*"):
            find_targets(model, LoraSettings(target_modules=targets), KEY)
    found = find_targets(model, LoraSettings(target_modules=["q_proj", "v_proj"]), KEY)
    assert len(found) == 4
    add_adapters(model, LoraSettings(target_modules=["q_proj", "v_proj"]), KEY, seed=0)
    weights = plain_weights(model)
    assert [name for name, weight in weights.items() if weight.adapter is not None] == [
        f"{name}.weight" for name in found
    ]
    assert {name.split(".")[3] for name, weight in weights.items() if weight.is_sent} == {"self_attn"}


@pytest.mark.parametrize("wanted", ["lm_head", "embed_tokens", "qproj", "proj", "norm", "self_attn"])
def test_names_of_no_linear_layer_are_refused_with_those_there_are(policy_model: str, wanted: str):
    with pytest.raises(BadInput, match=rf"{KEY}: '{wanted}': there is no linear layer .*down_proj, gate_proj, k_proj"):
        check_adapters(policy_model, LoraSettings(target_modules=["q_proj", wanted]), KEY)
    check_adapters(policy_model, LoraSettings(target_modules=["q_proj", "layers.0.mlp.up_proj"]), KEY)
    check_adapters(policy_model, None, KEY)


@pytest.mark.parametrize(("dtype", "zero_stage"), [("float32", 0), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3)])
def test_without_adapters_the_learner_is_the_base_model_bit_for_bit(
    policy_model: str, single_rank: Rank, dtype: str, zero_stage: int
):
    settings = {"dtype": dtype, "zero_stage": zero_stage, "micro_batch_tokens": 64}
    reference = Reference(policy_model, ReferenceSettings(dtype=dtype, micro_batch_tokens=64), 1.0)
    learner = learner_of(policy_model, single_rank, **settings)
    expected = [reference.logprobs(rollout).data for rollout in ROLLOUTS]
    for rollout, base in zip(ROLLOUTS, expected, strict=True):
        assert np.array_equal(learner.logprobs(rollout).data, base), "B is 0 at first"
    for step in range(2):
        assert train(learner, step).first_ratio_error < 1e-6
        for rollout, base in zip(ROLLOUTS, expected, strict=True):
            assert np.array_equal(learner.reference_logprobs(rollout).data, base)
            assert np.abs(learner.logprobs(rollout).data - base).max() > 1e-3


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_only_adapters_are_trained_and_merged_weights_are_sent(policy_model: str, single_rank: Rank, zero_stage: int):
    learner = learner_of(policy_model, single_rank, zero_stage=zero_stage)
    train(learner)
    layout = learner.weight_layout(20_000)
    buckets = [learner.weight_bucket(index) for index in range(len(layout))]
    assert [bucket.names for bucket in buckets if bucket is not None] == layout
    sent = {name: tensor.clone() for bucket in buckets if bucket is not None for name, tensor in bucket.tensors()}
    initial = weights_in(Path(policy_model))
    assert sent.keys() == {name for name in initial if "_proj." in name}
    for name, tensor in sent.items():
        assert not torch.equal(tensor, initial[name]), name


@pytest.mark.parametrize("zero_stage", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_both_exports_give_the_learners_logprobs(
    policy_model: str, tied_policy_model: str, single_rank: Rank, tmp_path: Path, zero_stage: int, tied: bool
):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tied_policy_model if tied else policy_model
    learner = learner_of(model, single_rank, zero_stage=zero_stage)
    for step in range(2):
        train(learner, step)
    learner.export(str(tmp_path / "policy"))
    learner.export_adapters(str(tmp_path / "adapters"))
    learner.save_checkpoint(str(tmp_path / "checkpoint"))
    columns = [learner.logprobs(rollout).data for rollout in ROLLOUTS]
    del learner  # While there is a ZeRO-3 engine, transformers partitions what it loads.
    gc.collect()
    settings = PolicySettings(model=model, lora=LoraSettings(rank=4, alpha=8))
    export_policy(settings, tmp_path / "checkpoint", tmp_path / "again")
    assert weights_in(tmp_path / "again").keys() == weights_in(tmp_path / "policy").keys()
    assert largest_difference(weights_in(tmp_path / "again"), weights_in(tmp_path / "policy")) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert set(weights_in(tmp_path / "policy")) == set(weights_in(Path(model)))
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<eos>"
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapters")
    for rollout, expected in zip(ROLLOUTS, columns, strict=True):
        for loaded in (merged, adapted):
            np.testing.assert_allclose(plain_logprobs(loaded, rollout), expected, rtol=0, atol=LOGITS)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def plain_logprobs(model: Any, rollout: Rollout) -> Any:
    """Of every response token, one sequence after another."""
    starts, found = 0, []
    for prompt, response in zip(rollout.prompt_lengths, rollout.response_lengths, strict=True):
        tokens = torch.from_numpy(rollout.tokens[starts : starts + prompt + response].astype(np.int64))
        starts += prompt + response
        with torch.no_grad():
            logprobs = model.eval()(input_ids=tokens[None]).logits[0].float().log_softmax(-1)
        found.append(logprobs[:-1].gather(-1, tokens[1:, None])[prompt - 1 :, 0])
    return torch.cat(found).numpy()


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_gradient_checkpointing_changes_nothing(policy_model: str, single_rank: Rank, zero_stage: int):
    """The inputs of the first layer are frozen: a reentrant checkpoint would lose its gradients."""
    reports, weights = [], []
    for checkpointing in (False, True):
        learner = learner_of(policy_model, single_rank, zero_stage=zero_stage, gradient_checkpointing=checkpointing)
        reports.append(train(learner))
        learner.weight_layout(1 << 30)
        bucket = learner.weight_bucket(0)
        assert bucket is not None
        weights.append({name: tensor.clone() for name, tensor in bucket.tensors()})
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-6)
    assert reports[0].grad_norm > 1e-3
    assert largest_difference(*weights) <= 1e-6


@pytest.mark.parametrize(("dtype", "zero_stage"), [("float32", 0), ("bfloat16", 1), ("bfloat16", 3)])
def test_a_checkpoint_brings_the_adapters_back(
    policy_model: str, single_rank: Rank, tmp_path: Path, dtype: str, zero_stage: int
):
    settings = {"dtype": dtype, "zero_stage": zero_stage, "warmup_steps": 4}
    learner = learner_of(policy_model, single_rank, **settings)
    train(learner)
    learner.save_checkpoint(str(tmp_path / "checkpoint"))
    reports = [train(learner, step=1)]
    resumed = learner_of(policy_model, single_rank, **settings)
    resumed.load_checkpoint(str(tmp_path / "checkpoint"))
    reports.append(train(resumed, step=1))
    assert reports[0] == reports[1]
    for number, each in enumerate((learner, resumed)):
        each.export_adapters(str(tmp_path / str(number)))
    files = [(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in range(2)]
    assert files[0] == files[1]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bfloat16_adapters_have_float32_master_weights(policy_model: str, single_rank: Rank, zero_stage: int):
    """Updates too small for bfloat16 add up."""
    from deepspeed.utils import safe_get_full_fp32_param

    learner = learner_of(policy_model, single_rank, dtype="bfloat16", zero_stage=zero_stage)
    factors = adapter_parameters(learner._engine.unwrapped)
    before = {name: safe_get_full_fp32_param(factor).clone() for name, factor in factors.items()}
    for step in range(2):  # The gradient of A is 0 while B is.
        train(learner, step)
    for name, factor in factors.items():
        master = safe_get_full_fp32_param(factor)
        assert master.dtype == torch.float32
        assert factor.dtype == torch.bfloat16
        assert not torch.equal(master, before[name])
        assert not torch.equal(master, master.bfloat16().float())


def test_supervised_training_takes_adapters(policy_model: str, single_rank: Rank):
    random = np.random.default_rng(0)
    examples = [TextExample(random.integers(3, 300, 12).astype(np.int32), learn_from=1) for _ in range(4)]
    learner = learner_of(policy_model, single_rank)
    losses = [learner.train_text(examples).loss for _ in range(4)]
    assert losses[-1] < losses[0]


def test_the_first_weights_follow_from_the_seed(policy_model: str, single_rank: Rank):
    def first(seed: int) -> dict[str, torch.Tensor]:
        policy = PolicySettings(model=policy_model, learner=learner_settings(), lora=LoraSettings(rank=4))
        torch.manual_seed(int(np.random.default_rng().integers(1 << 30)))
        learner = PolicyLearner(policy, ALGORITHM, single_rank, total_steps=20, seed=seed)
        return {name: t for name, t in parameters_of(learner._engine.unwrapped).items() if "lora_A" in name}

    assert largest_difference(first(1), first(1)) == 0
    assert largest_difference(first(1), first(2)) > 0
