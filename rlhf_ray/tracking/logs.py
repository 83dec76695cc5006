"""`metrics.jsonl` and `events.jsonl`: one JSON object a line, on disk as it happens.

Each line is appended by one write to a file opened for that write, so that what was logged survives whatever
happens next. A crash can leave half a line at the end: readers pass it over, writers remove it before
they append, or the next line would be lost with it.

JSON has no NaN and no infinity. Such a number is written as `null`, and an event says which metric it was.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname

from rlhf_ray.failures import BadInput, FailureKind, RoleFailure
from rlhf_ray.tracking.run_folder import write_atomic

Scalar = float | int | str | bool | None
Row = dict[str, Scalar]


class EventLog:
    """Starts, stops, deaths, restarts, checkpoints, each with role, node and cause.

    Args:
        path: the file; made with the first event.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        drop_torn_line(path)
        self._counts = Counter(str(row["kind"]) for row in read_log(path))

    def count(self, kind: str) -> int:
        """How often something has happened since the run's first start."""
        return self._counts[kind]

    def write(
        self,
        kind: str,
        *,
        role: str | None = None,
        node: str | None = None,
        cause: str | None = None,
        **details: object,
    ) -> None:
        """Append one event with the time in UTC.

        Args:
            kind: what happened, `checkpoint_saved`.
            role: role and replica, `generator-1`.
            node: address of the node.
            cause: one line.
            details: anything else that JSON can hold; other objects are written as their text, because an
                event often tells of a failure and must not fail itself.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_row(self.path, {**details, "time": now, "kind": kind, "role": role, "node": node, "cause": cause})
        self._counts[kind] += 1


class MetricsLog:
    """One row a step.

    Args:
        path: the file; made with the first row.
        events: where a metric that is not a finite number is reported.
    """

    def __init__(self, path: Path, events: EventLog) -> None:
        self._path, self._events = path, events
        drop_torn_line(path)

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Append one step's metrics. NaN and infinities become `null` and an event `metric_not_finite`."""
        broken = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        append_row(self._path, row)
        for name in broken:
            self._events.write("metric_not_finite", cause=f"{name} is {row[name]}", metric=name, step=row.get("step"))

    def read(self) -> list[Row]:
        """All rows so far."""
        return read_log(self._path)


def read_log(path: Path) -> list[Row]:
    """Read a log, also while it is written or after a crash. A missing file is an empty log.

    Raises:
        BadInput: a line other than a torn last one is not a JSON object.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            raise BadInput(f"{path}:{number}", "is not a JSON object", "one JSON object a line")
        rows.append(row)
    return rows


def truncate_after(path: Path, step: int) -> int:
    """Drop the rows of steps after `step`, which a resume from its checkpoint does again.

    Args:
        path: a log whose rows have a `step`.

    Returns:
        How many rows were dropped.
    """
    rows = read_log(path)
    kept = [row for row in rows if int(row["step"] or 0) <= step]
    if len(kept) < len(rows):
        write_atomic(path, "".join(_line(row) for row in kept))
    return len(rows) - len(kept)


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Append one object to a log, by one write.

    Raises:
        RoleFailure: the disk is full, or not there any more.
    """
    try:
        with path.open("ab") as file:
            file.write(_line(row).encode("utf-8"))
    except OSError as error:
        cause = f"{path} cannot be written ({error.strerror}); make room, and continue with --resume"
        raise RoleFailure(FailureKind.FATAL, "driver", gethostname(), cause, guard="disk") from None


def _line(row: Mapping[str, object]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _finite(value: object) -> object:
    """The same with `None` in place of floats that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def drop_torn_line(path: Path) -> None:
    """Remove the half line that a crash may have left at a log's end; a writer calls it before it appends."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
            os.fsync(file.fileno())
