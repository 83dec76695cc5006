"""Rows of JSONL, Parquet and `datasets`, each with its place, and what becomes of those that cannot be used.

Every complaint about data names where the row is (`pairs.jsonl:17`), what was found there and what would
have been accepted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.failures import BadInput, OutOfReach

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
SOURCES = "a .jsonl or .parquet file, a folder of such files, or a `datasets` name"
MAX_LISTED = 10


@dataclass(frozen=True)
class Row:
    """One row of data.

    Attributes:
        values: by column. Columns without a value in this row (null) are left out.
        place: `file:line` (JSONL), `file:row N` (Parquet) or `name[split]:row N` (`datasets`), counted from 1.
    """

    values: Mapping[str, Any]
    place: str


class RowError(Exception):
    """A row that cannot be used: what was found and what is allowed."""

    def __init__(self, found: str, allowed: str) -> None:
        self.found, self.allowed = found, allowed
        super().__init__(f"{found}; {allowed}")


@dataclass
class BadRows:
    """Collects rows that cannot be used.

    Attributes:
        mode: `fail` makes `close` raise, `skip` only counts.
        setting: the key that chose the mode.
        count: bad rows so far.
        messages: the first ten of them, one line each.
    """

    mode: Literal["fail", "skip"]
    setting: str
    count: int = 0
    messages: list[str] = field(default_factory=list)
    _first: BadInput | None = field(default=None, repr=False)
    _places: list[str] = field(default_factory=list, repr=False)

    def add(self, place: str, problem: RowError) -> None:
        self.count += 1
        if self.count <= MAX_LISTED:
            error = BadInput(place, problem.found, problem.allowed)
            self._first = self._first or error
            self._places.append(place)
            self.messages.append(str(error))

    def close(self) -> None:
        """After the last row: with `fail`, raise for the rows collected.

        Raises:
            BadInput: one line with the first problem in full, the places of the next nine, and the total.
        """
        if self.mode == "skip" or self._first is None:
            return
        hint = f"'{self.setting}=skip' leaves such rows out"
        if self.count > 1:
            more = ", …" if self.count > MAX_LISTED else ""
            hint = f"{self.count} such rows, also {', '.join(self._places[1:])}{more}; {hint}"
        raise BadInput(self._first.where, self._first.found, f"{self._first.allowed} ({hint})")


class NoBadRows(BadRows):
    """For data of which every row counts: the first bad row is the end of it.

    Args:
        key: the settings key that holds the path.
    """

    def __init__(self, key: str) -> None:
        super().__init__("fail", key)

    def add(self, place: str, problem: RowError) -> None:
        """Raise the row's `BadInput`."""
        raise BadInput(place, problem.found, problem.allowed)


def read_rows(path: str, bad_rows: BadRows, *, split: str | None, limit: int | None, key: str) -> Iterator[Row]:
    """Read rows one after the other; what is no row at all (broken JSON, not an object) goes to `bad_rows`.

    Args:
        path: a JSONL or Parquet file, a folder of such files (read in order of their names), or the name of
            a data set that `datasets.load_dataset` knows.
        split: split of a `datasets` name; `train` if None.
        limit: stop after so many rows, good or bad.
        key: the settings key that holds `path`, for messages.

    Raises:
        BadInput: missing or unreadable source, no rows; `OutOfReach` when the hub cannot be asked.
    """
    num_rows = 0
    for place, values in islice(_all_rows(path, split, key), limit):
        num_rows += 1
        if isinstance(values, dict):
            yield Row({name: value for name, value in values.items() if value is not None}, place)
        elif isinstance(values, RowError):
            bad_rows.add(place, values)
        else:
            bad_rows.add(place, RowError(f"the row is {_kind(values)}", "a JSON object a line"))
    if not num_rows:
        raise BadInput(key, f"'{path}' has no rows", "at least one row")


def text_value(value: Any, name: str) -> str:
    """A string that is not blank, or a `RowError`."""
    if not isinstance(value, str):
        raise RowError(f"`{name}` is {_kind(value)}", "a string or chat messages")
    if not value.strip():
        raise RowError(f"`{name}` is empty", "a text that is not blank")
    return value


def number_value(value: Any, name: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds, or a `RowError`."""
    bounds = f" from {low:g}" if math.isfinite(low) else ""
    bounds += f" to {high:g}" if math.isfinite(high) else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"`{name}` is {_kind(value)}", f"a finite number{bounds}")
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no limit
        raise RowError(f"`{name}` is an integer beyond what a float holds", f"a finite number{bounds}") from None
    if not math.isfinite(number) or not low <= number <= high:
        raise RowError(f"`{name}` is {value}", f"a finite number{bounds}")
    return number


def first_present(values: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of several columns that mean the same and that the row has, or a `RowError`."""
    for name in names:
        if name in values:
            return name, values[name]
    others = f" (or {', '.join(f'`{name}`' for name in names[1:])})" if len(names) > 1 else ""
    raise RowError(f"has no `{names[0]}`", f"rows with `{names[0]}`{others}; this one has {quoted_names(values)}")


def quoted_names(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def _kind(value: Any) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _all_rows(path: str, split: str | None, key: str) -> Iterator[tuple[str, Any]]:
    """Place and content of each row; the content of one that cannot be read is a `RowError`."""
    place = Path(path).expanduser()
    try:
        is_local = place.exists()
    except OSError as error:
        raise BadInput(key, f"'{path}' cannot be read ({error.strerror})", SOURCES) from None
    if is_local:
        if split is not None:
            raise BadInput(key, f"'{path}' is a local path, but a split is given", "a split only for a `datasets` name")
        for file in _files(place, key):
            yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    elif _looks_like_a_file(path):
        raise BadInput(key, f"'{path}' does not exist", SOURCES)
    else:
        yield from _dataset_rows(path, split or "train", key)


def _looks_like_a_file(path: str) -> bool:
    """Anything but `name` or `owner/name`; also what begins with a folder that is here."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", path) is not None
    return not is_name or path.endswith(FILE_SUFFIXES) or ("/" in path and Path(path).parent.is_dir())


def _files(place: Path, key: str) -> list[Path]:
    try:
        files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
    except OSError as error:
        raise BadInput(key, f"'{place}' cannot be read ({error.strerror})", "a readable folder") from None
    known = [file for file in files if file.suffix in FILE_SUFFIXES]
    if not known:
        raise BadInput(key, f"'{place}' is not, and does not hold, a .jsonl or .parquet file", SOURCES)
    return known


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", _json_value(line)
    except OSError as error:
        raise BadInput(str(file), f"cannot be read ({error.strerror})", "a readable file") from None


def _json_value(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if b"\\u" in line:
            # An escape can be half a surrogate pair, which is not a character and no tokenizer takes.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return RowError(f"is not UTF-8 ({error.reason})", "UTF-8 text")
    except UnicodeEncodeError:
        return RowError("has an escape that is half a surrogate pair", "Unicode text")
    except json.JSONDecodeError as error:
        return RowError(f"is not JSON ({error.msg}, column {error.colno})", "one JSON object a line")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets without end
        return RowError(f"is not JSON that can be read ({error})", "one JSON object a line")
    return value


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield f"{file}:row {number}", values
    except (OSError, pyarrow.ArrowException) as error:
        found = " ".join(str(error).split())
        raise BadInput(
            f"{file}:row {number + 1}" if number else str(file), f"cannot be read ({found})", "a Parquet file"
        ) from None


def _dataset_rows(name: str, split: str, key: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # `datasets` lets through whatever its readers and the network raise
        cause = " ".join(str(error).split())
        raise (OutOfReach if isinstance(error, ConnectionError) else BadInput)(
            key,
            f"'{name}' is no local path, and as a `datasets` name its split '{split}' cannot be loaded "
            f"({type(error).__name__}: {cause})",
            SOURCES,
        ) from error
    for number, values in enumerate(rows, start=1):
        yield f"{name}[{split}]:row {number}", dict(values)
