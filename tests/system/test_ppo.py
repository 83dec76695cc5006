"""`rlhf-ray ppo` from the command line to the files it leaves, with every engine real."""

import hashlib
import json
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import Fault, happened
from tests.system.commands import PPO, Command, rows_of, run, start, wait_until, without_times

pytestmark = pytest.mark.timeout(900)

STEPS = 10  # more than the 8 that one pass over the 64 prompts takes
DEADLINE_S = 400.0
ROLES = {"generator-0", "reward-0", "policy-0", "reference-0", "critic-0", "evaluator-0"}
FILES = (
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "summary.json",
    "policy/config.json",
    "policy/model.safetensors",
    "policy/tokenizer.json",
    "training.png",
    "samples.html",
    "samples.jsonl",
)
METRICS = """
step samples tokens wall_s reward/mean reward/std reward/shaped_mean kl/reference kl/coefficient policy/loss
policy/entropy policy/clip_fraction policy/approx_kl policy/grad_norm policy/lr value/loss value/explained_variance
response/length_mean response/truncated_fraction mismatch/kl mismatch/max_abs_dlogp weights/version staleness/mean
staleness/max time/generate_s time/reward_s time/reference_s time/values_s time/train_s time/sync_s
throughput/samples_per_s throughput/tokens_per_s
"""
HELD_OUT = ("prompts", "vader_before", "vader_after", "reward_before", "reward_after", "reward_std_before")


@dataclass
class Run:
    """A run and its folder."""

    command: Command
    folder: Path

    @property
    def metrics(self) -> list[dict]:
        return rows_of(self.folder / "metrics.jsonl")

    @property
    def events(self) -> list[dict]:
        return rows_of(self.folder / "events.jsonl")

    def events_of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["kind"] == kind]


def begin(data: Path, runs: Path, *more: str, module: str = "rlhf_ray", **environment: str) -> Run:
    """Start the tiny run; its schedules move at every step, so that a resume must get them right."""
    arguments = (
        *PPO,
        f"paths.data={data}",
        f"paths.runs={runs}",
        f"steps={STEPS}",
        "policy.learner.lr_schedule=linear",
        "policy.learner.warmup_steps=6",
        "checkpoint.every_steps=4",
        *more,
    )
    return Run(start(arguments, runs / "output", module, **environment), runs / "tiny-ppo")


@pytest.fixture(scope="session")
def twins(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs with one seed at the same time. The driver of the second tries to fetch a rollout on the way."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    first = begin(data_root, folders[0])
    second = begin(data_root, folders[1], module="tests.system.fetching_driver", OUTCOMES=str(folders[1] / "outcomes"))
    for each in (first, second):
        each.command.wait(DEADLINE_S)
    for each in (first, second):
        assert each.command.process.returncode == 0, each.command.stderr
    return first, second


@pytest.fixture(scope="session")
def finished(twins: tuple[Run, Run]) -> Run:
    """The run left alone."""
    return twins[0]


@pytest.fixture(scope="session")
def stopped(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that got SIGTERM after its second step; it has a checkpoint of every step."""
    stopped = begin(data_root, tmp_path_factory.mktemp("stopped"), "checkpoint.every_steps=1")
    wait_until(
        lambda: len(stopped.metrics) >= 2 or stopped.command.process.poll() is not None, DEADLINE_S, "the second step"
    )
    stopped.command.process.send_signal(signal.SIGTERM)
    stopped.command.wait(60)
    return stopped


@pytest.fixture(scope="session")
def resumed(stopped: Run, data_root: Path) -> tuple[int, Run]:
    """The stopped run taken up again with its newest checkpoint damaged, and the step it was stopped after."""
    last_step = stopped.metrics[-1]["step"]
    [weights] = stopped.folder.glob(f"checkpoints/step-{last_step:06d}/policy/state/*model_states.pt")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    # As if the evaluation had changed: the policy before training is judged again, not the one of the checkpoint.
    [judged] = stopped.folder.glob("held_out_before-*.jsonl")
    judged.unlink()
    run = begin(data_root, stopped.folder.parent, "--resume")
    run.command.wait(DEADLINE_S)
    assert run.command.process.returncode == 0, run.command.stderr
    return last_step, run


@pytest.fixture(scope="session")
def ahead(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs whose sampling is two steps ahead: one left alone, and one stopped after its third step and resumed."""
    settings = (
        *("steps=7", "algorithm.max_staleness=2", "generator.replicas=2"),
        # At the fourth step only, so that the best is that of the checkpoint.
        *("evaluation.every_steps=4", "evaluation.keep_best=judge"),
    )
    alone, stopped = (begin(data_root, tmp_path_factory.mktemp(name), *settings) for name in ("alone", "interrupted"))
    wait_until(
        lambda: len(stopped.metrics) >= 3 or stopped.command.process.poll() is not None, DEADLINE_S, "the third step"
    )
    stopped.command.process.send_signal(signal.SIGTERM)
    stopped.command.wait(60)
    assert stopped.events[-1]["kind"] == "run_stopped"
    assert len(stopped.metrics) < 7
    resumed = begin(data_root, stopped.folder.parent, *settings, "--resume")
    for each in (alone, resumed):
        each.command.wait(DEADLINE_S)
        assert each.command.process.returncode == 0, each.command.stderr
    return alone, resumed


@pytest.fixture(scope="session")
def haunted(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that loses a process of every kind, one way or another, and two of them at once."""
    folder = tmp_path_factory.mktemp("haunted")
    faults = [
        Fault("generator", "kill", "busy", 6, str(folder / "generator")),
        Fault("reward", "memory", "idle", 9, str(folder / "reward")),
        Fault("reference", "stop", "busy", 13, str(folder / "reference")),
        Fault("policy", "kill", "busy", 5, str(folder / "policy")),
        Fault("critic", "raise", "busy", 5, str(folder / "critic")),
        Fault("critic", "kill", "start", 0, str(folder / "critic-start")),
        Fault("generator", "kill", "start", 0, str(folder / "generator-start")),
    ]
    listed = json.dumps([asdict(fault) for fault in faults])
    run = begin(data_root, folder, "cluster.silent_after_s=15", module="tests.faulty_run", FAULTS=listed)
    run.command.wait(DEADLINE_S)
    assert run.command.process.returncode == 0, run.command.stderr
    assert happened(faults)
    return run


@pytest.fixture(scope="session")
def spared(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Two runs one step ahead whose steps are filled with spare prompts: one left alone, and one stopped after its
    second step and resumed."""
    settings = (
        *("steps=8", "algorithm.max_staleness=1", "evaluation.prompts=null", "evaluation.judge=none"),
        *("sampling.prompts_per_step=4", "sampling.spare_prompts=8", "algorithm.drop_uniform_groups=true"),
        *("algorithm.advantage=grpo", "algorithm.advantage_whiten=false"),
        "algorithm.kl={coefficient: 0.05, estimator: k3, placement: loss, controller: fixed}",
        "reward=[{function: 'tests.unit.reward_functions:even', batch_size: 8}]",
        "critic=null",
    )
    alone, stopped = (begin(data_root, tmp_path_factory.mktemp(name), *settings) for name in ("spared", "halfway"))
    wait_until(
        lambda: len(stopped.metrics) >= 2 or stopped.command.process.poll() is not None, DEADLINE_S, "the second step"
    )
    stopped.command.process.send_signal(signal.SIGTERM)
    stopped.command.wait(60)
    assert 2 <= len(stopped.metrics) < 8, stopped.command.stderr
    resumed = begin(data_root, stopped.folder.parent, *settings, "--resume")
    for each in (alone, resumed):
        each.command.wait(DEADLINE_S)
        assert each.command.process.returncode == 0, each.command.stderr
    return alone, resumed


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_a_run_leaves_every_file_of_the_contract(finished: Run) -> None:
    missing = [name for name in FILES if not (finished.folder / name).stat().st_size]
    assert not missing
    assert sorted(path.name for path in (finished.folder / "checkpoints").iterdir()) == ["step-000004", "step-000008"]


def test_every_row_has_every_metric_of_the_contract_as_a_number(finished: Run) -> None:
    assert [row["step"] for row in finished.metrics] == list(range(1, STEPS + 1))
    for row in finished.metrics:
        assert [name for name in METRICS.split() if not isinstance(row.get(name), int | float)] == []


def test_engine_and_learner_agree_after_every_sync_and_on_every_sample(finished: Run) -> None:
    for row in finished.metrics:
        assert row["sync/max_abs_dlogp"] <= 1e-4
        assert row["mismatch/max_abs_dlogp"] <= 1e-4
        assert row["mismatch/mean_ratio"] <= 1.0001


def test_every_step_samples_with_the_weights_of_the_step_before(finished: Run) -> None:
    for row in finished.metrics:
        assert row["weights/version"] == row["step"]
        assert (row["staleness/mean"], row["staleness/max"]) == (0, 0)


def test_token_and_sample_counts_add_up(finished: Run) -> None:
    rows = finished.metrics
    assert [row["samples"] for row in rows] == [16 * row["step"] for row in rows]
    for before, row in zip([{"tokens": 0, "samples": 0}, *rows], rows, strict=False):
        tokens = row["tokens"] - before["tokens"]
        assert tokens == pytest.approx(row["response/length_mean"] * (row["samples"] - before["samples"]))
        assert row["throughput/tokens_per_s"] * row["time/step_s"] == pytest.approx(tokens, rel=1e-3)


def test_the_exported_policy_is_a_trained_hugging_face_model(finished: Run, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished.folder / "policy")
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "policy")
    initial = load_file(tiny / "policy" / "model.safetensors")
    trained = model.state_dict()
    assert trained.keys() == initial.keys()
    assert not [name for name in initial if torch.equal(initial[name], trained[name])]
    tokens = tokenizer("I think the movie was", return_tensors="pt").input_ids
    assert torch.isfinite(model(tokens).logits).all()
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny / "policy").get_vocab()


def test_the_summary_has_the_keys_of_the_contract(finished: Run) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert [key for key in HELD_OUT if not isinstance(summary["held_out"][key], int | float)] == []
    assert summary["held_out"]["prompts"] == 16
    assert isinstance(summary["kl/reference"], float)
    assert summary["wall_s"] > 0


def test_events_name_every_role_with_its_node_and_every_role_has_a_log(finished: Run) -> None:
    started = finished.events_of("role_started")
    assert {event["role"] for event in started} == ROLES
    assert all(re.fullmatch(r"[0-9a-f.:]+", event["node"]) for event in started)
    assert {path.stem for path in (finished.folder / "logs").iterdir()} == ROLES
    assert [event["step"] for event in finished.events_of("checkpoint_saved")] == [4, 8]
    assert finished.events[-1]["kind"] == "run_finished"


def test_the_terminal_shows_nothing_but_our_lines(finished: Run) -> None:
    ours = re.compile(
        r"PPO tiny-ppo · .*|· .*| *step +reward .*| *\d+/10 .*|"
        r"on 16 held-out prompts: reward \S+ -> \S+, VADER \S+ -> \S+|done in \d+:\d\d min; look at \S+/samples\.html|"
    )
    assert [line for line in finished.command.stdout.splitlines() if not ours.fullmatch(line)] == []
    assert finished.command.stderr == ""


def test_no_process_outlives_the_run(finished: Run) -> None:
    assert len(finished.command.descendants) > len(ROLES)
    assert finished.command.left_running() == []


def test_the_timeline_has_every_role(finished: Run) -> None:
    events = json.loads((finished.folder / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(names.values()) == ROLES
    calls = {(names[event["pid"]], event["name"]) for event in events if event["ph"] == "X"}
    assert {("generator-0", "generate"), ("reward-0", "score"), ("policy-0", "train"), ("critic-0", "values")} <= calls
    assert {event["args"]["step"] for event in events if event["ph"] == "X"} == {1, 2, 3}
    assert all(event["dur"] > 0 and event["args"]["cpu_s"] >= 0 for event in events if event["ph"] == "X")
    assert all(0 < row["utilization/busy"] <= 1 for row in finished.metrics)


def test_one_seed_gives_one_run(twins: tuple[Run, Run]) -> None:
    first, second = twins
    assert [without_times(row) for row in first.metrics] == [without_times(row) for row in second.metrics]
    assert tensor_hashes(first.folder / "policy") == tensor_hashes(second.folder / "policy")
    assert (first.folder / "samples.jsonl").read_text() == (second.folder / "samples.jsonl").read_text()


def test_the_driver_cannot_fetch_a_rollout(twins: tuple[Run, Run]) -> None:
    outcomes = (twins[1].folder.parent / "outcomes").read_text().split("\n----\n")
    assert len(outcomes) == 2
    for outcome, kind in zip(outcomes, ("Rollout", "RewardColumn"), strict=True):
        assert f"holds references only, but fetched a {kind}" in outcome


def test_a_finished_run_is_not_overwritten(finished: Run, data_root: Path, tmp_path: Path) -> None:
    before = (finished.folder / "metrics.jsonl").read_bytes()
    arguments = (*PPO, f"paths.data={data_root}", f"paths.runs={finished.folder.parent}")
    again = run(arguments, tmp_path / "again", 60)
    assert again.process.returncode == 2
    assert re.fullmatch(r"bad input: .*/tiny-ppo: holds a finished run; .*\n", again.stderr)
    resumed = run((*arguments, "--resume"), tmp_path / "resumed", 60)
    assert (resumed.process.returncode, resumed.stderr) == (0, "")
    assert resumed.stdout == f"{finished.folder} holds a finished run: nothing is left to do\n"
    assert (finished.folder / "metrics.jsonl").read_bytes() == before


def test_the_policy_of_a_checkpoint_can_be_exported(ahead: tuple[Run, Run], tmp_path: Path) -> None:
    folder = ahead[0].folder
    command = run(("export", str(folder), "--to", str(tmp_path / "of-4")), tmp_path / "output", 200)
    assert command.process.returncode == 0, command.stderr
    assert command.stdout == f"{tmp_path / 'of-4'}\n"
    assert tensor_hashes(tmp_path / "of-4") == tensor_hashes(folder / "policy_best")
    again = run(("export", str(folder), "--step", "5"), tmp_path / "output", 60)
    assert again.process.returncode == 2
    assert again.stderr == "bad input: --step: 5; a checkpoint of the run: 4\n"


def test_a_stopped_run_keeps_its_last_step(stopped: Run) -> None:
    last_step = stopped.metrics[-1]["step"]
    assert 2 <= last_step < STEPS
    assert stopped.command.process.returncode == 1
    assert stopped.command.stderr == f"stopped by signal 15 after step {last_step}; continue with --resume\n"
    assert (stopped.folder / "checkpoints" / f"step-{last_step:06d}" / "manifest.json").exists()
    assert stopped.events[-1]["kind"] == "run_stopped"
    assert not (stopped.folder / "summary.json").exists()
    assert stopped.command.left_running() == []


def test_an_unfinished_run_is_not_begun_again_without_resume(stopped: Run, data_root: Path, tmp_path: Path) -> None:
    before = (stopped.folder / "metrics.jsonl").read_bytes()
    again = run((*PPO, f"paths.data={data_root}", f"paths.runs={stopped.folder.parent}"), tmp_path / "output", 60)
    assert again.process.returncode == 2
    assert "holds an unfinished run; add --resume" in again.stderr
    assert (stopped.folder / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_ends_like_the_one_left_alone(resumed: tuple[int, Run], finished: Run) -> None:
    last_step, run = resumed
    [broken] = run.events_of("checkpoint_broken")
    assert broken["step"] == last_step
    assert broken["cause"] == "policy/state/mp_rank_00_model_states.pt is not what was written (its hash differs)"
    [loaded] = run.events_of("checkpoint_loaded")
    assert (loaded["step"], loaded["dropped_rows"]) == (last_step - 1, 1)
    assert [without_times(row) for row in run.metrics] == [without_times(row) for row in finished.metrics]
    assert tensor_hashes(run.folder / "policy") == tensor_hashes(finished.folder / "policy")
    assert (run.folder / "samples.jsonl").read_text() == (finished.folder / "samples.jsonl").read_text()
    held_out = [json.loads((each.folder / "summary.json").read_text())["held_out"] for each in (run, finished)]
    assert held_out[0] == held_out[1]


def test_the_ledger_has_every_sample_once_also_where_steps_were_done_again(
    resumed: tuple[int, Run], ahead: tuple[Run, Run], finished: Run
) -> None:
    interrupted = resumed[1]
    assert (interrupted.folder / "ledger.jsonl").read_bytes() == (finished.folder / "ledger.jsonl").read_bytes()
    ledgers = [(each.folder / "ledger.jsonl").read_bytes() for each in ahead]
    assert ledgers[0] == ledgers[1]
    for each in (interrupted, finished, *ahead):
        rows = rows_of(each.folder / "ledger.jsonl")
        checked = json.loads((each.folder / "summary.json").read_text())["ledger"]
        assert (checked["steps"], checked["problems"]) == (len(each.metrics), [])
        assert checked["trained"] == each.metrics[-1]["samples"]
        assert [row["versions"] for row in rows] == [
            [row["step"] - 1 - metrics["staleness/max"]] * 2 for row, metrics in zip(rows, each.metrics, strict=True)
        ]


def test_the_story_of_a_damaged_checkpoint_can_be_told(resumed: tuple[int, Run], tmp_path: Path) -> None:
    last_step, run_ = resumed
    command = run(("report", str(run_.folder)), tmp_path / "output", 60)
    assert command.process.returncode == 0, command.stderr
    assert f"Finished after {STEPS} steps, every sample used exactly once" in command.stdout
    assert f"the checkpoint of step {last_step} cannot be used" in command.stdout
    assert f"went on from the checkpoint of step {last_step - 1}" in command.stdout
    assert (run_.folder / "report.html").exists()


def test_sampling_ahead_is_never_staler_than_allowed_and_correct_to_the_token(ahead: tuple[Run, Run]) -> None:
    for row in ahead[0].metrics:
        staleness = min(row["step"] - 1, 2)
        assert (row["staleness/mean"], row["staleness/max"]) == (staleness, staleness)
        assert row["sync/max_abs_dlogp"] <= 1e-4
    # The learner is ahead of what sampled: what differs is no rounding.
    assert ahead[0].metrics[0]["mismatch/max_abs_dlogp"] <= 1e-4 < ahead[0].metrics[-1]["mismatch/max_abs_dlogp"]


def test_sampling_ahead_leaves_the_same_run_however_it_was_interrupted(ahead: tuple[Run, Run], finished: Run) -> None:
    alone, resumed = ahead
    assert [without_times(row) for row in alone.metrics] == [without_times(row) for row in resumed.metrics]
    assert tensor_hashes(alone.folder / "policy") == tensor_hashes(resumed.folder / "policy")
    assert [row["step"] for row in alone.metrics if "held_out/judge" in row] == [4]
    assert tensor_hashes(alone.folder / "policy_best") == tensor_hashes(resumed.folder / "policy_best")
    assert (alone.folder / "samples.jsonl").read_text() == (resumed.folder / "samples.jsonl").read_text()
    assert tensor_hashes(alone.folder / "policy") != tensor_hashes(finished.folder / "policy")


def test_a_run_that_loses_a_process_of_every_kind_ends_like_the_one_left_alone(haunted: Run, finished: Run) -> None:
    assert [without_times(row) for row in haunted.metrics] == [without_times(row) for row in finished.metrics]
    assert tensor_hashes(haunted.folder / "policy") == tensor_hashes(finished.folder / "policy")
    assert (haunted.folder / "samples.jsonl").read_text() == (finished.folder / "samples.jsonl").read_text()


def test_the_events_tell_who_was_lost_and_what_was_done_about_it(haunted: Run) -> None:
    restarted = haunted.events_of("role_restarted")
    assert {event["role"] for event in restarted} >= {"generator-0", "reward-0", "reference-0"}
    kinds = [(event["kind"], event["role"]) for event in haunted.events]
    in_the_start = kinds[: kinds.index(("role_started", "generator-0"))]
    assert {role for kind, role in in_the_start if kind == "role_lost"} == {"generator-0", "critic-0"}
    [silent] = haunted.events_of("role_silent")
    assert silent["role"] == "reference-0"
    assert {event["role"] for event in haunted.events_of("group_rebuilt")} == {"policy", "critic"}
    assert {event["to_step"] for event in haunted.events_of("rolled_back")} <= {0, 4, 8}
    assert re.search(r"^generator-0 is back on \S+ after \d+ s$", haunted.command.stdout, re.MULTILINE)
    last = haunted.metrics[-1]
    assert last["recovery/lost"] == len(haunted.events_of("role_lost")) >= 5
    assert last["recovery/rolled_back"] == len(haunted.events_of("rolled_back")) >= 1
    assert "(raylet)" not in haunted.command.stdout + haunted.command.stderr


def test_no_process_outlives_a_run_that_lost_some(haunted: Run) -> None:
    assert haunted.command.left_running() == []


def test_spare_prompts_take_the_place_of_those_that_say_nothing(spared: tuple[Run, Run]) -> None:
    rows = spared[0].metrics
    assert [row["samples"] for row in rows] == [24 * (step + 1) for step in range(8)]
    for row in rows:
        differing = 4 - row["group/unfilled"] + row["group/surplus"]
        assert differing == round(12 * (1 - row["group/uniform_fraction"]))
        assert row["policy/grad_norm"] > 0
    filled = [row for row in rows if row["group/unfilled"] == 0 < row["group/uniform_fraction"]]
    assert filled
    # Of two responses that are scored 0 and 1 each, so of no prompt that was not to be trained on.
    assert {row["reward/shaped_mean"] for row in filled} == {0.5}
    assert {row["reward/mean"] for row in filled} != {0.5}


def test_one_seed_gives_one_run_one_step_ahead_and_with_spare_prompts(spared: tuple[Run, Run]) -> None:
    alone, resumed = spared
    assert [(row["staleness/mean"], row["staleness/max"]) for row in alone.metrics] == [(0, 0), *[(1, 1)] * 7]
    assert resumed.events_of("checkpoint_loaded")
    assert [without_times(row) for row in resumed.metrics] == [without_times(row) for row in alone.metrics]
    assert tensor_hashes(resumed.folder / "policy") == tensor_hashes(alone.folder / "policy")
