"""What each extra promises works where nothing else is installed: client, reward model, judgement, service."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

HEAVY = ("torch", "ray", "transformers", "numpy", "fastapi", "deepspeed", "vllm", "wandb")
CLIENT = """
import time
started = time.perf_counter()
from rlhf_ray.reward.client import AsyncRewardClient, PromptResponse, RewardClient
print(time.perf_counter() - started)
RewardClient("http://127.0.0.1:1").close()
"""
MODEL = """
from rlhf_ray.reward import RewardModel
model = RewardModel.load({model!r})
scores = model.score(["I think"] * 2, [" yes", " no"])
assert len(set(scores)) == 2
assert 0 < model.compare("I think", " yes", " no") < 1
"""
JUDGE = """
import rlhf_ray.cli
import rlhf_ray.reward.judge.evaluate
"""
SERVE = """
import rlhf_ray.cli
import rlhf_ray.reward.serve.application
import rlhf_ray.reward.serve.deploy
"""


def requirements(extra: str) -> Iterator[Requirement]:
    """Of the package with an extra, those of extras that it names among them."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            for name in requirement.extras:
                yield from requirements(name)
        else:
            yield requirement


def closure(wanted: Iterator[Requirement]) -> dict[str, metadata.Distribution]:
    """The installed packages that pip would install for these."""
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(requirement.name, extra) for requirement in wanted for extra in ("", *requirement.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform, which a marker would say if all metadata had one
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, each) for each in ("", *requirement.extras)]
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the packages of an extra and ours, and nothing else."""

    def folder_of(extra: str) -> Path:
        folder = tmp_path_factory.mktemp(extra)
        for package in closure(requirements(extra)).values():
            for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(Path(str(package.locate_file(top))))
        (folder / "rlhf_ray").symlink_to(REPOSITORY / "rlhf_ray")
        return folder

    return folder_of


def run_with(folder: Path, program: str, absent: tuple[str, ...]) -> str:
    """What a program prints that sees these packages only; it fails if it can import what should be absent."""
    code = f"""
import sys
sys.path.append({str(folder)!r})
{program}
import importlib.util
assert not [name for name in {absent!r} if importlib.util.find_spec(name)]
"""
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_client_needs_httpx_and_pydantic_only():
    assert {each.name for each in requirements("client")} == {"httpx", "pydantic"}
    sizes = [file.size or 0 for package in closure(requirements("client")).values() for file in package.files or []]
    assert sum(sizes) < 20e6


def test_the_client_loads_fast_where_nothing_else_is_installed(installed: Callable[[str], Path]):
    folder = installed("client")
    # The first compiles, and others may use the machine.
    assert min(float(run_with(folder, CLIENT, HEAVY)) for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    ("extra", "program", "absent"),
    [
        ("model", MODEL, ("ray", "fastapi", "deepspeed", "vllm", "wandb")),
        ("judge", JUDGE, ("deepspeed", "vllm", "wandb", "peft")),
        ("serve", SERVE, ("deepspeed", "vllm", "wandb", "peft")),
    ],
)
def test_an_extra_brings_what_it_needs_and_no_engine(
    installed: Callable[[str], Path], tiny: Path, extra: str, program: str, absent: tuple[str, ...]
):
    run_with(installed(extra), program.replace("{model!r}", repr(str(tiny / "reward_model"))), absent)


def test_the_package_says_that_it_is_typed():
    assert (REPOSITORY / "rlhf_ray" / "py.typed").is_file()
