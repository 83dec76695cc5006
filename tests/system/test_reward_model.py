"""`rlhf-ray train-rm` and `eval-rm` from the command line to the files they leave, with every engine real."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.data.preferences import load_preferences
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.judge.leakage import TrainingTexts, hash_pairs
from tests.system.commands import REPOSITORY, Command, rows_of, run, start, wait_until, without_times
from tests.system.test_ppo import tensor_hashes

pytestmark = pytest.mark.timeout(900)

DEADLINE_S = 300.0
PANDALM = REPOSITORY.parent / "shared" / "data" / "pandalm_human_preferences.jsonl"
CHECKS = {
    "special_tokens", "head_saved", "version", "template", "encoding", "probe", "raw_scores", "plain_transformers",
    "read_at_last_token", "invariance", "vllm",
}  # fmt: skip


def train(data: Path, runs: Path, name: str, *more: str) -> Command:
    """Start a tiny run. What the tests are not about costs little: one scorer, no second engine."""
    return start(
        (
            "train-rm",
            "configs/tiny/reward_model.yaml",
            f"run.name={name}",
            f"paths.data={data}",
            f"paths.runs={runs}",
            "scorer.replicas=1",
            *more,
        ),
        runs / f"{name}.out",
    )


def finish(command: Command, status: int = 0) -> None:
    command.wait(DEADLINE_S)
    assert command.process.returncode == status, command.stderr + command.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def altered(source: Path, target: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Path:
    """Rows with a change to each."""
    rows = [change(index, row) for index, row in enumerate(rows_of(source))]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(data_root: Path, runs: Path) -> Path:
    """An ensemble of three heads with two attributes, one of which half of the pairs lack; and, at the same time, a
    model of flipped labels."""

    def with_attributes(index: int, row: dict[str, Any]) -> dict[str, Any]:
        kindness = {"chosen": index % 5, "rejected": 2} if index % 2 else None
        return {**row, "attributes": {"quality": 1.5, "kindness": kindness}}

    def flipped(index: int, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}

    source = data_root / "tiny" / "pairs_train.jsonl"
    ensemble = train(
        data_root,
        runs,
        "ensemble",
        f"pairs.path={altered(source, runs / 'attributes.jsonl', with_attributes)}",
        "training.attributes=found",
        "aggregation.attributes={preference: 1.0, quality: 0.5}",
        "aggregation.members=minimum",
        "aggregation.length_penalty=fitted",
        "ensemble.members=3",
    )
    turned = train(
        data_root, runs, "flipped", f"pairs.path={altered(source, runs / 'flipped.jsonl', flipped)}", "gate.vllm=false"
    )
    finish(ensemble)
    finish(turned, status=1)
    return runs / "ensemble"


def test_a_run_leaves_a_model_with_its_card_and_its_judgement(trained: Path):
    files = ("config.yaml", "metrics.jsonl", "events.jsonl", "data.json", "evaluation.json", "evaluation.html")
    for name in (
        *files,
        "training.png",
        "summary.json",
        "reward_model/training_texts.npz",
        "reward_model/reference_scores.json",
    ):
        assert (trained / name).stat().st_size > 0, name
    card = RewardModelCard.load(str(trained / "reward_model"), "model")
    assert card is not None
    assert card.layout.attributes == ("preference", "kindness", "quality")
    assert card.layout.num_members == 3
    assert card.aggregation.attribute_weights == (1.0, 0.0, 0.5)
    assert card.aggregation.length_coefficient >= 0
    assert card.released
    assert card.version == card.version_of(trained / "reward_model")
    report = read(trained / "evaluation.json")
    assert {check["name"]: check["passed"] for check in report["checks"]} == dict.fromkeys(CHECKS, True)
    assert report["pairs"]["accuracy"]["value"] == card.evaluation["accuracy"] > 0.9
    assert [each["name"] for each in report["pairs"]["by_attribute"]] == list(card.layout.attributes)
    assert report["pairs"]["disagreement"] is not None


def test_the_offline_scorer_repeats_the_judgement(trained: Path, data_root: Path):
    scorer = RewardScorer(RewardSettings(model=str(trained / "reward_model")))
    rows = rows_of(data_root / "tiny" / "pairs_test.jsonl")
    encoded = [scorer.texts.encode(row["prompt"] + row[side]) for side in ("chosen", "rejected") for row in rows]
    # The members are centred within each pair.
    scored = scorer.score_encoded(encoded, prompts=np.tile(np.arange(len(rows)), 2))
    chosen, rejected = scored.scores.reshape(2, -1)
    report = read(trained / "evaluation.json")
    assert np.mean(chosen > rejected) == report["pairs"]["accuracy"]["value"]
    assert (chosen - rejected).mean() == pytest.approx(report["pairs"]["margins"]["mean"], abs=1e-5)
    assert (scored.disagreement > 0).all()
    assert scored.version == report["version"]


def test_flipped_labels_are_refused_with_reasons(trained: Path):
    command_error = (trained.parent / "flipped.err").read_text(encoding="utf-8")
    assert command_error.startswith("refused: ")
    assert "below one half" in command_error or "below chance" in command_error
    card = RewardModelCard.load(str(trained.parent / "flipped" / "reward_model"), "model")
    assert card is not None
    assert card.released is False
    assert read(trained.parent / "flipped" / "summary.json")["released"] is False


def test_a_policy_is_not_trained_against_a_refused_model(trained: Path, data_root: Path, tmp_path: Path):
    refused = trained.parent / "flipped" / "reward_model"
    arguments = ("ppo", "configs/tiny/ppo.yaml", f"paths.data={data_root}", f"paths.runs={tmp_path}")
    command = run((*arguments, f"reward.model={refused}"), tmp_path / "out", 60)
    assert command.process.returncode == 2
    assert "was refused by the release gate" in command.stderr
    assert not list(tmp_path.glob("*/metrics.jsonl"))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(data_root: Path, runs: Path):
    """Two independent members, judged on the way; stopped in the second one."""
    more = (
        "ensemble.members=2",
        "ensemble.kind=independent",
        "training.steps=10",
        "training.dropout=0.1",
        f"validation.path={data_root}/tiny/pairs_test.jsonl",
        "training.evaluate_every=4",
        "checkpoint.every_steps=3",
        "gate.enabled=false",
    )
    whole = train(data_root, runs, "whole", *more)
    stopped = train(data_root, runs, "stopped", *more, "--resume")

    def steps() -> list[dict[str, Any]]:
        return rows_of(runs / "stopped" / "metrics.jsonl")

    wait_until(lambda: len(steps()) >= 12 or stopped.process.poll() is not None, DEADLINE_S, "the second member")
    stopped.process.send_signal(signal.SIGTERM)
    finish(stopped, status=1)
    assert "continue with --resume" in stopped.stderr
    finish(whole)
    assert len(steps()) < 20
    finish(train(data_root, runs, "stopped", *more, "--resume"))
    one, other = (rows_of(runs / name / "metrics.jsonl") for name in ("whole", "stopped"))
    assert [without_times(row) for row in one] == [without_times(row) for row in other]
    assert [row["member"] for row in one] == [0] * 10 + [1] * 10
    assert [row["step"] for row in one if "validation/accuracy" in row] == [4, 8, 10, 14, 18, 20]
    for member in (".", "member-1"):
        folders = [runs / name / "reward_model" / member for name in ("whole", "stopped")]
        assert tensor_hashes(folders[0]) == tensor_hashes(folders[1])
    versions = [read(runs / name / "summary.json")["version"] for name in ("whole", "stopped")]
    assert versions[0] == versions[1]


def test_a_member_that_gets_no_better_ends_early(data_root: Path, runs: Path):
    more = (
        "learner.learning_rate=1.0e-12",
        f"validation.path={data_root}/tiny/pairs_test.jsonl",
        "training.evaluate_every=1",
        "training.patience=2",
        "held_out=null",
    )
    finish(train(data_root, runs, "early", *more))
    assert [row["step"] for row in rows_of(runs / "early" / "metrics.jsonl")] == [1, 2, 3]
    [ended] = [event for event in rows_of(runs / "early" / "events.jsonl") if event["kind"] == "member_ended_early"]
    assert "since step 1" in ended["cause"]
    assert RewardModelCard.load(str(runs / "early" / "reward_model"), "model") is not None
    # What chose the model cannot judge it later.
    seen = TrainingTexts.load(str(runs / "early" / "reward_model"), "model")
    assert seen is not None
    settings = PreferenceSettings(path=str(data_root / "tiny" / "pairs_test.jsonl"))
    assert seen.leakage(hash_pairs(load_preferences(settings, None, "pairs.path").pairs)).pairs.share == 1


def test_a_model_is_judged_again_from_its_directory_and_under_a_policy(trained: Path, data_root: Path, tmp_path: Path):
    arguments = (
        "eval-rm",
        "configs/tiny/reward_evaluation.yaml",
        f"paths.data={data_root}",
        f"paths.runs={tmp_path}",
        f"model={trained / 'reward_model'}",
        "gate.vllm=false",
        "gate.record=true",
    )
    command = start((*arguments, "--gate"), tmp_path / "healthy.out")
    leaked = start(
        (
            *arguments,
            "--gate",
            "run.name=leaked",
            f"pairs.path={data_root}/tiny/pairs_train.jsonl",
            "best_of_n=null",
            "gate.max_leaked_share=0.0",
            "gate.record=false",
        ),
        tmp_path / "leaked.out",
    )
    finish(command)
    finish(leaked, status=1)
    card = RewardModelCard.load(str(trained / "reward_model"), "model")
    assert card is not None
    assert card.released, "recorded by the first, not by the second"
    report = read(tmp_path / "tiny-evaluation" / "evaluation.json")
    before = read(trained / "evaluation.json")
    assert report["pairs"]["accuracy"] == before["pairs"]["accuracy"]
    assert report["verdict"] == {"released": True, "refusals": []}
    assert report["best_of_n"]["prompts"] == 8
    assert [point["n"] for point in report["best_of_n"]["curve"]["points"]] == [1, 2, 4, 8]
    [refusal] = read(tmp_path / "leaked" / "evaluation.json")["verdict"]["refusals"]
    assert "gate.max_leaked_share" in refusal


@pytest.mark.skipif(not PANDALM.exists(), reason="the comparisons are not beside this copy of the project")
def test_votes_with_ties_train_and_evaluate(data_root: Path, runs: Path):
    more = (
        f"pairs={{path: {PANDALM}, on_bad_row: skip, limit: 200}}",
        f"held_out={{path: {PANDALM}, on_bad_row: skip, limit: 100}}",
        "training={max_length: 256, on_too_long: truncate, steps: 3, batch_size: 16}",
        "gate.enabled=false",
    )
    command = train(data_root, runs, "votes", *more)
    finish(command)
    data = read(runs / "votes" / "data.json")
    assert data["training"]["rows"] == 200
    assert data["training"]["bad_rows"] == len(rows_of(PANDALM)[:200]) - data["training"]["pairs"]
    assert data["training"]["ties"] > 0
    listed = command.stdout.count("left out: ")
    assert listed >= min(data["training"]["bad_rows"], 10)
    assert f"{PANDALM}:" in command.stdout
    assert read(runs / "votes" / "evaluation.json")["pairs"]["ties"] > 0


def test_bad_rows_end_the_command_with_the_first_ten_places(data_root: Path, tmp_path: Path):
    bad = altered(
        data_root / "tiny" / "pairs_train.jsonl",
        tmp_path / "bad.jsonl",
        lambda index, row: {"prompt": row["prompt"], "chosen": row["chosen"]} if index < 12 else row,
    )
    command = train(data_root, tmp_path, "bad", f"pairs.path={bad}")
    command.wait(60)
    assert command.process.returncode == 2
    places = [f"{bad}:{line}" for line in range(1, 11)]
    assert command.stderr.count("\n") == 1
    assert all(place in command.stderr for place in places)
    assert "12 such rows" in command.stderr
