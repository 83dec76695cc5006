"""The published reward-model benchmarks, scored from local files: `load_benchmark`, score the items, `score_benchmark`.

`docs/benchmarks.md` has the rules. A module for each benchmark, with `load` and `score`; what they share is in `cases`.
"""

from __future__ import annotations

import numpy as np

from rlhf_ray.config.reward_model import BenchmarkName
from rlhf_ray.reward.judge.benchmarks import judge_bench, reward_bench, reward_bench_2, rm_bench
from rlhf_ray.reward.judge.benchmarks.cases import Benchmark, BenchmarkResult, item_text

__all__ = ["item_text", "load_benchmark", "score_benchmark"]

_MODULES = {module.NAME: module for module in (reward_bench, reward_bench_2, rm_bench, judge_bench)}


def load_benchmark(name: BenchmarkName, path: str, key: str) -> Benchmark:
    """Read a benchmark from its published files.

    Args:
        path: a file, or a folder with the files in it.
        key: the settings key that holds `path`, for messages.

    Raises:
        BadInput: nothing readable there, a row that is not as published (with file and line), more rows than published.
    """
    return _MODULES[name].load(path, key)


def score_benchmark(benchmark: Benchmark, scores: np.ndarray) -> BenchmarkResult:
    """The published figures of a benchmark.

    Args:
        scores: `[num_items]` float64, in the order of `benchmark.items`; NaN where a text could not be scored.
    """
    return _MODULES[benchmark.name].score(benchmark, scores)
