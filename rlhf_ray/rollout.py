"""A `Rollout` is one shard of sampled responses: the rows that every role reads and none changes.

Written once, by one generator, into the object store. Arrays are NumPy, flat and unpadded, because Ray
hands such arrays to every reader on the node without copying. What other roles have to say about the rows
is a *column*: an object of its own with one entry a response token (`[R]`) or one a sample (`[B]`).

The driver only ever moves references. `refuse_rollouts_in_this_process` makes that a rule: a process that
called it cannot unpickle a rollout or a column, so a stray `ray.get` fails at once and with this reason.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FINISH_STOP = 0
"""The response ended with an end-of-sequence token."""
FINISH_LENGTH = 1
"""The response was cut off at the token limit."""

MAX_CAUSES = 8
"""Different causes of failure in one header."""

_refuse = False


class RolloutFetchedByDriver(RuntimeError):
    """A process that may only hold references tried to read the rows behind one."""


def refuse_rollouts_in_this_process(refuse: bool = True) -> None:
    """From now on this process cannot unpickle a rollout or a column. The driver calls it once."""
    global _refuse
    _refuse = refuse


class Shipped(ABC):
    """Base of everything that travels between roles through the object store."""

    @abstractmethod
    def header(self) -> Any:
        """What the driver may know of it."""

    def __setstate__(self, state: Any) -> None:
        if _refuse:
            raise RolloutFetchedByDriver(
                f"this process holds references only, but fetched a {type(self).__name__}; "
                "let a role read it, or put what the driver needs into the header"
            )
        self.__dict__.update(state)


@dataclass(frozen=True)
class Rollout(Shipped):
    """One shard of sampled responses. `B` samples, `T` tokens in all, `R` of them response tokens.

    Attributes:
        tokens: `[T]` int32. Prompt and response of sample 0, then of sample 1, and so on.
        prompt_lengths: `[B]` int32.
        response_lengths: `[B]` int32, each at least 1.
        logprobs: `[R]` float32, log-probability of each response token under the policy that sampled it
            and at the sampling temperature (the behaviour policy, as the engine computed it).
        policy_versions: `[R]` int32, the version of the weights that produced each response token.
        finish_reasons: `[B]` int8, `FINISH_STOP` or `FINISH_LENGTH`.
        sample_ids: `[B]` int64, unique in a run: `prompt_id * samples_per_prompt + sample`.
        prompt_ids: `[B]` int64, the prompt's draw in the run; samples of one prompt form a group.
        loss_mask: `[R]` bool, true for tokens that the policy sampled, at least one in each response. The others (of
            tools, of other speakers) weigh 0 everywhere: their log-probs and columns may be any number. None: it
            sampled all of them.
    """

    tokens: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    response_lengths: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    policy_versions: NDArray[np.int32]
    finish_reasons: NDArray[np.int8]
    sample_ids: NDArray[np.int64]
    prompt_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        num_samples = len(self.prompt_lengths)
        expected = {
            "tokens": int(self.prompt_lengths.sum() + self.response_lengths.sum()),
            "response_lengths": num_samples,
            "logprobs": int(self.response_lengths.sum()),
            "policy_versions": int(self.response_lengths.sum()),
            "finish_reasons": num_samples,
            "sample_ids": num_samples,
            "prompt_ids": num_samples,
        }
        if self.loss_mask is not None:
            expected["loss_mask"] = expected["logprobs"]
        for name, length in expected.items():
            found = getattr(self, name).shape
            if found != (length,):
                raise ValueError(f"Rollout.{name} has shape {found}, expected ({length},)")
        if num_samples and int(self.response_lengths.min()) < 1:
            raise ValueError("Rollout.response_lengths: every response has at least one token")
        if self.loss_mask is None:
            return
        if self.loss_mask.dtype != np.bool_:
            raise ValueError(f"Rollout.loss_mask is {self.loss_mask.dtype}, expected bool")
        if num_samples and not np.logical_or.reduceat(self.loss_mask, self.response_starts()[:-1]).all():
            raise ValueError("Rollout.loss_mask: the policy sampled at least one token of every response")

    @property
    def num_samples(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """`[B]` tokens of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    def token_starts(self) -> NDArray[np.int64]:
        """`[B + 1]` where each sample's tokens start in `tokens`."""
        return offsets(self.lengths)

    def response_starts(self) -> NDArray[np.int64]:
        """`[B + 1]` where each sample's response starts in the `[R]` arrays."""
        return offsets(self.response_lengths)

    def sampled(self) -> NDArray[np.bool_]:
        """`[R]` true for tokens that the policy sampled: the loss mask, whether there is one or not."""
        return np.ones(len(self.logprobs), dtype=bool) if self.loss_mask is None else self.loss_mask

    def sample_tokens(self, index: int) -> NDArray[np.int32]:
        """Prompt and response of one sample."""
        starts = self.token_starts()
        return self.tokens[starts[index] : starts[index + 1]]

    @classmethod
    def gathered(cls, rollouts: Sequence[Rollout], samples: Sequence[Sequence[int]]) -> Rollout:
        """Some samples of several shards as one shard.

        Args:
            rollouts: at least one.
            samples: places of the samples to take, at least one, of each rollout.
        """
        masked = any(rollout.loss_mask is not None for rollout in rollouts)
        parts = [rollout._of_samples(places, masked) for rollout, places in zip(rollouts, samples, strict=True)]
        present = [name for name, array in vars(parts[0]).items() if array is not None]
        return cls(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in present})

    def _of_samples(self, places: Sequence[int], masked: bool) -> Rollout:
        chosen = np.array(places)
        tokens, response_tokens = _entries(self.lengths, chosen), _entries(self.response_lengths, chosen)
        return Rollout(
            tokens=self.tokens[tokens],
            prompt_lengths=self.prompt_lengths[chosen],
            response_lengths=self.response_lengths[chosen],
            logprobs=self.logprobs[response_tokens],
            policy_versions=self.policy_versions[response_tokens],
            finish_reasons=self.finish_reasons[chosen],
            sample_ids=self.sample_ids[chosen],
            prompt_ids=self.prompt_ids[chosen],
            loss_mask=self.sampled()[response_tokens] if masked else None,
        )

    def header(self) -> RolloutHeader:
        """What the driver may know of these rows."""
        versions = self.policy_versions if self.loss_mask is None else self.policy_versions[self.loss_mask]
        return RolloutHeader(
            num_samples=self.num_samples,
            num_response_tokens=len(self.logprobs),
            num_sampled_tokens=len(versions),
            version_min=int(versions.min()),
            version_max=int(versions.max()),
            version_sum=int(versions.astype(np.int64).sum()),
            digest=self.digest(),
        )

    def write(self, path: Path) -> None:
        """Into a file, for a checkpoint."""
        with path.open("wb") as file:
            np.savez(file, **{name: array for name, array in vars(self).items() if array is not None})

    @classmethod
    def read(cls, path: Path) -> Rollout:
        """What `write` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**arrays)

    def digest(self) -> str:
        """Hash of the tokens, their log-probs and the loss mask: equal for shards that are equal bit-for-bit."""
        state = hashlib.blake2b(digest_size=8)
        arrays = (self.tokens, self.prompt_lengths, self.response_lengths, self.logprobs, self.finish_reasons)
        for array in arrays if self.loss_mask is None else (*arrays, self.loss_mask):
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class RolloutHeader:
    """Counts and versions of one shard; the only part of a rollout that reaches the driver.

    Attributes:
        num_sampled_tokens: response tokens that the policy sampled; versions are those of these.
        digest: see `Rollout.digest`.
    """

    num_samples: int
    num_response_tokens: int
    num_sampled_tokens: int
    version_min: int
    version_max: int
    version_sum: int
    digest: str


@dataclass(frozen=True)
class TokenColumn(Shipped):
    """One float a response token, in the order of `Rollout.logprobs`: log-probs or values.

    Attributes:
        data: `[R]` float32.
    """

    data: NDArray[np.float32]

    def header(self) -> int:
        """How many tokens it has."""
        return len(self.data)


@dataclass(frozen=True)
class TrunkColumn(Shipped):
    """Hidden states behind the layers that are never trained, for every token of a rollout (`models/trunk.py`).

    Attributes:
        data: `[T, H]` in the order of `Rollout.tokens`; float32, or the bits of bfloat16 as uint16.
        dtype: by torch's name.
    """

    data: NDArray[Any]
    dtype: str

    def header(self) -> int:
        """How many tokens it has."""
        return len(self.data)


@dataclass(frozen=True)
class ProbeColumn(Shipped):
    """The learner's log-probs of the fixed tokens that a sync is verified with.

    Attributes:
        data: `[N]` float32, at temperature 1.
        dtype: the learner's compute type, by torch's name.
    """

    data: NDArray[np.float32]
    dtype: str

    def header(self) -> int:
        """How many tokens it has."""
        return len(self.data)


@dataclass(frozen=True)
class RewardColumn(Shipped):
    """One score a sample, or the cause why there is none. A failure is never a number.

    Attributes:
        scores: `[B]` float64; meaningless where `failures` names a cause (NaN there).
        failures: `[B]` empty string where the score is good, else the cause.
        version: version of the reward model.
        num_truncated: how many texts were longer than the model's maximum and were cut.
        disagreement: `[B]` standard deviation over the members of an ensemble; None where there is one judge only.
        time_s: how long the scorer took.
    """

    scores: NDArray[np.float64]
    failures: tuple[str, ...]
    version: str
    num_truncated: int = 0
    disagreement: NDArray[np.float64] | None = None
    time_s: float = 0.0

    def __post_init__(self) -> None:
        if len(self.failures) != len(self.scores):
            raise ValueError(f"{len(self.scores)} scores but {len(self.failures)} failure causes")
        if not np.isfinite(self.scores[self.ok]).all():
            raise ValueError("a score that is not finite must be given as a failure with its cause")

    @property
    def ok(self) -> NDArray[np.bool_]:
        """`[B]` true where there is a score."""
        return np.array([not cause for cause in self.failures], dtype=bool)

    @classmethod
    def gathered(cls, columns: Sequence[RewardColumn], samples: Sequence[Sequence[int]]) -> RewardColumn:
        """What these columns say of some samples; arguments as for `Rollout.gathered`."""
        pairs = [(column, place) for column, places in zip(columns, samples, strict=True) for place in places]
        return cls(
            np.array([column.scores[place] for column, place in pairs], dtype=np.float64),
            tuple(column.failures[place] for column, place in pairs),
            ", ".join(dict.fromkeys(column.version for column in columns)),
        )

    def header(self) -> RewardHeader:
        return RewardHeader(
            scores=np.where(self.ok, self.scores, np.nan),
            disagreement_sum=None if self.disagreement is None else float(self.disagreement[self.ok].sum()),
            num_truncated=self.num_truncated,
            failure_causes=self._causes(),
            version=self.version,
            time_s=self.time_s,
        )

    def _causes(self) -> dict[str, int]:
        """How often each cause occurred; where there are many, the rarest together, because a header is small."""
        counted = Counter(cause for cause in self.failures if cause)
        causes = dict(counted.most_common(MAX_CAUSES))
        others = counted.total() - sum(causes.values())
        return causes | ({"other causes": others} if others else {})


def weighted_sum(columns: Sequence[RewardColumn], names: Sequence[str], weights: Sequence[float]) -> RewardColumn:
    """One column of the columns of several sources: each sample's scores, times their weights, added.

    A sample that one source could not score has no score, and its cause names the source.

    Args:
        columns: of the same shard.
        names, weights: of their sources.
    """
    scores = weighted_scores([column.scores for column in columns], weights)
    failures = []
    for place, causes in enumerate(zip(*(column.failures for column in columns), strict=True)):
        cause = "; ".join(f"{name}: {cause}" for name, cause in zip(names, causes, strict=True) if cause)
        failures.append(cause or ("" if np.isfinite(scores[place]) else f"the weighted sum is {scores[place]}"))
    version = ", ".join(f"{name} {column.version}" for name, column in zip(names, columns, strict=True))
    truncated = sum(column.num_truncated for column in columns)
    return RewardColumn(
        np.where([not cause for cause in failures], scores, np.nan), tuple(failures), version, truncated
    )


def weighted_scores(scores: Sequence[NDArray[np.float64]], weights: Sequence[float]) -> NDArray[np.float64]:
    """`[B]` the sum over sources of weight times score; not finite where a score is not, or the sum is too large.

    Args:
        scores: `[B]` of each source.
        weights: of the sources.
    """
    total = np.zeros(len(scores[0]))
    with np.errstate(over="ignore", invalid="ignore"):
        for weight, each in zip(weights, scores, strict=True):
            total += weight * each
    return total


@dataclass(frozen=True)
class RewardHeader:
    """What the driver may know of one shard's scores: one number for each sample, none for a token.

    Attributes:
        scores: `[B]` float64, NaN where there is none.
    """

    scores: NDArray[np.float64]
    disagreement_sum: float | None
    num_truncated: int
    failure_causes: dict[str, int]
    version: str
    time_s: float


IdRanges = tuple[tuple[int, int], ...]
"""Ids as (first, last), both included; one that occurs twice is in two of them."""


def id_ranges(ids: NDArray[np.integer[Any]]) -> IdRanges:
    """Ids in any order as ranges."""
    ordered = np.sort(ids)
    if not len(ordered):
        return ()
    ends = np.flatnonzero(np.diff(ordered) != 1)
    return tuple(zip(ordered[[0, *(ends + 1)]].tolist(), ordered[[*ends, -1]].tolist(), strict=True))


def ids_in(ranges: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """The ids of ranges, in their order."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(first, last + 1) for first, last in ranges)])


@dataclass(frozen=True)
class SampleUse:
    """What a learner's rank did with the samples of a step, by their ids. Each is in exactly one of the four.

    Attributes:
        trained: had a part in the policy's loss.
        failed: had no score.
        masked: were cut off, and left out for it (`algorithm.mask_truncated`).
        uniform: in groups whose scores are all equal, and left out for it (`algorithm.drop_uniform_groups`).
    """

    trained: IdRanges
    failed: IdRanges = ()
    masked: IdRanges = ()
    uniform: IdRanges = ()


def offsets(lengths: NDArray[np.integer[Any]] | Sequence[int]) -> NDArray[np.int64]:
    """`[n + 1]` starts of consecutive segments, with the total at the end."""
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def _entries(lengths: NDArray[np.integer[Any]], chosen: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Where the entries of some segments are in flat data."""
    starts = offsets(lengths)
    return np.concatenate([np.arange(starts[place], starts[place + 1]) for place in chosen])
