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
    """Normalised texts of pairs as 64-bit hashes, uint64.

    Two texts of a million meet by chance with a probability of 3e-8.

    Attributes:
        places: of the pairs.
        pairs: `[P, 1]`, of the two whole texts, in whatever order.
        texts: `[P, 2]`, of the chosen and the rejected whole text, prompt + response.
        responses: `[P, 2]`, of these alone.
        prompts: `[P, 1]`; 0 where it is empty.
    """

    places: tuple[str, ...]
    pairs: NDArray[np.uint64]
    texts: NDArray[np.uint64]
    responses: NDArray[np.uint64]
    prompts: NDArray[np.uint64]

    @property
    def same(self) -> NDArray[np.bool_]:
        """`[P]`: both texts are the same."""
        return self.texts[:, 0] == self.texts[:, 1]


@dataclass(frozen=True, eq=False)
class TrainingTexts:
    """What a reward model was trained on or chosen by, as sorted hashes without repeats, uint64."""

    pairs: NDArray[np.uint64]
    texts: NDArray[np.uint64]
    responses: NDArray[np.uint64]
    prompts: NDArray[np.uint64]

    @classmethod
    def of(cls, *sets: PairHashes | TrainingTexts) -> TrainingTexts:
        """Of the training pairs, and of the validation pairs that the best model was chosen by, if any; or of what was
        recorded of such sets before."""

        def union(name: str) -> NDArray[np.uint64]:
            found = np.unique(np.concatenate([getattr(hashes, name).ravel() for hashes in sets]))
            return found[found != 0]

        return cls(*map(union, cls.__annotations__))

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
            **{
                name: find(hashes.places, np.any(np.isin(getattr(hashes, name), known), axis=1))
                for name, known in vars(self).items()
            }
        )


def hash_pairs(pairs: Sequence[PreferencePair]) -> PairHashes:
    """Pairs as hashes of their texts."""
    prompts = _hash_texts(pair.prompt for pair in pairs)
    prompts[np.array([not pair.prompt.strip() for pair in pairs], dtype=bool)] = 0
    texts = _hash_texts(pair.prompt + response for pair in pairs for response in (pair.chosen, pair.rejected))
    texts = texts.reshape(-1, 2)
    both = np.sort(texts, axis=1).astype("<u8")
    return PairHashes(
        places=tuple(pair.place for pair in pairs),
        pairs=np.array([[_hash(row.tobytes())] for row in both], dtype=np.uint64).reshape(-1, 1),
        texts=texts,
        responses=_hash_texts(text for pair in pairs for text in (pair.chosen, pair.rejected)).reshape(-1, 2),
        prompts=prompts[:, None],
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
