"""One rank of a data-parallel group that trains a module with DeepSpeed.

What DeepSpeed is asked for: ZeRO, mixed precision, gradient reduction and clipping. What stays here: which
micro-batches make up an optimizer step and what the learning rate is. Losses arrive as sums divided by the
normaliser of the whole minibatch over all ranks, so the gradient does not depend on how the minibatch was cut.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.schedule import learning_rate
from rlhf_ray.config.settings import LearnerSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.models.adapters import persistent_buffers, plain_weights
from rlhf_ray.models.loading import restore_rotary_frequencies
from rlhf_ray.models.token_models import gathered
from rlhf_ray.roles.rank_group import Batch, Rank, RankEngine
from rlhf_ray.roles.relayout import STATE, Layout, SavedLearner, write_anew


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: norm of the gradient before clipping, and the learning rate used."""

    grad_norm: float
    learning_rate: float


def mean_grad_norm(updates: Sequence[StepReport]) -> float:
    """Over the updates of one step."""
    return sum(update.grad_norm for update in updates) / len(updates)


class DeepSpeedEngine(RankEngine):
    """Trains one module. Every method is a collective: all ranks of the group call it together.

    Args:
        build: makes the module (in ZeRO-3 it is called where parameters are partitioned as they are loaded).
        settings: how it is trained.
        rank: this process.
        dtype: compute type by name, already resolved.
        total_steps: optimizer steps of the whole run, for the learning rate's schedule.
    """

    def __init__(
        self, build: Callable[[], torch.nn.Module], settings: LearnerSettings, rank: Rank, dtype: str, total_steps: int
    ) -> None:
        super().__init__(rank, settings.gpus > 0)
        import deepspeed

        self._settings = settings
        self._total_steps = total_steps
        self.steps_done = 0
        configuration = deepspeed_configuration(settings, dtype, rank.world_size)
        self._zero_stage = int(configuration["zero_optimization"]["stage"])
        if self._zero_stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            # transformers partitions while it loads as long as this object is alive.
            self._partitioned_loading = HfDeepSpeedConfig(configuration)
        module = build()
        if self._zero_stage == 3:
            restore_rotary_frequencies(module)
        if settings.gradient_checkpointing:
            for part in module.children():
                if hasattr(part, "gradient_checkpointing_enable"):
                    part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        groups = _parameter_groups(module, settings.weight_decay)
        self._layout = Layout(self._zero_stage, rank.world_size, dtype, len(groups))
        optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=configuration, dist_init_required=False
        )
        self.module = self._engine
        if self._zero_stage == 0 and rank.world_size == 1:
            # There is nobody to reduce with, and DeepSpeed would copy all gradients into one buffer for it.
            self._engine.enable_backward_allreduce = False

    @property
    def unwrapped(self) -> Any:
        """The module as it was built."""
        return self._engine.module

    def optimizer_step(self, batches: Sequence[Batch], loss: Callable[[Batch, bool], torch.Tensor]) -> StepReport:
        """Forward and backward over this rank's micro-batches, then one step.

        Args:
            batches: at least one.
            loss: a micro-batch's part of the minibatch's loss: its sum over this micro-batch, divided by the
                normaliser of the whole minibatch over all ranks. The second argument is false where a rank that has run
                out goes along with a micro-batch it has had: the loss is dropped, and nothing may be counted again.

        Raises:
            RoleFailure: the gradient is not finite. The weights are what they were before.
        """
        rate = learning_rate(self.steps_done, self._settings, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._engine.train()
        rounds = list(self.common_rounds(batches))
        for index, (batch, real) in enumerate(rounds):
            # DeepSpeed averages over ranks, ours is a sum; a rank that has run out joins in with nothing.
            value = loss(batch, real) * (self.rank.world_size if real else 0.0)
            self._engine.set_gradient_accumulation_boundary(index == len(rounds) - 1)
            self._engine.backward(value)
        norm = self._apply_gradient()
        self.steps_done += 1
        return StepReport(grad_norm=norm, learning_rate=rate)

    def _apply_gradient(self) -> float:
        """One update with the clipped gradient, unless that is not finite; gives its norm before."""
        if self._zero_stage == 0:
            # Without ZeRO, DeepSpeed clips but does not say what the norm was; a second look would cost as much again.
            norm = torch.nn.utils.clip_grad_norm_(self.unwrapped.parameters(), self._settings.max_grad_norm)
            self._refuse_non_finite(float(norm))
            self._engine.step()
        else:
            # ZeRO makes no update with a gradient that is not finite, and says that its norm is infinite.
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            if norm is None:
                raise RuntimeError(f"DeepSpeed reported no gradient norm at ZeRO stage {self._zero_stage}")
            self._refuse_non_finite(float(norm))
        return float(norm)

    def _refuse_non_finite(self, norm: float) -> None:
        """Every rank knows the same norm, so all of them end together."""
        if not math.isfinite(norm):
            cause = (
                f"the gradient of update {self.steps_done + 1} is not finite (norm {norm}), and was not applied; the "
                "same settings end here again: lower learning_rate, bound the rewards, or compute in float32"
            )
            raise RoleFailure(FailureKind.FATAL, "?", "?", cause, guard="gradient")

    def measure(self, batches: Sequence[Batch], loss: Callable[[Batch, bool], torch.Tensor]) -> StepReport:
        """The same passes without gradients and without a step: only what the loss measures comes of it."""
        self._engine.eval()
        with torch.no_grad():
            for batch, real in self.common_rounds(batches):
                loss(batch, real)
        return StepReport(grad_norm=0.0, learning_rate=0.0)

    def full_weights(self, strip: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight in full and in the compute type, under its Hugging Face name, adapters merged in.

        A collective in ZeRO-3; only rank 0 is given anything.

        Args:
            strip: name prefix that our wrapper put before the Hugging Face names.
        """
        for name, weight in plain_weights(self.unwrapped).items():
            with gathered(weight.parts, read_only=True):
                if self.rank.rank == 0:
                    yield name.removeprefix(strip), weight.value()

    def save_checkpoint(self, folder: Path) -> None:
        """Weights, optimizer and step count of this rank."""
        client_state = {"steps_done": self.steps_done, "trained": list(self._trained_parameters()[0])}
        self._engine.save_checkpoint(str(folder), tag=STATE, client_state=client_state, save_latest=False)
        if self.rank.rank == 0:
            self._layout.write(folder / STATE)

    def load_checkpoint(self, folder: Path) -> None:
        """Back to the saved state: exactly, where as many ranks of the same ZeRO stage and compute type wrote it, and
        else each number of it."""
        state = folder / STATE
        if not state.is_dir():
            raise FileNotFoundError(f"{folder} holds no checkpoint")
        written = Layout.of(state)
        if written is None or written == self._layout:
            self._load(folder)
            return
        # Where all ranks can read it, and where it is not taken for a checkpoint.
        other = folder.with_name(f".{folder.name}-anew")
        if self.rank.rank == 0:
            shutil.rmtree(other, ignore_errors=True)
        self.most(0)
        self.save_checkpoint(other / "template")
        self.most(0)
        own, aliases = self._trained_parameters()
        saved = SavedLearner(state, written, list(own))
        write_anew(saved, other / "template" / STATE, other / STATE, self._layout, self.rank.rank, own, aliases)
        self.most(0)
        self._load(other)
        self.most(0)
        if self.rank.rank == 0:
            shutil.rmtree(other)

    def _load(self, folder: Path) -> None:
        loaded, client_state = self._engine.load_checkpoint(str(folder), tag=STATE)
        if loaded is None:
            raise FileNotFoundError(f"{folder / STATE} holds no checkpoint that this engine can read")
        self.steps_done = int(client_state["steps_done"])

    def _trained_parameters(self) -> tuple[dict[str, torch.Size], dict[str, str]]:
        """Shapes by name, in the optimizer's order; and further names of shared ones to their own."""
        names = {id(parameter): name for name, parameter in self.unwrapped.named_parameters()}
        groups = _parameter_groups(self.unwrapped, self._settings.weight_decay)
        own = {
            names[id(parameter)]: torch.Size(getattr(parameter, "ds_shape", parameter.shape))
            for group in groups
            for parameter in group["params"]
        }
        every = self.unwrapped.named_parameters(remove_duplicate=False)
        return own, {name: names[id(parameter)] for name, parameter in every}

    def save_pretrained(self, folder: Path, part: Any, strip: str) -> None:
        """An ordinary Hugging Face directory, written by rank 0 from the full weights.

        Args:
            part: the transformers model inside the module.
            strip: as in `full_weights`.
        """
        state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.full_weights(strip)}
        if self.rank.rank == 0:
            state |= persistent_buffers(part)
            # A tied output projection is left out of named_parameters; transformers ties it again on loading.
            part.save_pretrained(folder, state_dict=state)


def deepspeed_configuration(settings: LearnerSettings, dtype: str, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation and batch sizes are ours, so it is told of one."""
    stage = _effective_stage(settings, dtype, world_size)
    configuration: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without ZeRO the engine above clips, because DeepSpeed would not tell the norm.
        "gradient_clipping": settings.max_grad_norm if stage else 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        # Offloading would otherwise insist on an optimizer that has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }
    if dtype == "bfloat16":
        # DeepSpeed's default is the compute type: 8 bits of sum, in which the many small gradients of a minibatch
        # vanish beside one large one.
        configuration["data_types"] = {"grad_accum_dtype": "fp32"}
        configuration["communication_data_type"] = "fp32"
    return _merged(configuration, settings.deepspeed)


def _effective_stage(settings: LearnerSettings, dtype: str, world_size: int) -> int:
    """The ZeRO stage that does what the settings ask for.

    DeepSpeed has no bfloat16 training without ZeRO that accumulates in float32; stage 1 gives the same result. On one
    rank in float32 there is nothing to shard: stages 1 and 2 would only keep a second copy of weights and gradients.
    """
    if settings.zero_stage == 0 and dtype == "bfloat16":
        return 1
    if settings.zero_stage in (1, 2) and dtype == "float32" and world_size == 1:
        return 0 if "zero_optimization" not in settings.deepspeed else settings.zero_stage
    return settings.zero_stage


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        known = result.get(key)
        result[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return result


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not. ZeRO-3 shows a partition's shape as `ds_shape`."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not weight_decay:
        return [{"params": trained, "weight_decay": 0.0}]
    matrices = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) > 1]
    vectors = [parameter for parameter in trained if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
