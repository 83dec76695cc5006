"""Every planted fault is found by the check that is there for it, and a sound model passes them all."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard
from rlhf_ray.reward.core.checks import Check, vllm_check
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.judge.inspector import RewardInspector
from tests import planting
from tests.planting import copied, sentiment_pairs, train_reward_model, write_encoder

TOLERANCE = 1e-5
PAIRS = sentiment_pairs(0, 128)
TEXTS = PAIRS.chosen[:10] + PAIRS.rejected[:10]


@pytest.fixture(scope="module")
def decoder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_reward_model(tiny / "reward_model", tmp_path_factory.mktemp("decoder") / "model", PAIRS, seed=0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model", TEXTS)


def inspect(folder: Path, build_scorer: Callable[[RewardSettings], RewardScorer] = RewardScorer) -> dict[str, Check]:
    # The settings of a run that would hide the faults of exactness.
    settings = RewardSettings(model=str(folder), dtype="bfloat16", max_length=8)
    return {check.name: check for check in RewardInspector(settings, build_scorer).inspect(TEXTS, TOLERANCE)}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.passed is False}


ALWAYS = {
    "special_tokens",
    "head_saved",
    "version",
    "template",
    "encoding",
    "probe",
    "raw_scores",
    "plain_transformers",
    "invariance",
}


def test_a_sound_decoder_passes_every_check(decoder: Path):
    checks = inspect(decoder)
    assert set(checks) == ALWAYS | {"read_at_last_token"}
    assert all(check.passed is True for check in checks.values()), checks


def test_a_sound_encoder_passes_every_check(encoder: Path):
    checks = inspect(encoder)
    assert set(checks) == ALWAYS
    assert all(check.passed is True for check in checks.values()), checks


@pytest.mark.parametrize(
    ("plant", "found_by", "found"),
    [
        (planting.plant_pad_is_eos, {"special_tokens"}, "the padding token is the one that ends a text"),
        (
            planting.plant_pad_id_is_eos_in_config,
            {"special_tokens", "plain_transformers", "read_at_last_token"},
            "config.json says padding is 1, the tokenizer says 0",
        ),
        (
            planting.plant_no_pad_id_in_config,
            {"special_tokens", "plain_transformers", "read_at_last_token"},
            "config.json says padding is None",
        ),
        (planting.plant_missing_head, {"head_saved", "version"}, r"has no weights .* for score\.weight"),
        (planting.plant_new_head, {"head_saved", "version", "probe"}, "the one that was trained: [0-9a-f]{16}"),
        (planting.plant_new_head_signed, {"probe"}, "8 recorded texts score up to"),
        (planting.plant_other_weights, {"version"}, "but the card says"),
        (planting.plant_other_template, {"template"}, r"the tokenizer has a template of \d+ characters, training had"),
        (planting.plant_other_ending, {"encoding"}, "append_eos is False, the tokenizer needs True"),
        (planting.plant_length_beyond_positions, {"encoding"}, "the model takes 256 tokens"),
    ],
)
def test_a_fault_in_the_directory_is_found(
    decoder: Path, tmp_path: Path, plant: Callable[[Path], None], found_by: set[str], found: str
):
    folder = copied(decoder, tmp_path / "model")
    plant(folder)
    checks = inspect(folder)
    named = failed(checks) - {"loading"}
    assert named == found_by, checks
    assert any(re.search(found, checks[name].found) for name in named)


def test_padding_in_front_is_found_where_positions_are_absolute(encoder: Path, tmp_path: Path):
    folder = copied(encoder, tmp_path / "model")
    planting.plant_padding_in_front(folder)
    checks = inspect(folder)
    assert failed(checks) == {"plain_transformers"}
    assert "in batches padded on the left" in checks["plain_transformers"].found


@pytest.mark.parametrize(
    ("build_scorer", "found_by", "found"),
    [
        (planting.ACTIVATION_LEFT_ON, "plain_transformers", "differs from our scorer by up to"),
        (planting.CONSTANT, "raw_scores", "scores every text 0"),
        (planting.NOT_A_NUMBER, "raw_scores", "20 of 20 texts have no finite score"),
        (planting.READ_ONE_TOKEN_EARLY, "read_at_last_token", "our scorer differs from it by"),
        (planting.READ_AT_THE_FIRST_TOKEN, "read_at_last_token", "our scorer differs from it by"),
        (planting.READ_AT_THE_END_OF_THE_ROW, "read_at_last_token", "our scorer differs from it by"),
        (planting.BATCH_MEAN_TAKEN_OFF, "invariance", "changes scores by up to"),
        (planting.PLACE_COUNTS, "invariance", "changes scores by up to"),
        (planting.BATCH_SIZE_COUNTS, "invariance", "changes scores by up to"),
        (planting.PADDING_COUNTS, "invariance", "changes scores by up to"),
    ],
)
def test_a_fault_in_the_scorer_is_found(
    decoder: Path, build_scorer: Callable[[RewardSettings], RewardScorer], found_by: str, found: str
):
    checks = inspect(decoder, build_scorer)
    assert not checks[found_by].passed
    assert found in checks[found_by].found
    # What lies in the directory is sound.
    assert not failed(checks) & {"special_tokens", "head_saved", "version", "template"}


def test_a_model_of_ratings_between_0_and_1_is_sound(encoder: Path, tmp_path: Path):
    """Regression on ratings gives raw scores in 0…1 without an activation anywhere."""
    folder = copied(encoder, tmp_path / "model")
    (folder / "reward_model.json").unlink()
    largest = np.abs(RewardScorer(RewardSettings(model=str(folder))).score_texts(TEXTS).heads).max()

    def rescaled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bias = weights["classifier.bias"]
        return {
            **weights,
            "classifier.weight": weights["classifier.weight"] * (0.4 / (largest + bias.abs().max())),
            "classifier.bias": torch.full_like(bias, 0.5),
        }

    planting.edit_weights(folder, rescaled)
    heads = RewardScorer(RewardSettings(model=str(folder))).score_texts(TEXTS).heads
    assert ((heads > 0) & (heads < 1)).all()
    checks = inspect(folder)
    assert not failed(checks), checks


def test_a_member_of_an_ensemble_is_inspected_like_the_whole(decoder: Path, tiny: Path, tmp_path: Path):
    other = train_reward_model(tiny / "reward_model", tmp_path / "other", PAIRS, seed=1)
    folder = copied(decoder, tmp_path / "ensemble")
    members = [copied(source, folder / f"member-{index}") for index, source in enumerate((decoder, other))]
    cards = [RewardModelCard.load(str(member), "reward.model") for member in members]
    assert cards[0] is not None
    assert cards[1] is not None
    probes = [
        first.model_copy(update={"logits": first.logits + second.logits})
        for first, second in zip(cards[0].probes, cards[1].probes, strict=True)
    ]
    cards[0].model_copy(
        update={
            "layout": MemberLayout(folders=("member-0", "member-1")),
            "head_hashes": cards[0].head_hashes + cards[1].head_hashes,
            "probes": tuple(probes),
        }
    ).save(folder)
    planting.sign_again(folder)
    assert not failed(inspect(folder))
    planting.plant_new_head(members[1])
    assert failed(inspect(folder)) == {"head_saved", "version", "probe"}


def test_what_was_never_recorded_is_not_said_to_hold(decoder: Path, tmp_path: Path):
    folder = copied(decoder, tmp_path / "model")
    (folder / "reward_model.json").unlink()
    checks = inspect(folder)
    assert {name for name, check in checks.items() if check.passed is None} == {
        "head_saved",
        "version",
        "template",
        "encoding",
        "probe",
    }
    assert not failed(checks)


@pytest.mark.parametrize("labels", [1, 3])
def test_probes_are_the_models_raw_logits_label_by_label(tmp_path: Path, labels: int):
    from transformers import AutoModelForSequenceClassification

    folder = write_encoder(tmp_path / "model", TEXTS, num_labels=labels)
    network = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for probe in RewardInspector(RewardSettings(model=str(folder))).probes(TEXTS):
        with torch.inference_mode():
            expected = network(input_ids=torch.tensor([probe.token_ids])).logits[0].numpy()
        np.testing.assert_allclose(probe.logits, expected, rtol=0, atol=1e-5)
    assert not failed(inspect(folder))


def test_vllm_is_compared_label_by_label():
    ours = np.array([[1.0, -2.0], [0.5, 3.0]])
    assert vllm_check(ours, ours + 1e-6, TOLERANCE).passed
    assert not vllm_check(ours, ours + np.array([0, 2e-5]), TOLERANCE).passed
    assert not vllm_check(ours, ours * np.nan, TOLERANCE).passed
    assert "activation left on" in vllm_check(ours, 1 / (1 + np.exp(-ours)), TOLERANCE).found
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(2, 1\)"):
        vllm_check(ours, ours[:, :1], TOLERANCE)
