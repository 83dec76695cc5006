"""One local Ray instance for all tests that need actors in this process's own cluster."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from rlhf_ray.config.settings import ClusterSettings
from rlhf_ray.runtime.cluster import connect


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two CPUs and a small object store; gives a folder for the roles' logs. Nothing is left running behind it."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_ADDRESS", raising=False)
        connect(ClusterSettings(num_cpus=2, object_store_gib=0.2))
        started = set(psutil.Process().children(recursive=True)) - before
        yield tmp_path_factory.mktemp("logs")
        started |= {process for process in set(psutil.Process().children(recursive=True)) - before if _of_ray(process)}
        ray.shutdown()
    _, alive = psutil.wait_procs(list(started), timeout=30)
    assert not alive, f"still running after the end: {[process.name() for process in alive]}"


def _of_ray(process: psutil.Process) -> bool:
    """Not the servers that Python's multiprocessing keeps for the next process of this one."""
    try:
        return not any("multiprocessing" in part for part in process.cmdline())
    except psutil.NoSuchProcess:
        return False
