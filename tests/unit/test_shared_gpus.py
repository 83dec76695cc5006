"""An engine and a learner's rank on one GPU: what is refused, where they are placed, and when the engine sleeps."""

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config.base import ActorSettings
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.failures import BadInput
from rlhf_ray.models.buckets import Snapshot
from rlhf_ray.ppo.roles import role_requests
from rlhf_ray.preflight.findings import Findings, State
from rlhf_ray.preflight.memory import Memory
from rlhf_ray.preflight.needs import Need
from rlhf_ray.preflight.room import check_gpu_memory, place
from rlhf_ray.roles.generator import Generator, Turns
from rlhf_ray.runtime.cluster import NodeShape, RoleRequest, Room
from tests.conftest import REPOSITORY

SHARED = (
    *("generator.sleep=true", "generator.gpus=1", "policy.learner.gpus=1"),
    *("generator.replicas=2", "policy.learner.replicas=2"),
)


def config_of(*overrides: str) -> PPOConfig:
    return load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("generator.gpus=0", "policy.learner.gpus=0"), "gpus is 0,.*on a CPU vLLM has no sleep mode"),
        (("generator.gpus=0.5",), r"gpus is 0\.5, .* both must be 1"),
        (("policy.learner.replicas=4",), "2 engines cannot share the GPUs of 4 ranks"),
        (("algorithm.max_staleness=1",), "with algorithm.max_staleness above 0.*never sleeps"),
        (("weights.transport=nccl",), "NCCL refuses two members"),
    ],
)
def test_what_cannot_share_is_refused_with_the_reason(overrides: tuple[str, ...], reason: str):
    config_of(*SHARED)
    with pytest.raises(BadInput, match=rf"generator\.sleep: {reason}"):
        config_of(*SHARED, *overrides)


def test_each_engine_is_in_the_bundle_of_one_rank():
    room = Room.of(role_requests(config_of(*SHARED, "generator.cpus=0.5", "policy.learner.cpus=0.25")))
    assert room.bundles[:2] == [{"CPU": 0.75, "GPU": 1}] * 2
    assert not any("GPU" in bundle for bundle in room.bundles[2:])
    roles = ("generator", "policy", "reward", "reference", "critic")
    assert [room.first_bundle[role] for role in roles] == [0, 0, 2, 3, 4]
    assert [room.settings[role].gpus for role in roles] == [0.5, 0.5, 0, 0, 0]


def test_preflight_puts_each_rank_where_its_engine_is():
    requests = role_requests(config_of(*SHARED))
    needs = [Need(request, None) for request in requests]
    [placed] = place(needs, [NodeShape("a", cpus=8, gpus=2, object_store_bytes=0)], "PACK")
    assert len(placed) == sum(request.settings.replicas for request in requests)
    one, two = place(needs, [NodeShape(name, cpus=8, gpus=1, object_store_bytes=0) for name in "ab"], "PACK")
    for node in (one, two):
        on_gpus = {process.need.request.role for process in node if process.need.request.settings.gpus}
        assert on_gpus == {"generator", "policy"}


@pytest.mark.parametrize(("utilization", "found"), [(0.9, ["generator.gpu_memory_utilization"]), (0.2, [])])
def test_what_a_rank_keeps_must_fit_beside_an_engine_that_is_awake(utilization: float, found: list[str]):
    config = config_of(*SHARED, f"generator.gpu_memory_utilization={utilization}")
    kept = {"weights": 20e9, "optimizer": 40e9, "activations": 15e9}
    needs = [Need(request, Memory({}, kept) if request.role == "policy" else None) for request in role_requests(config)]
    findings = Findings()
    check_gpu_memory(findings, needs, [NodeShape("a", 8, 2, 0, gpu_memory_bytes=80 * 10**9)])
    assert [finding.what for finding in findings.of(State.CHANGE)] == found


def test_without_sharing_every_process_has_a_bundle_of_its_own():
    two, one = ActorSettings(replicas=2, gpus=1), ActorSettings(cpus=1)
    room = Room.of([RoleRequest("a", "a", two), RoleRequest("b", "b", one), RoleRequest("c", "c", two)])
    assert room.first_bundle == {"a": 0, "b": 2, "c": 3}
    assert room.settings == {"a": two, "b": one, "c": two}
    assert room.bundles == [{"CPU": 0.25, "GPU": 1}] * 2 + [{"CPU": 1}] + [{"CPU": 0.25, "GPU": 1}] * 2


class Engine:
    """Notes what it is asked, in place of vLLM's."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.llm_engine = SimpleNamespace(has_unfinished_requests=lambda: False)

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake")

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls.append("update")

    def finish_weight_update(self, weight_version: str) -> None:
        self.calls.append(f"finish {weight_version}")

    def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        return True


def test_an_engine_that_sleeps_wakes_before_it_loads_and_only_once():
    generator = Generator.__new__(Generator)
    engine = Engine()
    state = {
        "_engine": engine,
        "_turns": Turns(),
        "_in_flight": False,
        "_version": 0,
        "_asleep": False,
        "_probed": None,
    }
    vars(generator).update(state)
    generator.sleep()
    generator._bring(Snapshot(1, frozenset({"weight"}), ()))
    generator._bring(Snapshot(1, frozenset({"weight"}), ()))
    assert engine.calls == ["sleep 1", "wake", "start", "update", "finish 1"]
    generator.sleep()
    generator._bring(Snapshot(1, frozenset({"weight"}), ()))
    assert engine.calls[5:] == ["sleep 1", "wake"]
