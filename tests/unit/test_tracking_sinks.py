import pytest

from rlhf_ray.config.settings import TrackingSettings, WandbSettings
from rlhf_ray.tracking import sinks
from rlhf_ray.tracking.run_folder import RunFolder
from rlhf_ray.tracking.sinks import open_sinks


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "x", "", resume=False)


def test_no_sinks_unless_asked_for(folder):
    assert open_sinks(TrackingSettings(), folder, "x", {}, pytest.fail) == []


def test_tensorboard_gets_every_number(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (sink,) = open_sinks(TrackingSettings(tensorboard=True), folder, "x", {}, pytest.fail)
    sink.log(1, {"step": 1, "reward/mean": 0.25, "missing": None})
    sink.log(2, {"step": 2, "reward/mean": 0.5, "missing": None})
    sink.close({"held_out": {"reward_after": 1.5}, "name": "x"})
    written = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(event.step, event.value) for event in written.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert written.Scalars("summary/held_out/reward_after")[0].value == 1.5
    assert "missing" not in written.Tags()["scalars"]


def test_wandb_offline_is_silent_and_resumes_under_its_id(folder, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers here
    settings = TrackingSettings(wandb=WandbSettings(mode="offline", project="p"))
    for step in (1, 2):
        (sink,) = open_sinks(settings, folder, "x", {"steps": 2}, pytest.fail)
        sink.log(step, {"step": step, "reward/mean": 0.25})
        sink.close({"wall_s": 1.0})
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    run_id = (folder.wandb / "run_id").read_text()
    assert {path.name for path in folder.wandb.glob("offline-run-*/*.wandb")} == {f"run-{run_id}.wandb"}


def test_wandb_whose_server_does_not_answer_is_kept_offline(folder, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers here
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(sinks, "_WANDB_TIMEOUT_S", 3.0)
    reported = []
    settings = TrackingSettings(wandb=WandbSettings(mode="online"))
    (sink,) = open_sinks(settings, folder, "x", {}, lambda *report: reported.append(report))
    sink.log(1, {"reward/mean": 0.25})
    sink.close({})
    [(name, cause)] = reported
    assert name == "wandb"
    assert "connection refused" in cause
    assert "wandb sync" in cause
    assert list(folder.wandb.glob("offline-run-*/*.wandb"))


class Failing:
    def __init__(self, fail_in: str) -> None:
        self.fail_in, self.calls = fail_in, []
        self._maybe("open")

    def _maybe(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fail_in:
            raise ConnectionError("no\nroute")

    def log(self, step, metrics):
        self._maybe("log")

    def close(self, summary):
        self._maybe("close")


@pytest.mark.parametrize(
    ("fail_in", "calls"),
    [
        ("open", ["open"]),
        ("log", ["open", "log"]),
        ("close", ["open", "log", "log", "close"]),
    ],
)
def test_a_failing_sink_is_reported_once_and_switched_off(folder, monkeypatch, fail_in, calls):
    made, reported = [], []

    class Recorded(Failing):
        def __init__(self, _folder) -> None:
            made.append(self)
            super().__init__(fail_in)

    monkeypatch.setattr(sinks, "TensorBoardSink", Recorded)
    (sink,) = open_sinks(TrackingSettings(tensorboard=True), folder, "x", {}, lambda *report: reported.append(report))
    sink.log(1, {})
    sink.log(2, {})
    sink.close({})
    assert made[0].calls == calls
    assert reported == [("tensorboard", "ConnectionError: no route")]
