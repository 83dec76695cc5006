"""How much memory a process of a role needs at its peak, by arithmetic from the model's size and the settings.

What a network keeps is exact: weights, gradients, the optimizer's state, keys and values. Activations are those of a
decoder with a gated MLP. What a process is before it holds anything was measured, on a CPU with float32 models
(`python -m bench.ppo --parts memory`; docs/preflight.md has the comparison). Figures for GPUs were never measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config.reward import RewardSettings, ScorerSettings
from rlhf_ray.config.settings import GeneratorSettings, LearnerSettings, ReferenceSettings
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.models.packing import SHORT_WIDTH
from rlhf_ray.models.sizes import ITEM_BYTES, ModelSize
from rlhf_ray.models.token_loss import CHUNK_BYTES
from rlhf_ray.roles.deepspeed_engine import deepspeed_configuration

_FLOAT32 = 4
_LEARNER, _REFERENCE, _SCORER, _ENGINE = 0.46e9, 0.41e9, 0.40e9, 0.66e9
"""Bytes of a process with its libraries, on a CPU."""
DRIVER_BYTES, RAY_BYTES = 0.5e9, 0.6e9
_HEAP = 1.7
"""How much of a CPU's memory the tensors of a training pass take up, by their size: what is freed on the way leaves
gaps between those that are kept."""
_CUDA_HOST, _CUDA_DEVICE = 3e9, 1e9
"""Bytes of a process with CUDA's libraries, in the node's memory and on the GPU. Bare torch takes 1.1 and 0.64 GB on an
H200; what vLLM and DeepSpeed add was not measured."""
_REDUCE_BUCKET, _LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults, in elements."""

Parts = dict[str, float]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Memory:
    """What one process needs.

    Attributes:
        host: in the node's memory.
        device: on its GPU; empty on a CPU.
        first: more in the node's memory of a group's first process, which gathers the weights that are written.
    """

    host: Parts
    device: Parts = field(default_factory=dict)
    first: float = 0.0

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def first_bytes(self) -> float:
        """In the node's memory, of a group's first process."""
        return self.host_bytes + self.first

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())


@dataclass(frozen=True)
class Pass:
    """One forward pass over a packed row.

    Attributes:
        tokens: in it.
        predicted: of these; they reach the output projection.
        width: of the longest sequence.
    """

    tokens: int
    predicted: int
    width: int

    @classmethod
    def of(cls, micro_batch_tokens: int, samples: int, prompt: int, response: int) -> Pass:
        """The largest of a role that has so many samples, each as long as it may be; none is split."""
        length = prompt + response
        fitting = max(min(micro_batch_tokens // length, samples), 1)
        return cls(fitting * length, fitting * response, length)


def learner_memory(
    settings: LearnerSettings, size: ModelSize, work: Pass, *, has_entropy: bool = False, has_head: bool = True
) -> Memory:
    """A rank of a learner.

    Args:
        work: its largest micro-batch.
        has_entropy: the loss has an entropy bonus.
        has_head: the output projection is computed (not by a critic).
    """
    on_gpu = settings.gpus > 0
    dtype = resolve_dtype(settings.dtype, on_gpu)
    item, ranks = ITEM_BYTES[dtype], settings.replicas
    zero: dict[str, Any] = deepspeed_configuration(settings, dtype, ranks)["zero_optimization"]
    stage = int(zero["stage"])
    weights = item * size.parameters / (ranks if stage == 3 else 1)
    gradients = _FLOAT32 * size.trained / (ranks if stage >= 2 else 1)
    moments = 2 * _FLOAT32 * size.trained / (ranks if stage else 1)
    master = _FLOAT32 * size.trained / ranks if stage else 0.0
    heap = 1.0 if on_gpu else _HEAP
    parts: Parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": master + moments,
        "buffers": _buffers(zero, size, item, ranks, on_gpu),
        "activations": heap * kept_activations(size, work, item, settings.gradient_checkpointing, on_gpu),
        "logits": heap * _logits(settings, size, work, item, on_gpu, has_entropy) if has_head else 0.0,
    }
    # The embedding's gradient is as large as the embedding, and lies beside the sum of those before it.
    if size.trained_layers == size.layers:
        parts["gradients"] += item * size.projection
    moved: Parts = {}
    for name, option in (("optimizer", "offload_optimizer"), ("weights", "offload_param")):
        device = (zero.get(option) or {}).get("device", "none")
        if device != "none":
            moved[name] = parts.pop(name) * (device == "cpu")
    if not on_gpu:
        return Memory({"process": _LEARNER, **parts, **moved})
    # Loaded into the node's memory first, but where ZeRO-3 partitions while it loads.
    loading = 0.0 if stage == 3 else item * size.parameters
    exported = item * size.parameters - loading
    return Memory({"process": _CUDA_HOST, "loading": loading, **moved}, {"process": _CUDA_DEVICE, **parts}, exported)


def reference_memory(settings: ReferenceSettings, size: ModelSize, work: Pass) -> Memory:
    """A replica of the reference, or a rank where it is spread over several."""
    item = ITEM_BYTES[resolve_dtype(settings.dtype, settings.gpus > 0)]
    parts: Parts = {
        "weights": item * size.parameters / (settings.replicas if settings.sharded else 1),
        "activations": _passing_activations(size, work, item, settings.gpus > 0),
        "logits": _projection(settings, size, item) + _chunk(size, work, settings.gpus > 0),
    }
    return _placed(parts, _REFERENCE, settings.gpus)


def scorer_memory(settings: ScorerSettings, size: ModelSize, members: int = 1) -> Memory:
    """A scorer with a reward model, or an ensemble of them; a rank where it is spread over several."""
    ranks = settings.replicas if isinstance(settings, RewardSettings) and settings.sharded else 1
    on_gpu = settings.gpus > 0
    item = ITEM_BYTES[resolve_dtype(settings.dtype, on_gpu)]
    tokens = settings.batch_tokens or (32_768 if on_gpu else 4096)
    width = min(settings.max_length or tokens, tokens)
    parts: Parts = {
        "weights": members * item * size.parameters / ranks,
        "activations": _passing_activations(size, Pass(tokens, 0, width), item, on_gpu),
    }
    return _placed(parts, _SCORER, settings.gpus)


def generator_memory(
    settings: GeneratorSettings, size: ModelSize, context_tokens: int, published: float = 0.0
) -> Memory:
    """An engine.

    On a GPU whose share decides, the engine takes all of it for keys and values; here are those of one sequence, which
    it must have room for.

    Args:
        published: bytes of one version of the weights that are loaded between steps; 0 where they are broadcast.
    """
    item = ITEM_BYTES[resolve_dtype(settings.dtype, settings.gpus > 0)]
    weights = item * size.parameters / settings.tensor_parallel
    cache = settings.kv_cache_bytes or size.kv_bytes(item) * context_tokens / settings.tensor_parallel
    if not settings.gpus:
        # Layers pack their weights for the CPU, and the output projection keeps a copy of a tied embedding. While a
        # version is loaded, the new weights of each layer are there beside the packed ones.
        packed = item * size.projection if size.tied else 0.0
        return Memory(
            {"process": _ENGINE, "weights": weights + packed, "next weights": published, "KV cache": float(cache)}
        )
    return Memory({"process": _CUDA_HOST}, {"process": _CUDA_DEVICE, "weights": weights, "KV cache": float(cache)})


def process_memory() -> Memory:
    """A process that holds no model."""
    return Memory({"process": _SCORER})


def _buffers(zero: dict[str, Any], size: ModelSize, item: int, ranks: int, on_gpu: bool) -> float:
    """What DeepSpeed holds beside the sums of the gradients.

    Stage 1 in bfloat16: all gradients of a backward pass, which are added to the float32 sums. Otherwise a bucket that
    gradients are reduced in, with the flat copy of a rank's share; in stage 3 gathered weights. On a CPU pages of a
    bucket that are never touched take no memory, but the weights leave a gap in the heap where they were flattened.
    """
    stage, bucket = int(zero["stage"]), float(zero.get("reduce_bucket_size", _REDUCE_BUCKET))
    if stage == 0:
        return 0.0
    if stage == 1 and item < _FLOAT32:
        return float(item * size.trained)
    buffers = item * (bucket if on_gpu else min(bucket, size.trained))
    if stage == 3:
        return buffers + item * min(float(zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS)), size.parameters)
    return buffers + _FLOAT32 * size.trained / ranks + (0 if on_gpu else item * size.trained)


def _placed(parts: Parts, process: float, gpus: float) -> Memory:
    """On the GPU where there is one."""
    if gpus:
        return Memory({"process": _CUDA_HOST}, {"process": _CUDA_DEVICE, **parts})
    return Memory({"process": process, **parts})


def _layer_activations(size: ModelSize, work: Pass, item: int, on_gpu: bool) -> float:
    """Of one layer, kept for its backward pass.

    Two norms keep what they are given in float32, normalised and scaled; attention keeps queries, keys, values and
    what comes of them; a gated MLP keeps gate, its activation, up and their product. On a CPU attention lays the row
    out as a padded batch, a second copy; written out (short sequences) it keeps this copy and its weights in float32.
    """
    norms = 2 * size.hidden * (_FLOAT32 + 2 * item)
    attention = item * 2 * (size.heads + size.kv_heads) * size.head_size
    padded = 0 if on_gpu else attention
    if not on_gpu and work.width <= SHORT_WIDTH:
        padded = _FLOAT32 * (size.heads * work.width + (size.heads + 2 * size.kv_heads) * size.head_size)
    return float(work.tokens * (norms + attention + padded + 4 * item * size.intermediate))


def kept_activations(size: ModelSize, work: Pass, item: int, checkpointed: bool, on_gpu: bool) -> float:
    layer = _layer_activations(size, work, item, on_gpu)
    if checkpointed:
        return layer + size.trained_layers * work.tokens * size.hidden * item
    return layer * size.trained_layers


def _passing_activations(size: ModelSize, work: Pass, item: int, on_gpu: bool) -> float:
    """Without gradients the tensors of one layer are freed as it goes on; at most a few are there."""
    return _layer_activations(size, work, item, on_gpu) / 2


def _chunk(size: ModelSize, work: Pass, on_gpu: bool) -> float:
    """Float32 logits of one chunk of positions."""
    return min(_FLOAT32 * size.vocabulary * work.predicted, CHUNK_BYTES["cuda" if on_gpu else "cpu"])


def _projection(settings: LearnerSettings | ReferenceSettings, size: ModelSize, item: int) -> float:
    """The float32 copy of the projection's weights, where a device cannot sum in float32 without one."""
    return _FLOAT32 * size.projection if settings.float32_logits and item < _FLOAT32 and not settings.gpus else 0.0


def _logits(
    settings: LearnerSettings, size: ModelSize, work: Pass, item: int, on_gpu: bool, has_entropy: bool
) -> float:
    """Chunks of logits and probabilities, one more for the entropy's gradient, and the projection's gradient."""
    chunks = _chunk(size, work, on_gpu) * (3 if has_entropy else 2)
    gradient = item * size.projection if size.trained_layers == size.layers or not size.tied else 0.0
    return chunks + gradient + _projection(settings, size, item)
