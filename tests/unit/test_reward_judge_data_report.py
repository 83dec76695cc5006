"""The data report and leakage: every count against pairs made by hand, and both data sets that are at hand."""

import json
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.data.preferences import PreferencePair, PreferenceSet, Votes, load_preferences
from rlhf_ray.data.rows import BadRows, RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.judge.data_report import AttributeReport, GapReport, LeftOut, data_findings, lines, report_data
from rlhf_ray.reward.judge.groups import Groups
from rlhf_ray.reward.judge.leakage import TRAINING_TEXTS_NAME, TrainingTexts, hash_pairs, normalised
from tests.conftest import REPOSITORY

PANDALM = REPOSITORY.parent / "shared" / "data" / "pandalm_human_preferences.jsonl"


def pair(prompt, chosen, rejected, probability=1.0, **values):
    optional = {"margin": None, "weight": 1.0, "source": None, "attributes": {}, "gap": None, "votes": None}
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        probability,
        **{**optional, "chosen_is_first": None, "templated": False, "place": "", **values},
    )


def pair_set(*pairs, name="train.jsonl"):
    placed = tuple(replace(each, place=f"{name}:{line}") for line, each in enumerate(pairs, start=1))
    return PreferenceSet(placed, len(pairs), 0, 0, 0, BadRows("skip", "pairs.on_bad_row"))


def report_of(*pairs, **options):
    return report_data(pair_set(*pairs), **options).training


def test_duplicates_repeat_texts_and_direction():
    report = report_of(
        pair("P", "good", "bad"),
        pair("P", "Good\n", " bad"),
        pair("P", "bad", "good", 0.2),
        pair("P", "good", "bad", 0.5),
        pair("P", "bad", "good", 0.5),
        pair("P", "good", "worse"),
        pair("Q", "good", "bad"),
    )
    assert report.duplicates.count == 3
    assert report.duplicates.share == pytest.approx(3 / 7)
    assert report.duplicates.examples == (
        "train.jsonl:2 repeats train.jsonl:1",
        "train.jsonl:3 repeats train.jsonl:1",
        "train.jsonl:5 repeats train.jsonl:4",
    )
    assert report.contradictions.count == 0


def test_contradictions_are_the_pairs_that_no_model_can_get_right():
    pairs = [
        pair("P", "a", "b"),
        pair("P", "b", "a"),
        pair("P", "a", "b"),
        pair("P", "a", "b", 0.3),
        pair("P", "a", "b"),
        pair("P", "a", "c"),
        pair("P", "a", "b", 0.5),
        pair("Q", "b", "a"),
    ]
    report = report_of(*pairs)
    preferred = [
        (
            each.prompt,
            *((each.chosen, each.rejected) if each.chosen_probability > 0.5 else (each.rejected, each.chosen)),
        )
        for each in pairs
        if each.chosen_probability != 0.5
    ]
    contradicting = {frozenset(two) for two in combinations(set(preferred), 2) if two[0] == (two[1][0], *two[1][:0:-1])}
    unavoidable = sum(min(preferred.count(each) for each in two) for two in contradicting)
    assert report.contradictions.count == unavoidable == 2
    assert report.contradictions.examples == (
        "train.jsonl:2 contradicts train.jsonl:1",
        "train.jsonl:4 contradicts train.jsonl:1",
    )


def test_responses_that_differ_in_case_and_space_only():
    report = report_of(pair("P", "Yes  sir", "yes SIR"), pair("P", "ﬁne", "FINE", 0.5), pair("P", "yes", "no"))
    assert (report.alike.count, report.alike.examples) == (1, ("train.jsonl:1",))
    assert report.contradictions.count == 0
    assert normalised(" ﬁne\u00a0 \n DAY") == normalised("Fine day") == "fineday"


def test_lengths_are_of_the_preferred_response_and_ties_do_not_count():
    pairs = [
        pair("P", "four", "by"),
        pair("P", "by", "four", 0.1),
        pair("P", "by", "seventy", 0.9),
        pair("P", "same", "size"),
        pair("P", "tie", "the longest of them", 0.5),
    ]
    tokens = np.array([[9, 5], [5, 9], [5, 6], [7, 7], [3, 30]])
    report = report_of(*pairs, training_tokens=tokens)
    characters = report.characters
    nan = np.nan
    assert characters.longer_preferred == Groups.of(pairs).share([1.0, 1.0, 0.0, nan, nan])
    assert (characters.longer_preferred.count, characters.longer_preferred.value) == (3, pytest.approx(2 / 3))
    assert characters.gap_mean == pytest.approx((2 + 2 - 5 + 0) / 4)
    assert characters.preferred_mean - characters.other_mean == pytest.approx(characters.gap_mean)
    assert characters.longest == len("the longest of them")
    assert (report.tokens.gap_mean, report.tokens.preferred_mean, report.tokens.longest) == (1.75, 7.5, 30)
    assert report_of(pairs[3]).characters.longer_preferred.value is None
    assert report_of(pairs[4]).characters.gap_mean is None
    with pytest.raises(ValueError, match=r"\(5, 2\) for 4 pairs"):
        report_of(*pairs[:4], training_tokens=tokens)


def test_agreement_of_raters_is_over_pairs_of_different_raters():
    votes = [Votes(3, 0, 0), Votes(2, 1, 0), Votes(1, 1, 1), Votes(0, 0, 2), Votes(1, 0, 0), Votes(4, 1, 2)]
    report = report_of(*(pair("P", str(n), "r", 0.5, votes=each) for n, each in enumerate(votes)), pair("P", "c", "r"))
    agreements = []
    for each in votes:
        opinions = ["chosen"] * each.chosen + ["rejected"] * each.rejected + ["tie"] * each.tie
        two = list(combinations(opinions, 2))
        agreements += [np.mean([first == second for first, second in two])] if two else []
    assert report.votes.pairs == len(agreements) == 5
    assert report.votes.agreement == pytest.approx(np.mean(agreements))
    assert report.votes.unanimous == pytest.approx(2 / 5)


def test_the_ceiling_leaves_out_pairs_with_one_vote():
    one, two = Votes(1, 0, 0), Votes(1, 1, 0)
    report = report_of(pair("P", "a", "r", votes=one), pair("P", "b", "r", 0.5, votes=two), pair("P", "c", "r", 0.7))
    assert (report.raters.pairs, report.raters.accuracy) == (2, pytest.approx(0.6))
    assert report_of(pair("P", "a", "r")).raters.accuracy is None


def test_labels_sources_gaps_and_attributes():
    report = report_of(
        pair("P", "a", "r", source="x", gap=1.0, attributes={"safe": 1.0, "kind": -1.0}),
        pair("P", "b", "r", 0.8, source="x", gap=2.0, attributes={"safe": -1.0}),
        pair("p ", "c", "r", 0.2, gap=4.0, attributes={"safe": -1.0, "kind": 0.0}),
        pair("Q", "d", "r", 0.5, source="y", attributes={"safe": 2.0}),
        pair("", "e", "r", 0.0),
    )
    assert (report.pairs, report.prompts, report.ties, report.soft_labels, report.rejected_preferred) == (5, 2, 1, 2, 2)
    assert [(each.name, each.pairs) for each in report.sources] == [("x", 2), (None, 2), ("y", 1)]
    assert report.gaps == GapReport(3, 1.0, 1.5, 2.0, 3.0, 4.0)
    kind, safe = report.attributes
    assert replace(kind, agreement=None) == AttributeReport("kind", 2, 0.4, 1, None)
    assert replace(safe, agreement=None) == AttributeReport("safe", 4, 0.8, 0, None)
    assert [(each.agreement.value, each.agreement.count) for each in (kind, safe)] == [(0, 1), (2 / 3, 3)]


HELD_OUT = [
    (pair("P", "a", "b"), "pairs texts responses prompts"),
    (pair("P", "B", " a"), "pairs texts responses prompts"),
    (pair("", "Pa", "P b"), "pairs texts"),
    (pair("P", "a", "new"), "texts responses prompts"),
    (pair("Z", "new", "a"), "responses"),
    (pair("p", "new", "newer"), "prompts"),
    (pair("", "new", "newer"), ""),
    (pair("Z", "new", "newer"), ""),
]


def test_leakage_by_pair_text_response_and_prompt(tmp_path):
    training = pair_set(pair("P", "a", "b"), pair("", "whole", "other"))
    held_out = pair_set(*(each for each, _ in HELD_OUT), name="test.jsonl")
    leakage = report_data(training, held_out).leakage
    for name in ("pairs", "texts", "responses", "prompts"):
        places = [f"test.jsonl:{line}" for line, (_, kinds) in enumerate(HELD_OUT, start=1) if name in kinds.split()]
        found = getattr(leakage, name)
        assert (found.count, found.share, found.examples) == (len(places), len(places) / 8, tuple(places)), name
    # The same from the hashes alone, as they lie beside a model.
    TrainingTexts.of(hash_pairs(training.pairs)).save(tmp_path)
    loaded = TrainingTexts.load(str(tmp_path), "model")
    assert loaded.leakage(hash_pairs(held_out.pairs)) == leakage


def test_only_the_first_few_places_are_kept():
    pairs = [pair("P", f"a{n}", "b") for n in range(20)]
    leakage = report_data(pair_set(*pairs), pair_set(*pairs, name="test.jsonl")).leakage
    assert (leakage.texts.count, leakage.texts.examples) == (20, tuple(f"test.jsonl:{n}" for n in range(1, 6)))


@pytest.mark.parametrize("damage", ["text", "cut", "array", "types"])
def test_unreadable_hashes_are_bad_input(tmp_path, damage):
    path = tmp_path / TRAINING_TEXTS_NAME
    assert TrainingTexts.load(str(tmp_path), "model") is None
    TrainingTexts.of(hash_pairs([pair("P", "a", "b")])).save(tmp_path)
    whole = path.read_bytes()
    arrays = dict.fromkeys(("pairs", "texts", "responses", "prompts"), np.array([0.5]))
    if damage == "array":
        np.savez(path, pairs=np.zeros(1, np.uint64))
    elif damage == "types":
        np.savez(path, **arrays)
    else:
        path.write_bytes(b"no archive" if damage == "text" else whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"model: '.*training_texts\.npz' cannot be read"):
        TrainingTexts.load(str(tmp_path), "model")


def told_of(report):
    return tuple(finding.line for finding in data_findings(report))


def healthy(count=100, start=0):
    """Pairs in which the longer response is preferred every other time."""
    return [
        pair(f"P{n}", f"yes{n}" + "!" * (n % 2), f"no {n}" + "!" * (1 - n % 2)) for n in range(start, start + count)
    ]


def test_nothing_is_found_in_healthy_pairs():
    report = report_data(pair_set(*healthy()), pair_set(*healthy(start=100)))
    assert told_of(report) == ()
    assert len(lines(report)) == 8


def many(**values):
    return [replace(each, **values) for each in healthy()]


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([*healthy(), pair("P1", "no 1", "yes1!")], "1 pairs (1.0 %) are contradicted"),
        ([*healthy(), *healthy(2)], "(the first: train.jsonl:101 repeats train.jsonl:1)"),
        ([*healthy(), pair("P", "yes", "YES")], "differ only in case"),
        ([pair(f"P{n}", "long" * n, "short") for n in range(1, 40)], "The longer response is preferred in 97.4 %"),
        ([pair(f"P{n}", "short", "long" * n) for n in range(2, 40)], "The shorter response is preferred in 100.0 %"),
        (many(chosen_probability=0.2), "In 100 of 100 pairs the label prefers the rejected response"),
        (many(chosen_probability=0.7), "no model can match more than 70.0 %"),
        (
            many(attributes={"safe": -1.0}),
            "'safe' points the way of the overall preference in only 0.0 %",
        ),
    ],
)
def test_findings_say_what_is_wrong(pairs, told):
    found = told_of(report_data(pair_set(*pairs)))
    assert len(found) == 1
    assert told in found[0]


SIDES = (lambda n: ("long" * n, "short"), lambda n: ("short", "long" * n))


def test_only_overpaid_length_can_be_taken_out_of_the_score():
    longer, shorter = ([pair(f"P{n}", *sides(n)) for n in range(2, 40)] for sides in SIDES)
    [of_longer] = data_findings(report_data(pair_set(*longer)))
    [of_shorter] = data_findings(report_data(pair_set(*shorter)))
    assert "length_penalty" in of_longer.lever
    assert of_shorter.lever == "Balance the pairs."


def test_a_handful_of_pairs_says_nothing_about_length():
    assert told_of(report_data(pair_set(*(pair(f"P{n}", "long", "s") for n in range(3))))) == ()


def test_left_out_and_cut_pairs_are_told():
    preferences = pair_set(*healthy(90))
    bad_rows = BadRows("skip", "pairs.on_bad_row")
    bad_rows.add("train.jsonl:91", RowError("found", "allowed"))
    preferences = replace(preferences, num_rows=97, num_skipped=1, bad_rows=bad_rows)
    report = report_data(preferences, training_left_out=LeftOut(small_gap=1, too_long=5, cut=10))
    assert report.training.bad_row_messages == ("train.jsonl:91: found; allowed",)
    assert lines(report)[0] == (
        "training: 90 pairs of 97 rows, 90 prompts, 1 bad rows left out, 1 left out for their gap, "
        "5 left out as too long, 10 cut"
    )
    lost, cut = told_of(report)
    assert "6 of 97 rows (6.2 %)" in lost
    assert "10 pairs (11.1 %) are cut" in cut


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        ([pair("P1", "yes1!", "no 1")], ["have a text that is also in training, 1 of them both"]),
        ([pair("P1", "new", "old")], ["have a prompt that is also in training"]),
        ([pair("Q", "new", "yes1!")], ["have a response that is also in training"]),
    ],
)
def test_leaks_are_told(held_out, told):
    found = told_of(report_data(pair_set(*healthy()), pair_set(*held_out, name="test.jsonl")))
    assert len(found) == len(told)
    assert all(part in line and "test.jsonl:1" in line for part, line in zip(told, found, strict=True))


def test_a_held_out_pair_that_helped_to_choose_the_model_is_a_leak():
    training, validation, held_out = (
        pair_set(*healthy(start=start), name=name)
        for start, name in ((0, "train.jsonl"), (100, "validation.jsonl"), (200, "test.jsonl"))
    )
    assert told_of(report_data(training, held_out, validation)) == ()
    assert report_data(training, held_out, validation).leakage.texts.count == 0
    report = report_data(training, validation, validation)
    assert report.leakage.pairs.count == 100
    [texts] = told_of(report)
    assert "100 pairs (100.0 %) of the held-out set have a text that is also in training or validation" in texts
    assert lines(report)[-2].startswith("held-out pairs also in training or validation: whole pair 100 (100.0 %)")


def test_a_validation_pair_that_was_trained_on_is_told():
    pairs = pair_set(*healthy())
    report = report_data(pairs, None, pair_set(*healthy()[:3], *healthy(97, start=100), name="validation.jsonl"))
    assert report.leakage is None
    assert report.validation_leakage.texts.count == 3
    [texts] = told_of(report)
    assert "3 pairs (3.0 %) of the validation set have a text that is also in training" in texts
    assert "validation.jsonl:1" in texts
    assert lines(report)[-1].startswith("validation pairs also in training: whole pair 3 (3.0 %), a text 3")


def test_the_report_is_json_and_its_lines_are_few():
    everything = pair("P", "a", "b", 0.7, source="x", gap=1.0, attributes={"safe": 1.0}, votes=Votes(2, 1, 0))
    pairs = pair_set(everything, replace(everything, source="y", chosen="c"))
    report = report_data(pairs, pairs, training_tokens=np.array([[3, 4], [5, 6]]))
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["training"]["tokens"]["longest"] == 6
    assert len(lines(report)) == 11
    assert "two raters agree on 33.3 %; no model can match more than 50.0 % of single votes" in lines(report)[1]


@pytest.mark.skipif(not PANDALM.is_file(), reason="needs the PandaLM comparisons beside the repository")
def test_pandalm_comparisons():
    settings = PreferenceSettings(path=str(PANDALM), on_bad_row="skip")
    report = report_data(load_preferences(settings, None, "pairs.path")).training
    assert (report.rows, report.bad_rows, report.pairs, report.ties) == (700, 57, 643, 64)
    assert len(report.bad_row_messages) == 10
    assert report.bad_row_messages[0].startswith(f"{PANDALM}:")
    # 559 unanimous pairs, and 84 in which two of three agree: (559 + 84 / 3) / 643.
    assert report.votes.unanimous == pytest.approx(559 / 643)
    assert report.votes.agreement == pytest.approx(587 / 643)
    assert report.contradictions.count == 0
    with pytest.raises(BadInput, match="57 such rows, also"):
        load_preferences(PreferenceSettings(path=str(PANDALM)), None, "pairs.path")
