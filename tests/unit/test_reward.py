"""A reward model from Python gives the scores of the one scorer there is."""

import shutil
from pathlib import Path

import pytest

from rlhf_ray.config.reward import RewardSettings, ScorerSettings
from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.failures import BadInput, Refused
from rlhf_ray.reward import RewardModel
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.judge.evaluate import read_texts
from rlhf_ray.reward.judge.inputs import read_pairs
from tests.planting import sentiment_pairs

PAIRS = sentiment_pairs(0, 12)
PROMPTS = [chosen[:9] for chosen in PAIRS.chosen]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def directory(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a card, a template and a temperature."""
    folder = Path(shutil.copytree(tiny / "reward_model", tmp_path_factory.mktemp("reward") / "model"))
    template = (folder / "chat_template.jinja").read_text()
    card = RewardModelCard(
        version="v7",
        base_model="base",
        max_length=64,
        append_eos=True,
        chat_template=template,
        training_data="hash",
        temperature=2.5,
        layout=MemberLayout(),
    )
    card.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(directory: Path) -> RewardModel:
    return RewardModel.load(directory, batch_invariant=True)


@pytest.mark.parametrize("chat", [True, False])
def test_scores_are_those_of_an_evaluation_to_the_bit(model: RewardModel, directory: Path, tmp_path: Path, chat: bool):
    import json

    prompts = CHATS if chat else PROMPTS
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in zip(prompts, PAIRS.chosen, PAIRS.rejected, strict=True)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = read_texts(str(directory), "model", ScorerSettings())
    used = read_pairs(PreferenceSettings(path=str(tmp_path / "pairs.jsonl")), "pairs.path", texts, "fail")
    scorer = RewardScorer(RewardSettings(model=str(directory), batch_invariant=True))
    chosen, rejected = (scorer.score_tokens(side).scores for side in (used.chosen, used.rejected))
    assert model.score(prompts, PAIRS.chosen) == chosen.tolist()
    assert model.score(prompts, PAIRS.rejected) == rejected.tolist()
    assert [model.score(*turn) for turn in zip(prompts, PAIRS.chosen, strict=True)] == chosen.tolist()


def test_a_comparison_is_the_calibrated_probability(model: RewardModel):
    a, b = model.score(PROMPTS, PAIRS.chosen), model.score(PROMPTS, PAIRS.rejected)
    found = model.compare(PROMPTS, PAIRS.chosen, PAIRS.rejected)
    assert model.temperature == 2.5
    for score_a, score_b, probability in zip(a, b, found, strict=True):
        assert probability / (1 - probability) == pytest.approx(2.718281828459045 ** ((score_a - score_b) / 2.5))
    assert model.compare(PROMPTS[0], PAIRS.chosen[0], PAIRS.rejected[0]) == found[0]
    assert model.compare(CHATS[0], "same", "same") == 0.5


def test_what_cannot_be_scored_is_an_error_and_never_a_number(model: RewardModel, directory: Path):
    with pytest.raises(BadInput, match="response 1: the text is longer than 64 tokens"):
        model.score(["I think", "I think"], [" so", " so" * 100])
    assert isinstance(RewardModel.load(directory, on_too_long="truncate").score("I think", " so" * 100), float)
    with pytest.raises(TypeError, match="a list of as many prompts"):
        model.score("So", ["a", "b"])
    with pytest.raises(TypeError, match="a list of as many prompts"):
        model.score(CHATS[0], ["a"])
    with pytest.raises(ValueError, match="shorter"):
        model.score(["a", "b"], ["c"])


def test_one_prompt_is_not_taken_for_many(model: RewardModel):
    for several in (["x", "y"], ["x"]):
        with pytest.raises(TypeError, match="a list of as many prompts"):
            model.compare("Hi", several, several)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="a list of as many prompts"):
            model.score("Hi", several)  # type: ignore[call-overload]


def test_a_refused_model_is_loaded_only_where_that_is_wanted(directory: Path, tmp_path: Path):
    folder = Path(shutil.copytree(directory, tmp_path / "model"))
    card = RewardModelCard.load(str(folder), "model")
    assert card is not None
    card.model_copy(update={"released": False, "refusals": ("accuracy: chance",)}).save(folder)
    with pytest.raises(Refused, match="accuracy: chance"):
        RewardModel.load(folder)
    assert RewardModel.load(folder, require_release=False).version == "v7"
    with pytest.raises(BadInput, match="directory: "):
        RewardModel.load(tmp_path / "nowhere")
