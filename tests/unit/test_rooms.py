"""Imports point downwards: what a room may know of is written here, and nothing else is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "rlhf_ray"
GROUND = {"config", "failures", "randomness", "waiting"}
DATA = GROUND | {"data", "rollout"}
NETWORKS = DATA | {"models", "algorithms"}
RUNTIME = NETWORKS | {"roles", "runtime", "tracking"}
CORE = NETWORKS | {"reward.client"}
JUDGE = RUNTIME | {"reward.core"}
MAY_IMPORT = {
    "config": {"failures"},
    "data": GROUND,
    "algorithms": {"config", "rollout"},
    "models": DATA,
    "tracking": GROUND | {"rollout"},
    "roles": NETWORKS,
    "runtime": NETWORKS | {"roles", "tracking"},
    "ppo": RUNTIME | {"reward.core"},
    "preflight": JUDGE | {"ppo", "reward.judge"},
    "reward.client": set(),
    "reward.core": CORE,
    "reward.judge": JUDGE,
    "reward.train": JUDGE | {"reward.judge"},
    "reward.serve": NETWORKS | {"runtime", "reward.client", "reward.core"},
}


def room_of(module: str) -> str:
    """`reward.core` of `rlhf_ray.reward.core.card`, `ppo` of `rlhf_ray.ppo.loop`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "reward" else parts[0]


def imports(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, at its head or later."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rlhf_ray."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("rlhf_ray."))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_those_below_it(room: str):
    files = list((PACKAGE / room.replace(".", "/")).rglob("*.py"))
    assert files
    strangers = {
        f"{file.relative_to(PACKAGE)}: {module}"
        for file in files
        for module in imports(file)
        if room_of(module) not in MAY_IMPORT[room] | {room}
    }
    assert not strangers


def test_the_loop_knows_of_the_reward_only_where_it_comes_from_and_how_it_is_asked():
    known = {f"rlhf_ray.reward.core.{name}" for name in ("protocol", "source", "evaluator")}
    used = {module for file in (PACKAGE / "ppo").rglob("*.py") for module in imports(file) if ".reward." in module}
    assert used <= known
