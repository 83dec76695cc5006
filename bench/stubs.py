"""Roles that compute nothing: the methods of the real ones, answers of the real types, and time that passes by a table.

What is around the roles is real: placement, meeting points, calls, object store, loop. A process group is a key-value
store at the meeting point in which every rank signs in, so a rank that is taken twice, or missing, is an error; weights
are their version, so an engine that is given others than it was asked to load finds out.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch.distributed import TCPStore

from rlhf_ray.algorithms.experience import ExperienceShard, ExperienceStats
from rlhf_ray.algorithms.parity import Parity, Probed
from rlhf_ray.config.algorithm import AlgorithmSettings
from rlhf_ray.config.settings import (
    CriticSettings,
    GeneratorSettings,
    PolicySettings,
    ReferenceSettings,
    WeightSettings,
)
from rlhf_ray.models.buckets import Snapshot, WeightBucket
from rlhf_ray.ppo.roles import RoleClasses
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.evaluator import EvaluatedSample, Evaluator, Judge
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.roles.critic_learner import CriticLearner, CriticReport
from rlhf_ray.roles.generator import Generator, ShardPlan
from rlhf_ray.roles.policy_learner import PolicyLearner, PolicyReport
from rlhf_ray.roles.rank_group import Rank
from rlhf_ray.roles.reference import Reference
from rlhf_ray.rollout import (
    FINISH_LENGTH,
    FINISH_STOP,
    ProbeColumn,
    RewardColumn,
    Rollout,
    SampleUse,
    TokenColumn,
    TrunkColumn,
    id_ranges,
)

_MEETING_S = 120.0
_VOCABULARY = 1000


@dataclass(frozen=True)
class Latencies:
    """How long the roles take. Zeros: as long as their answers take to make.

    Attributes:
        engine_step_s: one token of all responses in flight.
        reward_s, reference_s, values_s, logprobs_s: a token of prompt or response, on one replica.
        policy_s, critic_s: the same in training, all epochs.
        sync_s: to send or load the weights.
    """

    engine_step_s: float = 0.0
    reward_s: float = 0.0
    reference_s: float = 0.0
    values_s: float = 0.0
    logprobs_s: float = 0.0
    policy_s: float = 0.0
    critic_s: float = 0.0
    sync_s: float = 0.0


@dataclass(frozen=True)
class StubSettings:
    """What all stubs know.

    Attributes:
        facts: folder in which each role writes down where it is and what it was asked; None: nothing is written.
        meets: sign in at meeting points. Roles that share a process would wait there for each other.
        mean_tokens: of a response. Lengths are log-normal: the longest of a thousand has about eight times as many.
    """

    latencies: Latencies = field(default_factory=Latencies)
    facts: Path | None = None
    meets: bool = True
    mean_tokens: float = 64.0


class _Facts:
    """One role's notes: a JSON object a line."""

    def __init__(self, stub: StubSettings, role: str) -> None:
        self._path: Path | None = None
        if stub.facts is not None:
            context = ray.get_runtime_context()
            self._path = stub.facts / f"{role}-{context.get_actor_id()}.jsonl"
            placement = ray.util.get_current_placement_group()
            nodes = ray.util.placement_group_table(placement)["bundles_to_node_id"] if placement else {}
            self.write(
                "place",
                role=role,
                node=context.get_node_id(),
                address=ray.util.get_node_ip_address(),
                gpus=sorted(map(int, ray.get_gpu_ids())),
                # Ray's public view leaves out the bundle, which is in the names.
                resources=list(context.worker.core_worker.resource_ids()),
                bundle_nodes={str(bundle): node for bundle, node in nodes.items()},
            )

    def write(self, kind: str, **facts: Any) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **facts}) + "\n")


def _meet(stub: StubSettings, facts: _Facts, group: str, place: Rank, workers: int = 1) -> TCPStore | None:
    """Sign in as `workers` ranks from the place's on, and wait for all others."""
    facts.write("meeting", group=group, **vars(place), workers=workers)
    if not stub.meets:
        return None
    store = TCPStore(
        place.master_address,
        place.master_port,
        is_master=place.rank == 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=_MEETING_S),
    )
    for rank in range(place.rank, place.rank + workers):
        if store.add(f"rank-{rank}", 1) != 1:
            raise RuntimeError(f"rank {rank} of {group} is taken")
    store.wait([f"rank-{rank}" for rank in range(place.world_size)])
    return store


def _column(rollout: Rollout, purpose: str) -> TokenColumn:
    random = keyed_generator(int(rollout.sample_ids[0]), purpose)
    return TokenColumn(random.normal(-1.0, 0.1, len(rollout.logprobs)).astype(np.float32))


class StubGenerator(Generator):
    """Samples random tokens. A shard takes as long as its longest response."""

    def __init__(
        self,
        model: str,
        settings: GeneratorSettings,
        context_tokens: int,
        eos_token_id: int,
        weights: WeightSettings,
        in_flight_updates: bool = False,
        *,
        stub: StubSettings,
    ) -> None:
        self._stub, self._workers = stub, settings.tensor_parallel
        self._facts = _Facts(stub, "generator")
        self._version, self._received = 0, 0
        self._loading = threading.Condition()
        self._broadcast = False
        self._store: TCPStore | None = None

    def generate(self, plan: ShardPlan, snapshot: Snapshot) -> Rollout:
        with self._loading:
            self._bring(snapshot)
            had = self._version
        self._facts.write("sampled", asked=snapshot.version, had=had, shard=plan.index)
        prompts = [ids for ids in plan.prompts for _ in range(plan.samples_per_prompt)]
        responses, logprobs = [], []
        for seed in plan.seeds:
            random = keyed_generator(seed, "stub")
            # E exp(N(μ, σ²)) is exp(μ + σ²/2); with σ = 0.8 the 99.9th percentile is 8.6 times the mean.
            length = random.lognormal(np.log(self._stub.mean_tokens) - 0.32, 0.8)
            length = int(np.clip(length, 1, plan.max_response_tokens))
            responses.append(random.integers(3, _VOCABULARY, length).astype(np.int32))
            logprobs.append(random.normal(-1.0, 0.1, length).astype(np.float32))
        lengths = np.array([len(response) for response in responses], dtype=np.int32)
        time.sleep(int(lengths.max()) * self._stub.latencies.engine_step_s)
        prompt_ids = np.repeat(np.array(plan.prompt_ids, dtype=np.int64), plan.samples_per_prompt)
        cut = lengths == plan.max_response_tokens
        return Rollout(
            tokens=np.concatenate([part for pair in zip(prompts, responses, strict=True) for part in pair]),
            prompt_lengths=np.array([len(ids) for ids in prompts], dtype=np.int32),
            response_lengths=lengths,
            logprobs=np.concatenate(logprobs),
            policy_versions=np.full(int(lengths.sum()), snapshot.version, dtype=np.int32),
            finish_reasons=np.where(cut, FINISH_LENGTH, FINISH_STOP).astype(np.int8),
            sample_ids=prompt_ids * plan.samples_per_prompt
            + np.tile(np.arange(plan.samples_per_prompt), len(plan.prompts)),
            prompt_ids=prompt_ids,
        )

    def load(self, snapshot: Snapshot, before: Probed | None = None) -> Probed:
        with self._loading:
            self._bring(snapshot)
        nothing = np.zeros(0)
        return Probed(snapshot.version, nothing, nothing, Parity(snapshot.version, 0.0, 0.0, 0.0, 0.0, ""))

    def sleep(self) -> None:
        self._facts.write("slept", version=self._version)

    def _bring(self, snapshot: Snapshot, before: Probed | None = None) -> None:
        """Called with the lock. What is broadcast arrives in a call of its own, which may begin after this one."""
        if snapshot.version == self._version and not snapshot.names:
            return
        if self._broadcast:
            if not self._loading.wait_for(lambda: self._version >= snapshot.version, _MEETING_S):
                raise RuntimeError(f"version {snapshot.version} was not received")
            return
        time.sleep(self._stub.latencies.sync_s)
        found = {name: int(tensor[0]) for name, tensor in snapshot.tensors()}
        if found != {"version": snapshot.version}:
            raise RuntimeError(f"asked for version {snapshot.version}, found {found}")
        self._version = snapshot.version
        self._facts.write("loaded", version=snapshot.version)

    def join_senders(self, init_info: dict[str, Any]) -> None:
        self._broadcast = True
        place = Rank(
            init_info["rank_offset"], init_info["world_size"], init_info["master_address"], init_info["master_port"]
        )
        self._store = _meet(self._stub, self._facts, "weights", place, self._workers)

    def receive(self, update_info: dict[str, Any], version: int) -> None:
        time.sleep(self._stub.latencies.sync_s)
        if self._store is not None:
            found = int(self._store.get(f"broadcast-{self._received}"))
            if found != version:
                raise RuntimeError(f"asked for version {version}, received {found}")
        with self._loading:
            self._received += 1
            self._version = version
            self._facts.write("loaded", version=version)
            self._loading.notify_all()


class StubPolicyLearner(PolicyLearner):
    """Counts its updates, which are its weights."""

    def __init__(
        self,
        settings: PolicySettings,
        algorithm: AlgorithmSettings,
        rank: Rank,
        *,
        total_steps: int,
        temperature: float = 1.0,
        max_response_tokens: int = 1,
        seed: int = 0,
        shares_trunk: bool = False,
        shares_gpu: bool = False,
        stub: StubSettings,
    ) -> None:
        self._stub, self._rank = stub, rank
        self._facts = _Facts(stub, "policy")
        self._group = _meet(stub, self._facts, "policy", rank)
        self._version, self._sent = 0, 0
        self._store: TCPStore | None = None

    def logprobs(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        time.sleep(len(rollout.tokens) * self._stub.latencies.logprobs_s)
        return _column(rollout, "policy")

    def train(self, step: int, shards: Sequence[ExperienceShard], kl_coefficient: float) -> PolicyReport:
        time.sleep(sum(len(shard.rollout.tokens) for shard in shards) * self._stub.latencies.policy_s)
        self._version += 1
        scores = np.concatenate([shard.rewards.scores for shard in shards])
        lengths = np.concatenate([shard.rollout.response_lengths for shard in shards])
        stats = ExperienceStats(
            num_samples=len(scores),
            num_valid=len(scores),
            num_valid_tokens=int(lengths.sum()),
            shaped_reward_mean=float(scores.mean()),
            kl_reference=0.0,
            advantage_mean=0.0,
            advantage_std=1.0,
            response_length_mean=float(lengths.mean()),
            truncated_fraction=0.0,
            num_masked=0,
        )
        return PolicyReport(
            stats=stats,
            samples=SampleUse(id_ranges(np.concatenate([shard.rollout.sample_ids for shard in shards]))),
            loss=0.0,
            entropy=1.0,
            clip_fraction=0.0,
            approx_kl=0.0,
            max_abs_log_ratio=0.0,
            grad_norm=1.0,
            learning_rate=1e-6,
            importance_weight_mean=1.0,
            first_approx_kl=0.0,
            first_ratio_error=0.0,
            mismatch_kl=0.0,
            mismatch_max_abs=0.0,
            mismatch_mean_ratio=1.0,
            importance_effective_fraction=1.0,
            importance_truncated_fraction=0.0,
            importance_masked_fraction=0.0,
        )

    def probe(self, probe: tuple[NDArray[np.int32], ...]) -> ProbeColumn:
        return ProbeColumn(np.zeros(sum(len(ids) - 1 for ids in probe), dtype=np.float32), "float32")

    def weight_layout(self, max_bytes: int) -> list[tuple[str, ...]]:
        return [("version",)]

    def weight_bucket(self, index: int) -> WeightBucket | None:
        if self._rank.rank:
            return None
        time.sleep(self._stub.latencies.sync_s)
        return WeightBucket.of([("version", torch.tensor([self._version]))])

    def open_sender(self, group: dict[str, Any]) -> dict[str, Any]:
        if self._rank.rank == 0:
            place = Rank(0, group["world_size"], group["master_address"], group["master_port"])
            self._store = _meet(self._stub, self._facts, "weights", place)
        return {"names": ["version"], "dtype_names": ["int64"], "shapes": [[1]]}

    def broadcast_weights(self) -> None:
        time.sleep(self._stub.latencies.sync_s)
        if self._store is not None:
            self._store.set(f"broadcast-{self._sent}", str(self._version))
        self._sent += 1

    def save_checkpoint(self, folder: str) -> None:
        path = Path(folder) / f"policy-{self._rank.rank}"
        path.write_text(str(self._version), encoding="utf-8")

    def load_checkpoint(self, folder: str) -> None:
        path = Path(folder) / f"policy-{self._rank.rank}"
        self._version = int(path.read_text(encoding="utf-8"))

    def export(self, folder: str) -> None:
        if self._rank.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)


class StubCriticLearner(CriticLearner):
    """Random values."""

    def __init__(
        self,
        settings: CriticSettings,
        model: str,
        algorithm: AlgorithmSettings,
        rank: Rank,
        *,
        total_steps: int,
        max_response_tokens: int,
        seed: int,
        shares_trunk: bool = False,
        stub: StubSettings,
    ) -> None:
        self._stub = stub
        self._facts = _Facts(stub, "critic")
        self._group = _meet(stub, self._facts, "critic", rank)

    def values(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        time.sleep(len(rollout.tokens) * self._stub.latencies.values_s)
        return _column(rollout, "values")

    def train(self, step: int, shards: Sequence[ExperienceShard], kl_coefficient: float) -> CriticReport:
        time.sleep(sum(len(shard.rollout.tokens) for shard in shards) * self._stub.latencies.critic_s)
        return CriticReport(0.0, 0.0, 0.0, 0.0, 1.0, 1e-6)

    def save_checkpoint(self, folder: str) -> None:
        """It has no state."""

    def load_checkpoint(self, folder: str) -> None:
        """It has no state."""


class StubReference(Reference):
    """Random log-probs."""

    def __init__(
        self,
        model: str,
        settings: ReferenceSettings,
        temperature: float,
        trained_layers: int | None = None,
        rank: Rank | None = None,
        *,
        stub: StubSettings,
    ) -> None:
        self._stub = stub
        self._facts = _Facts(stub, "reference")
        self._group = None if rank is None else _meet(stub, self._facts, "reference", rank)

    def trunk(self, rollout: Rollout) -> TrunkColumn:
        return TrunkColumn(np.zeros((len(rollout.tokens), 1), dtype=np.float32), "float32")

    def logprobs(self, rollout: Rollout, trunk: TrunkColumn | None = None) -> TokenColumn:
        time.sleep(len(rollout.tokens) * self._stub.latencies.reference_s)
        self._facts.write("referred", shard=int(rollout.prompt_ids[0]))
        return _column(rollout, "reference")


class StubScorer:
    """Random scores."""

    def __init__(self, stub: StubSettings) -> None:
        self._stub = stub
        self._facts = _Facts(stub, "reward")

    def score(self, rollout: Rollout, prompts: dict[int, Conversation]) -> RewardColumn:
        time.sleep(len(rollout.tokens) * self._stub.latencies.reward_s)
        random = keyed_generator(int(rollout.sample_ids[0]), "score")
        return RewardColumn(random.normal(size=rollout.num_samples), ("",) * rollout.num_samples, "stub")


class StubEvaluator(Evaluator):
    """Reads no text."""

    def __init__(self, policy_model: str, judge: Judge, *, stub: StubSettings) -> None:
        self._facts = _Facts(stub, "evaluator")

    def read(
        self,
        rollout: Rollout,
        rewards: RewardColumn,
        prompts: Mapping[int, Conversation],
        reference: TokenColumn | None = None,
    ) -> list[EvaluatedSample]:
        return [
            EvaluatedSample(
                sample_id=int(rollout.sample_ids[index]),
                prompt_id=int(rollout.prompt_ids[index]),
                prompt=prompts[int(rollout.prompt_ids[index])].text,
                response="",
                num_tokens=int(rollout.response_lengths[index]),
                kl=None if reference is None else 0.0,
                reward=float(rewards.scores[index]),
                failure="",
                judgement=None,
            )
            for index in range(rollout.num_samples)
        ]


def stub_classes(stub: StubSettings) -> RoleClasses:
    """All roles but the scorers, which `StubSource` makes."""
    return RoleClasses(
        generator=partial(StubGenerator, stub=stub),
        policy=partial(StubPolicyLearner, stub=stub),
        critic=partial(StubCriticLearner, stub=stub),
        reference=partial(StubReference, stub=stub),
        evaluator=partial(StubEvaluator, stub=stub),
    )
