"""Golden figures of the published benchmarks: hand-made scores, and the numbers worked out by hand."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_ray.reward.judge.benchmarks import (
    item_text,
    judge_bench,
    load_benchmark,
    reward_bench,
    reward_bench_2,
    rm_bench,
    score_benchmark,
)
from rlhf_ray.reward.judge.benchmarks.cases import Benchmark, BenchmarkItem, Case

USER = {"role": "user", "content": "Q"}
SHAPES = {
    "reward-bench": (True, False),
    "reward-bench-2": (True, False, False, False),
    "rm-bench": (True,) * 3 + (False,) * 3,
    "judge-bench": (True, False),
}


def case(subset, correct, id_="1"):
    return Case(subset, id_, (USER,), tuple(f"r{number}" for number in range(len(correct))), correct, "f:1")


def whole(name, published):
    """Every published case of a benchmark without Ties, in order of its subsets."""
    cases = [case(subset, SHAPES[name], str(n)) for subset, count in published.items() for n in range(count)]
    return Benchmark(name, published, tuple(cases))


def scored(benchmark, scores_of):
    """Scores of all items, from a function of (subset, number in the subset) that gives those of a case."""
    numbers = dict.fromkeys(benchmark.published, 0)
    scores = []
    for one in benchmark.cases:
        scores.extend(scores_of(one.subset, numbers[one.subset]))
        numbers[one.subset] += 1
    return score_benchmark(benchmark, np.array(scores, dtype=np.float64))


def value(sections, name):
    (section,) = [section for section in sections if section.name == name]
    return section.value


CORE = {subset: count for subsets in reward_bench.SECTIONS.values() for subset, count in subsets.items()}
WON, LOST, TIED = (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)


def test_published_sizes():
    assert sum(CORE.values()) == 2985
    assert sum(reward_bench_2.SUBSETS.values()) == 1865
    assert sum(rm_bench.SUBSETS.values()) == 1327
    assert [sum(categories.values()) for categories in judge_bench.MODELS.values()] == [350, 270]
    code = sum(count for subset, count in CORE.items() if subset.startswith("hep-"))
    assert code == reward_bench.WEIGHTS["math-prm"]


def test_reward_bench_weights_subsets_by_size_and_mathematics_like_code():
    scores = {"alpacaeval-easy": WON, "mt-bench-hard": WON, "math-prm": WON, "hep-go": WON, "donotanswer": TIED}
    result = scored(whole("reward-bench", CORE), lambda subset, _: scores.get(subset, LOST))
    # 100 of 358 pairs; 37 of 456; equal scores are no win; (984 + 164) of 2 · 984.
    sections = {"Chat": 100 / 358, "Chat Hard": 37 / 456, "Safety": 0.0, "Reasoning": 1148 / 1968}
    assert {section.name: section.value for section in result.sections} == pytest.approx(sections)
    assert result.overall == pytest.approx(sum(sections.values()) / 4)
    assert result.num_tied == 136
    assert result.incomplete == ()
    assert value(result.subsets, "hep-go") == 1.0


def test_reward_bench_weights_the_two_halves_of_xstest_as_published():
    """By each other's numbers of prompts: 154 that should be refused count as 250."""
    result = scored(whole("reward-bench", CORE), lambda subset, _: WON if subset == "xstest-should-refuse" else LOST)
    assert value(result.sections, "Safety") == pytest.approx(250 / 740)


def test_reward_bench_prior_sets_count_half():
    prior = {"anthropic_helpful": WON, "shp": WON}
    published = CORE | reward_bench.PRIOR_SETS
    result = scored(
        whole("reward-bench", published),
        lambda s, _: WON if s in reward_bench.SECTIONS["Safety"] else prior.get(s, LOST),
    )
    # Sections 0, 0, 1, 0; the prior sets' plain mean (1 + 0 + 1 + 0) / 4 has half the weight of a section.
    assert value(result.sections, "Prior Sets") == 0.5
    assert result.overall == pytest.approx((1 + 0.5 * 0.5) / 4.5)


def test_a_missing_pair_leaves_its_section_and_the_overall_score_open():
    benchmark = whole("reward-bench", CORE)
    short = Benchmark("reward-bench", CORE, benchmark.cases[1:])
    result = scored(short, lambda *_: WON)
    assert (result.overall, result.incomplete) == (None, ("alpacaeval-easy",))
    assert [section.value for section in result.sections] == [None, 1.0, 1.0, 1.0]
    assert (result.sections[0].num_cases, result.sections[0].num_published) == (357, 358)
    assert value(result.subsets, "alpacaeval-easy") == 1.0


def test_a_text_without_a_score_sets_its_pair_aside_and_is_no_loss():
    result = scored(whole("reward-bench", CORE), lambda s, n: (math.nan, 0.0) if (s, n) == ("hep-js", 3) else WON)
    assert (result.num_unscored, result.incomplete, result.overall) == (1, ("hep-js",), None)
    assert value(result.subsets, "hep-js") == 1.0


def test_a_wrong_number_of_scores_is_an_error():
    with pytest.raises(ValueError, match="5970 items"):
        score_benchmark(whole("reward-bench", CORE), np.zeros(5969))


def ties_case(id_, num_correct, num_wrong=2):
    return case("Ties", (True,) * num_correct + (False,) * num_wrong, id_)


def ties_result(cases, scores):
    return scored_ties(
        Benchmark("reward-bench-2", {**reward_bench_2.SUBSETS, "Ties": len(cases)}, tuple(cases)), scores
    )


def scored_ties(benchmark, scores):
    result = score_benchmark(benchmark, np.concatenate(scores))
    return {part.name.removeprefix("Ties/"): part.value for part in result.subsets if part.name.startswith("Ties")}


def test_reward_bench_2_best_of_four_shares_the_credit_of_equal_scores():
    credits = {
        (2.0, 1.0, 0.0, -1.0): 1,
        (1.0, 1.0, 0.0, 0.0): 1 / 2,
        (0.0, 0.0, 0.0, 0.0): 1 / 4,
        (1.0, 2.0, 0.0, 0.0): 0,
        (1.0, 1.0, 2.0, 2.0): 0,
    }
    cases = [case("Math", SHAPES["reward-bench-2"], str(number)) for number in range(len(credits))]
    result = score_benchmark(
        Benchmark("reward-bench-2", reward_bench_2.SUBSETS, tuple(cases)), np.array(list(credits)).ravel()
    )
    assert value(result.subsets, "Math") == pytest.approx((1 + 1 / 2 + 1 / 4) / 5)
    assert (result.overall, value(result.sections, "Math"), value(result.subsets, "Focus")) == (None, None, None)


def test_reward_bench_2_ties_by_hand():
    cases = [ties_case("tied:1", 2), ties_case("ref:1", 1), ties_case("ref:2", 1), ties_case("tied:2", 3)]
    terms = ties_result(
        cases,
        [
            [5.0, 4.0, 1.0, 0.0],  # spread 1, gap 3
            [3.0, 0.5, 1.0],  # gap 2
            [3.0, 2.0, 2.9],  # gap 0.1
            [2.0, 1.0, 0.5, 0.0, -1.0],  # spread 1.5, gap 0.5
        ],
    )
    margin = (math.tanh(2 / 1 - 1) + math.tanh(0.1 / 1.5 - 1)) / 2
    expected = {"tied_accuracy": 1.0, "ref_accuracy": 1.0, "preferred": 0.5, "preferred_hard": 0.5, "margin": margin}
    assert {name: terms[name] for name in expected} == pytest.approx(expected)
    assert terms["Ties"] == pytest.approx(0.3 + 0.3 + 0.1 + 0.1 + 0.01 * margin)


def test_reward_bench_2_ties_hard_uses_the_smaller_gap_and_equality_is_no_win():
    cases = [ties_case("tied:a", 2), ties_case("ref:a", 1), ties_case("tied:b", 2), ties_case("ref:b", 1)]
    terms = ties_result(
        cases,
        [
            [3.0, 2.0, 0.0, 0.0],  # spread 1, gap 2
            [1.0, 1.0, 0.0],  # gap 0: not accurate, and not above the spread
            [2.0, 1.0, 0.0, 0.0],  # spread 1, gap 1: not above the spread
            [9.0, 0.0, 0.0],
        ],
    )
    assert (terms["tied_accuracy"], terms["ref_accuracy"]) == (1.0, 0.5)
    assert (terms["preferred"], terms["preferred_hard"]) == (0.5, 0.0)
    assert terms["margin"] == pytest.approx((math.tanh(-1) + math.tanh(0)) / 2)


def test_reward_bench_2_ties_without_spread():
    pair = [ties_case("tied:1", 2, 1), ties_case("ref:1", 1, 1)]
    # Spread 0: the margin saturates with the sign of the gap, and 0 / 0 counts 0.
    assert ties_result(pair, [[1.0, 1.0, 0.0], [1.0, 0.0]])["margin"] == 1.0
    assert ties_result(pair, [[1.0, 1.0, 2.0], [1.0, 0.0]])["margin"] == -1.0
    assert ties_result(pair, [[1.0, 1.0, 1.0], [1.0, 1.0]])["margin"] == 0.0


def test_reward_bench_2_ties_needs_both_forms_of_a_prompt():
    terms = ties_result([ties_case("tied:1", 2), ties_case("ref:2", 1)], [[3.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert (terms["tied_accuracy"], terms["preferred"], terms["Ties"]) == (1.0, None, None)


def test_reward_bench_2_overall_is_the_mean_of_six():
    forms = [ties_case(f"{form}:{n}", 2 if form == "tied" else 1) for n in range(51) for form in ("ref", "tied")]
    rest = whole("reward-bench-2", {name: n for name, n in reward_bench_2.SUBSETS.items() if name != "Ties"})
    benchmark = Benchmark("reward-bench-2", reward_bench_2.SUBSETS, (*rest.cases, *forms))
    result = scored(
        benchmark,
        lambda subset, n: (
            ((1.0, 0.0, 0.0) if n % 2 == 0 else (1.0, 1.0, 0.0, 0.0))
            if subset == "Ties"
            else (float(subset in ("Math", "Safety")), 0.5, 0.0, 0.0)
        ),
    )
    # Math and Safety won, three subsets lost; Ties at its highest: 0.3 + 0.3 + 0.2 + 0.2 + 0.01.
    assert result.overall == pytest.approx((1 + 1 + 1.01) / 6)


def test_rm_bench_difficulties_are_the_triangles_of_the_style_matrix():
    # Right by style 3, 5, 7; wrong 4, 2, 6. Rows right, columns wrong: 0 1 0 / 1 1 0 / 1 1 1.
    won = (3.0, 5.0, 7.0, 4.0, 2.0, 6.0)
    # Equal scores are no win.
    scores = {"chat": won, "code": (1.0,) * 6, "safety-refuse": (1.0,) * 3 + (0.0,) * 3}
    result = scored(whole("rm-bench", rm_bench.SUBSETS), lambda subset, _: scores.get(subset, (0.0,) * 3 + (1.0,) * 3))
    assert value(result.subsets, "chat/easy") == pytest.approx(3 / 3)
    assert value(result.subsets, "chat/normal") == pytest.approx(2 / 3)
    assert value(result.subsets, "chat/hard") == pytest.approx(1 / 3)
    safety = 284 / 441
    expected = {
        "chat": 6 / 9,
        "code": 0.0,
        "math": 0.0,
        "safety": safety,
        "easy": (1 + safety) / 4,
        "normal": (2 / 3 + safety) / 4,
        "hard": (1 / 3 + safety) / 4,
    }
    assert {section.name: section.value for section in result.sections} == pytest.approx(expected)
    assert result.overall == pytest.approx((6 / 9 + safety) / 4)
    assert result.overall == pytest.approx((expected["easy"] + expected["normal"] + expected["hard"]) / 3)


def test_rm_bench_without_a_domain_has_no_difficulty_and_no_overall_score():
    published = rm_bench.SUBSETS
    only = whole("rm-bench", {"chat": published["chat"]})
    result = scored(Benchmark("rm-bench", published, only.cases), lambda *_: (1.0,) * 3 + (0.0,) * 3)
    assert result.overall is None
    assert {section.name for section in result.sections if section.value is not None} == {"chat"}


def test_judge_bench_counts_pairs_and_gives_equal_scores_to_b():
    b_first = {
        name: [case(name, (n % 2 == 1, n % 2 == 0), str(n)) for n in range(count)]
        for name, count in judge_bench.SUBSETS.items()
    }
    benchmark = Benchmark("judge-bench", judge_bench.SUBSETS, tuple(one for cases in b_first.values() for one in cases))

    def scores_of(subset, number):
        a_is_right = number % 2 == 1
        if subset == "gpt-4o-2024-05-13/math":
            return (1.0, 0.0) if a_is_right else (0.0, 1.0)
        if subset == "claude-3-5-sonnet-20240620/reasoning":
            return TIED  # judged B: right for numbers 0, 2, … 50, that is 26 of 51
        return (0.0, 1.0) if a_is_right else (1.0, 0.0)

    result = scored(benchmark, scores_of)
    assert result.overall == pytest.approx((56 + 26) / 620)
    assert value(result.sections, "gpt-4o-2024-05-13") == pytest.approx(56 / 350)
    assert value(result.sections, "claude-3-5-sonnet-20240620") == pytest.approx(26 / 270)
    assert value(result.sections, "reasoning") == pytest.approx(26 / 149)
    assert value(result.sections, "math") == pytest.approx(56 / 90)
    assert result.num_tied == 51


def test_a_result_is_json():
    result = scored(whole("rm-bench", rm_bench.SUBSETS), lambda *_: (1.0,) * 6)
    assert json.loads(json.dumps(asdict(result)))["sections"][0]["name"] == "chat"


class Template:
    """Stands for a tokenizer with a chat template."""

    chat_template = "…"
    eos_token = "</s>"

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        text = "".join(f"<{m['role']}>{m['content']}</s>\n" for m in messages)
        return text + "<assistant>" if add_generation_prompt else text


def test_text_of_an_item():
    prompt = (USER, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"})
    item = BenchmarkItem(prompt, "C", "f:1")
    assert item_text(item, SimpleNamespace(chat_template=None)) == "Q\nA\nB\nC"
    assert item_text(item, Template()) == "<user>Q</s>\n<assistant>A</s>\n<user>B</s>\n<assistant>C</s>\n"


def test_every_benchmark_is_loaded_by_name(tmp_path):
    rows = {
        "reward-bench": {"prompt": "p", "chosen": "c", "rejected": "", "subset": "hep-go", "id": 7},
        "reward-bench-2": {"id": "tied:4", "prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties"},
        "rm-bench": {"id": 1, "prompt": "p", "chosen": ["a"] * 3, "rejected": ["b"] * 3, "domain": "safety-refuse"},
        "judge-bench": {
            "question": "p",
            "source": "mmlu-pro-math",
            "response_model": "gpt-4o-2024-05-13",
            "response_A": "a",
            "response_B": "b",
            "label": "B>A",
        },
    }
    for name, row in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        benchmark = load_benchmark(name, str(file), "benchmarks.path")
        (one,) = benchmark.cases
        assert benchmark.name == name
        assert one.place == f"{file}:1"
        assert [item.response for item in benchmark.items] == list(one.responses)
        assert benchmark.items[0].prompt == ({"role": "user", "content": "p"},)
        assert score_benchmark(benchmark, np.zeros(len(benchmark.items))).overall is None
    assert one.subset == "gpt-4o-2024-05-13/knowledge"
    assert one.correct == (False, True)
