"""What reward-model training reads before any actor starts: the backbone's facts, and pairs as tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.reward_model import (
    PREFERENCE,
    EnsembleSettings,
    PreferenceSettings,
    RewardModelConfig,
    RewardTrainingSettings,
)
from rlhf_ray.data.preferences import PreferencePair, PreferenceSet, attribute_names, load_preferences
from rlhf_ray.failures import BadInput
from rlhf_ray.models.adapters import check_adapters
from rlhf_ray.models.loading import check_attention, check_tokenizer_fits, check_top_layers, read_model_facts
from rlhf_ray.reward.core.card import MemberLayout
from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.core.loading import load_reward_tokenizer
from rlhf_ray.reward.judge.data_report import LeftOut


@dataclass(frozen=True)
class UsedPairs:
    """The pairs of a source that are used, as text and as tokens, and what became of the others.

    Attributes:
        preferences: the source, with `pairs` reduced to those that are used.
        chosen, rejected: token ids of the whole texts, a pair each.
        left_out: counts of the rest.
    """

    preferences: PreferenceSet
    chosen: tuple[tuple[int, ...], ...]
    rejected: tuple[tuple[int, ...], ...]
    left_out: LeftOut

    @property
    def pairs(self) -> tuple[PreferencePair, ...]:
        return self.preferences.pairs

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """`[P, 2]` of the chosen and the rejected text."""
        return np.array([[len(c), len(r)] for c, r in zip(self.chosen, self.rejected, strict=True)], dtype=np.int64)

    def digest(self) -> str:
        """Hash of the tokens and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for pair, chosen, rejected in zip(self.pairs, self.chosen, self.rejected, strict=True):
            labels = (pair.chosen_probability, pair.margin, pair.weight, sorted(pair.attributes.items()))
            digest.update(repr((chosen, rejected, labels)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainingInputs:
    """Everything that was read.

    Attributes:
        encoding: how texts become tokens, with the backbone's tokenizer.
        attributes: heads, the preference first.
    """

    training: UsedPairs
    validation: UsedPairs | None
    held_out: UsedPairs | None
    encoding: RewardEncoding
    attributes: tuple[str, ...]


def read_training_inputs(config: RewardModelConfig) -> TrainingInputs:
    """Read and check.

    Raises:
        BadInput: naming the key or the file and line.
    """
    training = config.training
    facts = read_model_facts(config.model, "model")
    tokenizer = load_reward_tokenizer(config.model, "model")
    check_tokenizer_fits(tokenizer, facts, config.model, "model")
    check_top_layers(config.learner.trainable_top_layers, facts, "learner.trainable_top_layers")
    check_attention(config.learner.attention, "learner.attention")
    check_adapters(config.model, training.lora, "training.lora.target_modules", "SequenceClassification")
    if training.max_length > facts.context_tokens:
        raise BadInput(
            "training.max_length", f"{training.max_length} tokens", f"at most {facts.context_tokens}, the model's limit"
        )
    encoding = RewardEncoding.for_backbone(tokenizer, training.max_length)

    def read(settings: PreferenceSettings | None, key: str) -> UsedPairs | None:
        return None if settings is None else read_pairs(settings, key, encoding, training.on_too_long)

    pairs = read(config.pairs, "pairs.path")
    assert pairs is not None, "pairs are a needed section"
    return TrainingInputs(
        training=pairs,
        validation=read(config.validation, "validation.path"),
        held_out=read(config.held_out, "held_out.path"),
        encoding=encoding,
        attributes=(PREFERENCE, *_attributes(training, config.aggregation.attributes, pairs)),
    )


def read_pairs(
    settings: PreferenceSettings,
    key: str,
    encoding: RewardEncoding,
    on_too_long: Literal["fail", "truncate", "skip"],
    section: Literal["training", "scorer"] = "training",
) -> UsedPairs:
    """Read comparisons and turn them into tokens.

    Args:
        section: of the settings that limits the length.

    Raises:
        BadInput: unreadable or bad rows, or no pair is left.
    """
    read = load_preferences(settings, encoding.tokenizer, key)
    used: list[PreferencePair] = []
    sides: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    cut = too_long = small_gap = 0
    for pair in read.pairs:
        if settings.min_gap is not None and (pair.gap is None or abs(pair.gap) < settings.min_gap):
            small_gap += 1
            continue
        (chosen, chosen_cut), (rejected, rejected_cut) = (
            encoding.encode(pair.prompt + response, templated=pair.templated)
            for response in (pair.chosen, pair.rejected)
        )
        if chosen_cut or rejected_cut:
            if on_too_long == "fail":
                raise BadInput(
                    pair.place,
                    f"a text is longer than {encoding.max_length} tokens",
                    f"a larger {section}.max_length, or {section}.on_too_long: truncate",
                )
            if on_too_long == "skip":
                too_long += 1
                continue
            cut += 1
        used.append(pair)
        sides.append((tuple(chosen), tuple(rejected)))
    if not used:
        raise BadInput(
            key, f"none of the {read.num_rows} rows of '{settings.path}' is left", "at least one usable pair"
        )
    return UsedPairs(
        replace(read, pairs=tuple(used)),
        tuple(chosen for chosen, _ in sides),
        tuple(rejected for _, rejected in sides),
        LeftOut(small_gap=small_gap, too_long=too_long, cut=cut),
    )


def attribute_label(pair: PreferencePair, name: str) -> float | None:
    """1 where the chosen response is better on an attribute, 0 where it is worse, a half for a tie, None: not said."""
    difference = pair.attributes.get(name)
    return None if difference is None else 0.5 + 0.5 * float(np.sign(difference))


def layout_of(attributes: tuple[str, ...], ensemble: EnsembleSettings) -> MemberLayout:
    """The first independent member is the directory itself: who knows nothing of ensembles loads that one."""
    folders = (".", *(f"member-{member}" for member in range(1, ensemble.num_models)))
    return MemberLayout(attributes=attributes, heads=ensemble.num_heads, folders=folders)


def _attributes(training: RewardTrainingSettings, weights: dict[str, float], pairs: UsedPairs) -> tuple[str, ...]:
    found = attribute_names(pairs.pairs)
    wanted = found if training.attributes == "found" else tuple(training.attributes)
    listed = ", ".join(found) or "none at all"
    for name in wanted:
        if name not in found:
            raise BadInput("training.attributes", f"no pair has the attribute '{name}'", f"attributes found: {listed}")
    for name in weights:
        if name != PREFERENCE and name not in wanted:
            raise BadInput("aggregation.attributes", f"there is no head '{name}'", f"attributes found: {listed}")
    return wanted
