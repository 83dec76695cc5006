"""A reward model under a policy: samples from a file, who scores what, and the figures against brute force."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import spearmanr
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_ray.config.reward_model import BestOfNSettings
from rlhf_ray.config.settings import GeneratorSettings, PromptSettings
from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.failures import BadInput
from rlhf_ray.randomness import keyed_seed
from rlhf_ray.reward.core.encoding import Encoded, RewardEncoding
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.judge.policy_samples import (
    BestOfNReport,
    PolicySamples,
    judge_samples,
    load_samples,
    plan_samples,
    report_best_of_n,
    score_samples,
)

KEY = "best_of_n.path"
QUESTION = {"role": "user", "content": "How was the movie?"}
GOOD_ROW = {"prompt": "I think", "responses": [" yes", " no"]}


def written(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_rows_are_cut_to_the_shortest_and_what_is_cut_is_counted(tmp_path: Path):
    rows = [
        {"prompt": "I think", "responses": [" yes", "", " no", " no"], "judge": [1, 0.5, -2, 3]},
        {"prompt": [QUESTION], "responses": ["Good.", "Bad.", "Dull."], "judge": [3, 2, 1]},
    ]
    path = written(tmp_path, rows)
    samples = load_samples(path, KEY)
    assert samples.prompts[0] == Conversation("I think")
    assert samples.prompts[1].messages == (QUESTION,)
    assert samples.responses == ((" yes", "", " no"), ("Good.", "Bad.", "Dull."))
    assert samples.judge is not None
    assert samples.judge.tolist() == [[1, 0.5, -2], [3, 2, 1]]
    assert (samples.samples_per_prompt, samples.num_surplus, samples.truncated_share) == (3, 1, None)
    assert samples.places == (f"{path}:1", f"{path}:2")
    with pytest.raises(BadInput, match="has no `judge`"):
        load_samples(written(tmp_path, [GOOD_ROW]), KEY, judged=True)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"responses": ["a", "b"]}, "has no `prompt`"),
        ({"prompt": " ", "responses": ["a", "b"]}, "`prompt` is empty"),
        ({"prompt": [{"role": "user"}], "responses": ["a", "b"]}, "message 1 of `prompt` is malformed"),
        ({"prompt": "p"}, "has no `responses`"),
        ({"prompt": "p", "responses": ["a"]}, "`responses` has 1 entries"),
        ({"prompt": "p", "responses": ["a", 1]}, "`responses` is not a list of strings"),
        ({"prompt": "p", "responses": "ab"}, "`responses` is not a list of strings"),
        ({"prompt": "p", "responses": ["a", "b"], "judge": [1]}, "`judge` does not fit"),
        ({"prompt": "p", "responses": ["a", "b"], "judge": [1, float("nan")]}, r"`judge\[1\]` is nan"),
        ({"prompt": "p", "responses": ["a", "b"], "judge": [1, 2]}, None),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], found: str | None):
    path = written(tmp_path, [GOOD_ROW, row])
    with pytest.raises(BadInput, match=found or "has no `judge`, but another row has") as caught:
        load_samples(path, KEY)
    assert caught.value.where == f"{path}:{2 if found else 1}"


def test_broken_json_is_named(tmp_path: Path):
    path = written(tmp_path, [GOOD_ROW])
    Path(path).write_text(Path(path).read_text() + "{")
    with pytest.raises(BadInput, match="is not JSON") as caught:
        load_samples(path, KEY)
    assert caught.value.where == f"{path}:2"


def samples_of(*rows: tuple[str | list[dict[str, Any]], Sequence[str]], judge: Any = None) -> PolicySamples:
    prompts = [
        Conversation(prompt) if isinstance(prompt, str) else Conversation("", tuple(prompt)) for prompt, _ in rows
    ]
    places = tuple(f"made:{number}" for number in range(1, len(rows) + 1))
    return PolicySamples(tuple(prompts), tuple(tuple(responses) for _, responses in rows), places, judge)


def length_score(encoded: Sequence[Encoded], _: np.ndarray) -> np.ndarray:
    """The number of tokens; none where the text was cut."""
    return np.array([np.nan if was_cut else float(len(token_ids)) for token_ids, was_cut in encoded])


def test_texts_are_scored_as_they_are_and_chat_as_its_template_has_it(policy_tokenizer: Any):
    encoding = RewardEncoding.for_backbone(policy_tokenizer, 32)
    turns = [QUESTION, {"role": "assistant", "content": "Good."}]
    rendered = policy_tokenizer.apply_chat_template(turns, tokenize=False)
    samples = samples_of(("I think", [" yes", " so" * 40]), ([QUESTION], ["Good.", "Bad."]))
    seen: list[Encoded] = []

    def score(encoded: Sequence[Encoded], prompts: np.ndarray) -> np.ndarray:
        seen.extend(encoded)
        assert prompts.tolist() == [0, 0, 1, 1]
        return length_score(encoded, prompts)

    scores = score_samples(samples, encoding, score)
    assert seen[0] == encoding.encode("I think yes")
    assert seen[2] == encoding.encode(rendered, templated=True)
    lengths = [float(len(token_ids)) for token_ids, _ in seen]
    np.testing.assert_array_equal(scores, [[lengths[0], np.nan], lengths[2:]])


def test_messages_without_a_template_are_bad_input(policy_model: str):
    from rlhf_ray.models.loading import load_tokenizer

    tokenizer = load_tokenizer(policy_model, "judge")
    tokenizer.chat_template = None
    asked_twice = [QUESTION, {"role": "assistant", "content": "Yes."}, QUESTION]
    with pytest.raises(BadInput, match="no chat template") as caught:
        score_samples(
            samples_of(("p", ["a", "b"]), (asked_twice, ["a", "b"])),
            RewardEncoding.for_backbone(tokenizer, 32),
            length_score,
        )
    assert caught.value.where == "made:2"


def test_vader_judges_the_response_alone():
    samples = samples_of(("The worst, most terrible movie:", [" I love it!", " I hate it.", ""]))
    compound = SentimentIntensityAnalyzer().polarity_scores
    expected = [compound(text)["compound"] for text in (" I love it!", " I hate it.")]
    assert judge_samples(samples, "vader").tolist() == [[*expected, 0.0]]
    assert expected[0] > 0.5 > -0.5 > expected[1]


def test_the_judge_is_the_one_that_was_named():
    given = np.array([[1.0, 2.0]])
    samples = samples_of(("p", ["a", "b"]), judge=given)
    assert judge_samples(samples, "samples") is given
    assert judge_samples(samples, "vader").tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="without a judge"):
        judge_samples(samples_of(("p", ["a", "b"])), "samples")


def test_a_judge_must_be_named():
    with pytest.raises(ValidationError, match="judge\n  Field required"):
        BestOfNSettings(path="samples.jsonl")
    with pytest.raises(ValidationError, match="needs `path` with samples that were judged"):
        BestOfNSettings(policy="model", prompts=PromptSettings(path="prompts.jsonl"), judge="samples")


def test_a_response_has_the_same_seed_in_every_cut_into_shards(tiny: Path, policy_tokenizer: Any):
    settings = BestOfNSettings(
        policy="unused",
        prompts=PromptSettings(path=str(tiny / "prompts_test.jsonl"), limit=7),
        samples_per_prompt=4,
        judge="vader",
    )
    assert settings.prompts is not None
    prompts = load_prompts(
        settings.prompts,
        policy_tokenizer,
        max_prompt_tokens=64,
        context_tokens=256,
        max_response_tokens=8,
        key="best_of_n.prompts.path",
        section="best_of_n",
    )
    seeds = {}
    for room, num_shards in ((256, 1), (8, 4), (3, 7)):
        engine = GeneratorSettings(max_concurrent_sequences=room)
        plans = plan_samples(prompts, settings.model_copy(update={"generator": engine}), seed=5)
        assert [plan.index for plan in plans] == list(range(num_shards))
        assert [number for plan in plans for number in plan.prompt_ids] == list(range(7))
        seeds[room] = [seed for plan in plans for seed in plan.seeds]
    assert seeds[256] == seeds[8] == seeds[3]
    assert seeds[256] == [keyed_seed(5, "best-of-n", number, sample) for number in range(7) for sample in range(4)]
    assert plan_samples(prompts, settings, seed=6)[0].seeds[0] != seeds[256][0]


def drawn_scores(prompts: int = 12, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    proxy = random.normal(size=(prompts, 1)) * 2 + random.normal(size=(prompts, count)).round(1)
    return proxy, proxy + random.normal(size=(prompts, count))


def report(proxy: Any, gold: Any, **more: Any) -> BestOfNReport:
    return report_best_of_n(proxy, gold, "made", **more)


def test_the_curve_is_over_powers_of_two_and_all_samples():
    proxy, gold = drawn_scores()
    found = report(proxy, gold, truncated_share=0.25)
    assert [point.n for point in found.curve.points] == [1, 2, 4, 6]
    assert found.curve.points[-1].proxy == pytest.approx(proxy.max(axis=1).mean())
    best = [worth[scores == scores.max()].mean() for scores, worth in zip(proxy, gold, strict=True)]
    assert found.curve.points[-1].gold == pytest.approx(np.mean(best))
    assert [rate.n for rate in found.win_rates] == [1, 2, 4]
    assert found.win_rates[0].value == pytest.approx(0.5)
    assert found.win_rates[2].without_ties == pytest.approx(0.8)
    assert (found.judge, found.prompts, found.samples_per_prompt, found.truncated_share) == ("made", 12, 6, 0.25)


def test_rank_agreement_is_the_mean_of_spearmans():
    proxy, gold = drawn_scores()
    proxy[3], gold[5] = 1.0, -2.0  # prompts in which one of them does not vary
    varying = [row for row in range(12) if row not in (3, 5)]
    expected = np.mean([spearmanr(proxy[row], gold[row]).statistic for row in varying])
    found = report(proxy, gold).agreement
    assert found.correlation == pytest.approx(expected, abs=1e-12)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.correlation < found.high
    assert found.prompts == 10


def test_the_spread_within_and_between_prompts():
    proxy, gold = drawn_scores()
    found = report(proxy, gold).spread
    assert found.within_prompt_std == pytest.approx(np.mean([np.std(row, ddof=1) for row in proxy]))
    # One-way analysis of variance, from its sums of squares.
    means = proxy.mean(axis=1)
    between_ms = 6 * np.sum((means - proxy.mean()) ** 2) / 11
    within_ms = np.sum((proxy - means[:, None]) ** 2) / (12 * 5)
    assert found.between_prompt_share == pytest.approx((between_ms - within_ms) / (between_ms + 5 * within_ms))
    assert found.flat_prompts == 0


def test_the_share_between_prompts_is_that_of_the_variances_and_not_of_the_sample_size():
    """With few samples the means of prompts differ by chance; that is no variance between prompts."""
    random = np.random.default_rng(1)
    for deviation, share in ((2.0, 0.8), (0.0, 0.0)):
        proxy = random.normal(size=(4000, 1)) * deviation + random.normal(size=(4000, 3))
        found = report_best_of_n(proxy, proxy, "made").spread.between_prompt_share
        assert found == pytest.approx(share, abs=0.02)


def test_prompts_scored_nearly_equal_are_flat():
    proxy, gold = drawn_scores()
    proxy[:3] = proxy[:3, :1] + np.linspace(0, 1e-3, 6)
    assert report(proxy, gold).spread.flat_prompts == pytest.approx(0.25)


@pytest.mark.parametrize("proxy", [np.full((3, 4), 0.1), np.array([[0.1, 0.2]])], ids=["constant", "one prompt"])
def test_a_report_is_json_without_nan(proxy: np.ndarray):
    found = report(proxy, np.full(proxy.shape, 0.3))
    text = json.dumps(dataclasses.asdict(found), allow_nan=False)
    assert json.loads(text)["agreement"] == {"correlation": None, "low": None, "high": None, "prompts": 0}
    assert found.spread.between_prompt_share is None
    if len(proxy) > 1:
        assert (found.spread.flat_prompts, found.spread.within_prompt_std) == (1.0, 0.0)
        assert [rate.value for rate in found.win_rates] == pytest.approx([0.5, 0.5])


def test_a_prompt_with_a_failed_sample_is_left_out_and_counted():
    proxy, gold = drawn_scores()
    rest = report(proxy[2:], gold[2:])
    proxy[0, 2] = np.nan
    gold[1, 0] = np.nan
    found = report(proxy, gold)
    assert found.failed_prompts == 2
    assert dataclasses.replace(found, failed_prompts=0) == rest
    gold[:, 1] = np.nan
    with pytest.raises(BadInput, match=r"each of the 12 prompts .*\(1 of 72 by the reward model, 13 by the judge\)"):
        report(proxy, gold)


def test_scores_that_do_not_belong_together_are_refused():
    proxy, gold = drawn_scores()
    for wrong in ((proxy, gold[:, :5]), (proxy[:, :1], gold[:, :1]), (proxy[0], gold[0])):
        with pytest.raises(ValueError, match="scores of shape"):
            report(*wrong)


def test_a_proxy_that_is_hacked_peaks_before_the_end():
    """Its best-scored samples are its errors: gold rises with the score up to a point, then falls."""
    proxy = np.random.default_rng(2).normal(size=(400, 64))
    found = report(proxy, np.where(proxy < 1.5, proxy, 3 - 3 * (proxy - 1)))
    assert 1 < found.curve.peak_n < 64
    assert found.fit is not None
    assert found.fit.peak_d is not None
    assert found.fit.peak_d < found.curve.points[-1].sqrt_kl
