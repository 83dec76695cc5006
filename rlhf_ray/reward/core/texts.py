"""From texts, conversations and sampled responses to the tokens that a reward model is given, without its weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.data.chat import Message, render
from rlhf_ray.data.rows import RowError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard, weights_version
from rlhf_ray.reward.core.loading import RewardEncoding, load_reward_tokenizer
from rlhf_ray.rollout import Rollout

Encoded = tuple[list[int], bool]
"""Token ids as the model is given them, and whether the text was cut."""


class RewardTexts:
    """A reward model's tokenizer, template and limits, as its card says.

    Args:
        model: directory of the reward model, or a hub id.
        max_length: longest text in tokens; None: what the model was trained with, else its position limit.
        key: of the model in the configuration.

    Attributes:
        card: of the model, or None.
        layout: what its labels mean.
        tokenizer: with the card's chat template.
        version: of the weights and everything else that a score depends on.

    Raises:
        BadInput: the model cannot be read.
    """

    def __init__(self, model: str, max_length: int | None, key: str = "reward.model") -> None:
        from transformers import AutoConfig

        self.card = card = RewardModelCard.load(model, key)
        self.tokenizer = templated_tokenizer(model, card, key)
        self.layout = card.layout if card else MemberLayout()
        # Some models hold more positions than a text may have; their tokenizer knows.
        positions = int(AutoConfig.from_pretrained(self.folders(model)[0]).max_position_embeddings)
        longest = min(positions, self.tokenizer.model_max_length)
        limit = max_length or (card.max_length if card else longest)
        self._encoding = RewardEncoding.for_model(self.tokenizer, card, limit)
        folder = Path(model)
        self.version = card.version if card else weights_version(folder) if folder.is_dir() else model

    def folders(self, model: str) -> list[str]:
        """Where the models of an ensemble lie."""
        return [str(Path(model) / member) if member != "." else model for member in self.layout.folders]

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self._encoding.max_length

    def encode(
        self,
        text: str,
        *,
        templated: bool = False,
        max_tokens: int | None = None,
        keep: Literal["end", "start"] = "end",
    ) -> Encoded:
        """Token ids of a whole text as the model is given them, and whether they were cut.

        Args:
            templated: a chat template has written the special tokens already.
            max_tokens: cut to fewer than the model takes.
            keep: which end of a text that is too long is scored; training keeps the end.
        """
        shorter = max_tokens is not None and max_tokens < self.max_length
        if keep == "end" and not shorter:
            return self._encoding.encode(text, self.tokenizer, templated=templated)
        whole, _ = replace(self._encoding, max_length=sys.maxsize).encode(text, self.tokenizer, templated=templated)
        limit = max_tokens if max_tokens is not None and shorter else self.max_length
        return replace(self._encoding, max_length=limit).cut(whole, keep), len(whole) > limit

    def encode_messages(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        keep: Literal["end", "start"] = "end",
    ) -> Encoded:
        """As `encode`, for a conversation that ends with the response. Where the model has no chat template, a user's
        turn and its answer are prompt and response.

        Raises:
            RowError: there is no chat template for any other conversation, or it does not take this one.
        """
        if self.tokenizer.chat_template is None and [each["role"] for each in messages] == ["user", "assistant"]:
            text = "".join(str(each["content"]) for each in messages)
            return self.encode(text, max_tokens=max_tokens, keep=keep)
        text = render(self.tokenizer, messages, add_generation_prompt=False)
        return self.encode(text, templated=True, max_tokens=max_tokens, keep=keep)

    def encode_turn(self, prompt: str | Sequence[Message], response: str) -> Encoded:
        """As `encode`, for a prompt (text or chat messages) and the response to it.

        Raises:
            RowError: as `encode_messages`.
        """
        if isinstance(prompt, str):
            return self.encode(prompt + response)
        return self.encode_messages([*prompt, {"role": "assistant", "content": response}])

    def finish(self, token_ids: list[int]) -> Encoded:
        """Token ids of a whole text, ended as the model expects and cut at the front."""
        return self._encoding.finish(token_ids, self.tokenizer)


def templated_tokenizer(model: str, card: RewardModelCard | None, key: str) -> Any:
    """A reward model's tokenizer, with the chat template that its card names, else its own.

    Raises:
        BadInput: under `key`, as `load_reward_tokenizer`.
    """
    tokenizer = load_reward_tokenizer(model, key)
    if card is not None and card.chat_template is not None:
        tokenizer.chat_template = card.chat_template
    return tokenizer


class SharedIds(Enum):
    """Which sampled texts a reward model can be given as the policy's token ids."""

    NONE = "another tokenizer"
    TEXTS = "the same tokenizer, another chat template: prompts that are texts"
    ALL = "the same tokenizer and chat template"


class ResponseReader:
    """Reads what a policy sampled.

    An embedding often has more rows than there are tokens, because round numbers suit the hardware, and a policy may
    sample the id of such a row. Nobody can read that response, so it cannot be scored.

    Args:
        policy_model: whose tokenizer decodes.

    Raises:
        BadInput: it has no readable tokenizer.
    """

    def __init__(self, policy_model: str) -> None:
        self._tokenizer = load_tokenizer(policy_model, "policy.model")
        self._vocabulary = self._tokenizer.get_vocab()
        ids = list(self._vocabulary.values())
        self._known = np.zeros(max(ids) + 2, dtype=bool)  # the last entry stands for all higher ids
        self._known[ids] = True

    def token_ids(self, rollout: Rollout, index: int) -> NDArray[np.int32]:
        """The tokens of one response.

        Raises:
            RowError: the tokenizer does not have all of them.
        """
        token_ids = rollout.sample_tokens(index)[int(rollout.prompt_lengths[index]) :]
        if not self._known[np.minimum(token_ids, len(self._known) - 1)].all():
            raise RowError("the response has a token id that the policy's tokenizer does not know", "known token ids")
        return token_ids

    def text(self, rollout: Rollout, index: int) -> str:
        """One response without special tokens.

        Raises:
            RowError: as `token_ids`.
        """
        return str(self._tokenizer.decode(self.token_ids(rollout, index), skip_special_tokens=True))

    def shared_ids(self, texts: RewardTexts) -> SharedIds:
        """Which sampled texts have the token ids that a reward model would give them."""
        own, tokenizer = self._tokenizer, texts.tokenizer
        # An empty text shows which special tokens are put around a text.
        if own("").input_ids != tokenizer("").input_ids or self._vocabulary != tokenizer.get_vocab():
            return SharedIds.NONE
        names = ("chat_template", "bos_token", "eos_token")
        same_template = all(getattr(own, name) == getattr(tokenizer, name) for name in names)
        # A published model was shown what its template puts behind the token at which a policy stops.
        return SharedIds.ALL if same_template and texts.card is not None else SharedIds.TEXTS
