"""A policy as a Hugging Face directory, from any checkpoint of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.runtime.cluster import RoleRequest
from rlhf_ray.runtime.learner_group import connected, ranks, role_group
from rlhf_ray.tracking.manifest import find_fault
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.run_lock import run_lock


def export_checkpoint(run: Path, step: int | None, to: Path | None) -> Path:
    """Write a checkpoint's policy, adapters merged in, by the ranks that the checkpoint was written by.

    Args:
        run: the run's folder.
        step: of the checkpoint; None: the latest.
        to: the directory; None: `<run>/policy-<step>`.

    Returns:
        The directory.

    Raises:
        BadInput: there is no such run or checkpoint, it is damaged, the run is still going on, or the directory exists.
        RoleFailure: a rank failed, died or did not answer.
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
    request = RoleRequest("policy", "policy.learner", config.policy.learner)
    with (
        # A run that goes on has logs of the same names, and may delete the checkpoint meanwhile.
        run_lock(folder.lock),
        connected(config.cluster, [[request]]),
        role_group(request, config.cluster, folder.logs) as group,
    ):
        build = partial(PolicyLearner, config.policy, config.algorithm, total_steps=config.steps)
        group.build_all(*(partial(build, rank) for rank in ranks(group)))
        group.call_all(PolicyLearner.load_checkpoint, str(checkpoint.absolute()))
        group.call_all(PolicyLearner.export, str(target.absolute()))
    return target
