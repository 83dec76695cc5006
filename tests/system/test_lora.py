"""PPO with adapters from the command line: engine and learner agree after every sync, and no role is a reference."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.system.commands import PPO, Command, rows_of, start, without_times
from tests.system.test_ppo import tensor_hashes

pytestmark = pytest.mark.timeout(600)

STEPS = 3
DEADLINE_S = 240.0
LOG_PROBS = 1e-5
"""Log-probs of two float32 computations of a model with 64 hidden units."""


def begin(data: Path, runs: Path, *more: str) -> Command:
    """Two ranks share the weights (ZeRO-3); queries and values have adapters, keys beside them do not."""
    arguments = (
        *PPO,
        f"paths.data={data}",
        f"paths.runs={runs}",
        f"steps={STEPS}",
        "policy.lora={rank: 4, alpha: 16, target_modules: [q_proj, v_proj, down_proj]}",
        "policy.learner.replicas=2",
        "policy.learner.zero_stage=3",
        "policy.learner.learning_rate=1e-2",
        "reference.dtype=auto",
        "algorithm.kl.controller=fixed",
        "sampling.prompts_per_step=4",
        # One shard for two ranks: one of them goes along with a forward pass that nobody asked for.
        "evaluation.prompts.limit=2",
        *more,
    )
    return start(arguments, runs / "output")


@pytest.fixture(scope="module")
def runs(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and the same from its checkpoint of step 2 on, as if it had been killed behind it."""
    alone, resumed = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("resumed")
    command = begin(data_root, alone)
    assert command.wait(DEADLINE_S) == 0, command.stderr
    results = shutil.ignore_patterns("summary.json", "policy_adapters", "model.safetensors")
    shutil.copytree(alone / "tiny-ppo", resumed / "tiny-ppo", ignore=results)
    again = begin(data_root, resumed, "--resume")
    assert again.wait(DEADLINE_S) == 0, again.stderr
    assert command.left_running() == again.left_running() == []
    return alone / "tiny-ppo", resumed / "tiny-ppo"


def test_engine_and_learner_agree_after_every_sync(runs: tuple[Path, Path]) -> None:
    rows = rows_of(runs[0] / "metrics.jsonl")
    assert [row["weights/version"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert row["sync/max_abs_dlogp"] <= 1e-4
        assert row["sync/change"] >= 1e-3, "a step changes too little to prove anything"
        assert row["mismatch/max_abs_dlogp"] <= 1e-4
    assert not [event for event in rows_of(runs[0] / "events.jsonl") if event["kind"] == "sync_repeated"]


def test_the_policy_starts_at_its_reference_and_leaves_it(runs: tuple[Path, Path]) -> None:
    first, *later = rows_of(runs[0] / "metrics.jsonl")
    assert first["kl/reference"] == 0, "adapters that are 0 are the same arithmetic as none, plus 0"
    assert all(abs(row["kl/reference"]) > 1e-4 for row in later)
    started = {event["role"] for event in rows_of(runs[0] / "events.jsonl") if event["kind"] == "role_started"}
    assert started == {"generator-0", "reward-0", "policy-0", "policy-1", "critic-0", "evaluator-0"}
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert isinstance(summary["kl/reference"], float)


def test_a_resumed_run_ends_like_the_one_left_alone(runs: tuple[Path, Path]) -> None:
    alone, parts = runs
    [loaded] = [event for event in rows_of(parts / "events.jsonl") if event["kind"] == "checkpoint_loaded"]
    assert loaded["step"] == 2
    whole, resumed = (rows_of(folder / "metrics.jsonl") for folder in runs)
    assert [without_times(row) for row in resumed] == [without_times(row) for row in whole]
    assert tensor_hashes(alone / "policy") == tensor_hashes(parts / "policy")
    adapters = [(folder / "policy_adapters" / "adapter_model.safetensors").read_bytes() for folder in runs]
    assert adapters[0] == adapters[1]


def test_exported_policy_and_adapters_give_the_same_logprobs(runs: tuple[Path, Path], tiny: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(runs[0] / "policy")
    base = AutoModelForCausalLM.from_pretrained(tiny / "policy")
    before = logprobs_of(base)
    adapted = PeftModel.from_pretrained(base, runs[0] / "policy_adapters")
    torch.testing.assert_close(logprobs_of(merged), logprobs_of(adapted), rtol=0, atol=LOG_PROBS)
    assert float((logprobs_of(adapted) - before).abs().max()) > 1e-3


def logprobs_of(model: Any) -> torch.Tensor:
    """`[T, V]` after each of some tokens."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 300, 40))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens[None]).logits[0]
    return logits.log_softmax(-1)
