"""Twenty sound reward models are released, those trained or judged on faulty data are refused, and vLLM agrees.

The models are made in this process in a second each; vLLM runs in an actor of its own.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.reward import RewardSettings, ScorerSettings
from rlhf_ray.config.reward_model import GateSettings
from rlhf_ray.data.preferences import PreferencePair
from rlhf_ray.reward.core.checks import Check, vllm_check
from rlhf_ray.reward.judge.accuracy import pair_credit
from rlhf_ray.reward.judge.bias import NOTHING_TO_PAY_FOR, LengthBias, length_bias
from rlhf_ray.reward.judge.calibration import calibration, fit_temperature
from rlhf_ray.reward.judge.gate import GateFigures, Verdict, judge
from rlhf_ray.reward.judge.groups import Estimate, Groups, Proportion
from rlhf_ray.reward.judge.inspector import RewardInspector
from rlhf_ray.reward.judge.leakage import TrainingTexts, hash_pairs
from rlhf_ray.reward.judge.pooling_engine import PoolingEngine
from rlhf_ray.runtime.actor_group import ActorGroup
from tests.planting import (
    PREFERENCE_PROBABILITY,
    SentimentPairs,
    copied,
    plant_flipped_labels,
    plant_leak,
    plant_length_in_labels,
    plant_mean_pooling,
    sentiment_pairs,
    train_reward_model,
    write_encoder,
)
from tests.system.groups import started

HEALTHY = 3  # `make bench-gate` trains twenty
# A second of training leaves the models unsure of some of the new nouns, which is miscalibration.
GATE = GateSettings(max_calibration_excess=0.2)
MAX_TOKENS = 64


def preference_pairs(pairs: SentimentPairs) -> list[PreferencePair]:
    return [
        PreferencePair("", chosen, rejected, 0.9, None, 1.0, None, {}, None, None, None, False, f"made:{index}")
        for index, (chosen, rejected) in enumerate(zip(pairs.chosen, pairs.rejected, strict=True))
    ]


def figures(inspector: RewardInspector, training: SentimentPairs, held_out: SentimentPairs) -> GateFigures:
    """What an evaluation on held-out pairs finds."""
    chosen, rejected = (
        np.array([probe.logits[0] for probe in inspector.probes(texts)])
        for texts in (held_out.chosen, held_out.rejected)
    )
    probability = np.full(len(chosen), PREFERENCE_PROBABILITY)
    pairs = preference_pairs(held_out)
    groups, delta = Groups.of(pairs), chosen - rejected
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    temperature = fit_temperature(delta, probability).temperature
    leakage = TrainingTexts.of(hash_pairs(preference_pairs(training))).leakage(hash_pairs(pairs))
    return GateFigures(
        prompts=groups.count,
        accuracy=groups.share(pair_credit(delta, probability)),
        calibration_excess=calibration(delta, probability, groups, seed=0, temperature=temperature).excess,
        length=length_bias(lengths, delta, probability, groups),
        leaked_share=leakage.texts.share,
        failed_share=0.0,
    )


def verdict(folder: Path, training: SentimentPairs, held_out: SentimentPairs) -> Verdict:
    """All checks but vLLM's, and all figures."""
    inspector = RewardInspector(RewardSettings(model=str(folder)))
    checks = inspector.inspect(held_out.chosen[:8] + held_out.rejected[:8], GATE.max_engine_difference)
    return judge(figures(inspector, training, held_out), checks, GATE)


TRAINING, HELD_OUT = sentiment_pairs(0, 256), sentiment_pairs(0, 400, held_out=True)


@pytest.fixture(scope="module")
def sound(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_reward_model(tiny / "reward_model", tmp_path_factory.mktemp("sound") / "model", TRAINING, seed=0)


@pytest.mark.parametrize("seed", range(HEALTHY))
def test_a_healthy_model_is_released(tiny: Path, tmp_path: Path, seed: int):
    training, held_out = sentiment_pairs(seed, 256), sentiment_pairs(seed, 400, held_out=True)
    folder = train_reward_model(tiny / "reward_model", tmp_path / "model", training, seed)
    assert verdict(folder, training, held_out).refusals == ()


def test_flipped_labels_are_refused(tiny: Path, tmp_path: Path):
    training = plant_flipped_labels(TRAINING)
    folder = train_reward_model(tiny / "reward_model", tmp_path / "model", training, seed=0)
    refusals = verdict(folder, training, HELD_OUT).refusals
    assert refusals[0].startswith("accuracy: ")
    assert "The labels are flipped" in refusals[0]


def test_length_biased_labels_are_refused(tiny: Path, tmp_path: Path):
    training = plant_length_in_labels(TRAINING)
    folder = train_reward_model(tiny / "reward_model", tmp_path / "model", training, seed=0)
    refusals = verdict(folder, training, HELD_OUT).refusals
    assert any(line.startswith("length: ") for line in refusals), refusals


def test_length_biased_labels_are_refused_even_where_the_held_out_labels_share_the_bias(tiny: Path, tmp_path: Path):
    """Accuracy is then high, and nothing tells length from quality but that it is always the longer one."""
    training, held_out = plant_length_in_labels(TRAINING), plant_length_in_labels(HELD_OUT)
    folder = train_reward_model(tiny / "reward_model", tmp_path / "model", training, seed=0)
    refusals = verdict(folder, training, held_out).refusals
    assert any("Nothing here tells length from quality" in line for line in refusals), refusals


def test_leaked_pairs_are_refused(sound: Path):
    [refusal] = verdict(sound, TRAINING, plant_leak(HELD_OUT, TRAINING, 4)).refusals
    assert refusal.startswith("leakage: 1.0 % of the pairs")


@pytest.fixture(scope="module")
def engine(local_ray: Path) -> Iterator[ActorGroup[PoolingEngine]]:
    with started(local_ray, {"pooling-engine": ScorerSettings()}) as [group]:
        yield group


TEXTS = HELD_OUT.chosen[:16] + HELD_OUT.rejected[:16] + ["good", "We found the ending was " + "very " * 40 + "dull."]


def compared(engine: ActorGroup[PoolingEngine], folder: Path, use_activation: bool = False) -> Check:
    """With an engine that takes the place of the one before it."""
    probes = RewardInspector(RewardSettings(model=str(folder))).probes(TEXTS)
    engine.build_all(partial(PoolingEngine, str(folder), str(folder), MAX_TOKENS, use_activation))
    [theirs] = engine.call_all(PoolingEngine.score_tokens, [probe.token_ids for probe in probes])
    engine.call_all(PoolingEngine.close)
    return vllm_check(np.array([probe.logits for probe in probes]), theirs, GATE.max_engine_difference)


def nothing_wrong() -> GateFigures:
    perfect = Proportion(1.0, 0.99, 1.0, 400)
    length = LengthBias(NOTHING_TO_PAY_FOR, perfect, perfect, Proportion(0.5, 0.4, 0.6, 400), 0.0)
    return GateFigures(400, perfect, Estimate(0.0, -0.01, 0.01), length, None, 0.0)


def test_vllm_gives_the_decoders_logits(engine: ActorGroup[PoolingEngine], sound: Path):
    check = compared(engine, sound)
    assert check.passed, check.found


@pytest.mark.parametrize("labels", [1, 4])
def test_vllm_gives_the_encoders_logits(engine: ActorGroup[PoolingEngine], tmp_path: Path, labels: int):
    check = compared(engine, write_encoder(tmp_path / "model", TEXTS, labels))
    assert check.passed, check.found


def test_vllms_activation_left_on_is_refused(engine: ActorGroup[PoolingEngine], sound: Path):
    check = compared(engine, sound, use_activation=True)
    assert not check.passed
    assert "activation left on" in check.found
    [refusal] = judge(nothing_wrong(), [check], GATE).refusals
    assert refusal.startswith("vllm: ")


def test_a_directory_that_vllm_reads_otherwise_than_transformers_is_refused(
    engine: ActorGroup[PoolingEngine], sound: Path, tmp_path: Path
):
    folder = copied(sound, tmp_path / "model")
    plant_mean_pooling(folder)
    inspector = RewardInspector(RewardSettings(model=str(folder)))
    assert all(check.passed for check in inspector.inspect(TEXTS, GATE.max_engine_difference))
    check = compared(engine, folder)
    assert not check.passed
    assert "activation" not in check.found
