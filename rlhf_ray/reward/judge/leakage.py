"""Whether pairs of an evaluation were in a reward model's training data, or in what it was chosen by.

Hashes of those texts stay with the model, so leakage can be found long after, without the data. Texts count
as the same when they differ only in Unicode form, case or white space.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.preferences import PreferencePair
from rlhf_ray.failures import BadInput

TRAINING_TEXTS_NAME = "training_texts.npz"
NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Matches:
    """Pairs of which something is true.

    Attributes:
        count: of such pairs.
        share: of all pairs, from 0 to 1.
        examples: places of the first few.
    """

    count: int
    share: float
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Leakage:
    """Pairs that were in other data, most often in training, by how much of them was.

    Attributes:
        pairs: both whole texts (prompt + response) were one training pair, in either order.
        texts: at least one whole text was in training.
        responses: at least one response was, under whatever prompt.
        prompts: the prompt was.
    """

    pairs: Matches
    texts: Matches
    responses: Matches
    prompts: Matches


@dataclass(frozen=True, eq=False)
class PairHashes:
    """Normalised texts of pairs as 64-bit hashes, each `[P]` uint64.

    Two texts of a million meet by chance with a probability of 3e-8.

    Attributes:
        places: of the pairs.
        pairs: of the two whole texts, in whatever order.
        chosen, rejected: of the whole texts, prompt + response.
        chosen_responses, rejected_responses, prompts: of these alone; a prompt that is empty is 0.
    """

    places: tuple[str, ...]
    pairs: NDArray[np.uint64]
    chosen: NDArray[np.uint64]
    rejected: NDArray[np.uint64]
    chosen_responses: NDArray[np.uint64]
    rejected_responses: NDArray[np.uint64]
    prompts: NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TrainingTexts:
    """What a reward model was trained on or chosen by, as sorted hashes without repeats, uint64."""

    pairs: NDArray[np.uint64]
    texts: NDArray[np.uint64]
    responses: NDArray[np.uint64]
    prompts: NDArray[np.uint64]

    @classmethod
    def of(cls, *sets: PairHashes) -> TrainingTexts:
        """Of the training pairs, and of the validation pairs that the best model was chosen by, if any."""

        def union(*names: str) -> NDArray[np.uint64]:
            return np.unique(np.concatenate([getattr(hashes, name) for hashes in sets for name in names]))

        prompts = union("prompts")
        return cls(
            pairs=union("pairs"),
            texts=union("chosen", "rejected"),
            responses=union("chosen_responses", "rejected_responses"),
            prompts=prompts[prompts != 0],
        )

    def save(self, folder: Path) -> None:
        """Write `training_texts.npz` into the model's folder."""
        np.savez(folder / TRAINING_TEXTS_NAME, **vars(self))

    @classmethod
    def load(cls, model: str, key: str) -> TrainingTexts | None:
        """The hashes in a model's folder; none for a model that was trained elsewhere.

        Raises:
            BadInput: there is a file that cannot be read.
        """
        path = Path(model) / TRAINING_TEXTS_NAME
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                return cls(**{name: arrays[name].astype(np.uint64, casting="safe") for name in cls.__annotations__})
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise BadInput(key, f"'{path}' cannot be read ({error})", "the file that train-rm wrote") from None

    def leakage(self, hashes: PairHashes) -> Leakage:
        """How many of these pairs were in training."""
        return Leakage(
            pairs=find(hashes.places, np.isin(hashes.pairs, self.pairs)),
            texts=find(hashes.places, np.isin(hashes.chosen, self.texts) | np.isin(hashes.rejected, self.texts)),
            responses=find(
                hashes.places,
                np.isin(hashes.chosen_responses, self.responses) | np.isin(hashes.rejected_responses, self.responses),
            ),
            prompts=find(hashes.places, np.isin(hashes.prompts, self.prompts)),
        )


def hash_pairs(pairs: Sequence[PreferencePair]) -> PairHashes:
    """Pairs as hashes of their texts."""
    chosen = _hash_texts(pair.prompt + pair.chosen for pair in pairs)
    rejected = _hash_texts(pair.prompt + pair.rejected for pair in pairs)
    prompts = _hash_texts(pair.prompt for pair in pairs)
    prompts[np.array([not pair.prompt.strip() for pair in pairs], dtype=bool)] = 0
    both = np.stack([np.minimum(chosen, rejected), np.maximum(chosen, rejected)], axis=1).astype("<u8")
    return PairHashes(
        places=tuple(pair.place for pair in pairs),
        pairs=np.array([_hash(row.tobytes()) for row in both], dtype=np.uint64),
        chosen=chosen,
        rejected=rejected,
        chosen_responses=_hash_texts(pair.chosen for pair in pairs),
        rejected_responses=_hash_texts(pair.rejected for pair in pairs),
        prompts=prompts,
    )


def find(places: Sequence[str], found: NDArray[np.bool_]) -> Matches:
    """The pairs that a mask `[P]` picks out."""
    count = int(found.sum())
    return Matches(count, count / len(places), tuple(places[index] for index in np.flatnonzero(found)[:NUM_EXAMPLES]))


def normalised(text: str) -> str:
    """A text without what is no difference between texts: Unicode form (NFKC), case and white space.

    White space goes altogether, so that a text is the same whether or not its prompt was split off, and where.
    """
    return "".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _hash_texts(texts: Iterable[str]) -> NDArray[np.uint64]:
    return np.fromiter((_hash(normalised(text).encode()) for text in texts), np.uint64)
