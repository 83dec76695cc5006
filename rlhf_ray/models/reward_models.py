"""Reward models as Hugging Face directories: how they are loaded, what text they are shown, and their card.

The card (`reward_model.json`, beside the weights) records what must be the same in training, scoring and serving.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import load_tokenizer

CARD_NAME = "reward_model.json"
_LENGTH_STEP = 8


@dataclass(frozen=True)
class RewardModelCard:
    """What a reward model needs to be used as it was trained.

    Attributes:
        version: of the weights, a hash.
        base_model: backbone it was trained from.
        max_length: longest text in tokens it was trained with.
        append_eos: whether the end-of-sequence token was put behind the text.
        chat_template: template of chat messages, or None.
        training_data: hash of the pairs' file contents.
        evaluation: held-out figures.
    """

    version: str
    base_model: str
    max_length: int
    append_eos: bool
    chat_template: str | None
    training_data: str
    evaluation: dict[str, float]

    def save(self, folder: Path) -> None:
        (folder / CARD_NAME).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, model: str, key: str) -> RewardModelCard | None:
        """The card of a directory; none for a model that was trained elsewhere.

        Raises:
            BadInput: there is a card that cannot be read.
        """
        path = Path(model) / CARD_NAME
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise BadInput(
                key, f"'{path}' is not a reward model's card ({error})", "the card that train-rm wrote"
            ) from None


@dataclass(frozen=True)
class RewardEncoding:
    """How a text becomes the tokens that the model scores; the same in training, scoring and serving.

    Attributes:
        max_length: longest text in tokens.
        append_eos: put the end-of-sequence token behind texts that do not end in it. Decoders are read at the last
            token, and their tokenizers usually add none; encoders bring their own special tokens.
    """

    max_length: int
    append_eos: bool

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, max_length: int) -> RewardEncoding:
        own = tokenizer("").input_ids
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        return cls(max_length=max_length, append_eos=not own or own[-1] not in ends)

    def finish(self, token_ids: list[int], tokenizer: Any) -> tuple[list[int], bool]:
        """Token ids of a whole text, ended as the model expects and cut at the front to the maximum.

        Returns:
            The ids, and whether they were cut.
        """
        if self.append_eos and (not token_ids or token_ids[-1] != tokenizer.eos_token_id):
            token_ids = [*token_ids, tokenizer.eos_token_id]
        too_long = len(token_ids) > self.max_length
        return (token_ids[-self.max_length :] if too_long else token_ids), too_long

    def encode(self, text: str, tokenizer: Any) -> tuple[list[int], bool]:
        """Token ids of a text, cut at the front; the special tokens around it are kept.

        Returns:
            The ids, and whether they were cut.
        """
        token_ids = tokenizer(text, verbose=False).input_ids
        if len(token_ids) > self.max_length and not self.append_eos:
            tokenizer.truncation_side = "left"
            return tokenizer(text, truncation=True, max_length=self.max_length).input_ids, True
        return self.finish(token_ids, tokenizer)


def pad_texts(token_ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch of `[B, L]` with L a multiple of 8, so that few shapes (and their kernels) occur."""
    longest = max(len(ids) for ids in token_ids)
    width = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    ids = torch.full((len(token_ids), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(token_ids), width, dtype=torch.int64)
    for row, text in enumerate(token_ids):
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        mask[row, : len(text)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def load_reward_tokenizer(model: str, key: str) -> Any:
    """A tokenizer whose padding cannot be taken for the end of the text.

    Raises:
        BadInput: pad and end of sequence are the same token: the score would be read one token off.
    """
    tokenizer = load_tokenizer(model, key)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise BadInput(
            key,
            f"the tokenizer of '{model}' has no padding token of its own (pad {tokenizer.pad_token_id}, eos "
            f"{tokenizer.eos_token_id}); a score would be read at the wrong token",
            "a tokenizer whose pad_token differs from its eos_token",
        )
    return tokenizer


def load_reward_network(
    model: str, *, dtype: str, pad_token_id: int, dropout: float | None = None, attention: str | None = None
) -> Any:
    """An `AutoModelForSequenceClassification` with one label.

    Args:
        dtype: a torch type by name, already resolved.
        pad_token_id: of the tokenizer that goes with it.
        dropout: of the backbone in training; None leaves the model's own.
        attention: an attention that takes padded batches; None leaves it to transformers.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model)
    config.num_labels = 1
    config.pad_token_id = pad_token_id
    if dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "attention_dropout"):
            if name in config.to_dict():
                setattr(config, name, dropout)
    return AutoModelForSequenceClassification.from_pretrained(
        model, config=config, dtype=getattr(torch, dtype), attn_implementation=attention
    )


def weights_version(folder: Path) -> str:
    """A hash that names a directory's weights: size, first and last MiB of each weight file, and the configuration."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(size - (1 << 20), 0))
            digest.update(file.read())
    return digest.hexdigest()
