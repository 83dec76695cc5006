"""Scoring responses with a reward model. Written once: the loop, the evaluation and a service call the same class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.models.loading import resolve_attention, resolve_dtype, resolve_padded_attention
from rlhf_ray.models.products import prefer_onednn
from rlhf_ray.reward.core.card import ScoreAggregation
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.loading import load_reward_network, padded_width
from rlhf_ray.reward.core.network import RewardNetwork, takes_packed_rows
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.texts import ResponseReader, RewardTexts, SharedIds
from rlhf_ray.rollout import RewardColumn, Rollout

_CPU_TOKENS, _GPU_TOKENS = 4096, 32768
"""Of a forward pass, where the settings do not say: on a CPU more are no faster and take more memory."""


@dataclass(frozen=True)
class ScoredTexts:
    """Scores of N texts, and what they came from.

    Attributes:
        heads: `[N, A, K]` float64 logits of A attributes and K members, NaN where there is no score.
        scores: `[N]` the aggregated score, NaN where there is none.
        disagreement: `[N]` standard deviation over the members, in the unit of the score; 0 for one member.
        failures: `[N]` why there is no score, or empty.
        num_tokens: `[N]` as scored.
        truncated: `[N]` whether the text was cut.
        version: of the reward model.
    """

    heads: NDArray[np.float64]
    scores: NDArray[np.float64]
    disagreement: NDArray[np.float64]
    failures: tuple[str, ...]
    num_tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    version: str

    def column(self) -> RewardColumn:
        """As a rollout's column."""
        several = self.heads.shape[2] > 1
        return RewardColumn(
            self.scores, self.failures, self.version, int(self.truncated.sum()), self.disagreement if several else None
        )


class Passes(Protocol):
    """A network where it computes, and how batches go through it: in place of a device of its own."""

    module: Any

    def forward_each(self, batches: Sequence[Any], forward: Callable[[Any], Any], /) -> list[Any]:
        """Results of a forward pass over each batch, of which there is one at least."""
        ...


Place = Callable[[Callable[[], Any], str], Passes]
"""Puts what makes a network, whose compute type is given, where it computes."""


class RewardScorer:
    """One replica of the reward model, or one rank of a model that is spread over all of them: all models of an
    ensemble, all heads, one score.

    Token ids go to the model as the policy sampled them where both have the same tokenizer and, for chat messages, the
    same template and a card. Otherwise the response is decoded, and chat messages are rendered with the reward model's
    template.

    Args:
        settings: model and limits.
        policy_model: whose tokenizer decodes the responses; empty where only texts are scored.
        place: where the networks are spread over ranks; None: each is whole, on this process's device. With it every
            call is a collective: the ranks are asked for as many shards, in the same order.

    Raises:
        BadInput: the model cannot be read, or its head is missing or does not fit its card.
    """

    def __init__(self, settings: RewardSettings, policy_model: str | None = None, place: Place | None = None) -> None:
        on_gpu = settings.gpus > 0
        self._settings = settings
        self.batch_invariant = settings.batch_invariant
        self._device = torch.device("cuda" if on_gpu else "cpu")
        if not on_gpu:
            prefer_onednn()
        self._batch_tokens = settings.batch_tokens or (_GPU_TOKENS if on_gpu else _CPU_TOKENS)
        self.texts = RewardTexts.read(settings.model, settings.max_length)
        self._responses = ResponseReader(policy_model) if policy_model else None
        self._shared_ids = self._responses.shared_ids(self.texts) if self._responses else SharedIds.NONE
        card = self.texts.card
        self._aggregation = card.aggregation if card else ScoreAggregation()
        self._temperature = card.temperature if card and settings.apply_temperature else 1.0
        self.dtype = resolve_dtype(settings.dtype, on_gpu)
        self._packed = True
        self._spread: Passes | None = None
        self._networks = [self._placed(folder, place) for folder in self.texts.folders]
        self.version = self.texts.version

    def _placed(self, model: str, place: Place | None) -> Any:
        """One model of the ensemble where it computes."""
        if place is not None:
            self._spread = place(partial(self._load, model), self.dtype)
            return self._spread.module
        with self._device:  # straight onto it, without a copy in host memory
            network = self._load(model)
        for parameter in network.parameters():
            # They are mapped from the file, and would change with it while the scorer goes by its old version.
            parameter.data = parameter.data.clone()
        return network

    def _load(self, model: str) -> RewardNetwork:
        """One model of the ensemble. On a CPU texts are packed, which computes no padding; in the batch-invariant mode
        they are alone, and on GPUs plain batches are what the engines are made for."""
        on_gpu = self._settings.gpus > 0
        classifier = load_reward_network(
            model,
            dtype=self.dtype,
            pad_token_id=self.texts.tokenizer.pad_token_id,
            attention=resolve_padded_attention("auto", on_gpu),
            num_labels=self.texts.layout.num_labels,
        )
        packed = takes_packed_rows(classifier) and not on_gpu and not self.batch_invariant
        if packed:
            classifier.set_attn_implementation(resolve_attention("auto"))
        self._packed &= packed
        return RewardNetwork(classifier.eval(), self.texts.tokenizer.pad_token_id, packed)

    def score(self, rollout: Rollout, prompts: Mapping[int, Conversation]) -> RewardColumn:
        """A score, or the cause why there is none, for every sample of a shard.

        Members of an ensemble are centred within each prompt (`centre_within_groups`), so with `minimum` and
        `mean_minus_variance` a score depends on the prompt's other samples.

        Args:
            prompts: of the shard, by prompt id.
        """
        encoded: list[Encoded] = []
        causes: dict[int, str] = {}
        for index in range(rollout.num_samples):
            try:
                encoded.append(self._encode_sample(rollout, index, prompts[int(rollout.prompt_ids[index])]))
            except RowError as problem:
                encoded.append(([], False))
                causes[index] = problem.found
        return self.score_encoded(encoded, causes, rollout.prompt_ids.astype(np.int64)).column()

    def score_texts(self, texts: Sequence[str], *, templated: bool = False) -> ScoredTexts:
        """A score, or the cause why there is none, for every whole text.

        Args:
            templated: a chat template has written the special tokens already.
        """
        return self.score_encoded([self.texts.encode(text, templated=templated) for text in texts])

    def score_tokens(self, token_ids: Sequence[Sequence[int]]) -> ScoredTexts:
        """As `score_texts`, for texts that are tokens already, special ones included."""
        return self.score_encoded([(list(ids), False) for ids in token_ids])

    def _encode_sample(self, rollout: Rollout, index: int, prompt: Conversation) -> Encoded:
        """What the reward model is shown of one sample.

        Raises:
            RowError: there is nothing that it could be shown.
        """
        assert self._responses is not None, "rollouts are scored with a policy's tokenizer"
        if self._shared_ids is SharedIds.ALL or (self._shared_ids is SharedIds.TEXTS and prompt.messages is None):
            self._responses.token_ids(rollout, index)
            return self.texts.finish(rollout.sample_tokens(index).tolist())
        return self.texts.encode_turn(prompt.messages or prompt.text, self._responses.text(rollout, index))

    def score_encoded(
        self,
        encoded: Sequence[Encoded],
        causes: Mapping[int, str] | None = None,
        prompts: NDArray[np.int64] | None = None,
    ) -> ScoredTexts:
        """As `score_texts`, for what `encode` returned.

        Args:
            causes: why some of them, by their place, cannot be scored.
            prompts: see `ScoreAggregation.scores`.
        """
        failures = [""] * len(encoded)
        wanted: list[int] = []
        for index, (token_ids, was_cut) in enumerate(encoded):
            if causes and index in causes:
                failures[index] = causes[index]
            elif was_cut and self._settings.on_too_long == "fail":
                failures[index] = f"the text is longer than {self.texts.max_length} tokens"
            elif not token_ids:
                failures[index] = "the text has no tokens"
            else:
                wanted.append(index)
        num_tokens = np.array([len(token_ids) for token_ids, _ in encoded], dtype=np.int64)
        shape = (len(encoded), len(self.texts.layout.attributes), self.texts.layout.num_members)
        heads = np.full(shape, math.nan)
        batches = list(self._batches(wanted, num_tokens))
        found = self._forward_each([[encoded[index][0] for index in rows] for rows in batches])
        for rows, logits in zip(batches, found, strict=True):
            heads[rows] = logits
        aggregated = self._aggregation.scores(heads, num_tokens, prompts)
        scores, disagreement = (each / self._temperature for each in aggregated)
        for index in wanted:
            if not math.isfinite(scores[index]):
                failures[index] = f"the reward model returned {scores[index]}"
        failed = np.array([bool(cause) for cause in failures], dtype=bool)
        for array in (heads, scores, disagreement):
            array[failed] = math.nan
        truncated = np.array([was_cut for _, was_cut in encoded], dtype=bool)
        return ScoredTexts(heads, scores, disagreement, tuple(failures), num_tokens, truncated, self.version)

    def _batches(self, wanted: Sequence[int], num_tokens: NDArray[np.int64]) -> Iterator[list[int]]:
        """Texts of like length together. In the batch-invariant mode each is alone: kernels are chosen by shape, and
        some sum the rows of one block otherwise than those of the next."""
        order = sorted(wanted, key=lambda index: -int(num_tokens[index]))
        if self.batch_invariant:
            yield from ([index] for index in order)
            return
        size = self._settings.batch_size
        while order:
            ends = np.cumsum(num_tokens[order[:size]])
            if not self._packed:
                ends = padded_width(int(ends[0])) * np.arange(1, len(ends) + 1)
            count = max(1, int(np.searchsorted(ends, self._batch_tokens, side="right")))
            yield order[:count]
            order = order[count:]

    def _forward_each(self, batches: Sequence[Sequence[Sequence[int]]]) -> list[NDArray[np.float64]]:
        if self._spread is None:
            with torch.inference_mode():
                return [self._forward(texts) for texts in batches]
        # Where there is nothing to score here, the other ranks still wait for this one.
        nothing = [[[self.texts.tokenizer.pad_token_id]]]
        return self._spread.forward_each(batches or nothing, self._forward)[: len(batches)]

    def _forward(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """`[n, A, K]` logits of one batch."""
        logits = [network(texts, one_batch=True)[0] for network in self._networks]
        return self.texts.layout.arrange([each.double().cpu().numpy() for each in logits])
