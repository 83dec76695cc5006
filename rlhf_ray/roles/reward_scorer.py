"""Scoring responses with a reward model. Written once: the loop, the evaluation and a service call the same class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.models.loading import load_tokenizer, resolve_dtype
from rlhf_ray.models.reward_models import (
    RewardEncoding,
    RewardModelCard,
    load_reward_network,
    load_reward_tokenizer,
    pad_texts,
    weights_version,
)
from rlhf_ray.rollout import RewardColumn, RewardHeader, Rollout


@dataclass(frozen=True)
class Conversation:
    """A prompt as its row had it: text, or chat messages."""

    text: str
    messages: tuple[dict[str, Any], ...] | None = None


class RewardScorer:
    """One replica of the reward model.

    Token ids go to the model as the policy sampled them where both have the same tokenizer; otherwise the text is
    decoded, and chat messages are rendered with the reward model's own template.

    Args:
        settings: model and limits.
        policy_model: whose tokenizer decodes the responses; empty where only texts are scored.
    """

    def __init__(self, settings: RewardSettings, policy_model: str | None = None) -> None:
        on_gpu = settings.gpus > 0
        self._settings = settings
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._tokenizer = load_reward_tokenizer(settings.model, "reward.model")
        self._policy_tokenizer = load_tokenizer(policy_model, "policy.model") if policy_model else None
        self._same_tokenizer = (
            self._policy_tokenizer is not None and self._policy_tokenizer.get_vocab() == self._tokenizer.get_vocab()
        )
        card = RewardModelCard.load(settings.model, "reward.model")
        network = load_reward_network(
            settings.model, dtype=resolve_dtype(settings.dtype, on_gpu), pad_token_id=self._tokenizer.pad_token_id
        )
        self._model = network.to(self._device).eval()
        # Some models hold more positions than a text may have; their tokenizer knows.
        longest = min(int(network.config.max_position_embeddings), self._tokenizer.model_max_length)
        limit = settings.max_length or (card.max_length if card else longest)
        self._encoding = RewardEncoding.for_tokenizer(self._tokenizer, limit)
        if card is not None:
            self._encoding = RewardEncoding(limit, card.append_eos)
        if card is not None and card.chat_template is not None:
            self._tokenizer.chat_template = card.chat_template
        folder = Path(settings.model)
        self.version = card.version if card else weights_version(folder) if folder.is_dir() else settings.model

    def score(self, rollout: Rollout, prompts: Mapping[int, Conversation]) -> tuple[RewardColumn, RewardHeader]:
        """A score, or the cause why there is none, for every sample of a shard.

        Args:
            prompts: of the shard, by prompt id.
        """
        encoded = [self._encode_sample(rollout, index, prompts) for index in range(rollout.num_samples)]
        column = self._score_encoded(encoded)
        return column, column.header()

    def score_texts(self, texts: Sequence[str]) -> RewardColumn:
        """A score, or the cause why there is none, for every whole text."""
        return self._score_encoded([self._encoding.encode(text, self._tokenizer) for text in texts])

    def _encode_sample(
        self, rollout: Rollout, index: int, prompts: Mapping[int, Conversation]
    ) -> tuple[list[int], bool]:
        tokens = rollout.sample_tokens(index)
        prompt = prompts[int(rollout.prompt_ids[index])]
        if self._same_tokenizer:
            return self._encoding.finish(tokens.tolist(), self._tokenizer)
        assert self._policy_tokenizer is not None, "rollouts are scored with a policy's tokenizer"
        response_ids = tokens[int(rollout.prompt_lengths[index]) :]
        response = self._policy_tokenizer.decode(response_ids, skip_special_tokens=True)
        if prompt.messages is None:
            return self._encoding.encode(prompt.text + response, self._tokenizer)
        turns = [*prompt.messages, {"role": "assistant", "content": response}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        # The template has written the special tokens already.
        token_ids = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self._encoding.finish(token_ids, self._tokenizer)

    @torch.inference_mode()
    def _score_encoded(self, encoded: Sequence[tuple[list[int], bool]]) -> RewardColumn:
        scores = np.full(len(encoded), math.nan, dtype=np.float64)
        failures = [""] * len(encoded)
        wanted: list[int] = []
        num_truncated = 0
        for index, (token_ids, was_cut) in enumerate(encoded):
            num_truncated += was_cut
            if was_cut and self._settings.on_too_long == "fail":
                failures[index] = f"the text is longer than {self._encoding.max_length} tokens"
            elif not token_ids:
                failures[index] = "the text has no tokens"
            else:
                wanted.append(index)
        # Longest first, so that a batch holds texts of like length; ties keep their order.
        wanted.sort(key=lambda index: -len(encoded[index][0]))
        for start in range(0, len(wanted), self._settings.batch_size):
            chosen = wanted[start : start + self._settings.batch_size]
            batch = pad_texts([encoded[index][0] for index in chosen], self._tokenizer.pad_token_id)
            logits = self._model(**{name: tensor.to(self._device) for name, tensor in batch.items()}).logits
            for index, score in zip(chosen, logits[:, 0].float().tolist(), strict=True):
                if math.isfinite(score):
                    scores[index] = score
                else:
                    failures[index] = f"the reward model returned {score}"
        return RewardColumn(scores, tuple(failures), self.version, num_truncated)
