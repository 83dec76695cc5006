"""The reward models of a replica: which there are, and which of them a request gets.

A table never changes. A new version is loaded beside the old one, then one assignment puts the new table in the place
of the old: a request that began with a version ends with it, and none sees both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rlhf_ray.config.serving import ServedModelSettings, ServedScorerSettings
from rlhf_ray.failures import BadInput, Refused
from rlhf_ray.models.loading import resolve_dtype
from rlhf_ray.reward.client.service_errors import ApiError, ErrorType
from rlhf_ray.reward.core.card import RewardModelCard, directory_version
from rlhf_ray.reward.core.reference_scores import ReferenceScores
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.serve.exchange import ModelInfo

PROBE = "The quick brown fox jumps over the lazy dog."
"""Scored when a model is loaded and by the health check: a replica that cannot score it is not healthy."""


FileStates = tuple[tuple[str, int, int, int], ...]
"""Name, size, time of change in ns and inode of files: the same for as long as nobody writes them."""


@dataclass(frozen=True)
class Weights:
    """What a directory held when it was read.

    Attributes:
        version: of the bytes, not only by the card's word.
        files: their states, taken before they were read.
    """

    path: str
    version: str
    files: FileStates

    @classmethod
    def read(cls, path: str, key: str) -> Weights:
        """What a directory holds now.

        Args:
            key: of the model in the configuration.

        Raises:
            BadInput: the files are not those that the card names.
        """
        files, folder = _file_states(path), Path(path)
        card = RewardModelCard.load(path, key)
        if card is None:
            return cls(path, directory_version(folder) if folder.is_dir() else path, files)
        version = card.version_of(folder)
        if version != card.version:
            raise BadInput(
                key, f"the files in '{path}' are version {version}", f"version {card.version}, as their card says"
            )
        return cls(path, version, files)

    def check(self) -> None:
        """See that the directory still holds these weights.

        Raises:
            BadInput: it does not.
        """
        now = Weights.read(self.path, "models") if self.is_touched() else self
        if now.version != self.version:
            raise BadInput("models", f"'{self.path}' holds version {now.version} by now", f"version {self.version}")

    def is_touched(self) -> bool:
        """Whether a file of the directory was written since."""
        return _file_states(self.path) != self.files

    @property
    def key(self) -> str:
        """Names them in the scoring process; the names and shares of entries change nothing there."""
        return f"{self.path}@{self.version}"


def _file_states(folder: str) -> FileStates:
    found = ((str(path), path.stat()) for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return tuple((name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in found)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in memory. Two of them are the same only if they are one object.

    Attributes:
        texts: turns short texts into tokens, on the event loop.
        long_texts: the same for long ones, in a thread: a tokenizer is for one thread at a time.
    """

    info: ModelInfo
    weights: Weights
    texts: RewardTexts
    long_texts: RewardTexts
    reference: ReferenceScores | None

    @property
    def key(self) -> str:
        """Names its weights in the scoring process."""
        return self.weights.key


@dataclass(frozen=True)
class ModelTable:
    """The models of one moment."""

    models: tuple[LoadedModel, ...]

    @property
    def live(self) -> tuple[LoadedModel, ...]:
        """Those that share the traffic, the largest share first."""
        live = [model for model in self.models if model.info.role == "live"]
        return tuple(sorted(live, key=lambda model: -model.info.share))

    @property
    def shadows(self) -> tuple[LoadedModel, ...]:
        """Those that score unseen."""
        return tuple(model for model in self.models if model.info.role == "shadow")

    def choose(self, name: str | None, sticky: str, any_name: bool = False) -> LoadedModel:
        """The model of a request.

        Args:
            name: model or version that it asks for.
            sticky: requests with the same key get the same model.
            any_name: a name that is not known asks for none.

        Raises:
            ApiError: there is no such model.
        """
        if name is not None:
            for model in self.models:
                if name in (model.info.name, model.info.version):
                    return model
            if not any_name:
                names = ", ".join(model.info.name for model in self.models)
                raise ApiError(ErrorType.NOT_FOUND, f"there is no such model; there are {names}")
        live = self.live
        place, edge = unit_hash("share", sticky), 0.0
        for model in live:
            edge += model.info.share
            if place < edge:
                return model
        return live[-1]


def unit_hash(purpose: str, key: str) -> float:
    """A number in [0, 1) that a key always gets, independent for each purpose."""
    digest = hashlib.blake2b(f"{purpose}:{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def shares(models: Sequence[ServedModelSettings]) -> dict[str, float]:
    """Each model's share of the requests that name none; shadows have none."""
    given = sum(model.share or 0.0 for model in models if not model.shadow)
    rest = max(0.0, 1.0 - given)
    return {model.name: 0.0 if model.shadow else rest if model.share is None else model.share for model in models}


def check_models(models: Sequence[ServedModelSettings], scorer: ServedScorerSettings) -> None:
    """See, before anything starts, that every model could be served.

    Raises:
        BadInput: a directory is no reward model.
        Refused: the release gate refused it.
    """
    for model in models:
        check_model(model, scorer, f"models.{model.name}.path")


def check_model(model: ServedModelSettings, scorer: ServedScorerSettings, key: str) -> RewardTexts:
    """See that one directory holds a reward model that may be served; gives its card and tokenizer.

    Raises:
        BadInput: it does not.
        Refused: the release gate refused it.
    """
    texts = RewardTexts.read(model.path, scorer.max_length, key, "scorer")
    ReferenceScores.load(model.path, key)
    if texts.card is not None and texts.card.released is False and scorer.require_release:
        raise Refused(model.path, texts.card.refusals)
    return texts


def read_table(models: Sequence[ServedModelSettings], scorer: ServedScorerSettings, current: ModelTable) -> ModelTable:
    """The models' cards and tokenizers; what is in the current table is kept.

    Raises:
        BadInput, Refused: a model cannot be served.
    """
    if not models:
        raise BadInput(
            "models", "there is none", "the `user_config` of the deployment `monitor` in the Serve config file"
        )
    share_of = shares(models)
    return ModelTable(tuple(_read(model, scorer, share_of[model.name], current.models) for model in models))


def _read(
    model: ServedModelSettings, settings: ServedScorerSettings, share: float, known: Sequence[LoadedModel]
) -> LoadedModel:
    key = f"models.{model.name}.path"
    role: Literal["live", "shadow"] = "shadow" if model.shadow else "live"
    for each in known:
        if each.weights.path == model.path and each.weights.files and not each.weights.is_touched():
            if (each.info.name, each.info.role, each.info.share) == (model.name, role, share):
                return each
            return replace(each, info=replace(each.info, name=model.name, role=role, share=share))
    texts = check_model(model, settings, key)
    weights = Weights.read(model.path, key)
    info = ModelInfo(
        name=model.name,
        version=weights.version,
        temperature=texts.card.temperature if texts.card else 1.0,
        attributes=texts.layout.attributes,
        num_members=texts.layout.num_members,
        max_length=texts.max_length,
        dtype=resolve_dtype(settings.dtype, settings.gpus > 0),
        role=role,
        share=share,
    )
    return LoadedModel(info, weights, texts, deepcopy(texts), ReferenceScores.load(model.path, key))
