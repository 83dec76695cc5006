"""The card of a reward model: what must be the same in training, scoring and serving, and what is known of it.

`reward_model.json` lies beside the weights. Whoever reads the directory without it gets the raw logits of a
classifier; the card says what each of them is, how they become one score, and whether the model was released.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from rlhf_ray.config.reward_model import PREFERENCE
from rlhf_ray.reward.core.beside_weights import BesideWeights
from rlhf_ray.reward.core.ensemble import (
    MemberScale,
    aggregate_attributes,
    aggregate_members,
    centre_within_groups,
    disagreement,
    standardise,
)

CARD_NAME = "reward_model.json"
_FIXED_AFTER_SCORING = {"version", "evaluation", "released", "refusals", "temperature", "covers_tokenizer"}
"""Fields that say something about the scores and do not change them."""
_WEIGHTS = ("config.json", "*.safetensors")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MemberLayout(_Part):
    """What the labels of the heads mean.

    Attributes:
        attributes: names; label `a * heads + h` of each model is attribute a as head h judges it.
        heads: members of the ensemble on one trunk.
        folders: a model each, relative to the card's; the members of all models are counted one after another.
    """

    attributes: tuple[str, ...] = (PREFERENCE,)
    heads: int = 1
    folders: tuple[str, ...] = (".",)

    @property
    def num_labels(self) -> int:
        """Of each model's head."""
        return len(self.attributes) * self.heads

    @property
    def num_members(self) -> int:
        """Of the whole ensemble."""
        return self.heads * len(self.folders)

    def arrange(self, logits: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """`[N, A, K]` from the `[N, labels]` of each model."""
        shape = (len(self.attributes), self.heads)
        return np.concatenate([own.reshape(len(own), *shape) for own in logits], axis=2)


class ScoreAggregation(_Part):
    """How the heads' logits become one score.

    Attributes:
        members: over the members of an ensemble.
        variance_weight: λ of `mean_minus_variance`, for scores in standard deviations within a pair.
        attribute_weights: of each attribute, in the order of the layout.
        offsets, scales: of each member over training pairs; empty for a single one, whose scores stay as they are.
        length_coefficient: subtracted for each token of the text.
    """

    members: Literal["mean", "minimum", "mean_minus_variance"] = "mean"
    variance_weight: float = 0.5
    attribute_weights: tuple[float, ...] = (1.0,)
    offsets: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    length_coefficient: float = 0.0

    def scores(
        self,
        heads: NDArray[np.float64],
        num_tokens: NDArray[np.int64],
        prompts: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """One score a text, and how much the members disagree about it.

        Members of an ensemble are first brought to a common offset and scale, and the result back to their mean
        offset and scale, so that score differences stay logits of the preference.

        Args:
            heads: `[N, A, K]` logits.
            num_tokens: `[N]`.
            prompts: `[N]` number of each text's prompt. Members are then centred within a prompt of several texts;
                None: every score is of its own text alone.

        Returns:
            `[N]` scores, and `[N]` standard deviations over the members in the unit of the score.
        """
        columns = self.member_scores(heads)
        if prompts is not None and columns.shape[1] > 1:
            columns = centre_within_groups(columns, prompts)
        # The variance is in squared units of the score: with λ per unit, the scale of the members does not matter.
        score = aggregate_members(columns, self.members, self.variance_weight / self._unit)
        return score - self.length_coefficient * num_tokens, disagreement(columns)

    def member_scores(self, heads: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[N, K]` scores of each member, in one unit and from one origin."""
        columns = aggregate_attributes(heads, self.attribute_weights)
        if not self.scales:
            return columns
        offset = sum(self.offsets) / len(self.offsets)
        return standardise(columns, MemberScale(self.offsets, self.scales)) * self._unit + offset

    @property
    def _unit(self) -> float:
        """Mean scale of the members, in which their scores are put back after they were standardised."""
        return sum(self.scales) / len(self.scales) if self.scales else 1.0


class Probe(_Part):
    """A text as the learner scored it before the model was written.

    Attributes:
        token_ids: as the model is given them.
        logits: of every label of every model, one after another.
    """

    token_ids: tuple[int, ...]
    logits: tuple[float, ...]


class RewardModelCard(BesideWeights, _Part):
    """What a reward model needs to be used as it was trained, and what is known of it.

    Attributes:
        version: names the weights and everything else that a score depends on.
        base_model: backbone it was trained from.
        max_length: longest text in tokens it was trained with.
        append_eos: whether the end-of-sequence token was put behind the text.
        chat_template: template of chat messages, or None.
        training_data: hash of the training pairs.
        layout: what the labels mean.
        aggregation: how they become one score.
        head_hashes: of each model's head, as the learner had it in memory.
        probes: scores from before the model was written.
        temperature: σ(Δ/T) is the calibrated preference probability; 1 where none was fitted.
        evaluation: held-out figures.
        released: verdict of the release gate; None where there was none.
        refusals: its reasons.
        covers_tokenizer: whether the version is of the tokenizer's files too; that of earlier cards is not.
    """

    FILE_NAME = CARD_NAME
    MEANING = "a reward model's card"
    INDENT = 2

    version: str
    base_model: str
    max_length: int
    append_eos: bool
    chat_template: str | None
    training_data: str
    layout: MemberLayout = MemberLayout()
    aggregation: ScoreAggregation = ScoreAggregation()
    head_hashes: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    temperature: float = 1.0
    evaluation: dict[str, float | int | str | None] = {}
    released: bool | None = None
    refusals: tuple[str, ...] = ()
    covers_tokenizer: bool = False

    def version_of(self, folder: Path) -> str:
        """The version that the weights in a folder have together with this card."""
        digest = hashlib.blake2b(digest_size=8)
        for member in self.layout.folders:
            digest.update(weights_version(folder / member).encode())
        if self.covers_tokenizer:
            digest.update(_hash_of(folder, _TOKENIZER).encode())
        fixed = self.model_dump(mode="json", exclude=_FIXED_AFTER_SCORING)
        digest.update(json.dumps(fixed, sort_keys=True).encode())
        return digest.hexdigest()


def weights_version(folder: Path) -> str:
    """A hash that names a directory's weights: every byte of them, and of the configuration."""
    return _hash_of(folder, _WEIGHTS)


def directory_version(folder: Path) -> str:
    """A hash that names a directory without a card: of the weights, and of the tokenizer with its chat template."""
    return _hash_of(folder, (*_WEIGHTS, *_TOKENIZER))


def _hash_of(folder: Path, patterns: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def sigmoid(value: float) -> float:
    """1 / (1 + e^-x), without overflow. Of Δ/T, a score difference over the temperature, it is the probability that
    people prefer the one to the other."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
