"""Room in the object store: snapshots of the weights, and the steps that are sampled with them.

A step that is sampled with version v holds that snapshot until its responses are there, and with `max_staleness` n the
steps under way are sampled with the versions v − n to v. So n + 1 snapshots are there at the same time, and as many
steps' rows and columns. A store that is too small does not end a run at once: Ray moves objects to disk, and every sync
waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.models.sizes import ITEM_BYTES, ModelSize
from rlhf_ray.ppo.inputs import trunk_sharers
from rlhf_ray.runtime.cluster import NodeShape, cluster_address

_COLUMNS = 5
"""Of a response token: log-probs and version from the engine, values, log-probs of the reference and of the learner."""


def snapshot_bytes(config: PPOConfig, policy: ModelSize) -> int:
    """The snapshots that are there at the same time; none where weights are broadcast."""
    if config.weights.transport == "nccl":
        return 0
    return (config.algorithm.max_staleness + 1) * policy.published * _item_bytes(config)


def rollout_bytes(config: PPOConfig, policy: ModelSize) -> int:
    """Rows and columns of all steps under way, were every prompt and response as long as it may be.

    Where more prompts are sampled than are trained on, the rows of those that are chosen are there a second time.
    """
    sampling, steps = config.sampling, config.algorithm.max_staleness + 1
    prompts = sampling.prompts_drawn * steps + (sampling.prompts_per_step if sampling.spare_prompts else 0)
    samples = prompts * sampling.samples_per_prompt
    length = sampling.max_prompt_tokens + sampling.max_response_tokens
    states = policy.hidden * _item_bytes(config) if trunk_sharers(config, policy.layers) else 0
    return samples * (length * (4 + states) + sampling.max_response_tokens * _COLUMNS * 4)


def check_object_store(config: PPOConfig, policy: ModelSize | None, nodes: Sequence[NodeShape]) -> None:
    """See that the weights that are in flight, and what is sampled with them, fit into the object store.

    Args:
        policy: None where stub roles stand in for it.

    Raises:
        BadInput: they do not, on one of the nodes that the policy's first rank may be on.
    """
    if policy is None:
        return
    snapshots, rollouts = snapshot_bytes(config, policy), rollout_bytes(config, policy)
    # What is written beside the versions that are complete; no more than one of them.
    bucket = min(config.weights.bucket_mib << 20, snapshots)
    needed = snapshots + rollouts + bucket
    possible = [node for node in nodes if node.gpus >= config.policy.learner.gpus]
    smallest = min(possible, key=lambda node: node.object_store_bytes, default=None)
    if smallest is None or needed <= smallest.object_store_bytes:
        return
    is_ours = cluster_address(config.cluster) is None
    staleness = config.algorithm.max_staleness
    raise BadInput(
        "cluster.object_store_gib" if is_ours else f"object store of node {smallest.address}",
        f"{_gib(smallest.object_store_bytes)} GiB; {staleness + 1} version(s) of the weights (algorithm.max_staleness "
        f"+ 1) take {_gib(snapshots)}, rollouts {_gib(rollouts)}, a bucket on its way {_gib(bucket)}",
        f"at least {_gib(needed)} GiB{'' if is_ours else ' (ray start --object-store-memory)'}"
        f"{', or a smaller algorithm.max_staleness' if staleness else ''}",
    )


def _gib(size: int) -> str:
    # Upwards, so that what is asked for is enough.
    return f"{-(-size * 100 // (1 << 30)) / 100:g}"


def _item_bytes(config: PPOConfig) -> int:
    learner = config.policy.learner
    return ITEM_BYTES[resolve_dtype(learner.dtype, learner.gpus > 0)]
