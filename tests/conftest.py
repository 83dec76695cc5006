"""What all tests share: a quiet, single-threaded process, the tiny preset, and learners that are one process."""

import os

# Read when the libraries are imported, which the test modules do after this file.
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.data.presets import prepare
from rlhf_ray.roles.rank_group import Rank

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of presets with `tiny` in it: the repository's own `data` where that has it."""
    root = REPOSITORY / "data"
    if not (root / "tiny" / "preset.json").is_file():
        root = tmp_path_factory.mktemp("data")
    prepare("tiny", root, lambda line: None)
    return root


@pytest.fixture(scope="session")
def tiny(data_root: Path) -> Path:
    """Folder of the tiny preset: `policy`, `policy_tied`, `reward_model` and JSONL files."""
    return data_root / "tiny"


@pytest.fixture(scope="session")
def policy_model(tiny: Path) -> str:
    """Directory of the tiny policy."""
    return str(tiny / "policy")


@pytest.fixture(scope="session")
def tied_policy_model(tiny: Path) -> str:
    """Directory of the tiny policy whose output projection shares the embedding's weights."""
    return str(tiny / "policy_tied")


@pytest.fixture(scope="session")
def policy_tokenizer(policy_model: str) -> Any:
    """Its tokenizer."""
    from rlhf_ray.models.loading import load_tokenizer

    return load_tokenizer(policy_model, "policy.model")


@pytest.fixture(scope="session")
def single_rank() -> Iterator[Rank]:
    """This process as a learner's whole group."""
    import torch.distributed as dist

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    yield Rank(0, 1, "127.0.0.1", port)
    if dist.is_initialized():
        dist.destroy_process_group()
