"""Policy, critic, reference and engine work together on architectures that differ from Llama where it matters."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from bench.architectures import agreement_of, processes
from rlhf_ray.config.lora import LoraSettings


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


# The engine fuses queries with keys and values, and their biases; it has GPT-2's weights transposed.
@pytest.mark.parametrize(("name", "targets"), [("qwen2", ["q_proj", "v_proj", "down_proj"]), ("gpt2", "all-linear")])
def test_engine_and_learners_agree_with_adapters(pool: ProcessPoolExecutor, name: str, targets: Any, policy_model: str):
    lora = LoraSettings(rank=4, alpha=32, target_modules=targets)
    found = pool.submit(agreement_of, name, True, policy_model, lora).result(timeout=300)
    assert not found.fault, found
