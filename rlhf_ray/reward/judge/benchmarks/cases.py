"""What the published benchmarks have in common: cases of right and wrong responses, and sections over subsets.

A case is one row of the published data: a prompt with several responses, of which it is known which are right. A
subset is a group of cases that the benchmark reports by name; a section is a published mean over subsets.

A published number is comparable only where it covers the published data. So the value of a *subset* is over the cases
that were scored, and is None only where there are none; a *section* and the overall score are None unless every case
that belongs to them was there and was scored. Nothing is averaged over a gap.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.data.chat import Message, parse_messages, render_turn
from rlhf_ray.data.rows import FILE_SUFFIXES, NoBadRows, Row, RowError, first_present, read_rows
from rlhf_ray.failures import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class BenchmarkItem:
    """One text to score.

    Attributes:
        prompt: messages up to and with the last one of the user.
        response: the assistant's answer; published data may hold an empty one.
        place: of the row it comes from.
    """

    prompt: tuple[Message, ...]
    response: str
    place: str


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Attributes:
        subset: name under which the case is counted.
        id: within the subset, as the data has it.
        prompt: messages.
        responses: at least two, in the order of the data.
        correct: for each response, whether it is a right one; some are and some are not.
        place: of the row.
    """

    subset: str
    id: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    place: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as it was found on disk.

    Attributes:
        name: as in `load_benchmark`.
        published: number of published cases by subset, in the order of reporting.
        cases: at least one, in the order of the files.
    """

    name: str
    published: Mapping[str, int]
    cases: tuple[Case, ...]

    @cached_property
    def items(self) -> tuple[BenchmarkItem, ...]:
        """The texts to score: the responses of all cases, one case after the other."""
        return tuple(
            BenchmarkItem(case.prompt, response, case.place) for case in self.cases for response in case.responses
        )


@dataclass(frozen=True)
class Section:
    """A value with the number of cases behind it.

    Attributes:
        value: in [0, 1] (RewardBench 2's Ties: from -0.01 to 1.01), or None (see the module).
        num_cases: scored cases.
        num_published: cases in the published data.
    """

    name: str
    value: float | None
    num_cases: int
    num_published: int

    @property
    def complete(self) -> bool:
        return self.num_cases == self.num_published


@dataclass(frozen=True)
class BenchmarkResult:
    """The published figures of one benchmark; `dataclasses.asdict` makes it JSON.

    Attributes:
        overall: the published headline figure, or None where anything is missing from it.
        sections: what the headline is made of.
        subsets: what the sections are made of.
        incomplete: names of the subsets of which some cases are missing or have no score.
        num_unscored: cases set aside because a response has no finite score.
        num_tied: scored cases in which a right and a wrong response have the same score. Each benchmark has its own
            rule for them; where there are many, the figure says more of the rule than of the model.
    """

    name: str
    overall: float | None
    sections: tuple[Section, ...]
    subsets: tuple[Section, ...]
    incomplete: tuple[str, ...]
    num_unscored: int
    num_tied: int


@dataclass(frozen=True)
class ScoredCase:
    """A case with a finite score (float64) for each of its responses."""

    case: Case
    scores: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.scores[np.array(self.case.correct)]

    @property
    def wrong(self) -> np.ndarray:
        return self.scores[~np.array(self.case.correct)]


Measure = Callable[[Sequence[ScoredCase]], float]


class ScoredBenchmark:
    """The cases of a benchmark with their scores, and the sections over them.

    Args:
        scores: `[num_items]`, in the order of `benchmark.items`; NaN where a text could not be scored.

    Attributes:
        measured: what `measure` found, by name.

    Raises:
        ValueError: another number of scores than of items.
    """

    def __init__(self, benchmark: Benchmark, scores: np.ndarray) -> None:
        if scores.shape != (len(benchmark.items),):
            raise ValueError(f"{len(benchmark.items)} items to score, but scores of shape {scores.shape}")
        self._benchmark = benchmark
        self._cases: dict[str, list[ScoredCase]] = {subset: [] for subset in benchmark.published}
        self._num_unscored = self._num_tied = 0
        self.measured: dict[str, Section] = {}
        start = 0
        for case in benchmark.cases:
            scored = ScoredCase(case, np.asarray(scores[start : start + len(case.responses)], dtype=np.float64))
            start += len(case.responses)
            if not np.isfinite(scored.scores).all():
                self._num_unscored += 1
                continue
            self._cases[case.subset].append(scored)
            self._num_tied += not set(scored.right).isdisjoint(scored.wrong)

    def measure(self, subset: str, measure: Measure, name: str | None = None) -> Section:
        """A measure of a subset's scored cases; a NaN becomes None."""
        cases = self._cases[subset]
        value = float(measure(cases)) if cases else math.nan
        found = Section(
            name or subset, None if math.isnan(value) else value, len(cases), self._benchmark.published[subset]
        )
        self.measured[found.name] = found
        return found

    def section(self, name: str, weights: Mapping[str, float]) -> Section:
        """The weighted mean of what was measured under these names."""
        return mean_of(name, [self.measured[part] for part in weights], list(weights.values()))

    def result(self, overall: Section, sections: Sequence[Section]) -> BenchmarkResult:
        """With all that was measured."""
        return BenchmarkResult(
            name=self._benchmark.name,
            overall=overall.value,
            sections=tuple(sections),
            subsets=tuple(self.measured.values()),
            incomplete=tuple(
                name for name, cases in self._cases.items() if len(cases) != self._benchmark.published[name]
            ),
            num_unscored=self._num_unscored,
            num_tied=self._num_tied,
        )


def mean_of(name: str, parts: Sequence[Section], weights: Sequence[float] | None = None) -> Section:
    """Weighted mean of sections (equal weights if None); None unless all of them are complete."""
    values = [part.value for part in parts if part.complete and part.value is not None]
    value = float(np.average(values, weights=weights)) if len(values) == len(parts) else None
    return Section(name, value, sum(part.num_cases for part in parts), sum(part.num_published for part in parts))


def pair_accuracy(cases: Sequence[ScoredCase]) -> float:
    """Share of pairs whose right response scores strictly higher; equal scores count as wrong."""
    return float(np.mean([case.right[0] > case.wrong[0] for case in cases]))


def item_text(item: BenchmarkItem, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a reward model scores for an item.

    With a chat template this is the rendered conversation. Without one it is
    the contents of the messages and the response, in order, with one newline between them.

    Args:
        tokenizer: of the reward model.

    Raises:
        BadInput: the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        return "\n".join([*(message["content"] for message in item.prompt), item.response])
    try:
        prompt, response = render_turn(tokenizer, item.prompt, [{"role": "assistant", "content": item.response}])
    except RowError as problem:
        raise BadInput(item.place, problem.found, problem.allowed) from None
    return prompt + response


def local_files(path: str, key: str) -> list[Path]:
    """The data files at a path: itself, or those directly in a folder, in order of their names.

    Raises:
        BadInput: nothing to read there.
    """
    place = Path(path).expanduser()
    allowed = "a .jsonl, .json or .parquet file of the published data, or a folder of such files"
    try:
        files = sorted(place.iterdir()) if place.is_dir() else [place]
        files = [file for file in files if file.is_file() and file.suffix in FILE_SUFFIXES]
    except OSError as error:
        raise BadInput(key, f"'{path}' cannot be read ({error.strerror})", allowed) from None
    if not files:
        found = f"'{path}' holds no such file" if place.exists() else f"'{path}' does not exist"
        raise BadInput(key, found, allowed)
    return files


def read_benchmark(
    name: str, published: Mapping[str, int], files: Sequence[Path], key: str, parse: Callable[[Row, Path], Case]
) -> Benchmark:
    """Read the cases of a benchmark. A row that cannot be used is not skipped: without it the figure is another one.

    Args:
        published: number of published cases by subset.
        parse: the case of a row, from its file.

    Raises:
        BadInput: an unreadable file, a row that `parse` refuses, or more cases in a subset than were published.
    """
    bad_rows = NoBadRows(key)
    cases: list[Case] = []
    for file in files:
        for row in _rows(file, bad_rows, key):
            try:
                cases.append(parse(row, file))
            except RowError as problem:
                bad_rows.add(row.place, problem)
    for subset, count in Counter(case.subset for case in cases).items():
        if count > published[subset]:
            raise BadInput(
                key,
                f"{count} rows of '{subset}' in {', '.join(str(file) for file in files)}",
                f"the {published[subset]} published ones, each once",
            )
    return Benchmark(name, published, tuple(cases))


def known_value(values: Mapping[str, Any], column: str, allowed: Sequence[str]) -> str:
    """A column that names one of several things, or a `RowError`."""
    value = string_value(values, column)
    if value not in allowed:
        raise RowError(f"`{column}` is '{value}'", f"one of {', '.join(allowed)}")
    return value


def string_value(values: Mapping[str, Any], column: str) -> str:
    """A string, or a `RowError`. It may be empty: published responses are scored as they are."""
    _, value = first_present(values, (column,))
    if not isinstance(value, str):
        raise RowError(f"`{column}` is not a string", "a string")
    return value


def string_list(values: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """A list of at least one string, or a `RowError`."""
    _, value = first_present(values, (column,))
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise RowError(f"`{column}` is not a list of strings", "a list of at least one string")
    return tuple(value)


def prompt_value(values: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """Messages; a string is one message of the user."""
    _, value = first_present(values, (column,))
    if isinstance(value, list):
        return tuple(parse_messages(value, column))
    return ({"role": "user", "content": string_value(values, column)},)


def _rows(file: Path, bad_rows: NoBadRows, key: str) -> Iterator[Row]:
    """Rows of one file; unlike elsewhere a .json file may hold one list of all rows, as RM-Bench is published."""
    rows = _json_list(file) if file.suffix == ".json" else None
    if rows is None:
        yield from read_rows(str(file), bad_rows, split=None, limit=None, key=key)
        return
    for number, values in enumerate(rows, start=1):
        place = f"{file}:row {number}"
        if not isinstance(values, dict):
            bad_rows.add(place, RowError("the row is not an object", "a list of JSON objects"))
        yield Row({name: value for name, value in values.items() if value is not None}, place)


def _json_list(file: Path) -> list[Any] | None:
    """The rows of a file that is one JSON list; None for one object a line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        return json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        raise BadInput(f"{file}:{error.lineno}", f"is not JSON ({error.msg})", "a list of JSON objects") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(str(file), f"cannot be read ({error})", "a readable UTF-8 file") from None
