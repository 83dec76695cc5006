"""Low-rank adapters (Hu et al. 2021) on a transformers model, and the plain weights that engines and directories get.

`peft` puts its layers into the model in place: it stays the transformers model that it was, with a frozen
`base_layer` beside each adapter. Everything outside the learner knows plain weights only, `W + scale · B A` under the
name of W. They are computed here, one at a time, because with ZeRO-3 no process ever has a whole model to merge.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from rlhf_ray.config.lora import LoraSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import NO_CODE

Head = Literal["CausalLM", "SequenceClassification"]

_ADAPTER = "default"
_BASE = ".base_layer."


@dataclass(frozen=True)
class PlainWeight:
    """A weight of the model without adapters.

    Attributes:
        parameter: the learner's parameter.
        adapter: peft's layer on it, or None.
        is_sent: whether an engine that has the model's directory needs it.
    """

    parameter: nn.Parameter
    adapter: Any
    is_sent: bool

    @property
    def parts(self) -> list[nn.Parameter]:
        """Everything that `value` reads, which ZeRO-3 must have gathered before."""
        return [self.parameter, *(_factors(self.adapter) if self.adapter is not None else ())]

    def value(self) -> torch.Tensor:
        """The weight; with an adapter `W + scale · B A`, computed in float32 and rounded to W's type once."""
        weight = self.parameter.data
        if self.adapter is None:
            return weight
        down, up = (factor.data.float() for factor in _factors(self.adapter))
        change = self.adapter.scaling[_ADAPTER] * (up @ down)
        if self.adapter.fan_in_fan_out:  # GPT-2's layers keep their weights transposed.
            change = change.T
        return (weight.float() + change).to(weight.dtype)


def plain_weights(model: nn.Module) -> dict[str, PlainWeight]:
    """All weights under the names that they have without adapters.

    Sent are trained parameters; with adapters all weights of the modules that contain an adapted layer. An engine fuses
    neighbours such as the projections of queries, keys and values into one layer, with their biases, and reloads it as
    a whole.
    """
    adapters = _adapters(model)
    factors = {id(factor) for adapter in adapters.values() for factor in _factors(adapter)}
    changed = tuple({name.removesuffix(name.rpartition(".")[2]) for name in adapters})
    weights = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in factors:
            layer, _, kind = name.rpartition(_BASE)
            adapter = adapters.get(layer) if kind == "weight" else None
            is_sent = parameter.requires_grad or name.startswith(changed)
            weights[name.replace(_BASE, ".")] = PlainWeight(parameter, adapter, is_sent)
    return weights


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a model's files hold beside its weights, such as the correction bias of a router."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers() if name in kept}


def add_adapters(model: Any, settings: LoraSettings, key: str, seed: int) -> None:
    """Freeze a transformers model behind adapters, which start at W: B is 0.

    Args:
        settings: what the adapters are like.
        key: of these settings.
        seed: of A, which is drawn at random.

    Raises:
        BadInput: a target cannot have an adapter.
    """
    from peft import LoraConfig, TaskType, inject_adapter_in_model

    targets = find_targets(model, settings, key)
    ends = _ends(targets) if settings.target_modules == "all-linear" else sorted(settings.target_modules)
    configuration = LoraConfig(
        task_type=TaskType.SEQ_CLS if model.get_output_embeddings() is None else TaskType.CAUSAL_LM,
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        target_modules=ends,
        # A head may have a layer of the same name as one of the layers below it.
        exclude_modules=[name for name in _linear_layers(model) if _ends_in(name, ends) and name not in targets]
        or None,
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Whether a layer keeps its weight transposed is decided for each, with a warning.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        torch.manual_seed(seed)
        inject_adapter_in_model(configuration, model, _ADAPTER)


def find_targets(model: Any, settings: LoraSettings, key: str) -> list[str]:
    """Full names of the layers that get an adapter.

    Args:
        model: a transformers model; without weights is enough.

    Raises:
        BadInput: under `key`, with the names that there are: a name is that of no layer, or of one that is not linear.
    """
    base = model.base_model
    inside = {id(module) for module in base.modules()}
    linear = [name for name, layer in _linear_layers(model).items() if id(layer) in inside]
    fused = _ends([name for name, parameter in base.named_parameters() if _dimensions(parameter) > 2])
    allowed = f"of {', '.join(_ends(linear))}"
    experts = f"the experts' {', '.join(fused)} are one parameter of all experts, and get no adapter"
    if settings.target_modules == "all-linear":
        if fused:
            raise BadInput(key, f"'all-linear' for a mixture of experts: {experts}", f"a list {allowed}")
        return linear
    targets: set[str] = set()
    for wanted in settings.target_modules:
        found = {name for name in linear if _ends_in(name, [wanted])}
        if not found:
            reason = experts if wanted in {*fused, "experts"} else "there is no linear layer of that name to adapt"
            raise BadInput(key, f"'{wanted}': {reason}", f"some {allowed}")
        targets |= found
    return sorted(targets)


def check_adapters(model: str, settings: LoraSettings | None, key: str, head: Head = "CausalLM") -> None:
    """See that a model has the layers that are to get adapters, without loading its weights.

    Args:
        model: Hugging Face directory or hub id.
        key: of the settings.
        head: that the model is loaded with.

    Raises:
        BadInput: see `find_targets`.
    """
    if settings is None:
        return
    import transformers

    with torch.device("meta"):
        kind = getattr(transformers, f"AutoModelFor{head}")
        empty = kind.from_config(transformers.AutoConfig.from_pretrained(model, **NO_CODE))
    find_targets(empty, settings, key)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters for the length of a block: what it computes is what it did before training."""
    # peft's own switch also takes the factors' gradients away, which DeepSpeed has hooks on.
    adapters = _adapters(model).values()
    for adapter in adapters:
        adapter._disable_adapters = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter._disable_adapters = False


def save_adapters(folder: Path, model: Any, factors: Mapping[str, torch.Tensor]) -> None:
    """The adapters as a directory that `peft.PeftModel.from_pretrained` reads.

    Args:
        model: with adapters.
        factors: `adapter_parameters` in full.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    configuration = copy(model.peft_config[_ADAPTER])
    configuration.inference_mode = True
    # A set, whose order is another in each process.
    configuration.target_modules = sorted(configuration.target_modules)
    configuration.save_pretrained(str(folder))
    saved = {f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": factor for name, factor in factors.items()}
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors A and B of all adapters, by name."""
    factors = {id(factor) for adapter in _adapters(model).values() for factor in _factors(adapter)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in factors}


def _adapters(model: nn.Module) -> dict[str, Any]:
    """peft's layers, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _factors(adapter: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A `[rank, in]` and B `[out, rank]`."""
    return adapter.lora_A[_ADAPTER].weight, adapter.lora_B[_ADAPTER].weight


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _dimensions(parameter: nn.Parameter) -> int:
    """ZeRO-3 shows a partition's shape as `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _ends_in(name: str, ends: Sequence[str]) -> bool:
    """As peft understands the names of targets."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _ends(names: Sequence[str]) -> list[str]:
    """The last part of each name, each once."""
    return sorted({name.rpartition(".")[2] for name in names})
