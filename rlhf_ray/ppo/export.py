"""A policy as a Hugging Face directory, from any checkpoint of a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PolicySettings, PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.models.adapters import persistent_buffers, plain_weights
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.roles.learner import checkpoint_folder
from rlhf_ray.roles.policy_learner import POLICY_PREFIX, build_policy
from rlhf_ray.roles.relayout import STATE, Layout, SavedLearner
from rlhf_ray.tracking.manifest import find_fault
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.run_lock import run_lock


def export_checkpoint(run: Path, step: int | None, to: Path | None) -> Path:
    """Write a checkpoint's policy, adapters merged in.

    Args:
        run: the run's folder.
        step: of the checkpoint; None: the latest.
        to: the directory; None: `<run>/policy-<step>`.

    Returns:
        The directory.

    Raises:
        BadInput: there is no such run or checkpoint, it is damaged, the run is still going on, or the directory exists.
    """
    folder = RunFolder(run)
    if not folder.config_yaml.exists():
        raise BadInput(str(run), "has no config.yaml", "the folder of a PPO run")
    config = load_config(PPOConfig, folder.config_yaml, ())
    there = dict(folder.complete_checkpoints())
    if not there:
        raise BadInput(str(folder.checkpoints), "has no complete checkpoint", "a run that has written one")
    step = max(there) if step is None else step
    if step not in there:
        raise BadInput("--step", str(step), f"a checkpoint of the run: {', '.join(map(str, there))}")
    checkpoint = there[step]
    fault = find_fault(checkpoint)
    if fault is not None:
        raise BadInput(str(checkpoint), fault, f"another checkpoint of the run (--step): {', '.join(map(str, there))}")
    target = to or folder.path / f"policy-{step:06d}"
    if target.exists():
        raise BadInput(str(target), "exists", "a directory that is not there yet (--to)")
    with run_lock(folder.lock):  # a run that goes on may delete the checkpoint meanwhile
        export_policy(config.policy, checkpoint, target)
    return target


def export_policy(settings: PolicySettings, checkpoint: Path, target: Path) -> None:
    """The policy as its ranks would write it, to the bit, but in this process alone: neither they nor their GPUs are
    needed, and of the optimizer's state nothing is read.

    Args:
        settings: of the run.
        checkpoint: its folder.
        target: the directory.

    Raises:
        BadInput: the checkpoint is of a version that did not write down how it is divided among files.
    """
    state = checkpoint_folder(str(checkpoint), "policy") / STATE
    layout = Layout.of(state)
    if layout is None:
        raise BadInput(str(state), "does not say how it is divided among files", "a checkpoint of this version")
    # DeepSpeed's classes are in its files. It would look for a GPU, and say on stdout that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # No pass is made, so the attention of the run need not be there.
    learner = settings.learner.model_copy(update={"attention": "auto"})
    model = build_policy(settings.model_copy(update={"learner": learner}), layout.dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = SavedLearner(state, layout, list(trained))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved.tensor(name, "weight", parameter.shape))
        weights = {name.removeprefix(POLICY_PREFIX): weight.value() for name, weight in plain_weights(model).items()}
    # Where it stands only once it is whole.
    unfinished = target.with_name(f".{target.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    weights |= persistent_buffers(model.language_model)
    model.language_model.save_pretrained(unfinished, state_dict=weights)
    load_tokenizer(settings.model, "policy.model").save_pretrained(unfinished)
    unfinished.rename(target)
