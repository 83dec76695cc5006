"""What is wrong with a model's directory is said before anything is loaded."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench.architectures import cases, configuration
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import (
    check_language_model,
    check_packed_rows,
    check_tokenizer_fits,
    load_policy_tokenizer,
    load_tokenizer,
    read_model_facts,
    resolve_attention,
    resolve_dtype,
    train_only_top_layers,
)
from rlhf_ray.models.token_models import load_policy_model
from rlhf_ray.ppo.inputs import read_inputs
from tests.conftest import REPOSITORY


@pytest.fixture
def model(policy_model: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(policy_model, tmp_path / "model"))


def refusal(model: Path | str) -> str:
    with pytest.raises(BadInput) as caught:
        read_model_facts(str(model), "policy.model")
    assert caught.value.where == "policy.model"
    assert "\n" not in str(caught.value)
    return caught.value.found


def test_facts(model: Path, tiny: Path):
    facts = read_model_facts(str(model), "policy.model")
    assert (facts.context_tokens, facts.num_layers) == (256, 2)
    assert facts.architectures == ("LlamaForCausalLM",)
    assert read_model_facts(str(tiny / "reward_model"), "reward.model").num_labels == 1


@pytest.mark.parametrize("name", ["/no/such/place", "./nothing", "data/tiny/policie", "a-bare-name"])
def test_missing_directory(name: str):
    assert f"'{name}'" in refusal(name)


def test_hub_id_that_cannot_be_read():
    assert "some-org/no-such-model" in refusal("some-org/no-such-model")


def test_no_configuration(model: Path):
    (model / "config.json").unlink()
    assert "has no config.json" in refusal(model)


def test_broken_configuration(model: Path):
    (model / "config.json").write_text("{")
    assert "cannot be read" in refusal(model)


def test_configuration_without_a_vocabulary(model: Path):
    (model / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    assert "vocab_size" in refusal(model)


def test_no_weights(model: Path):
    (model / "model.safetensors").unlink()
    assert "has no weights" in refusal(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_by_name(model: Path, name: str):
    (model / "model.safetensors").rename(model / name)
    assert f"has pickled weights ({name}), which can run any code" in refusal(model)


def test_a_pickle_beside_whole_weights_is_never_opened(model: Path):
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    read_model_facts(str(model), "policy.model")
    load_policy_model(
        str(model), dtype="float32", attention=resolve_attention("auto"), temperature=1.0, float32_logits=True
    )


@pytest.mark.parametrize("name", ["policy.model", "reference.model", "critic.model", "reward.model"])
def test_every_role_refuses_pickles_before_any_actor_starts(tiny: Path, tmp_path: Path, name: str):
    source = tiny / ("reward_model" if name == "reward.model" else "policy")
    pickled = Path(shutil.copytree(source, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    overrides = [f"paths.data={tiny.parent}", f"{name}={pickled}"]
    config = load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", overrides)
    with pytest.raises(BadInput, match=r"has pickled weights \(pytorch_model\.bin\)") as caught:
        read_inputs(config)
    assert caught.value.where == name


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as the hub's cache has it, under the id `some-org/some-model`; gives its files."""
    cached = tmp_path / "hub" / "models--some-org--some-model"
    files = cached / "snapshots" / "0123"
    shutil.copytree(model, files)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return files


def test_pickled_weights_of_a_hub_model_are_refused(hub: Path):
    read_model_facts("some-org/some-model", "policy.model")
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    assert "'some-org/some-model' has pickled weights (pytorch_model.bin)" in refusal("some-org/some-model")


def test_code_beside_a_model_never_runs(model: Path, tmp_path: Path):
    """A configuration of an unknown kind that brings its own class, and a tokenizer that does."""
    config = json.loads((model / "config.json").read_text())
    planted = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (model / "planted.py").write_text(planted)
    own = {**config, "model_type": "of-its-own", "auto_map": {"AutoConfig": "planted.Config"}}
    (model / "config.json").write_text(json.dumps(own))
    assert "cannot be read (" in refusal(model)
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": [None, "planted.Tokenizer"]}, "tokenizer_class": "OfItsOwn"}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with suppress(BadInput):  # whether transformers has a class of its own to fall back to
        load_tokenizer(str(model), "policy.model")
    assert not (tmp_path / "ran").exists()


def test_truncated_weights(model: Path):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is cut short" in refusal(model)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\x04" + b"\x00" * 7 + b"[1]x", b"version https://git-lfs"])
def test_weights_that_are_none(model: Path, content: bytes):
    (model / "model.safetensors").write_bytes(content)
    assert "is not a safetensors file" in refusal(model)


def shard(model: Path) -> list[Path]:
    """Split the weights into two files with an index, as large models come."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, model / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [model / file for file in parts]


def test_missing_shard(model: Path):
    shards = shard(model)
    assert read_model_facts(str(model), "policy.model").num_layers == 2
    shards[1].unlink()
    assert "lacks b.safetensors" in refusal(model)


def test_truncated_shard(model: Path):
    shards = shard(model)
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    assert "b.safetensors' is cut short" in refusal(model)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_broken_index(model: Path, content: str):
    shard(model)
    (model / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(model)


def test_no_tokenizer(model: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(BadInput, match=r"policy\.model: .*no readable tokenizer"):
        load_tokenizer(str(model), "policy.model")


def test_tokenizer_without_an_end(model: Path):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="no end-of-sequence token"):
        load_policy_tokenizer(str(model), "policy.model")


def test_tokenizer_larger_than_the_embedding(model: Path):
    tokenizer = load_tokenizer(str(model), "policy.model")
    facts = read_model_facts(str(model), "policy.model")
    check_tokenizer_fits(tokenizer, facts, str(model), "policy.model")
    tokenizer.add_tokens([f"<new-{index}>" for index in range(facts.vocab_size - len(tokenizer) + 1)])
    with pytest.raises(BadInput, match=f"highest token id is {facts.vocab_size}") as caught:
        check_tokenizer_fits(tokenizer, facts, str(model), "policy.model")
    assert caught.value.where == "policy.model"


def test_a_reward_model_is_no_language_model(model: Path, tiny: Path):
    check_language_model(read_model_facts(str(model), "policy.model"), str(model), "policy.model")
    facts = read_model_facts(str(tiny / "reward_model"), "best_of_n.policy")
    with pytest.raises(BadInput, match="'it' is a LlamaForSequenceClassification") as caught:
        check_language_model(facts, "it", "best_of_n.policy")
    assert caught.value.where == "best_of_n.policy"


def test_types_and_attention():
    assert resolve_dtype("auto", on_gpu=True) == "bfloat16"
    assert resolve_dtype("float32", on_gpu=True) == "float32"
    assert resolve_attention("auto") == "packed_sdpa"
    assert resolve_attention("eager") == "eager"


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_the_faster_type_of_this_cpu(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str):
    monkeypatch.setattr("rlhf_ray.models.loading.cpu_has_bf16", lambda: has_bf16)
    assert resolve_dtype("auto", on_gpu=False) == expected
    assert resolve_dtype("float32", on_gpu=False) == "float32"


def with_configuration(model: Path, **changed: Any) -> str:
    """The model's directory with other entries in its configuration."""
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return str(model)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model_type": "t5"}, "no decoder-only language model"),
        ({"model_type": "vit"}, "no decoder-only language model"),
        ({"model_type": "mamba"}, "recurrent layers"),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "layers of the kind conv"),
        (
            {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 8},
            "its sliding window is in a mask",
        ),
        ({"model_type": "bloom"}, "its attention cannot be replaced"),
    ],
)
def test_an_architecture_that_cannot_keep_sequences_apart_is_refused(model: Path, changed: Any, reason: str):
    check_packed_rows(str(model), "critic.model")
    with pytest.raises(BadInput, match=reason) as caught:
        check_packed_rows(with_configuration(model, **changed), "critic.model")
    assert caught.value.where == "critic.model"
    assert changed["model_type"] in caught.value.found


@pytest.mark.parametrize(("name", "tied"), cases())
def test_top_layers_of_a_decoder(name: str, tied: bool, policy_tokenizer: Any):
    """The last layer, the final norm and a head of its own; with a head and without."""
    from transformers import AutoModel, AutoModelForCausalLM

    config = configuration(name, tied, policy_tokenizer)
    model = AutoModelForCausalLM.from_config(config)
    train_only_top_layers(model, 1)
    trained = {each for each, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {each for each in trained if re.search(r"^[a-z_]+\.(decoder\.)?(norm|ln_f|final_layer_norm)\.", each)}
    head = {each for each in trained if each.startswith("lm_head.")}
    assert norms
    assert bool(head) != tied
    layer = trained - norms - head
    assert layer == {each for each, _ in model.named_parameters() if re.search(r"\.(h|layers)\.1\.", each)}
    backbone = AutoModel.from_config(config)
    train_only_top_layers(backbone, 1)
    own = {each for each, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert own == {each.removeprefix(f"{model.base_model_prefix}.") for each in trained - head}


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=1, num_labels=1
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (0, ("bert.pooler", "classifier")),
        (1, ("bert.encoder.layer.2", "bert.pooler", "classifier")),
        (9, ("bert.encoder.layer", "bert.pooler", "classifier")),
    ],
)
def test_top_layers_of_an_encoder(num_layers: int, expected: tuple[str, ...]):
    model = bert()
    train_only_top_layers(model, num_layers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(expected)}


def test_no_number_of_layers_trains_all():
    model = bert()
    train_only_top_layers(model, None)
    assert all(parameter.requires_grad for parameter in model.parameters())
