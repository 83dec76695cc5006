"""What a resumed run may take from before, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.load import load_config
from rlhf_ray.config.settings import PPOConfig
from rlhf_ray.data.prompts import Prompt, PromptSet
from rlhf_ray.data.rows import BadRows
from rlhf_ray.failures import BadInput
from rlhf_ray.ppo.evaluation import before_file
from rlhf_ray.ppo.inputs import Inputs
from rlhf_ray.ppo.state import LoopState, check_resumable, draw_settings, learner_shapes
from rlhf_ray.ppo.step import conversations
from rlhf_ray.reward.core.source import RewardSource
from rlhf_ray.runtime.checkpoints import read_state, write_state
from rlhf_ray.tracking.manifest import write_manifest
from rlhf_ray.tracking.run_folder import RunFolder
from tests.conftest import REPOSITORY


def config_of(*overrides: str) -> PPOConfig:
    return load_config(PPOConfig, REPOSITORY / "configs" / "tiny" / "ppo.yaml", overrides)


def prompt(index: int, text: str = "I think", **more: Any) -> Prompt:
    return Prompt(index, np.array([3, 4, 5 + index], dtype=np.int32), text, **{"label": None, **more})


def inputs_of(*prompts: Prompt) -> Inputs:
    held_out = PromptSet(prompts or [prompt(0)], BadRows("fail", "evaluation.prompts.on_bad_row"))
    rewards = tuple(RewardSource(source, "reward") for source in config_of().reward)
    return Inputs(eos_token_id=1, context_tokens=64, prompts=held_out, held_out=held_out, rewards=rewards)


PROMPTS = inputs_of().prompts


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run with one checkpoint."""
    folder = RunFolder(tmp_path)
    checkpoint = folder.checkpoint_path(4)
    checkpoint.mkdir(parents=True)
    write_state(checkpoint, LoopState(step=4, learners=learner_shapes(config_of())))
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.learner.trainable_top_layers=1", r"policy\.learner\.trainable_top_layers: 1, but .* with none"),
        ("critic.learner.trainable_top_layers=1", r"critic\.learner\.trainable_top_layers: 1, but .* with none"),
        ("policy.lora={rank: 4}", r'policy\.lora: {"rank":4,.*}, but .* with none'),
    ],
)
def test_a_checkpoint_that_the_learners_could_not_read_is_refused(folder: RunFolder, override: str, message: str):
    with pytest.raises(BadInput, match=message):
        check_resumable(config_of(override, "reference.dtype=auto"), PROMPTS, folder)


def test_adapters_are_resumed_with_the_settings_they_were_begun_with(folder: RunFolder):
    adapted = ("policy.lora={rank: 4}", "reference.dtype=auto")
    write_state(folder.checkpoint_path(4), LoopState(step=4, learners=learner_shapes(config_of(*adapted))))
    check_resumable(config_of(*adapted), PROMPTS, folder)
    for override, now in (("policy.lora.rank=8", r'{"rank":8,.*}'), ("policy.lora=null", "none")):
        with pytest.raises(BadInput, match=rf'policy\.lora: {now}, but the checkpoint .* with {{"rank":4,'):
            check_resumable(config_of(*adapted, override), PROMPTS, folder)


def test_a_checkpoint_of_before_there_were_adapters_has_none(folder: RunFolder):
    learners = learner_shapes(config_of())
    del learners["policy.lora"]
    write_state(folder.checkpoint_path(4), LoopState(step=4, learners=learners))
    check_resumable(config_of(), PROMPTS, folder)


def test_a_critic_without_a_checkpoint_is_refused(folder: RunFolder):
    without = config_of("critic=null", "algorithm.advantage=rloo")
    check_resumable(without, PROMPTS, folder)
    write_state(_made(folder.checkpoint_path(8)), LoopState(step=8, learners=learner_shapes(without)))
    with pytest.raises(BadInput, match=r"critic\.learner\.trainable_top_layers: none, but .* with no such learner"):
        check_resumable(config_of(), PROMPTS, folder)


UNIFORM = ("critic=null", "algorithm.advantage=grpo", "algorithm.drop_uniform_groups=true")


def kept(folder: RunFolder, *rollouts: int) -> None:
    begun = config_of(*UNIFORM)
    draws = draw_settings(begun, PROMPTS)
    state = LoopState(step=4, learners=learner_shapes(begun), prompts=draws, rollouts=list(rollouts))
    write_state(folder.checkpoint_path(4), state)


@pytest.mark.parametrize(
    "override",
    ["sampling.prompts_per_step=16", "sampling.spare_prompts=4", "sampling.samples_per_prompt=4", "run.seed=5"],
)
def test_other_draws_would_skip_prompts_or_repeat_them(folder: RunFolder, override: str):
    kept(folder)
    check_resumable(config_of(*UNIFORM), PROMPTS, folder)
    key, _, value = override.partition("=")
    with pytest.raises(BadInput, match=rf"{key}: {value}, but the checkpoint of step 4 was written with"):
        check_resumable(config_of(*UNIFORM, override), PROMPTS, folder)


@pytest.mark.parametrize("others", [(prompt(0), prompt(1)), (prompt(1),), (prompt(0, label="b"),)])
def test_other_prompts_are_refused(folder: RunFolder, others: tuple[Prompt, ...]):
    kept(folder)
    with pytest.raises(BadInput, match=r"prompts\.path: \d prompts \(digest .*\), but .* with 1 prompts"):
        check_resumable(config_of(*UNIFORM), inputs_of(*others).prompts, folder)


def test_other_shards_are_refused_where_the_checkpoint_has_rows_of_them(folder: RunFolder):
    kept(folder)
    smaller = config_of(*UNIFORM, "sampling.prompts_per_shard=4")
    check_resumable(smaller, PROMPTS, folder)
    kept(folder, 5)
    with pytest.raises(BadInput, match=r"sampling\.prompts_per_shard: 4, but the checkpoint of step 4"):
        check_resumable(smaller, PROMPTS, folder)


def test_what_an_earlier_version_remembered_does_not_stand_in_the_way(folder: RunFolder):
    state = folder.checkpoint_path(4) / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best": {"step": 2, "value": 0.5}}))
    assert read_state(folder.checkpoint_path(4), LoopState).step == 4


def test_what_does_not_shape_a_checkpoint_may_change(folder: RunFolder):
    ranks = ("policy.learner.replicas=2", "policy.learner.zero_stage=3", "critic.learner.dtype=bfloat16")
    check_resumable(config_of(*ranks), PROMPTS, folder)
    check_resumable(
        config_of("policy.learner.learning_rate=1", "generator.replicas=2", "reference.replicas=2"), PROMPTS, folder
    )


def test_a_checkpoint_of_before_there_was_a_record_is_tried(folder: RunFolder):
    state = folder.checkpoint_path(4) / "state.json"
    written = json.loads(state.read_text())
    del written["learners"], written["prompts"]
    state.write_text(json.dumps(written))
    write_manifest(folder.checkpoint_path(4))
    check_resumable(config_of("policy.learner.trainable_top_layers=1"), PROMPTS, folder)


def test_a_state_that_was_damaged_is_not_read(folder: RunFolder):
    write_state(_made(folder.checkpoint_path(8)), LoopState(step=8, learners=learner_shapes(config_of())))
    (folder.checkpoint_path(8) / "state.json").write_text("{")
    with pytest.raises(BadInput, match="the checkpoint of step 4 was written with none"):
        check_resumable(config_of("policy.learner.trainable_top_layers=1"), PROMPTS, folder)


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    "override",
    [
        "policy.model=other",
        "run.seed=7",
        "evaluation.samples_per_prompt=2",
        "evaluation.judge=none",
        "sampling.temperature=0.5",
        "sampling.max_response_tokens=5",
        "reward.model=other",
        "reward.on_too_long=truncate",
        "reward.weight=2",
    ],
)
def test_samples_before_training_are_not_taken_for_those_of_another_evaluation(override: str):
    assert before_file(config_of(override), inputs_of()) != before_file(config_of(), inputs_of())


def test_samples_before_training_are_those_of_their_prompts_alone():
    names = [
        before_file(config_of(), inputs_of(*prompts))
        for prompts in (
            [prompt(0)],
            [prompt(0, "I hope")],
            [prompt(1)],
            [prompt(0), prompt(1)],
            [prompt(0, label="better")],
        )
    ]
    assert len(set(names)) == 5
    elsewhere = config_of("reward.replicas=2", "generator.replicas=2", "steps=3", "policy.learner.learning_rate=1")
    assert before_file(elsewhere, inputs_of()) == names[0]


def test_labels_and_messages_reach_the_scorers():
    messages = ({"role": "user", "content": "1 + 1?"},)
    drawn = [(7, prompt(0, "1 + 1?", label={"answer": 2}, messages=messages)), (9, prompt(1))]
    asked = conversations(drawn)
    assert asked[7].label == {"answer": 2}
    assert asked[7].messages == messages
    assert (asked[9].text, asked[9].label) == ("I think", None)
