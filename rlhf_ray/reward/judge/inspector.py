"""Whether a reward model's directory gives everyone the scores that it was judged by.

The classic faults are silent: a padding token taken for the end, a head that was not saved, a template that changed
between training and use, a score that depends on its neighbours. Each has a check here, and each check compares two
independent ways to a score, all in float32 whatever the settings say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import NO_CODE, SAFE_WEIGHTS, load_tokenizer
from rlhf_ray.randomness import keyed_generator
from rlhf_ray.reward.core.card import MemberLayout, Probe, RewardModelCard
from rlhf_ray.reward.core.checks import Check, largest_difference, probe_check, raw_scores_check
from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.core.loading import head_hash, head_of, padded_width
from rlhf_ray.reward.core.scorer import RewardScorer

_CALL_SIZES = (1, 2, 7, 16, 64)
"""Texts handed to the scorer in one call."""
_PLAIN_BATCH = 8
_SEED = 0
_NO_CARD = "there is no reward_model.json: nothing was recorded in training"


@dataclass(frozen=True)
class PlainMember:
    """One model of the directory as any user of transformers has it.

    Attributes:
        network: in float32, with transformers' default attention.
        unsaved: parameters that the weights do not hold, or hold in another shape.
    """

    network: Any
    unsaved: tuple[str, ...]


class RewardInspector:
    """Integrity checks of one reward model.

    Args:
        settings: which model, and on what device it is scored.
        build_scorer: the scorer under inspection.

    Raises:
        BadInput: the directory cannot be read as a classifier with a tokenizer at all.
    """

    def __init__(
        self, settings: RewardSettings, build_scorer: Callable[[RewardSettings], RewardScorer] = RewardScorer
    ) -> None:
        # As it was trained, not as one configuration happens to use it; texts are encoded here.
        self._settings = settings.model_copy(
            update={"dtype": "float32", "max_length": None, "on_too_long": "truncate", "require_release": False}
        )
        self._build_scorer = build_scorer
        self._device = torch.device("cuda" if settings.gpus > 0 else "cpu")
        self._tokenizer = load_tokenizer(settings.model, "reward.model")
        self._card = RewardModelCard.load(settings.model, "reward.model")
        self._layout = self._card.layout if self._card else MemberLayout()
        folder = Path(settings.model)
        self._member_paths = [
            settings.model if member == "." else str(folder / member) for member in self._layout.folders
        ]

    def inspect(self, texts: Sequence[str], tolerance: float) -> tuple[Check, ...]:
        """All checks that can be made; where the model cannot be scored, those up to there.

        Args:
            texts: whole texts of several lengths, as in the data; at least two.
            tolerance: largest |Δ logit| between two exact ways to a score.

        Raises:
            BadInput: the weights cannot be read.
        """
        members = [self._load_plain(path) for path in self._member_paths]
        checks = [self._special_tokens(members), self._head_saved(members), self._version(), self._template()]
        readable = all(
            not member.unsaved and member.network.config.num_labels == self._layout.num_labels for member in members
        )
        if not readable:
            return tuple(checks)
        try:
            scorer = self._invariant_scorer
        except BadInput as error:
            meaning = "nothing can be learnt from a model that cannot be scored"
            return (*checks, Check("loading", False, str(error), meaning))
        encoded = self.token_ids(texts)
        if len(encoded) < 2:
            raise ValueError(f"{len(encoded)} texts with tokens; the checks compare at least two")
        heads = scorer.score_tokens(encoded).heads
        checks += [
            self._encoding_check(texts, members),
            self._probe(),
            raw_scores_check(heads, tolerance),
            self._plain_transformers(members, encoded, heads, tolerance),
        ]
        if all(hasattr(member.network, "score") for member in members):
            checks.append(self._read_at_last_token(members, encoded, heads, tolerance))
        checks.append(self._invariance(encoded, heads, tolerance))
        return tuple(checks)

    def probes(self, texts: Sequence[str]) -> tuple[Probe, ...]:
        """Token ids and raw logits of texts, for a comparison with another engine."""
        encoded = self.token_ids(texts)
        heads = self._invariant_scorer.score_tokens(encoded).heads
        # [N, A, models · heads] to labels that lie model by model.
        by_model = heads.reshape(*heads.shape[:2], len(self._layout.folders), self._layout.heads)
        labels = by_model.transpose(0, 2, 1, 3).reshape(len(heads), -1)
        return tuple(
            Probe(token_ids=tuple(ids), logits=tuple(row)) for ids, row in zip(encoded, labels.tolist(), strict=True)
        )

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts as the model is given them, by its card; those without a token are left out."""
        encoded = (self._encoding.encode(text)[0] for text in texts)
        return [ids for ids in encoded if ids]

    @cached_property
    def _invariant_scorer(self) -> RewardScorer:
        return self._build_scorer(self._settings.model_copy(update={"batch_invariant": True}))

    @cached_property
    def _encoding(self) -> RewardEncoding:
        limit = self._card.max_length if self._card else self._longest_text()
        return RewardEncoding.of_model(self._tokenizer, self._card, limit)

    def _longest_text(self) -> int:
        from transformers import AutoConfig

        positions = AutoConfig.from_pretrained(self._member_paths[0], **NO_CODE).max_position_embeddings
        return min(int(positions), self._tokenizer.model_max_length)

    def _load_plain(self, path: str) -> PlainMember:
        from transformers import AutoModelForSequenceClassification

        try:
            network, loading = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **SAFE_WEIGHTS
            )
        except (OSError, ValueError, KeyError) as error:
            raise BadInput("reward.model", f"'{path}' cannot be read ({error})", "a reward model's directory") from None
        mismatched = [entry[0] for entry in loading["mismatched_keys"]]
        return PlainMember(network.to(self._device).eval(), tuple(sorted([*loading["missing_keys"], *mismatched])))

    def _special_tokens(self, members: Sequence[PlainMember]) -> Check:
        """Padding is told from text by the tokenizer, by transformers and by every engine alike."""
        tokenizer = self._tokenizer
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        highest = max(tokenizer.get_vocab().values())
        configs = [member.network.config for member in members]
        faults = []
        if pad is None:
            faults.append("the tokenizer has no padding token")
        elif pad in (eos, tokenizer.sep_token_id):
            faults.append(f"the padding token is the one that ends a text (id {pad})")
        faults += [
            f"config.json says padding is {config.pad_token_id}, the tokenizer says {pad}"
            for config in configs
            if config.pad_token_id != pad
        ]
        faults += [
            f"the tokenizer's highest id is {highest}, the embedding has {config.vocab_size} rows"
            for config in configs
            if highest >= config.vocab_size
        ]
        found = "; ".join(dict.fromkeys(faults)) or f"pad {pad}, eos {eos}, highest id {highest}"
        meaning = "the end of a text cannot be told from padding: scores are read at the wrong token"
        return Check("special_tokens", not faults, found, meaning)

    def _head_saved(self, members: Sequence[PlainMember]) -> Check:
        """The weights hold every parameter, and the heads are those that the card names."""
        meaning = "transformers makes up a head that is absent at random: rewards would be noise"
        for path, member in zip(self._member_paths, members, strict=True):
            if member.unsaved:
                found = f"'{path}' has no weights (or of another shape) for {', '.join(member.unsaved[:3])}"
                return Check("head_saved", False, found, meaning)
            labels = member.network.config.num_labels
            if labels != self._layout.num_labels:
                found = f"the head of '{path}' has {labels} labels, its card says {self._layout.num_labels}"
                return Check("head_saved", False, found, meaning)
        hashes = tuple(head_hash(member.network.state_dict()) for member in members)
        if self._card is None:
            return Check("head_saved", None, _NO_CARD, meaning)
        same = hashes == self._card.head_hashes
        found, trained = (", ".join(each) or "not recorded" for each in (hashes, self._card.head_hashes))
        return Check(
            "head_saved", same, found if same else f"head {found}; the one that was trained: {trained}", meaning
        )

    def _version(self) -> Check:
        """Neither the files nor what the card fixes have changed since they were written."""
        meaning = "weights, tokenizer or settings changed after training: what was judged is not what is used"
        if self._card is None:
            return Check("version", None, _NO_CARD, meaning)
        found = self._card.version_of(Path(self._settings.model))
        same = found == self._card.version
        return Check("version", same, found if same else f"{found}, but the card says {self._card.version}", meaning)

    def _template(self) -> Check:
        """Others render chat messages with the tokenizer's template, training did with the card's."""
        meaning = "chats would be rendered unlike in training, and scored as texts the model never saw"
        if self._card is None:
            return Check("template", None, _NO_CARD, meaning)
        ours, theirs = self._card.chat_template, self._tokenizer.chat_template
        same = ours == theirs
        if same:
            found = "none, in the card and the tokenizer" if ours is None else f"the same {len(ours)} characters"
        else:
            first, second = (
                "no template" if each is None else f"a template of {len(each)} characters" for each in (theirs, ours)
            )
            found = f"the tokenizer has {first}, training had {second}"
            found += " and other text" if ours is not None and theirs is not None and len(ours) == len(theirs) else ""
        return Check("template", same, found, meaning)

    def _encoding_check(self, texts: Sequence[str], members: Sequence[PlainMember]) -> Check:
        """The card's rule fits tokenizer and positions, and is the one that the scorer follows."""
        meaning = "texts end, or are cut, otherwise than in training"
        if self._card is None:
            return Check("encoding", None, "no card: append_eos and max_length of the training are not known", meaning)
        faults = []
        needed = RewardEncoding.for_backbone(self._tokenizer, self._encoding.max_length).append_eos
        if needed != self._encoding.append_eos:
            faults.append(f"append_eos is {self._encoding.append_eos}, the tokenizer needs {needed}")
        longest = min(int(member.network.config.max_position_embeddings) for member in members)
        longest = min(longest, self._tokenizer.model_max_length)
        if self._encoding.max_length > longest:
            faults.append(f"max_length is {self._encoding.max_length}, the model takes {longest} tokens")
        texts = [text for text in texts if self._encoding.encode(text)[0]]
        by_text = self._invariant_scorer.score_texts(texts).heads
        by_tokens = self._invariant_scorer.score_tokens(self.token_ids(texts)).heads
        if not np.array_equal(by_text, by_tokens):
            faults.append("the scorer does not encode texts by the card's rule")
        found = "; ".join(faults) or f"append_eos {needed}, max_length {self._encoding.max_length}"
        return Check("encoding", not faults, found, meaning)

    def _probe(self) -> Check:
        probes = self._card.probes if self._card else ()
        if not probes:
            meaning = "whether the model scores as it did in training is not known"
            found = _NO_CARD if self._card is None else "the card holds no probes"
            return Check("probe", None, found, meaning)
        labels = np.array([probe.logits for probe in probes], dtype=np.float64)
        recorded = self._layout.arrange(np.split(labels, len(self._layout.folders), axis=1))
        return probe_check(recorded, self._invariant_scorer.score_tokens([probe.token_ids for probe in probes]).heads)

    @torch.inference_mode()
    def _logits(self, network: Any, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """`[n, labels]` of one batch, padded as the saved tokenizer does."""
        batch = self._tokenizer.pad({"input_ids": list(token_ids)}, return_tensors="pt")
        inputs = {name: tensor.to(self._device) for name, tensor in batch.items()}
        return network(**inputs).logits.double().cpu().numpy()

    def _plain_transformers(
        self,
        members: Sequence[PlainMember],
        encoded: Sequence[Sequence[int]],
        heads: NDArray[np.float64],
        tolerance: float,
    ) -> Check:
        """`AutoModelForSequenceClassification` and `AutoTokenizer` as saved give our logits."""
        meaning = "others who load the directory get other rewards than those judged here"
        mixed = keyed_generator(_SEED, "plain-batches").permutation(len(encoded))
        parts = np.array_split(mixed, -(-len(encoded) // _PLAIN_BATCH))
        singly, batched = [], []
        try:
            for member in members:
                singly.append(np.concatenate([self._logits(member.network, [ids]) for ids in encoded]))
                rows = [self._logits(member.network, [encoded[index] for index in part]) for part in parts]
                batched.append(np.concatenate(rows)[np.argsort(mixed)])
        except (ValueError, IndexError, RuntimeError) as error:
            return Check("plain_transformers", False, f"transformers cannot score the texts ({error})", meaning)
        alone, together = (largest_difference(heads, self._layout.arrange(logits)) for logits in (singly, batched))
        found = (
            f"differs from our scorer by up to {alone:.3g} text by text and {together:.3g} in batches padded on the "
            f"{self._tokenizer.padding_side} (allowed {tolerance:g})"
        )
        return Check("plain_transformers", max(alone, together) <= tolerance, found, meaning)

    def _read_at_last_token(
        self,
        members: Sequence[PlainMember],
        encoded: Sequence[Sequence[int]],
        heads: NDArray[np.float64],
        tolerance: float,
    ) -> Check:
        """A decoder's logits are its head over the last real token's hidden state, and padding does not move it."""
        expected = []
        for member in members:
            with torch.inference_mode():
                rows = []
                for ids in encoded:
                    hidden = member.network.base_model(torch.tensor([ids], device=self._device)).last_hidden_state
                    rows.append(head_of(member.network)(hidden[:, -1]).double().cpu().numpy())
            expected.append(np.concatenate(rows))
        ours = largest_difference(heads, self._layout.arrange(expected))
        faults = [f"our scorer differs from it by {ours:.3g}"] if not ours <= tolerance else []
        if self._tokenizer.pad_token_id is not None:
            padded = [self._padded_logits(member.network, encoded) for member in members]
            moved = largest_difference(self._layout.arrange(padded), self._layout.arrange(expected))
            if not moved <= tolerance:
                faults.append(f"padding behind the text moves the score by {moved:.3g}")
        found = "; ".join(faults) or f"differs by up to {ours:.3g} (allowed {tolerance:g})"
        meaning = "the score is read at another token than the last: it does not see the whole text"
        return Check("read_at_last_token", not faults, found, meaning)

    @torch.inference_mode()
    def _padded_logits(self, network: Any, encoded: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """`[n, labels]`, each text alone with one more block of padding behind it than it needs."""
        rows = []
        for ids in encoded:
            width = padded_width(len(ids) + 1)
            padded = torch.full((1, width), self._tokenizer.pad_token_id, device=self._device)
            padded[0, : len(ids)] = torch.tensor(ids)
            mask = torch.arange(width, device=self._device)[None] < len(ids)
            rows.append(network(input_ids=padded, attention_mask=mask.long()).logits.double().cpu().numpy())
        return np.concatenate(rows)

    def _invariance(self, encoded: Sequence[Sequence[int]], heads: NDArray[np.float64], tolerance: float) -> Check:
        """A score depends on its text alone: to the bit in the batch-invariant mode, else within the tolerance."""
        plain_scorer = self._build_scorer(self._settings.model_copy(update={"batch_invariant": False}))
        faults = []
        for name, found in self._rearranged(self._invariant_scorer, encoded, _CALL_SIZES):
            if not np.array_equal(found, heads):
                difference = largest_difference(found, heads)
                faults.append(f"{name} changes scores by up to {difference:.3g} in the batch-invariant mode")
        largest = 0.0
        for name, found in self._rearranged(plain_scorer, encoded, (1, len(encoded))):
            largest = max(largest, difference := largest_difference(found, heads))
            if not difference <= tolerance:
                faults.append(f"{name} changes scores by up to {difference:.3g} (allowed {tolerance:g})")
        sizes = ", ".join(str(size) for size in _CALL_SIZES)
        found_text = (
            f"equal to the bit in calls of {sizes} texts, in any order and with other neighbours; within {largest:.3g} "
            "outside the batch-invariant mode"
        )
        meaning = "a text's reward depends on what it is scored beside: noise that a policy can exploit"
        return Check("invariance", not faults, "; ".join(faults[:3]) or found_text, meaning)

    def _rearranged(
        self, scorer: RewardScorer, encoded: Sequence[Sequence[int]], sizes: Sequence[int]
    ) -> list[tuple[str, NDArray[np.float64]]]:
        """The `[N, A, K]` logits of the same texts, scored in other company."""
        count = len(encoded)

        def scored(order: Sequence[int], size: int) -> NDArray[np.float64]:
            parts = [order[start : start + size] for start in range(0, count, size)]
            rows = [scorer.score_tokens([encoded[index] for index in part]).heads for part in parts]
            return np.concatenate(rows)[np.argsort(order)]

        ordered = list(range(count))
        permuted = keyed_generator(_SEED, "permuted").permutation(count).tolist()
        found = [(f"scoring {size} at a time", scored(ordered, size)) for size in sizes]
        found += [("reversed order", scored(ordered[::-1], count)), ("another order", scored(permuted, count))]
        # Neighbours of the same lengths, which share a batch, and one shorter and one longer than all.
        longest = (2 * max((list(ids) for ids in encoded), key=len))[: self._encoding.max_length]
        neighbours = [longest, *(list(ids[::-1]) for ids in encoded), list(encoded[0][:1])]
        beside = [ids for pair in zip(encoded, neighbours, strict=False) for ids in pair] + neighbours[count:]
        found.append(("other neighbours", scorer.score_tokens(beside).heads[: 2 * count : 2]))
        return found
