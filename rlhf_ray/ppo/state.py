"""What the loop itself must remember. Everything else follows from the seed, or is in the learners' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.data.prompts import PromptSet
from rlhf_ray.failures import BadInput
from rlhf_ray.runtime.checkpoints import STATE_FILE, read_state
from rlhf_ray.tracking.manifest import find_fault
from rlhf_ray.tracking.run_folder import RunFolder

_LORA = "policy.lora"
_STALENESS = "algorithm.max_staleness"
_SHARDS = "sampling.prompts_per_shard"
_PROMPTS = "prompts.path"


@dataclass
class LoopState:
    """The loop's position.

    Attributes:
        step: steps done; also the position in the prompts, whose order is a function of it, and the version of the
            policy's weights.
        samples, tokens: responses and response tokens since the run began.
        kl_controller: its state.
        max_staleness: `algorithm.max_staleness`, which the next two follow from.
        rollouts: steps that were under way and whose weights are gone; their rows are in the checkpoint.
        syncs: the proofs (`Parity`) of the weights that the next steps are sampled with, oldest first.
        learners: see `learner_shapes`; empty in checkpoints of earlier versions.
        prompts: see `draw_settings`; checkpoints of earlier versions lack some, or all.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    kl_controller: dict[str, float] = field(default_factory=dict)
    max_staleness: int = 0
    rollouts: list[int] = field(default_factory=list)
    syncs: list[dict[str, Any]] = field(default_factory=list)
    learners: dict[str, int | str | None] = field(default_factory=dict)
    prompts: dict[str, int | str] = field(default_factory=dict)

    def advance(self, samples: int, tokens: int) -> None:
        """One more step is done."""
        self.step += 1
        self.samples += samples
        self.tokens += tokens


def learner_shapes(config: PPOConfig) -> dict[str, int | str | None]:
    """The settings, by their keys, that a learner's checkpoint must be read with as it was written: they decide which
    weights are in it. Ranks, ZeRO stage and compute type may change (`roles/relayout.py`)."""
    learners = {"policy.learner": config.policy.learner}
    if config.critic is not None:
        learners["critic.learner"] = config.critic.learner
    shapes = {f"{key}.trainable_top_layers": learner.trainable_top_layers for key, learner in learners.items()}
    lora = config.policy.lora
    return {**shapes, _LORA: None if lora is None else lora.model_dump_json()}


def draw_settings(config: PPOConfig, prompts: PromptSet) -> dict[str, int | str]:
    """The settings, by their keys, that say which prompts a step draws and how its samples are numbered. With others, a
    resumed run would leave some out of the order, or draw them again, or take samples for those of other prompts."""
    sampling = config.sampling
    names = ("prompts_per_step", "spare_prompts", "samples_per_prompt", "prompts_per_shard")
    return {
        **{f"sampling.{name}": getattr(sampling, name) for name in names},
        "run.seed": config.run.seed,
        _PROMPTS: f"{len(prompts):,} prompts (digest {prompts.digest})",
    }


def check_resumable(config: PPOConfig, prompts: PromptSet, folder: RunFolder) -> None:
    """See that the run can go on from its latest checkpoint, before any role is started.

    Whether all its files are whole is seen later (`Run.sound_checkpoint`): here only its state is read.

    Raises:
        BadInput: it was written with other settings of those, without a critic, with another staleness, or with other
            prompts.
    """
    readable = [each for each in folder.complete_checkpoints() if find_fault(each[1], (STATE_FILE,)) is None]
    if not readable:
        return
    step, path = readable[-1]
    found = read_state(path, LoopState)
    written: Mapping[str, object] = {
        _LORA: None,
        **found.learners,
        **found.prompts,
        _STALENESS: found.max_staleness,
    }
    draws = {key: value for key, value in draw_settings(config, prompts).items() if key in found.prompts}
    if not found.rollouts:
        draws.pop(_SHARDS, None)  # no rows of such shards are kept
    wanted: Mapping[str, object] = {
        **(learner_shapes(config) if found.learners else {}),
        **draws,
        _STALENESS: config.algorithm.max_staleness,
    }
    for key, now in wanted.items():
        before = written.get(key, "no such learner")
        if before != now:
            allowed = "the value that the run was begun with"
            if key == _PROMPTS:
                allowed = "the prompts, tokenizer, chat template and limits (sampling) that the run was begun with"
            raise BadInput(
                key,
                f"{_shown(now)}, but the checkpoint of step {step} was written with {_shown(before)}",
                f"{allowed}, or another run.name",
            )


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
