"""The same command with --resume begins a run, takes it up again, or finds it finished."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from rlhf_ray.config.load import load_config
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.settings import PolicySettings, PPOConfig, RunConfig, SFTConfig
from rlhf_ray.failures import BadInput, Finished, Refused, Stopped
from rlhf_ray.models.policy import read_policy
from rlhf_ray.ppo.loop import run_ppo
from rlhf_ray.reward.core.card import RewardModelCard
from rlhf_ray.reward.train.run import run_reward_model
from rlhf_ray.runtime.run import Run
from rlhf_ray.supervised import run_sft
from tests.conftest import REPOSITORY


@dataclass
class State:
    step: int = 0


Config = TypeVar("Config", bound=RunConfig)


def config_of(cls: type[Config], path: str, tmp_path: Path) -> Config:
    return load_config(cls, REPOSITORY / "configs" / path, [f"paths.runs={tmp_path}", "run.name=x"])


def row(step: int) -> dict[str, float | int | None]:
    return {"step": step, "loss": 1.0}


def test_resume_begins_a_run_that_is_not_there_and_takes_up_one_that_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of(SFTConfig, "demo/sft.yaml", tmp_path)
    steps_done, complaints = [], []
    for steps in (1, 2, 1):  # the first run ends without a checkpoint
        with Run(config, "sft", "title", 9, (), config.checkpoint, resume=True) as run:
            restored = run.restore(State)
            done = 0 if restored is None else restored[0].step
            steps_done.append((done, [each["step"] for each in run.tracker.metrics.read()]))
            for step in range(done + 1, done + steps + 1):
                run.tracker.step(row(step))
            if steps == 2:
                run._writer.begin(done + steps, State(done + steps), lambda folder: [])
                run.tracker.step(row(done + steps + 1))
        complaints.append("no checkpoint" in "".join(capsys.readouterr()))
    assert steps_done == [(0, []), (0, []), (2, [1, 2])]
    assert complaints == [False, True, False], "a first run has nothing that could be missing"
    events = [json.loads(line) for line in run.folder.events.read_text().splitlines()]
    found = [(each["kind"], each["dropped_rows"]) for each in events if "dropped_rows" in each]
    assert found == [("nothing_to_resume", 0), ("nothing_to_resume", 1), ("checkpoint_loaded", 1)]


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "summary.json").write_text("{}")
    with pytest.raises(Finished):
        run_ppo(config_of(PPOConfig, "tiny/ppo.yaml", tmp_path), resume=True)
    with pytest.raises(Finished):
        run_sft(config_of(SFTConfig, "demo/sft.yaml", tmp_path), resume=True)
    with pytest.raises(Finished):
        run_reward_model(config_of(RewardModelConfig, "tiny/reward_model.yaml", tmp_path), resume=True)


def test_a_refused_model_stays_refused(tmp_path: Path):
    folder = tmp_path / "x" / "reward_model"
    folder.mkdir(parents=True)
    (tmp_path / "x" / "summary.json").write_text('{"released": false}')
    card = RewardModelCard(
        version="1",
        base_model="b",
        max_length=8,
        append_eos=True,
        chat_template=None,
        training_data="",
        released=False,
        refusals=("accuracy: 0.5",),
    )
    card.save(folder)
    with pytest.raises(Refused, match=r"accuracy: 0\.5"):
        run_reward_model(config_of(RewardModelConfig, "tiny/reward_model.yaml", tmp_path), resume=True)


def test_a_run_that_is_stopped_before_its_first_step_has_no_checkpoint(tmp_path: Path):
    config = config_of(SFTConfig, "demo/sft.yaml", tmp_path)
    run = Run(config, "sft", "title", 9, (), config.checkpoint, resume=False)

    def stop() -> None:
        signal.raise_signal(signal.SIGTERM)
        run.keep(0, State(), lambda folder: [])

    with pytest.raises(Stopped), run:
        stop()
    assert run.folder.all_checkpoints() == []
    with Run(config, "sft", "title", 9, (), config.checkpoint, resume=False) as again:
        assert again.restore(State) is None


def test_text_that_is_longer_than_the_model_takes_is_refused(tmp_path: Path, tiny: Path):
    model = str(tiny / "policy")
    most = read_policy(PolicySettings(model=model)).facts.context_tokens
    longer = [f"paths.runs={tmp_path}", "run.name=x", f"policy.model={model}", f"text.max_tokens={most + 1}"]
    longer.append("policy.learner.trainable_top_layers=null")
    config = load_config(SFTConfig, REPOSITORY / "configs/demo/sft.yaml", longer)
    with pytest.raises(BadInput) as refused:
        run_sft(config)
    assert (refused.value.where, refused.value.allowed) == ("text.max_tokens", f"at most {most}, the model's limit")
