"""Scores of the audit log, computed again and compared to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.chat import parse_messages
from rlhf_ray.data.rows import NoBadRows, RowError, first_present, read_rows, text_value
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.serve.audit import Head, LoggedScore, text_hash, verified_records

_SCORED_TOGETHER = 256


@dataclass(frozen=True)
class Difference:
    """A score that came out otherwise.

    Attributes:
        place: `file:line` of the record.
        replayed: NaN where the text has no score now.
    """

    place: str
    request_id: str
    caller: str | None
    logged: float
    replayed: float


@dataclass(frozen=True)
class NotReplayed:
    """A record that could not be scored again, and why."""

    place: str
    request_id: str
    caller: str | None
    cause: str


@dataclass(frozen=True)
class ReplayReport:
    """What a replay found.

    Attributes:
        num_equal: records whose score came out equal to the bit.
    """

    num_equal: int
    differences: tuple[Difference, ...]
    not_replayed: tuple[NotReplayed, ...]

    @property
    def exact(self) -> bool:
        """Whether every record was scored again and came out equal."""
        return not self.differences and not self.not_replayed


def replay(
    folder: Path,
    scorers: Mapping[str, RewardScorer],
    *,
    texts: str | None = None,
    key: bytes = b"",
    heads: Sequence[Head] = (),
) -> ReplayReport:
    """Verify the log and score its records again.

    Args:
        scorers: by version, in the mode that the service scored in.
        texts: file of rows with `text` (and `templated`, where a chat template has written the special tokens), or
            `messages`; needed where the log keeps texts as hashes. A text that a request had cut to fewer tokens than
            the model takes is not found by its whole.
        key, heads: as of `verify`.

    Raises:
        BadInput: the log is not intact or has no records, or the file of texts cannot be read.
    """
    known = {version: _by_hash(scorer.texts, texts, key) for version, scorer in scorers.items()} if texts else {}
    waiting: dict[str, list[tuple[str, LoggedScore, Sequence[int]]]] = defaultdict(list)
    equal = 0
    differences: list[Difference] = []
    not_replayed: list[NotReplayed] = []

    def score(version: str) -> None:
        nonlocal equal
        entries = waiting.pop(version)
        scores = scorers[version].score_tokens([token_ids for _, _, token_ids in entries]).scores
        for (place, record, _), found in zip(entries, scores.tolist(), strict=True):
            if record.score.hex() == found.hex():
                equal += 1
            else:
                differences.append(Difference(place, record.request_id, record.caller, record.score, found))

    def leave_out(place: str, record: LoggedScore, cause: str) -> None:
        not_replayed.append(NotReplayed(place, record.request_id, record.caller, cause))

    for place, record in verified_records(folder, key, heads):
        token_ids = record.token_ids or known.get(record.version, {}).get(record.text_hash)
        if record.version not in scorers:
            leave_out(place, record, f"no model of version {record.version}")
        elif record.batch_invariant != scorers[record.version].batch_invariant:
            cause = f"scored with batch_invariant {str(record.batch_invariant).lower()}, unlike the configuration"
            leave_out(place, record, cause)
        elif token_ids is None:
            leave_out(place, record, "the text is not known")
        elif text_hash(token_ids, key) != record.text_hash:
            raise BadInput(place, "the token ids are not those of text_hash", "a record that the service wrote")
        else:
            waiting[record.version].append((place, record, token_ids))
            if len(waiting[record.version]) == _SCORED_TOGETHER:
                score(record.version)
    for version in list(waiting):
        score(version)
    if not (equal or differences or not_replayed):
        raise BadInput(str(folder), "no record", "a folder of which there are scores")
    return ReplayReport(equal, tuple(differences), tuple(not_replayed))


def _by_hash(encoding: RewardTexts, texts: str, key: bytes) -> dict[str, list[int]]:
    encoded = (token_ids for token_ids, _ in _encoded(encoding, texts))
    return {text_hash(token_ids, key): token_ids for token_ids in encoded}


def _encoded(encoding: RewardTexts, texts: str) -> Iterator[Encoded]:
    bad_rows = NoBadRows("texts")
    for row in read_rows(texts, bad_rows, split=None, limit=None, key="texts"):
        try:
            name, value = first_present(row.values, ("text", "messages"))
            if name == "messages":
                yield encoding.encode_messages(parse_messages(value, name))
            else:
                yield encoding.encode(text_value(value, name), templated=bool(row.values.get("templated", False)))
        except RowError as problem:
            bad_rows.add(row.place, problem)
