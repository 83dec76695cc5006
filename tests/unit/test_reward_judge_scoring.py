"""How heads become the scores that are judged, with scorers that answer from a table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.reward import ScorerSettings
from rlhf_ray.config.reward_model import AggregationSettings, PreferenceSettings, RewardEvaluationConfig
from rlhf_ray.data.preferences import PreferencePair, PreferenceSet
from rlhf_ray.data.rows import BadRows
from rlhf_ray.failures import Refused
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard, ScoreAggregation
from rlhf_ray.reward.core.scorer import ScoredTexts
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.judge import evaluate, scoring
from rlhf_ray.reward.judge.data_report import LeftOut
from rlhf_ray.reward.judge.inputs import UsedPairs, read_pairs
from rlhf_ray.reward.judge.leakage import TrainingTexts, hash_pairs
from rlhf_ray.reward.train import run
from tests.synthetic import preference_pair

MINIMUM = ScoreAggregation(members="minimum")
NO_SCORERS: Any = None
Heads = Callable[[Sequence[tuple[int, ...]]], np.ndarray]


def used_pairs(count: int) -> UsedPairs:
    """Texts of two to six tokens; a text's first token is its number."""
    pairs = tuple(preference_pair(f"p{number}", "a", "b") for number in range(count))
    chosen, rejected = (
        tuple((2 * number + side, *[0] * ((3 * number + side) % 5 + 1)) for number in range(count)) for side in (0, 1)
    )
    return UsedPairs(PreferenceSet(pairs, count, 0, 0, 0, BadRows("fail", "")), chosen, rejected, LeftOut())


def answers(heads: Heads) -> Callable[..., ScoredTexts]:
    """In place of `score_all`: `heads` makes `[N, K]` of the texts."""

    def score(_: Any, texts: Sequence[tuple[int, ...]]) -> ScoredTexts:
        found = heads(texts)[:, None, :]
        bad = ~np.isfinite(found).all(axis=(1, 2))
        count = len(texts)
        lengths = np.array([len(text) for text in texts])
        causes = tuple("no score" if each else "" for each in bad)
        zeros = np.zeros(count)
        return ScoredTexts(found, zeros, zeros, causes, lengths, np.zeros(count, dtype=bool), "v")

    return score


def qualities(texts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`[N, 3]` of three members that see much the same."""
    numbers = np.array([text[0] for text in texts])
    return np.cos(numbers)[:, None] + 0.3 * np.cos(numbers[:, None] * [3.0, 5.0, 7.0])


def with_offsets(texts: Sequence[tuple[int, ...]]) -> np.ndarray:
    """The same, where each member adds something of its own to both texts of a pair."""
    pair = np.array([text[0] // 2 for text in texts])
    return qualities(texts) + 4 * np.sin(pair[:, None] * [1.0, 2.0, 3.0])


def test_what_a_member_adds_to_both_texts_of_a_pair_changes_no_difference(monkeypatch: pytest.MonkeyPatch):
    used, found = used_pairs(20), []
    for heads in (qualities, with_offsets):
        monkeypatch.setattr(scoring, "score_all", answers(heads))
        found.append(scoring.score_pairs(NO_SCORERS, used, MINIMUM).scores)
    np.testing.assert_allclose(found[0].differences, found[1].differences, atol=1e-12)
    single = qualities(used.chosen).min(axis=1) - qualities(used.rejected).min(axis=1)
    assert np.abs(found[0].differences - single).max() > 0.01, "a text alone has another minimum"


def test_pairs_without_scores_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch):
    def heads(texts: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.where(np.array([[text[0] == 5] for text in texts]), np.nan, qualities(texts))

    used = used_pairs(20)
    monkeypatch.setattr(scoring, "score_all", answers(heads))
    scored = scoring.score_pairs(NO_SCORERS, used, MINIMUM)
    assert scored.kept == (0, 1, *range(3, 20))
    assert (scored.failures, scored.failed_texts) == ({"no score": 1}, 1)
    assert np.isfinite(scored.scores.differences).all()
    assert np.isnan(scored.text_scores).sum() == 1


def test_responses_to_a_prompt_are_ranked_as_ppo_scores_them(monkeypatch: pytest.MonkeyPatch):
    def heads(texts: Sequence[tuple[int, ...]]) -> np.ndarray:
        prompt = np.array([text[0] // 4 for text in texts])
        return qualities(texts) + 4 * np.sin(prompt[:, None] * [1.0, 2.0, 3.0])

    texts = [(number, 1) for number in range(12)]
    encoded, prompts = [(list(text), False) for text in texts], np.arange(12) // 4
    card = card_of(MINIMUM)
    monkeypatch.setattr(evaluate, "score_all", answers(heads))
    found = evaluate._text_scorer(NO_SCORERS, ScorerSettings(), card)([*encoded, ([0, 1], True)], np.append(prompts, 0))
    expected, _ = MINIMUM.scores(heads(texts)[:, None, :], np.full(12, 2), prompts)
    np.testing.assert_allclose(found, [*expected, np.nan], atol=1e-12)
    free = qualities(texts).reshape(3, 4, 3)
    centred = (free - free.mean(axis=1, keepdims=True)).min(axis=2)
    assert (found[:12].reshape(3, 4).argmax(axis=1) == centred.argmax(axis=1)).all()


def card_of(aggregation: ScoreAggregation) -> RewardModelCard:
    return RewardModelCard(
        version="",
        base_model="base",
        max_length=64,
        append_eos=True,
        chat_template=None,
        training_data="",
        layout=MemberLayout(heads=3),
        aggregation=aggregation,
        head_hashes=("",),
        probes=(),
        covers_tokenizer=True,
    )


def test_a_fitted_penalty_takes_out_what_is_overpaid_whatever_has_no_score(monkeypatch: pytest.MonkeyPatch):
    """One member whose score is quality and 0.2 for each token; a text of a hundredth of the pairs has none."""
    random = np.random.default_rng(0)
    count = 800
    quality, lengths = random.normal(0, 1.5, (2, count)), random.integers(2, 30, (2, count))
    probability = 1 / (1 + np.exp(quality[1] - quality[0]))
    pairs = tuple(preference_pair(f"p{at}", "a", "b", float(probability[at])) for at in range(count))
    chosen, rejected = (
        tuple((2 * at + side, *[0] * (int(lengths[side, at]) - 1)) for at in range(count)) for side in (0, 1)
    )
    used = UsedPairs(PreferenceSet(pairs, count, 0, 0, 0, BadRows("fail", "")), chosen, rejected, LeftOut())

    def heads(texts: Sequence[tuple[int, ...]]) -> np.ndarray:
        scores = np.array([[quality[text[0] % 2, text[0] // 2] + 0.2 * len(text)] for text in texts])
        return np.where(np.array([[text[0] % 200 == 3] for text in texts]), np.nan, scores)

    settings = AggregationSettings(length_penalty="fitted")
    monkeypatch.setattr(run, "score_all", answers(heads))
    fitted, _ = run._fit_aggregation(card_of(ScoreAggregation()), settings, NO_SCORERS, used)
    assert fitted.length_coefficient == pytest.approx(0.2, abs=0.01)
    monkeypatch.setattr(run, "score_all", answers(lambda texts: np.full((len(texts), 1), np.nan)))
    with pytest.raises(Refused) as refused:
        run._fit_aggregation(card_of(ScoreAggregation()), settings, NO_SCORERS, used)
    assert "Not one of the training pairs has scores" in refused.value.refusals[0]


def test_leaks_are_looked_for_in_the_models_own_record_and_in_what_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pairs that chose the best model are in its record only."""
    texts = RewardTexts.read(str(tiny / "reward_model"))
    settings = PreferenceSettings(path=str(tiny / "pairs_test.jsonl"))
    used = read_pairs(settings, "pairs.path", texts, "truncate")
    recorded: list[PreferencePair] = list(used.pairs[:2])
    TrainingTexts.of(hash_pairs(recorded)).save(tmp_path)
    other = tmp_path / "training.jsonl"
    other.write_text("\n".join((tiny / "pairs_test.jsonl").read_text().splitlines()[2:5]))
    monkeypatch.setattr(evaluate.TrainingTexts, "load", lambda *_: TrainingTexts.of(hash_pairs(recorded)))
    config = RewardEvaluationConfig.model_construct(
        model=str(tiny / "reward_model"), pairs=settings, training_pairs=PreferenceSettings(path=str(other))
    )
    found = evaluate._leakage(config, used, texts)
    assert found is not None
    assert found.pairs.count == 5
