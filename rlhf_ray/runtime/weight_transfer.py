"""New weights from the policy learner to the generators, and the proof that they arrived.

Two transports behind one call: buckets through the object store, everywhere; or vLLM's own NCCL engine, when
learner and engine sit on separate GPUs. After either, the engine samples a probe and the learner computes the
same log-probs. Weights that were not taken in, a stale cache or a wrong temperature all show there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_ray.config.settings import WeightSettings
from rlhf_ray.failures import FailureKind, RoleFailure
from rlhf_ray.roles.generator import ShardPlan
from rlhf_ray.roles.policy_learner import ParityReport
from rlhf_ray.runtime.actor_group import ActorGroup, meeting_point
from rlhf_ray.runtime.role_host import OneByOne
from rlhf_ray.runtime.waiting import Pending


class WeightTransport(Protocol):
    """Moves the learner's weights into all generators."""

    def send(self, version: int) -> None:
        """Afterwards every generator samples with these weights and calls them `version`."""
        ...


class ObjectStoreTransport:
    """Buckets that the first learner rank puts and every generator fetches, one by one."""

    def __init__(self, policy: ActorGroup, generators: ActorGroup, bucket_mib: int) -> None:
        self._policy, self._generators, self._bucket_bytes = policy, generators, bucket_mib << 20

    def send(self, version: int) -> None:
        buckets = self._policy.stream_all("weight_buckets", self._bucket_bytes)[0]
        self._generators.call_all("load_weights", OneByOne(tuple(buckets)), version)


class GeneratorClient:
    """The generators as vLLM's trainer side wants them (`VLLMWeightSyncClient`): one call goes to all."""

    def __init__(self, generators: ActorGroup) -> None:
        self._generators = generators
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # Each engine has its own place in the NCCL group, behind the sender.
        pending: list[Pending] = []
        for index in range(len(self._generators)):
            own = {**init_info, "rank_offset": init_info["rank_offset"] + index * self._workers_each(init_info)}
            pending += self._generators.submit(index, "init_weight_transfer_engine", own)
        self._generators.wait(pending)

    def start_weight_update(self) -> None:
        self._generators.call_all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._generators.call_all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._generators.call_all(
            "finish_weight_update", self.version if weight_version is None else int(weight_version)
        )

    def _workers_each(self, init_info: dict[str, Any]) -> int:
        return (init_info["world_size"] - init_info["rank_offset"]) // len(self._generators)


class NcclTransport:
    """vLLM's dense NCCL engine. Not run on the machines that test this project; its wiring is."""

    def __init__(self, policy: ActorGroup, generators: ActorGroup, workers_per_generator: int) -> None:
        self._policy = policy
        address, port = meeting_point(policy)
        world_size = 1 + len(generators) * workers_per_generator
        self._policy.call_all("open_nccl_sender", GeneratorClient(generators), address, port, world_size)

    def send(self, version: int) -> None:
        self._policy.call_all("send_weights_nccl", version)


@dataclass(frozen=True)
class Parity:
    """The probe's result over all generators: the worst of each."""

    max_abs: float
    mean_ratio: float


def open_transport(
    settings: WeightSettings, policy: ActorGroup, generators: ActorGroup, workers_per_generator: int
) -> WeightTransport:
    if settings.transport == "nccl":
        return NcclTransport(policy, generators, workers_per_generator)
    return ObjectStoreTransport(policy, generators, settings.bucket_mib)


def verify(
    settings: WeightSettings, policy: ActorGroup, generators: ActorGroup, plan: ShardPlan, version: int, exact: bool
) -> Parity:
    """Let every generator sample the probe, and the learner compute its log-probs.

    Args:
        plan: the probe.
        version: which the generators must say they sampled with.
        exact: engine and learner both compute in float32.

    Raises:
        RoleFailure: a generator disagrees; the run must not sample with it.
    """
    asked = [generators.submit(index, "generate", plan, num_returns=2) for index in range(len(generators))]
    headers = generators.wait([header for _, header in asked])
    worst = Parity(0.0, 1.0)
    reports: dict[str, ParityReport] = {}
    for member, (rollout, _), header in zip(generators.members, asked, headers, strict=True):
        if header.version_min != version or header.version_max != version:
            raise RoleFailure(
                FailureKind.FATAL,
                member.name,
                member.node,
                f"samples with weights of version {header.version_min}–{header.version_max} after a sync to {version}",
            )
        if header.digest not in reports:
            # Generators that sampled the same to the bit need only one comparison.
            reports[header.digest] = policy.call_all("compare", rollout.reference)[0]
        report = reports[header.digest]
        worst = Parity(max(worst.max_abs, report.max_abs), max(worst.mean_ratio, report.mean_ratio))
        near = (
            report.max_abs <= settings.max_abs_dlogp_float32
            if exact
            else report.mean_ratio <= settings.max_mean_ratio_bfloat16
        )
        if not near:
            raise RoleFailure(
                FailureKind.FATAL,
                member.name,
                member.node,
                f"engine and learner disagree after the sync to version {version}: max |Δ log-prob| "
                f"{report.max_abs:.2e}, mean exp|Δ| {report.mean_ratio:.4f} (allowed: weights.max_abs_dlogp_float32 "
                f"{settings.max_abs_dlogp_float32:g}, weights.max_mean_ratio_bfloat16 "
                f"{settings.max_mean_ratio_bfloat16:g}); the weights did not arrive, or the two compute "
                "different things",
            )
    return worst
