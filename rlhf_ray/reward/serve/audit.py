"""A log from which any score can be replayed, and which shows when it was altered.

One JSON object a line. A line ends with the HMAC-SHA-256 of the previous line's and its own bytes, so that no byte,
line or file between two others can be changed, moved or taken out without the next one being wrong. Each file begins
with a line that names the hash before it; a start of the writer begins a new file, and so does a file that is full.

What that shows depends on who may have had the folder. Without a key (`audit.key_file`) anybody can compute the
hashes, and write a chain anew that is as good as the first: the log shows accidents, and edits by those who don't know
better. With a key, nobody who lacks it can write a line. Neither shows what is not there any more: records taken from
the end of a chain, whole chains, and, where `keep_files` deletes the oldest, the oldest. Those are missed by whoever
has noted the `Head`s of all chains elsewhere; `/v1/service` lists them, and `verify` compares.

A text is kept as the HMAC of the token ids that were scored, each as four bytes, little endian; with `texts: full` as
the ids themselves too. Without a key, whoever can guess a text can see whether it was scored. On a CPU a score depends
on those ids alone, and a replay must find it to the bit.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_ray.config.serving import AuditSettings
from rlhf_ray.failures import BadInput

_FILE_NAME = re.compile(r"(?P<writer>[A-Za-z0-9_#-][A-Za-z0-9._#-]*)-(?P<number>[0-9]{6,})\.jsonl")
_LINE = re.compile(rb'(?P<body>\{.*),"hash":"(?P<hash>[0-9a-f]{64})"\}\n')
_INTACT = "the line that the log wrote"
_SHORTEST_KEY = 16


@dataclass(frozen=True)
class AuditRecord:
    """One score, as the service hands it over.

    Attributes:
        model, version: what scored it.
        token_ids: as scored, special ones included.
        truncated: whether the text was cut to these.
        score: on the raw scale.
        batch_invariant: the mode it was scored in; the other one rounds otherwise.
        caller: who asked; None where the service was open.
    """

    request_id: str
    model: str
    version: str
    token_ids: Sequence[int]
    truncated: bool
    score: float
    batch_invariant: bool
    caller: str | None = None


class Head(BaseModel):
    """How far a chain was, to be kept elsewhere.

    Attributes:
        records: that were written to it since it began.
        hash: of the last one; empty before the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    writer: str
    records: int
    hash: str


def read_key(settings: AuditSettings) -> bytes:
    """The key of the file; empty where there is none.

    Raises:
        BadInput: it cannot be read, or is too short.
    """
    if settings.key_file is None:
        return b""
    try:
        key = Path(settings.key_file).read_bytes().strip()
    except OSError as error:
        raise BadInput("audit.key_file", f"'{settings.key_file}' cannot be read ({error})", "a key file") from None
    if len(key) < _SHORTEST_KEY:
        raise BadInput("audit.key_file", f"a key of {len(key)} bytes", f"at least {_SHORTEST_KEY}")
    return key


def read_heads(path: Path) -> list[Head]:
    """The heads in an answer of `/v1/service` that was kept.

    Raises:
        BadInput: it holds none.
    """
    try:
        return [Head.model_validate(head) for head in json.loads(path.read_bytes())["audit"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(str(path), f"holds no heads ({type(error).__name__})", "an answer of /v1/service") from None


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class _Opening(_Line):
    """First line of a file.

    Attributes:
        first_seq: of the record that comes next.
        previous_hash: last hash of the file before; empty in the very first.
        record_hash: that of the last record before.
    """

    writer: str
    number: int
    first_seq: int
    previous_hash: str
    record_hash: str


class LoggedScore(_Line):
    """A record as it is in the log.

    Attributes:
        seq: counts the writer's records, from 0.
        time: seconds since 1970, when it was written.
        text_hash: see `text_hash`.
        token_ids: None where texts are kept as hashes.
        caller: None where the service was open, and in logs that do not say.
    """

    seq: int
    time: float
    request_id: str
    model: str
    version: str
    text_hash: str
    token_ids: tuple[int, ...] | None = None
    num_tokens: int
    truncated: bool
    score: float
    batch_invariant: bool
    caller: str | None = None


class _Anchor(_Line):
    """Where the chain begins after the files before it were deleted to keep no more than was asked for.

    Attributes:
        record_hash: of the last record before.
    """

    first_number: int
    first_seq: int
    previous_hash: str
    record_hash: str


def text_hash(token_ids: Sequence[int], key: bytes = b"") -> str:
    """HMAC-SHA-256, in hex, of token ids as unsigned 32-bit integers, little endian."""
    return hmac.digest(key, np.asarray(token_ids, dtype="<u4").tobytes(), "sha256").hex()


def _chained(values: Mapping[str, Any], previous_hash: str, key: bytes) -> tuple[bytes, str]:
    """A line, and its hash."""
    body = json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii")[:-1]
    digest = _link(previous_hash, body, key)
    return body + f',"hash":"{digest}"}}\n'.encode("ascii"), digest


def _link(previous_hash: str, body: bytes, key: bytes) -> str:
    return hmac.digest(key, previous_hash.encode("ascii") + b"\n" + body, "sha256").hex()


@dataclass
class _Chain:
    """Follows one writer's chain, line by line.

    Attributes:
        number, seq: of the file and the record that come next.
        hash: of the last line.
        record_hash: of the last record.
    """

    key: bytes
    number: int
    seq: int = 0
    hash: str = ""
    record_hash: str = ""

    def follow(self, line: bytes, place: str) -> tuple[bytes, str]:
        """The body of a line and its hash, which becomes the chain's.

        Raises:
            BadInput: the line is not what was written there.
        """
        match = _LINE.fullmatch(line)
        if match is None:
            if not line.endswith(b"\n"):
                raise BadInput(
                    place, "the line is not complete (the writer was interrupted, or is writing)", "a complete line"
                )
            raise BadInput(place, "the line was altered", _INTACT)
        body, digest = match["body"], match["hash"].decode("ascii")
        if _link(self.hash, body, self.key) != digest:
            raise BadInput(place, f"the hash is wrong: {self._suspicion(body)}", _INTACT)
        self.hash = digest
        return body + b"}", digest

    def open(self, body: bytes, place: str) -> None:
        """Take a file's first line."""
        opening = _parse(_Opening, body, place)
        if (opening.number, opening.first_seq) != (self.number, self.seq):
            raise BadInput(
                place,
                f"file {opening.number} from record {opening.first_seq} on",
                f"file {self.number} from record {self.seq} on; files are missing or were renamed",
            )

    def record(self, body: bytes, place: str) -> LoggedScore:
        """Take a record."""
        record = _parse(LoggedScore, body, place)
        if record.seq != self.seq:
            raise BadInput(place, f"record {record.seq}", f"record {self.seq}")
        self.seq += 1
        self.record_hash = self.hash
        return record

    def _suspicion(self, body: bytes) -> str:
        seq = re.match(rb'\{"seq":([0-9]+),', body)
        if seq is not None and int(seq[1]) != self.seq:
            return f"record {int(seq[1])} stands where {self.seq} was; lines are missing or were moved"
        return "this line was altered, one before it is missing, or the key is another one"


Part = TypeVar("Part", bound=_Line)


def _parse(kind: type[Part], body: bytes, place: str) -> Part:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise BadInput(place, f"is not a line of this log ({error.errors()[0]['msg']})", _INTACT) from None


class AuditLog:
    """Writes one chain. For one thread of one process.

    A file appears with its first line in it, all at once; records are written with one call and not held back, so a
    process that is killed loses at most the end of its last line, which the next start cuts off.

    Args:
        folder: may hold the chains of other writers too.
        settings: what is kept, and how much.
        writer: name of this chain, the same over restarts if it is to go on: letters, digits, `.`, `_`, `-`, `#`, and
            no `.` at its front.

    Raises:
        BadInput: the last file is not as the log left it, or another process writes this chain.
    """

    def __init__(self, folder: Path, settings: AuditSettings, writer: str) -> None:
        if _FILE_NAME.fullmatch(f"{writer}-000001.jsonl") is None:
            raise ValueError(f"'{writer}' cannot name a file of the audit log")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings, self._writer = folder, settings, writer
        self._key = read_key(settings)
        self._lock = _locked(folder / f"{writer}.lock")
        try:
            self._chain = self._recovered()
            self._file, self._size = self._begin()
        except BaseException:
            self._lock.close()
            raise

    @property
    def head(self) -> Head:
        """How far the chain is."""
        return Head(writer=self._writer, records=self._chain.seq, hash=self._chain.record_hash)

    def append(self, records: Sequence[AuditRecord]) -> None:
        """Write records, in their order.

        Raises:
            OSError: they could not be written (the disk is full). The log is closed then; the next start mends it.
            ValueError: a score is not finite, or the log is closed.
        """
        try:
            self._append(records, time.time())
        except BaseException:
            # What is in the file is not what the chain says any more.
            self._file.close()
            self._lock.close()
            raise

    def _append(self, records: Sequence[AuditRecord], now: float) -> None:
        lines: list[bytes] = []
        pending = 0
        for record in records:
            # A file holds one record at least, however long that is.
            if self._size + pending >= self._settings.max_bytes:
                self._write(lines)
                lines, pending = [], 0
                self._file.close()
                self._chain.number += 1
                self._file, self._size = self._begin()
            line, self._chain.hash = _chained(self._values(record, now), self._chain.hash, self._key)
            self._chain.record_hash = self._chain.hash
            self._chain.seq += 1
            lines.append(line)
            pending += len(line)
        self._write(lines)

    def close(self) -> None:
        """Close the file, once it is on the disk."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _values(self, record: AuditRecord, now: float) -> dict[str, Any]:
        ids = {"token_ids": [int(token) for token in record.token_ids]} if self._settings.texts == "full" else {}
        return {
            "seq": self._chain.seq,
            "time": now,
            "request_id": record.request_id,
            "model": record.model,
            "version": record.version,
            "text_hash": text_hash(record.token_ids, self._key),
            **ids,
            "num_tokens": len(record.token_ids),
            "truncated": bool(record.truncated),
            # Written with as many digits as it takes to read the same float64.
            "score": float(record.score),
            "batch_invariant": record.batch_invariant,
            "caller": record.caller,
        }

    def _write(self, lines: Sequence[bytes]) -> None:
        content = b"".join(lines)
        self._size += len(content)
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._writer}-{number:06d}.jsonl"

    def _recovered(self) -> _Chain:
        """Where the chain goes on: behind the last complete line of the last file."""
        numbers = _numbers(self._folder).get(self._writer, [])
        if not numbers:
            return _start(self._folder, self._writer, self._key)
        path = self._path(numbers[-1])
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            # The file's first line was lost with the machine.
            path.unlink()
            return self._recovered()
        lines = whole.splitlines(keepends=True)
        opening = _opening(lines[0], path)
        chain = _Chain(self._key, numbers[-1], opening.first_seq, opening.previous_hash, opening.record_hash)
        for _ in _followed(chain, lines, path):
            pass
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        chain.number += 1
        return chain

    def _begin(self) -> tuple[FileIO, int]:
        """Open the next file."""
        opening = _Opening(
            writer=self._writer,
            number=self._chain.number,
            first_seq=self._chain.seq,
            previous_hash=self._chain.hash,
            record_hash=self._chain.record_hash,
        )
        line, self._chain.hash = _chained(opening.model_dump(), self._chain.hash, self._key)
        path = self._path(self._chain.number)
        _write_whole(path, line)
        self._prune()
        return FileIO(path, "ab"), len(line)

    def _prune(self) -> None:
        """Delete the oldest closed files, after noting where the chain begins now."""
        numbers = _numbers(self._folder)[self._writer]
        surplus = numbers[: -self._settings.keep_files - 1] if self._settings.keep_files else []
        if surplus:
            first = self._path(numbers[len(surplus)])
            with first.open("rb") as file:
                opening = _opening(file.readline(), first)
            anchor = _Anchor(
                first_number=opening.number,
                first_seq=opening.first_seq,
                previous_hash=opening.previous_hash,
                record_hash=opening.record_hash,
            )
            line, _ = _chained(anchor.model_dump(), self._writer, self._key)
            _write_whole(self._folder / f"{self._writer}.anchor.json", line)
        for number in surplus:
            self._path(number).unlink()


def _opening(line: bytes, path: Path) -> _Opening:
    """A file's first line, taken at its word."""
    return _parse(_Opening, line.rpartition(b',"hash"')[0] + b"}", f"{path}:1")


def _locked(path: Path) -> FileIO:
    """A file that only one process holds."""
    file = FileIO(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BadInput(str(path), "another process writes this chain", "a writer's name of its own") from None
    return file


def _write_whole(path: Path, content: bytes) -> None:
    """A file that is there with all its content, or not at all."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _numbers(folder: Path) -> dict[str, list[int]]:
    """The files of each writer, in order."""
    found: dict[str, list[int]] = defaultdict(list)
    for path in folder.glob("*.jsonl"):
        match = _FILE_NAME.fullmatch(path.name)
        if match is not None:
            found[match["writer"]].append(int(match["number"]))
    return {writer: sorted(numbers) for writer, numbers in sorted(found.items())}


def _start(folder: Path, writer: str, key: bytes) -> _Chain:
    """Where the chain begins: at the anchor, or with nothing before it."""
    path = folder / f"{writer}.anchor.json"
    if not path.is_file():
        return _Chain(key, 1)
    body, _ = _Chain(key, 0, hash=writer).follow(path.read_bytes(), f"{path}:1")
    anchor = _parse(_Anchor, body, f"{path}:1")
    return _Chain(key, anchor.first_number, anchor.first_seq, anchor.previous_hash, anchor.record_hash)


def _followed(chain: _Chain, lines: Sequence[bytes], path: Path) -> Iterator[LoggedScore]:
    """The records of one file, each verified before it is handed out."""
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        body, _ = chain.follow(line, place)
        if number == 1:
            chain.open(body, place)
        else:
            yield chain.record(body, place)


@dataclass(frozen=True)
class VerifiedWriter:
    """One chain without a fault.

    Attributes:
        first_seq: of the first record that is kept; above 0 where older files were deleted as the settings ask.
        num_records: that are kept.
        last_hash: of its last line.
    """

    writer: str
    num_files: int
    first_seq: int
    num_records: int
    last_hash: str


@dataclass(frozen=True)
class VerifiedLog:
    """All chains of a folder."""

    writers: tuple[VerifiedWriter, ...]

    @property
    def num_records(self) -> int:
        """Of all chains."""
        return sum(writer.num_records for writer in self.writers)


def verify(folder: Path, key: bytes = b"", heads: Sequence[Head] = ()) -> VerifiedLog:
    """Follow every chain of a folder from its first line to its last.

    Args:
        heads: that were noted elsewhere, of the chains of this folder: each must have got at least so far.

    Raises:
        BadInput: naming the file and line where something was altered, is missing or was moved.
    """
    verified: list[VerifiedWriter] = []
    for writer, numbers in _chains(folder, heads).items():
        chain = _start(folder, writer, key)
        first_number, first_seq = chain.number, chain.seq
        for _ in _chain_records(folder, writer, numbers, chain, heads):
            pass
        verified.append(
            VerifiedWriter(writer, chain.number - first_number, first_seq, chain.seq - first_seq, chain.hash)
        )
    if not verified:
        raise BadInput(str(folder), "there is no file of an audit log", "the folder that the service logs to")
    return VerifiedLog(tuple(verified))


def verified_records(folder: Path, key: bytes = b"", heads: Sequence[Head] = ()) -> Iterator[tuple[str, LoggedScore]]:
    """Every record of every chain with its place (`file:line`), verified up to itself; the heads at the end of each
    chain.

    Raises:
        BadInput: as `verify`.
    """
    for writer, numbers in _chains(folder, heads).items():
        yield from _chain_records(folder, writer, numbers, _start(folder, writer, key), heads)


def _chains(folder: Path, heads: Sequence[Head]) -> dict[str, list[int]]:
    chains = _numbers(folder)
    if lost := sorted({head.writer for head in heads} - chains.keys()):
        raise BadInput(str(folder), f"nothing of the chain '{lost[0]}'", "the chains whose heads were noted")
    return chains


def _chain_records(
    folder: Path, writer: str, numbers: Sequence[int], chain: _Chain, heads: Sequence[Head]
) -> Iterator[tuple[str, LoggedScore]]:
    # What was deleted to keep no more than was asked for cannot be compared any more.
    noted = {(head.records, head.hash) for head in heads if head.writer == writer and head.records >= chain.seq}
    noted.discard((chain.seq, chain.record_hash))
    # A file before the anchor was to be deleted, and the process ended first.
    for number in (each for each in numbers if each >= chain.number):
        path = folder / f"{writer}-{number:06d}.jsonl"
        if number != chain.number:
            raise BadInput(f"{path}:1", f"file {number} of '{writer}'", f"file {chain.number}, which is missing")
        lines = path.read_bytes().splitlines(keepends=True)
        if not lines:
            raise BadInput(f"{path}:1", "the file is empty", _INTACT)
        for line_number, record in enumerate(_followed(chain, lines, path), start=2):
            noted.discard((chain.seq, chain.record_hash))
            yield f"{path}:{line_number}", record
        chain.number += 1
    if noted:
        records = min(noted)[0]
        where = str(folder / f"{writer}-*.jsonl")
        raise BadInput(where, f"{chain.seq} records, or other ones", f"the {records} that were noted, and more")
