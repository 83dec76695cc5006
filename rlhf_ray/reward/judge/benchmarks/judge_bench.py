"""JudgeBench (Tan et al. 2025, arXiv:2410.12784; repository ScalerLab/JudgeBench).

Pairs of a right and a wrong response, both by GPT-4o (350 pairs) or both by Claude 3.5 Sonnet (270 pairs). The overall
score is the share of all 620 pairs judged as labelled; sections are the same by responding model and by category. The
published code takes a reward model's verdict to be A where A scores strictly higher and B otherwise, so that equal
scores are right where the label is B.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_ray.data.rows import Row, RowError
from rlhf_ray.reward.judge.benchmarks.cases import (
    Benchmark,
    BenchmarkResult,
    Case,
    ScoredBenchmark,
    ScoredCase,
    known_value,
    local_files,
    prompt_value,
    read_benchmark,
    string_value,
)

NAME = "judge-bench"
MODELS = {
    "gpt-4o-2024-05-13": {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42},
    "claude-3-5-sonnet-20240620": {"knowledge": 154, "reasoning": 51, "math": 34, "coding": 31},
}
SUBSETS = {
    f"{model}/{category}": count for model, categories in MODELS.items() for category, count in categories.items()
}
# By the beginning of `source`: mmlu-pro-math is a question of knowledge.
CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
LABELS = ("A>B", "B>A")


def load(path: str, key: str) -> Benchmark:
    """Read rows of `pair_id`, `source`, `question`, `response_model`, `response_A`, `response_B`, `label`.

    Args:
        path: file or folder; the two files together are the benchmark.
        key: the settings key that holds `path`.

    Raises:
        BadInput: as `read_benchmark`.
    """
    return read_benchmark(NAME, SUBSETS, local_files(path, key), key, _case)


def score(benchmark: Benchmark, scores: np.ndarray) -> BenchmarkResult:
    """The published figures.

    Args:
        scores: `[num_items]` float64, NaN where a text could not be scored.
    """
    scored = ScoredBenchmark(benchmark, scores)
    for subset in SUBSETS:
        scored.measure(subset, verdict_accuracy)
    sections = [
        scored.section(part, {subset: count for subset, count in SUBSETS.items() if part in subset.split("/")})
        for part in (*MODELS, *CATEGORIES.values())
    ]
    # Weighted by their numbers of pairs, means of means are the mean over pairs.
    return scored.result(scored.section("overall", SUBSETS), sections)


def verdict_accuracy(cases: Sequence[ScoredCase]) -> float:
    """Share of pairs with the verdict (A where its score is strictly higher, else B) that the label has."""
    return float(np.mean([(case.scores[0] > case.scores[1]) == case.case.correct[0] for case in cases]))


def _case(row: Row, file: Path) -> Case:
    values = row.values
    model = known_value(values, "response_model", list(MODELS))
    source = string_value(values, "source")
    category = next((name for start, name in CATEGORIES.items() if source.startswith(start)), None)
    if category is None:
        raise RowError(f"`source` is '{source}'", f"a source that begins with one of {', '.join(CATEGORIES)}")
    a_is_right = known_value(values, "label", LABELS) == "A>B"
    return Case(
        subset=f"{model}/{category}",
        id=str(values.get("pair_id", row.place)),
        prompt=prompt_value(values, "question"),
        responses=(string_value(values, "response_A"), string_value(values, "response_B")),
        correct=(a_is_right, not a_is_right),
        place=row.place,
    )
