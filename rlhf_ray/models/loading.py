"""Loading models from Hugging Face directories, in the type and with the attention of the device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_ray.failures import BadInput, OutOfReach

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Of every `from_pretrained`: code that lies beside a model is never run."""
SAFE_WEIGHTS: dict[str, Any] = {**NO_CODE, "use_safetensors": True}
"""Of every `from_pretrained` of weights: pickles, which run code when they are loaded, are never opened."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WINDOW_IN_THE_MASK = {"doge", "phimoe", "qwen2_moe"}
"""Architectures of transformers 5.19 that tell their attention of a sliding window by the mask alone."""
_PACKED_LAYER_TYPES = {"full_attention", "sliding_attention"}
"""Kinds of layers that keep to the sequences of a packed row."""


@dataclass(frozen=True)
class ModelFacts:
    """What can be known of a model without loading it.

    Attributes:
        vocab_size: rows of its embedding.
        context_tokens: longest sequence of positions.
        num_layers: transformer layers.
        num_labels: of a classifier's head; transformers' default where the configuration names none.
        architectures: class names that the weights were saved from.
    """

    vocab_size: int
    context_tokens: int
    num_layers: int
    num_labels: int
    architectures: tuple[str, ...]


def read_model_facts(model: str, key: str) -> ModelFacts:
    """Read a model's configuration and see that its weights are there, whole, and in the safetensors format.

    Raises:
        BadInput: under `key`, when there is no such directory or hub model, a file is missing or broken, the weights
            are pickled, or the model needs code of its own; `OutOfReach` when the hub cannot be asked.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
    from transformers import AutoConfig

    folder = Path(model)
    if folder.is_dir():
        check_weight_files(folder, key)
    elif model.startswith((".", "/", "~")) or model.count("/") != 1 or folder.parent.is_dir():
        raise BadInput(
            key,
            f"there is no directory '{model}'",
            "a Hugging Face directory (see `rlhf-ray prepare --help`) or a hub id such as 'org/name'",
        )
    try:
        found = AutoConfig.from_pretrained(model, **NO_CODE)
        if not folder.is_dir():
            _check_hub_weights(model, key)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        is_unreachable = isinstance(error.__cause__, LocalEntryNotFoundError)
        raise (OutOfReach if is_unreachable else BadInput)(
            key, f"'{model}' cannot be read ({_first_line(error)})", "a Hugging Face directory or hub id"
        ) from None
    if not hasattr(found, "vocab_size"):
        raise BadInput(
            key, f"the configuration of '{model}' ({found.model_type}) has no vocab_size", "a model that reads text"
        )
    return ModelFacts(
        vocab_size=int(found.vocab_size),
        context_tokens=int(getattr(found, "max_position_embeddings", None) or 1 << 20),
        num_layers=int(getattr(found, "num_hidden_layers", 0)),
        num_labels=int(getattr(found, "num_labels", 0) or 0),
        architectures=tuple(found.architectures or ()),
    )


def load_tokenizer(model: str, key: str) -> Any:
    """The tokenizer in a model's directory.

    Raises:
        BadInput: under `key`, when there is none or it does not fit the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **NO_CODE)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise BadInput(
            key,
            f"'{model}' has no readable tokenizer ({_first_line(error)})",
            "a directory with tokenizer.json and tokenizer_config.json",
        ) from None
    return tokenizer


def load_policy_tokenizer(model: str, key: str) -> Any:
    """A tokenizer that can end a response.

    Raises:
        BadInput: as `load_tokenizer`, or it has no end-of-sequence token.
    """
    tokenizer = load_tokenizer(model, key)
    if tokenizer.eos_token_id is None:
        raise BadInput(
            key, f"the tokenizer of '{model}' has no end-of-sequence token", "a tokenizer with eos_token set"
        )
    return tokenizer


def check_tokenizer_fits(tokenizer: Any, facts: ModelFacts, model: str, key: str) -> None:
    """Every token id must have a row in the embedding; a foreign tokenizer trains in silence and learns nothing."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= facts.vocab_size:
        raise BadInput(
            key,
            f"the tokenizer of '{model}' does not fit the model: its highest token id is {highest}, "
            f"the embedding has {facts.vocab_size} rows",
            "the tokenizer that the model was trained with",
        )


def check_language_model(facts: ModelFacts, model: str, key: str) -> None:
    """See that a directory holds a language model that learner and engine can both run.

    Raises:
        BadInput: it is a reward model, which would get a randomly initialised language-model head; or an architecture
            whose sequences cannot share a packed row.
    """
    if any("SequenceClassification" in name for name in facts.architectures):
        raise BadInput(
            key,
            f"'{model}' is a {', '.join(facts.architectures)}; its language-model head would be randomly initialised",
            "an AutoModelForCausalLM directory",
        )
    check_packed_rows(model, key)


def check_packed_rows(model: str, key: str) -> None:
    """See that a model's backbone keeps the sequences of a packed row apart.

    The same property lets vLLM run an architecture that it has no class of its own for.

    Raises:
        BadInput: it does not.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(model, **NO_CODE)
    reason = None
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "transformers has no decoder-only language model of this kind"
    else:
        network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        other_layers = set(getattr(config, "layer_types", None) or ()) - _PACKED_LAYER_TYPES
        if getattr(network, "_is_stateful", False):
            reason = "it has recurrent layers, whose state would run from one sequence of a packed row into the next"
        elif other_layers:
            reason = f"it has layers of the kind {', '.join(sorted(other_layers))}"
        elif config.model_type in _WINDOW_IN_THE_MASK and getattr(config, "sliding_window", None):
            reason = "its sliding window is in a mask, which packed rows do without"
        elif not getattr(network, "_supports_attention_backend", False):
            reason = "its attention cannot be replaced by one that takes packed rows"
    if reason is not None:
        raise BadInput(
            key,
            f"'{model}' ({config.model_type}) cannot be trained: {reason}",
            "a decoder with full or sliding-window attention, such as Llama, Qwen, Mistral or Gemma",
        )


def check_top_layers(top_layers: int | None, facts: ModelFacts, key: str) -> None:
    """See that there are as many layers as are to be trained."""
    if top_layers is not None and facts.num_layers and top_layers > facts.num_layers:
        raise BadInput(key, f"{top_layers} layers", f"at most {facts.num_layers}, or empty for all")


def check_weight_files(folder: Path, key: str) -> None:
    """See that a model's directory has whole weights in the safetensors format.

    Raises:
        BadInput: under `key`, naming what is missing, broken or pickled.
    """
    if not (folder / "config.json").is_file():
        raise BadInput(key, f"'{folder}' has no config.json", "a Hugging Face directory")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(key, f"'{index}' is not a weight index", "an undamaged copy") from None
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise BadInput(key, f"'{folder}' lacks {', '.join(missing[:3])}", "all shards named in the weight index")
        for name in shards:
            _check_safetensors(folder / name, key)
    elif single.is_file():
        _check_safetensors(single, key)
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise _pickled(key, str(folder), pickles)
        raise BadInput(key, f"'{folder}' has no weights", "model.safetensors beside config.json")


def _check_hub_weights(model: str, key: str) -> None:
    from transformers.utils import (
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
        has_file,
    )

    if any(has_file(model, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return
    pickles = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if has_file(model, name)]
    if pickles:
        raise _pickled(key, model, pickles)


def _pickled(key: str, model: str, names: list[str]) -> BadInput:
    return BadInput(
        key,
        f"'{model}' has pickled weights ({', '.join(names[:3])}), which can run any code when they are loaded",
        "weights in the safetensors format (where you trust the pickle: load it with transformers and "
        "`save_pretrained` it)",
    )


def _check_safetensors(path: Path, key: str) -> None:
    """Only the header is read, and it says how long the file must be."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(header_size)) if 0 < header_size < size else {}
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise BadInput(key, f"'{path}' is not a safetensors file", "an undamaged copy") from None
    if 8 + header_size + end > size:
        raise BadInput(key, f"'{path}' is cut short ({size} bytes)", "an undamaged copy")


@cache
def cpu_entry(name: str) -> str:
    """What the kernel says of this machine's first CPU, such as its `flags`; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions; without them bf16 is slower than fp32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_entry("flags").split())


def resolve_dtype(dtype: str, on_gpu: bool) -> str:
    """`auto` to `bfloat16` where it is the faster type, else `float32`."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_gpu or cpu_has_bf16() else "float32"


def resolve_attention(attention: str) -> str:
    """`auto` to an attention that takes packed rows, registered with transformers."""
    from rlhf_ray.models.packing import register_packed_sdpa

    register_packed_sdpa()
    return "packed_sdpa" if attention == "auto" else attention


_ATTENTION_PACKAGES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}


def check_attention(attention: str, key: str) -> None:
    """See that there is such a kernel, before a role looks for it.

    Without the package of one, transformers may fetch a compiled kernel from a hub, and run it.

    Raises:
        BadInput: naming the key.
    """
    from transformers import AttentionInterface

    known = ("auto", "packed_sdpa", "eager", *(name for name in AttentionInterface().valid_keys() if "|" not in name))
    if attention not in known:
        raise BadInput(key, f"no attention is called '{attention}'", f"one of {', '.join(dict.fromkeys(known))}")
    package = _ATTENTION_PACKAGES.get(attention)
    if package is not None and not _is_installed(package):
        raise BadInput(key, f"{attention} needs the package {package}, which is not installed", "auto, or install it")


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False  # of which it would be a part


def resolve_padded_attention(attention: str, on_gpu: bool) -> str:
    """`auto` to an attention for padded batches: on a CPU plain matrix products, whose backward pass is the faster one
    for the short texts that a CPU is used for."""
    if attention == "auto":
        return "sdpa" if on_gpu else "eager"
    return attention


_AFTER_THE_LAYERS = {"norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "project_out", "pooler"}
"""What architectures call the modules between the last layer and the head."""


def train_only_top_layers(model: Any, num_layers: int | None) -> None:
    """Freeze all but the last layers, the final norm and the head.

    A head that shares its weights with the embedding stays frozen with it.

    Args:
        model: a transformers model, with a head or without.
        num_layers: layers from the top that stay trainable; none: every parameter is trained.
    """
    if num_layers is None:
        return
    base = model.base_model
    layers, owner = _layer_stack(model)
    trained: list[Any] = layers[max(len(layers) - num_layers, 0) :]
    for part in {owner, base}:
        trained += [module for name, module in part.named_children() if name in _AFTER_THE_LAYERS]
    of_base = {id(parameter) for parameter in base.parameters()}
    head = [parameter for parameter in model.parameters() if id(parameter) not in of_base]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in [parameter for module in trained for parameter in module.parameters()] + head:
        parameter.requires_grad_(True)


def restore_rotary_frequencies(model: Any) -> None:
    """Give rotary embeddings their float32 frequencies back.

    Transformers keeps them in float32 whatever the type of the weights. ZeRO-3 in bfloat16 computes and stores every
    tensor of a new module in bfloat16, and frequencies of 8 bits turn far positions by whole radians.
    """
    for module in list(model.modules()):
        if "RotaryEmbedding" in type(module).__name__ and hasattr(module, "config"):
            for name, buffer in type(module)(module.config).named_buffers(recurse=False):
                setattr(module, name, buffer.to(getattr(module, name).device))


def frozen_layers(model: Any, num_layers: int) -> list[Any]:
    """The layers that `train_only_top_layers` freezes, from the first on."""
    layers, _ = _layer_stack(model)
    return layers[: max(len(layers) - num_layers, 0)]


def _layer_stack(model: Any) -> tuple[list[Any], Any]:
    """A transformers model's layers, and the module that runs them."""
    base = model.base_model
    stacks = {name: part for name, part in base.named_modules() if type(part).__name__ == "ModuleList"}
    # The stack of layers is the outermost list of that length; where layers share weights, the longest list.
    wanted = getattr(model.config, "num_hidden_layers", None)
    where = next((name for name, part in stacks.items() if len(part) == wanted), None)
    if where is None:
        where = max(stacks, key=lambda name: len(stacks[name]))
    return list(stacks[where]), base.get_submodule(where.rpartition(".")[0])


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
