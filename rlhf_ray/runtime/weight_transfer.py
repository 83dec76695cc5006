"""New weights from the policy learner to the generators, and the proof that the engines compute with them.

Weights are a versioned object. With the object store, the learner writes a snapshot bucket by bucket, and the engines
load the first while it writes the second; the references belong to the driver. Each shard names the snapshot that it is
sampled with, so that a generator that is behind pulls it. With NCCL, learner and engines meet in vLLM's own broadcast.
A snapshot carries its proof: the learner's log-probs of the same fixed tokens, which an engine that has loaded it must
come to (`rlhf_ray.algorithms.parity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.parity import Parity, Probed
from rlhf_ray.config.settings import WeightSettings
from rlhf_ray.models.buckets import Proof, Snapshot, WeightBucket
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.policy_learner import PolicyLearner
from rlhf_ray.runtime.actor_group import ActorGroup, meeting_point
from rlhf_ray.runtime.answers import Answer, Assembly, Deferred, OneByOne, collect

ProbeTokens = tuple[NDArray[np.int32], ...]


@dataclass(frozen=True)
class Published:
    """Weights on their way.

    Attributes:
        snapshot: what a shard carries.
        answers: of everybody who takes part in sending it.
    """

    snapshot: Deferred[Snapshot]
    answers: list[Answer[Any]]


class WeightTransport(Protocol):
    """Moves the learner's weights to all generators."""

    def publish(self, version: int, proof: Deferred[Proof], after: Sequence[Answer[Any]]) -> Published:
        """Begin to send the weights that the learner has when it gets there.

        Args:
            proof: of these weights.
            after: what the generators still owe with older weights.
        """
        ...


class ObjectStoreTransport:
    """Buckets that the first learner rank stores and every generator fetches, one by one."""

    def __init__(self, policy: ActorGroup[PolicyLearner], bucket_mib: int, timeout_s: float) -> None:
        self._policy = policy
        asked = [rank.ask(PolicyLearner.weight_layout, bucket_mib << 20) for rank in policy]
        self._layout = collect(asked, timeout_s)[0]

    def publish(self, version: int, proof: Deferred[Proof], after: Sequence[Answer[Any]]) -> Published:
        # Gathering a bucket is a collective in ZeRO-3; what is in it comes from the first rank.
        asked = [
            [rank.ask(PolicyLearner.weight_bucket, index) for rank in self._policy]
            for index in range(len(self._layout))
        ]
        first: list[Answer[WeightBucket | None]] = [ranks[0] for ranks in asked]
        snapshot = Assembly(
            Snapshot,
            {
                "version": version,
                "names": frozenset(name for bucket in self._layout for name in bucket),
                "buckets": OneByOne(tuple(first)),
                "proof": proof,
            },
        )
        return Published(snapshot, [answer for ranks in asked for answer in ranks[1:]])


class NcclTransport:
    """vLLM's dense NCCL engine. The machines that test this project run its wiring only; docs/gpus.md has the rest.

    Both sides are asked by the driver and waited for together: where one fails, the other would wait for it for ever.
    """

    def __init__(
        self,
        policy: ActorGroup[PolicyLearner],
        generators: ActorGroup[Generator],
        workers_per_generator: int,
        bucket_mib: int,
        timeout_s: float,
    ) -> None:
        self._policy, self._generators, self._timeout_s = policy, generators, timeout_s
        address, port = meeting_point(policy)
        group = {
            "master_address": address,
            "master_port": port,
            "world_size": 1 + len(generators) * workers_per_generator,
            "packed": True,
            "packed_buffer_size_bytes": bucket_mib << 20,
            "packed_num_buffers": 2,
        }
        senders = [rank.ask(PolicyLearner.open_sender, group) for rank in policy]
        # Each engine has its own places in the NCCL group, behind the sender.
        receivers = [
            generator.ask(Generator.join_senders, {**group, "rank_offset": 1 + index * workers_per_generator})
            for index, generator in enumerate(generators)
        ]
        met: list[Any] = collect([*senders, *receivers], timeout_s)
        self._update_info: dict[str, Any] = met[0]

    def publish(self, version: int, proof: Deferred[Proof], after: Sequence[Answer[Any]]) -> Published:
        # An engine has one set of weights: shards that it has not begun would find the old ones gone.
        collect(after, self._timeout_s)
        answers: list[Answer[Any]] = [rank.ask(PolicyLearner.broadcast_weights) for rank in self._policy]
        answers += [
            generator.beside.ask(Generator.receive, self._update_info, version) for generator in self._generators
        ]
        fields = {"version": version, "names": frozenset(), "buckets": (), "proof": proof}
        return Published(Assembly(Snapshot, fields), answers)


@dataclass(frozen=True)
class Sync:
    """A sync under way.

    Attributes:
        version: of the weights.
        snapshot: what a shard that is sampled with them carries.
        parity: each generator's comparison.
        answers: of everybody else who takes part.
    """

    version: int
    snapshot: Deferred[Snapshot]
    parity: list[Answer[Parity]]
    answers: list[Answer[Any]]

    def all_answers(self) -> list[Answer[Any]]:
        """Everything to wait for; `worst` takes what comes of it."""
        return [*self.parity, *self.answers]

    def worst(self, values: Sequence[Any]) -> Parity:
        """The comparison of the generator that is the farthest from the learner."""
        reports: Sequence[Parity] = values[: len(self.parity)]
        return max(reports, key=lambda report: (bool(report.first_fault), report.max_abs))


class WeightSync:
    """Sends new weights to engines, which prove that they compute with them.

    Args:
        policy: the learner.
        generators: the engines.
        settings: the transport and the limits.
        workers_per_generator: processes of one engine.
        tokens: rows to compare on.
        timeout_s: for one sync.
        in_flight: engines load between two steps, while they sample.
    """

    def __init__(
        self,
        policy: ActorGroup[PolicyLearner],
        generators: ActorGroup[Generator],
        settings: WeightSettings,
        workers_per_generator: int,
        tokens: ProbeTokens,
        timeout_s: float,
        in_flight: bool = False,
    ) -> None:
        self._policy, self._generators, self._tokens, self._in_flight = policy, generators, tokens, in_flight
        self._before: list[Answer[Probed] | None] = [None] * len(generators)
        """Of each generator under the newest weights. Here and not in its process, which may be another next time."""
        self._transport: WeightTransport = (
            NcclTransport(policy, generators, workers_per_generator, settings.bucket_mib, timeout_s)
            if settings.transport == "nccl"
            else ObjectStoreTransport(policy, settings.bucket_mib, timeout_s)
        )

    def begin(self, version: int, after: Sequence[Answer[Any]] = ()) -> Sync:
        """Send the weights, once the learner has done what it was asked for before.

        Args:
            after: what the generators still owe with older weights.
        """
        # The proof comes first: an engine has it by the time that the last bucket arrives.
        learner = [rank.keep(PolicyLearner.probe, self._tokens) for rank in self._policy]
        proof = Assembly(Proof, {"tokens": self._tokens, "learner": learner[0].data})
        published = self._transport.publish(version, proof, () if self._in_flight else after)
        probed = [
            (generator.beside if self._in_flight else generator).keep(Generator.load, published.snapshot, before)
            for generator, before in zip(self._generators, self._before, strict=True)
        ]
        self._before = [each.data for each in probed]
        headers = [column.header for column in learner]
        return Sync(version, published.snapshot, [each.header for each in probed], [*published.answers, *headers])


def probe_rows(prompts: Sequence[NDArray[np.int32]], num_tokens: int, context_tokens: int) -> ProbeTokens:
    """Tokens to compare engine and learner on: the prompts one after another, in rows that the engine can take.

    Args:
        prompts: token ids.
        num_tokens: to be compared, about.
        context_tokens: longest sequence of the engine.
    """
    row = max(min(context_tokens - 1, 64), 2)
    wanted = max(num_tokens // row, 1) * row
    tokens = np.concatenate(prompts[:wanted])
    tokens = np.resize(tokens, wanted)  # repeats what there is, where it is too short
    return tuple(tokens[start : start + row].astype(np.int32) for start in range(0, wanted, row))
