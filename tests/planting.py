"""Reward models with a fault planted in their directory, or in the code that scores with them.

Each `plant_…` takes the folder of a sound model and leaves everything but its fault as it was.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, load_file, save_file

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.randomness import batch_rows, keyed_generator
from rlhf_ray.reward.core.card import MemberLayout, Probe, RewardModelCard, ScoreAggregation
from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.core.loading import head_hash, pad_texts
from rlhf_ray.reward.core.scorer import RewardScorer
from rlhf_ray.reward.train.preference import bradley_terry_loss

HEADS = ("score.weight", "classifier.weight")


def copied(folder: Path, target: Path) -> Path:
    """A copy of a model's directory to plant a fault in."""
    return Path(shutil.copytree(folder, target))


def edit_json(path: Path, **changed: Any) -> None:
    """Set keys of a JSON object; None removes one."""
    content = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the tensors of a model."""
    file = folder / "model.safetensors"
    # Read as bytes: tensors that are mapped from the file change while it is written.
    save_file(change(load(file.read_bytes())), file, metadata={"format": "pt"})


def edit_tokenizer(folder: Path, **changed: Any) -> None:
    """Set attributes of the saved tokenizer."""
    tokenizer = load_tokenizer(str(folder), "reward.model")
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def sign_again(folder: Path) -> None:
    """Give the card the version of what is there now: a fault from before the card was written."""
    card = RewardModelCard.load(str(folder), "reward.model")
    assert card is not None
    card.model_copy(update={"version": card.version_of(folder)}).save(folder)


def plant_pad_is_eos(folder: Path) -> None:
    """The tokenizer pads with the token that ends a text."""
    tokenizer = load_tokenizer(str(folder), "reward.model")
    edit_tokenizer(folder, pad_token=tokenizer.eos_token or tokenizer.sep_token)


def plant_pad_id_is_eos_in_config(folder: Path) -> None:
    """transformers takes the end for padding, and reads the score one token early."""
    edit_json(folder / "config.json", pad_token_id=load_tokenizer(str(folder), "reward.model").eos_token_id)
    sign_again(folder)


def plant_no_pad_id_in_config(folder: Path) -> None:
    """transformers cannot tell where a text ends."""
    edit_json(folder / "config.json", pad_token_id=None)
    sign_again(folder)


def plant_padding_in_front(folder: Path) -> None:
    """The tokenizer pads in front of the text, which moves the positions of a model with absolute ones."""
    edit_json(folder / "tokenizer_config.json", padding_side="left")


def plant_mean_pooling(folder: Path) -> None:
    """Files of a sentence encoder beside the model: vLLM follows them and reads the mean over the tokens."""
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": size, "pooling_mode_mean_tokens": True})
    )


def plant_missing_head(folder: Path) -> None:
    """The head was not saved."""
    edit_weights(folder, lambda weights: {name: part for name, part in weights.items() if name not in HEADS})


def plant_new_head(folder: Path) -> None:
    """The head was made anew after training, in the same shape and spread."""

    def redraw(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in HEADS if name in weights)
        drawn = keyed_generator(0, "planted-head").standard_normal(weights[name].shape) * float(weights[name].std())
        return {**weights, name: torch.from_numpy(drawn.astype(np.float32))}

    edit_weights(folder, redraw)


def plant_new_head_signed(folder: Path) -> None:
    """The same, before the card was written: only what the learner recorded can tell."""
    plant_new_head(folder)
    card = RewardModelCard.load(str(folder), "reward.model")
    assert card is not None
    written = head_hash(load_file(folder / "model.safetensors"))
    card.model_copy(update={"head_hashes": (written,)}).save(folder)
    sign_again(folder)


def plant_other_weights(folder: Path) -> None:
    """One weight of the trunk was changed after training, too little to see in a score."""

    def nudge(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in weights if name not in HEADS and weights[name].dim() > 1)
        weights[name][-1, -1] += 1e-3
        return weights

    edit_weights(folder, nudge)


def plant_other_template(folder: Path) -> None:
    """Chats are rendered otherwise than in training."""
    edit_tokenizer(folder, chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}")


def plant_other_ending(folder: Path) -> None:
    """Texts end otherwise than the tokenizer needs."""
    card = RewardModelCard.load(str(folder), "reward.model")
    assert card is not None
    card.model_copy(update={"append_eos": not card.append_eos}).save(folder)
    sign_again(folder)


def plant_length_beyond_positions(folder: Path) -> None:
    """The card allows texts that the model has no positions for."""
    card = RewardModelCard.load(str(folder), "reward.model")
    assert card is not None
    card.model_copy(update={"max_length": 100_000}).save(folder)
    sign_again(folder)


class FaultyNetwork:
    """Stands in front of a network and spoils its logits.

    Args:
        network: a sound one.
        spoil: from the `[B, labels]` logits and the `[B, L]` attention mask.
    """

    def __init__(self, network: Any, spoil: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self._network, self._spoil = network, spoil

    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = self._network(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=self._spoil(logits, attention_mask))


class ReadingNetwork(FaultyNetwork):
    """Applies a decoder's head to the hidden state of another token than the last.

    Args:
        network: a sound decoder.
        place: from the `[B, L]` attention mask, which token of each row is read.
    """

    def __init__(self, network: Any, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._network, self._place = network, place

    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self._network.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return SimpleNamespace(logits=self._network.score(hidden[rows, self._place(attention_mask)]))


class PaddedRows:
    """Gives a faulty network padded rows, whatever the sound one would get."""

    def __init__(self, network: Any, pad_token_id: int) -> None:
        self._network, self._pad_token_id = network, pad_token_id

    def __call__(self, texts: Any, one_batch: bool) -> tuple[torch.Tensor, int]:
        batch = pad_texts(texts, self._pad_token_id)
        return self._network(**batch).logits.float(), batch["input_ids"].numel()


def faulty_scorer(wrap: Callable[[Any], Any]) -> Callable[[RewardSettings], RewardScorer]:
    """A scorer whose networks are wrapped: a fault that lives in code and not in the directory."""

    def build(settings: RewardSettings) -> RewardScorer:
        scorer = RewardScorer(settings)
        sound = [network.network for network in scorer._networks]
        for network in sound:
            network.set_attn_implementation("eager")
        faulty: Any = [PaddedRows(wrap(network), scorer.texts.tokenizer.pad_token_id) for network in sound]
        scorer._networks = faulty
        return scorer

    return build


def _spoiled(spoil: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[RewardSettings], RewardScorer]:
    return faulty_scorer(lambda network: FaultyNetwork(network, spoil))


ACTIVATION_LEFT_ON = _spoiled(lambda logits, mask: torch.sigmoid(logits))
BATCH_MEAN_TAKEN_OFF = _spoiled(lambda logits, mask: logits - 1e-3 * logits.mean(0))
PLACE_COUNTS = _spoiled(lambda logits, mask: logits + 1e-4 * torch.arange(len(logits))[:, None])
PADDING_COUNTS = _spoiled(lambda logits, mask: logits + 1e-4 * (1 - mask).sum(1, keepdim=True))
BATCH_SIZE_COUNTS = _spoiled(lambda logits, mask: logits + 1e-4 * len(logits))
CONSTANT = _spoiled(lambda logits, mask: torch.zeros_like(logits))
NOT_A_NUMBER = _spoiled(lambda logits, mask: logits * float("nan"))
READ_ONE_TOKEN_EARLY = faulty_scorer(lambda network: ReadingNetwork(network, lambda mask: mask.sum(1) - 2))
READ_AT_THE_FIRST_TOKEN = faulty_scorer(lambda network: ReadingNetwork(network, lambda mask: mask.sum(1) * 0))
READ_AT_THE_END_OF_THE_ROW = faulty_scorer(lambda network: ReadingNetwork(network, lambda mask: mask.sum(1) * 0 - 1))


_OPENINGS = ("I think the", "They say the", "We found the", "You know the")
_NOUNS = ("movie", "story", "music", "actor")
_HELD_OUT_NOUNS = ("ending", "book")
_GOOD = ("good", "great", "lovely", "charming", "bright", "moving")
_BAD = ("bad", "awful", "boring", "clumsy", "dull", "weak")
PREFERENCE_PROBABILITY = 0.9


@dataclass(frozen=True)
class SentimentPairs:
    """Whole texts of comparisons: one praises what the other damns."""

    chosen: list[str]
    rejected: list[str]


def sentiment_pairs(seed: int, count: int, *, held_out: bool = False) -> SentimentPairs:
    """Made-up short reviews in which quality and length are drawn apart; no text is in both parts."""
    random = keyed_generator(seed, "sentiment-pairs", int(held_out))
    nouns = _HELD_OUT_NOUNS if held_out else _NOUNS

    def review(adjectives: tuple[str, ...]) -> str:
        filler = " and that is all" * int(random.integers(5))
        return f"{random.choice(_OPENINGS)} {random.choice(nouns)} was {random.choice(adjectives)}{filler}."

    pairs = [(review(_GOOD), review(_BAD)) for _ in range(count)]
    return SentimentPairs([chosen for chosen, _ in pairs], [rejected for _, rejected in pairs])


def plant_flipped_labels(pairs: SentimentPairs) -> SentimentPairs:
    """The worse text is called the chosen one."""
    return SentimentPairs(pairs.rejected, pairs.chosen)


def plant_length_in_labels(pairs: SentimentPairs) -> SentimentPairs:
    """The longer text is called the chosen one, as a careless rater does."""
    by_length = [sorted(both, key=len, reverse=True) for both in zip(pairs.chosen, pairs.rejected, strict=True)]
    return SentimentPairs([longer for longer, _ in by_length], [shorter for _, shorter in by_length])


def plant_leak(held_out: SentimentPairs, training: SentimentPairs, count: int) -> SentimentPairs:
    """The last held-out pairs are training pairs."""
    return SentimentPairs(
        held_out.chosen[:-count] + training.chosen[:count], held_out.rejected[:-count] + training.rejected[:count]
    )


def train_reward_model(source: Path, folder: Path, pairs: SentimentPairs, seed: int, steps: int = 40) -> Path:
    """A sound directory after a second of Bradley-Terry training of a tiny decoder.

    Args:
        source: the untrained model and its tokenizer.
        folder: where to write.
        seed: of the head and the order of the pairs.
    """
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(str(source), "reward.model")
    network = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    drawn = keyed_generator(seed, "head").standard_normal(network.score.weight.shape) * 0.02
    network.score.weight.data = torch.from_numpy(drawn.astype(np.float32))
    encoding = RewardEncoding.for_backbone(tokenizer, 64)
    chosen, rejected = ([encoding.encode(text)[0] for text in texts] for texts in (pairs.chosen, pairs.rejected))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for step in range(steps):
        rows = batch_rows(len(chosen), 32, seed, step)
        texts = [chosen[row] for row in rows] + [rejected[row] for row in rows]
        scores = network(**pad_texts(texts, tokenizer.pad_token_id)).logits[:, 0]
        loss = bradley_terry_loss(
            *scores.chunk(2),
            chosen_probability=torch.full((32,), PREFERENCE_PROBABILITY),
            margin=None,
            weight=torch.ones(32),
            label_smoothing=0.0,
            centering=0.01,
        )
        optimizer.zero_grad()
        (loss / 32).backward()
        optimizer.step()
    return write_reward_model(network, tokenizer, folder, pairs.chosen[:4] + pairs.rejected[:4])


def write_reward_model(network: Any, tokenizer: Any, folder: Path, probes: list[str]) -> Path:
    """Weights, tokenizer and a card that holds what the network scores now.

    Args:
        probes: texts whose logits are recorded.
    """
    network.eval()
    encoding = RewardEncoding.for_backbone(tokenizer, 64)
    encoded = [encoding.encode(text)[0] for text in probes]
    with torch.inference_mode():
        logits = [network(input_ids=torch.tensor([ids])).logits[0].tolist() for ids in encoded]
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = RewardModelCard(
        version="",
        base_model="made",
        max_length=encoding.max_length,
        append_eos=encoding.append_eos,
        chat_template=tokenizer.chat_template,
        training_data="made",
        layout=MemberLayout(attributes=tuple(f"attribute-{index}" for index in range(network.config.num_labels))),
        aggregation=ScoreAggregation(attribute_weights=(1.0,) * network.config.num_labels),
        head_hashes=(head_hash(network.state_dict()),),
        probes=tuple(Probe(token_ids=tuple(ids), logits=tuple(row)) for ids, row in zip(encoded, logits, strict=True)),
    )
    card.save(folder)
    sign_again(folder)
    return folder


def write_encoder(folder: Path, texts: list[str], num_labels: int = 1) -> Path:
    """A small random BERT classifier with absolute positions, and words for tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in texts for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    network = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(words),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=64,
            num_labels=num_labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                drawn = keyed_generator(0, "encoder", name).standard_normal(parameter.shape) * 0.2
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return write_reward_model(network, tokenizer, folder, texts[:8])
