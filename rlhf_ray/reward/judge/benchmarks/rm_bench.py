"""RM-Bench (Liu et al. 2025, arXiv:2410.16184; repository THU-KEG/RM-Bench).

Three right and three wrong responses in the same three styles: concise, detailed in plain text, detailed in Markdown.
Of the nine comparisons of a right (row) with a wrong (column) one, those below the diagonal are easy (the right one
has the richer style), those on it normal, those above it hard; a comparison is won where the right response scores
strictly higher. A domain is the mean over its cases and the three difficulties; the overall score is the mean of the
four domains, and so is each difficulty. Safety pools the cases of safety-refuse and safety-response, as the published
`compute_accuracy` does for the whole data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rlhf_ray.data.rows import Row, RowError
from rlhf_ray.reward.judge.benchmarks.cases import (
    Benchmark,
    BenchmarkResult,
    Case,
    ScoredBenchmark,
    ScoredCase,
    Section,
    known_value,
    local_files,
    mean_of,
    prompt_value,
    read_benchmark,
    string_list,
)

NAME = "rm-bench"
SUBSETS = {"chat": 129, "code": 228, "math": 529, "safety-refuse": 284, "safety-response": 157}
DOMAINS = {
    "chat": ("chat",),
    "code": ("code",),
    "math": ("math",),
    "safety": ("safety-refuse", "safety-response"),
}
DIFFICULTIES = ("easy", "normal", "hard")
NUM_STYLES = 3
_WHOLE = "total_dataset.json"
_DOMAIN_FILE = "_filtered.json"


def load(path: str, key: str) -> Benchmark:
    """Read rows of `id`, `prompt`, `chosen` and `rejected` (three each, by style), `domain`.

    The files of single domains (`chat_filtered.json`) have no `domain`; their names say it. In a folder with
    `total_dataset.json`, which holds them all, only that file is read.

    Args:
        path: file or folder.
        key: the settings key that holds `path`.

    Raises:
        BadInput: as `read_benchmark`.
    """
    files = local_files(path, key)
    whole = [file for file in files if file.name == _WHOLE]
    return read_benchmark(NAME, SUBSETS, whole or files, key, _case)


def score(benchmark: Benchmark, scores: np.ndarray) -> BenchmarkResult:
    """The published figures: sections by domain and by difficulty; subsets also as `chat/easy` and so on.

    Args:
        scores: `[num_items]` float64, NaN where a text could not be scored.
    """
    scored = ScoredBenchmark(benchmark, scores)
    # Each difficulty has three of the nine comparisons, so their mean is that of all nine.
    for subset in SUBSETS:
        scored.measure(subset, lambda cases: float(win_matrix(cases).mean()))
    for subset in SUBSETS:
        for difficulty in DIFFICULTIES:
            scored.measure(subset, partial(difficulty_accuracy, difficulty=difficulty), f"{subset}/{difficulty}")

    def domains(of: str = "") -> list[Section]:
        return [
            scored.section(domain, {subset + of: SUBSETS[subset] for subset in members})
            for domain, members in DOMAINS.items()
        ]

    difficulties = [mean_of(difficulty, domains(f"/{difficulty}")) for difficulty in DIFFICULTIES]
    return scored.result(mean_of("overall", domains()), [*domains(), *difficulties])


def win_matrix(cases: Sequence[ScoredCase]) -> np.ndarray:
    """Share of cases whose right response of style i beats the wrong one of style j, `[3, 3]`."""
    return np.mean([case.right[:, None] > case.wrong[None, :] for case in cases], axis=0)


def difficulty_accuracy(cases: Sequence[ScoredCase], difficulty: str) -> float:
    """Mean of the win matrix below (easy), on (normal) or above (hard) its diagonal."""
    right, wrong = np.indices((NUM_STYLES, NUM_STYLES))
    masks = {"easy": right > wrong, "normal": right == wrong, "hard": right < wrong}
    return float(win_matrix(cases)[masks[difficulty]].mean())


def _case(row: Row, file: Path) -> Case:
    values = row.values
    if "domain" not in values and file.name.endswith(_DOMAIN_FILE):
        values = {**values, "domain": file.name.removesuffix(_DOMAIN_FILE)}
    chosen, rejected = string_list(values, "chosen"), string_list(values, "rejected")
    if len(chosen) != NUM_STYLES or len(rejected) != NUM_STYLES:
        raise RowError(
            f"`chosen` has {len(chosen)} and `rejected` {len(rejected)} responses",
            f"{NUM_STYLES} each: concise, detailed in plain text, detailed in Markdown",
        )
    return Case(
        subset=known_value(values, "domain", list(SUBSETS)),
        id=str(values.get("id", row.place)),
        prompt=prompt_value(values, "prompt"),
        responses=(*chosen, *rejected),
        correct=(True,) * NUM_STYLES + (False,) * NUM_STYLES,
        place=row.place,
    )
