"""Policy, critic, reference and engine work together on architectures that differ from Llama where it matters."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from bench.architectures import agreement_of, processes


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with processes() as pool:
        yield pool


# Tied embeddings and a window; biases, learned positions and dropout; soft caps; fused experts. All others:
# `make bench-architectures`.
@pytest.mark.parametrize(("name", "tied"), [("mistral", True), ("gpt2", False), ("gemma2", True), ("mixtral", False)])
def test_engine_and_learners_agree_before_training_and_after_each_sync(
    pool: ProcessPoolExecutor, name: str, tied: bool, policy_model: str
):
    found = pool.submit(agreement_of, name, tied, policy_model).result(timeout=300)
    assert not found.fault, found
