"""The checks and stand-ins of the benchmarks with stub roles."""

import inspect
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bench.many_nodes import CONFIG, QUARTER, Process, faults_of
from bench.scale import Turn
from bench.stub_inputs import stub_inputs
from bench.stubs import StubGenerator, StubSettings, stub_classes
from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.models.buckets import Snapshot, WeightBucket
from rlhf_ray.ppo.roles import RoleClasses, role_requests
from rlhf_ray.ppo.step import plan_shards

CONFIGURATION = load_config(PPOConfig, CONFIG, [*QUARTER, "steps=2", "evaluation.prompts=null"])


PORTS = {"policy": 1, "critic": 2, "reference": 3, "weights": 4}


def sound_run() -> list[Process]:
    """What the processes of a faultless run write down: two GPUs on each node, filled in the order of the bundles."""
    wanted = [request for request in role_requests(CONFIGURATION) for _ in range(request.settings.replicas)]
    gpus = iter((f"node-{index // 2}", index % 2) for index in range(16))
    own = [[next(gpus) for _ in range(int(request.settings.gpus))] for request in wanted]
    nodes = {str(bundle): of_bundle[0][0] for bundle, of_bundle in enumerate(own)}
    roles = [request.role for request in wanted]
    processes = []
    for bundle, role in enumerate(roles):
        place = {
            "node": nodes[str(bundle)],
            "address": nodes[str(bundle)],
            "gpus": [gpu for _, gpu in own[bundle]],
            "resources": [f"CPU_group_{bundle}_ab12", "CPU_group_ab12"],
            "bundle_nodes": nodes,
        }
        number = bundle - roles.index(role)

        def meeting(group: str, rank: int, workers: int = 1) -> dict[str, Any]:
            first = roles.index("policy" if group == "weights" else group)
            where = {"master_address": nodes[str(first)], "master_port": PORTS[group]}
            return {"kind": "meeting", "group": group, "rank": rank, "workers": workers, **where}

        facts: list[dict[str, Any]] = []
        if role == "generator":
            facts = [meeting("weights", 1 + 2 * number, workers=2)]
            facts += [{"kind": "loaded", "version": version} for version in range(3)]
            facts.append({"kind": "sampled", "asked": 1, "had": 1, "shard": 0})
        elif role in PORTS:
            facts = [meeting(role, number)]
            if role == "policy" and number == 0:
                facts.append(meeting("weights", 0))
        processes.append(Process(role, place, tuple(facts)))
    return processes


def of_role(processes: list[Process], role: str, number: int = 0) -> Process:
    return [process for process in processes if process.role == role][number]


def move(processes: list[Process]) -> None:
    of_role(processes, "reward").place["node"] = "node-0"


def share_a_gpu(processes: list[Process]) -> None:
    one, other = of_role(processes, "policy", 0), of_role(processes, "policy", 1)
    other.place["gpus"] = one.place["gpus"]


def take_the_same_rank(processes: list[Process]) -> None:
    of_role(processes, "policy", 3).of_kind("meeting")[0]["rank"] = 2


def meet_elsewhere(processes: list[Process]) -> None:
    of_role(processes, "reference", 1).of_kind("meeting")[0]["master_port"] += 1


def overlap_in_the_broadcast(processes: list[Process]) -> None:
    of_role(processes, "generator", 1).of_kind("meeting")[0]["rank"] = 2


def miss_a_version(processes: list[Process]) -> None:
    of_role(processes, "generator").of_kind("loaded")[1]["version"] = 2


def sample_with_another(processes: list[Process]) -> None:
    of_role(processes, "generator").of_kind("sampled")[0]["had"] = 0


def take_the_bundle_of_another(processes: list[Process]) -> None:
    of_role(processes, "reward").place["resources"] = ["CPU_group_0_ab12"]


def test_a_faultless_run_has_no_faults():
    assert faults_of(CONFIGURATION, sound_run()) == []


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (move, "not on the node of its bundle"),
        (share_a_gpu, "belongs to 2 processes"),
        (take_the_same_rank, "policy: ranks"),
        (meet_elsewhere, "reference: meets at"),
        (overlap_in_the_broadcast, "weights: ranks"),
        (miss_a_version, "a generator loaded versions"),
        (sample_with_another, "was to be sampled with version 1, not 0"),
        (take_the_bundle_of_another, "that bundle is for generator"),
    ],
)
def test_each_planted_fault_is_found(plant: Callable[[list[Process]], None], told: str):
    processes = sound_run()
    plant(processes)
    faults = faults_of(CONFIGURATION, processes)
    assert any(told in fault for fault in faults), faults


def test_stub_rollouts_are_keyed_and_have_long_tails():
    stub = StubSettings(mean_tokens=64.0)
    inputs = stub_inputs(CONFIGURATION, stub, num_prompts=300, num_held_out=0)
    drawn = inputs.prompts.draw(1, 0, 512)
    plans = plan_shards(drawn, CONFIGURATION.sampling, 1, "train")

    def sampled() -> list[Any]:
        generator = StubGenerator("m", CONFIGURATION.generator, 2048, 2, CONFIGURATION.weights, stub=stub)
        return [generator.generate(plan, Snapshot(0, frozenset(), ())) for plan in plans]

    rollouts = sampled()
    assert [each.digest() for each in rollouts] == [each.digest() for each in sampled()]
    lengths = np.concatenate([each.response_lengths for each in rollouts])
    # Mean of 512 log-normals with σ = 0.8: its standard error is 0.95 · 64 / √512 = 2.7.
    assert abs(lengths.mean() - 64) < 4 * 2.7
    assert lengths.max() > 4 * lengths.mean()


def test_an_engine_that_is_given_another_version_than_asked_for_says_so():
    generator = StubGenerator("m", CONFIGURATION.generator, 2048, 2, CONFIGURATION.weights, stub=StubSettings())
    bucket = WeightBucket.of([("version", torch.tensor([1]))])
    generator._bring(Snapshot(1, frozenset({"version"}), (bucket,)))
    with pytest.raises(RuntimeError, match="asked for version 2, found"):
        generator._bring(replace(Snapshot(1, frozenset({"version"}), (bucket,)), version=2))


def test_calls_of_one_role_begin_in_the_order_in_which_they_were_made():
    turn, begun, order = Turn(at_once=2), threading.Event(), []

    def call(ticket: int, wait: bool) -> None:
        with turn.of(ticket):
            order.append(ticket)
            if wait:
                begun.wait(10)

    late = threading.Thread(target=call, args=(2, False))
    late.start()
    first = [threading.Thread(target=call, args=(ticket, True)) for ticket in (0, 1)]
    for thread in first:
        thread.start()
    late.join(0.2)
    assert late.is_alive(), "two are at work already"
    begun.set()
    for thread in [*first, late]:
        thread.join(10)
    assert sorted(order[:2]) == [0, 1]
    assert order[2] == 2


@pytest.mark.parametrize("role", ["generator", "policy", "critic", "reference", "evaluator"])
def test_a_stub_is_built_as_the_role_that_it_stands_for(role: str):
    real, stub = getattr(RoleClasses(), role), getattr(stub_classes(StubSettings()), role).func
    wanted = list(inspect.signature(real).parameters)
    assert [name for name in inspect.signature(stub).parameters if name != "stub"] == wanted
