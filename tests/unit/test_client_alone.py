"""The client of the reward service, where nothing is installed but httpx and pydantic."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import REPOSITORY

PROGRAM = """
import sys, time
started = time.perf_counter()
from rlhf_ray.reward.client import AsyncRewardClient, PromptResponse, RewardClient
print(time.perf_counter() - started)
RewardClient("http://127.0.0.1:1").close()
assert not {"torch", "ray", "transformers", "numpy", "fastapi"} & set(sys.modules)
for absent in ("torch", "ray", "transformers", "numpy"):
    try:
        __import__(absent)
    except ImportError:
        continue
    raise AssertionError(f"{absent} is there")
"""


def requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["client"]]


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    """The installed packages that pip would install for these."""
    found: dict[str, metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[requirement.name] = metadata.distribution(requirement.name)
        waiting += found[requirement.name].requires or []
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with those packages and ours, and nothing else."""
    folder = tmp_path_factory.mktemp("site-packages")
    size = 0
    for package in closure(requirements()).values():
        for file in package.files or []:
            size += file.size or 0
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
    assert size < 20e6
    (folder / "rlhf_ray").symlink_to(REPOSITORY / "rlhf_ray")
    return folder


def test_the_client_needs_httpx_and_pydantic_only():
    assert {Requirement(line).name for line in requirements()} == {"httpx", "pydantic"}


def test_the_client_loads_fast_where_nothing_else_is_installed(packages: Path):
    seconds = []
    for _ in range(3):  # the first compiles, and others may use the machine
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(packages)!r})\n{PROGRAM}"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        )
        assert run.returncode == 0, run.stderr
        seconds.append(float(run.stdout))
    assert min(seconds) < 0.5


def test_the_package_says_that_it_is_typed():
    assert (REPOSITORY / "rlhf_ray" / "py.typed").is_file()
