"""Made-up models and data that are written in seconds and run in seconds, the same bytes on every machine.

Weights are drawn with NumPy, one key a tensor, because torch's own initialisation depends on the
machine's vector instructions. The models know nothing; they are for tests of the machinery.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray.randomness import keyed_generator

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

FORMAT_VERSION = 2
SEED = 135
VOCABULARY = 512
"""At most; the small corpus gives fewer merges."""
CONTEXT_TOKENS = 256
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>")
WEIGHT_STD = 0.05
SCORE_STD = 0.3
"""Of the reward model's head: large enough that scores of different texts clearly differ."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\\n' + message['content'] + '<eos>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\\n' }}{% endif %}"
)

_OPENINGS = ("I think", "They say", "We found", "You know")
_NOUNS = ("movie", "story", "music", "actor", "ending", "book", "song", "play", "cast", "scene")
_VERBS = ("was", "is", "seems")
_GOOD = ("good", "great", "lovely", "charming", "bright", "moving", "funny", "clever")
_BAD = ("bad", "awful", "boring", "clumsy", "dull", "weak", "silly", "tedious")
_ENDINGS = ("from start to end", "in every way", "for the most part", "and that is all")


def build(archive: Path, target: Path, report: Callable[[str], None]) -> dict[str, object]:
    """Write models and data; `archive` is not used, there is no source."""
    rows = _rows()
    for name, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (target / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    report("making a tokenizer and three random models")
    tokenizer = _tokenizer(
        [str(row["text"]) for row in rows["sft_train"]]
        + [_sentence(*words, good=good) for words in _all_words() for good in (0, 5)]
    )
    _save_models(tokenizer, target)
    return {"rows": {name: len(content) for name, content in rows.items()}, "seed": SEED}


def _all_words() -> list[tuple[str, str, str]]:
    """Every opening, noun and verb, in keyed order."""
    words = list(product(_OPENINGS, _NOUNS, _VERBS))
    return [words[index] for index in keyed_generator(SEED, "words").permutation(len(words))]


def _prompt(opening: str, noun: str, verb: str) -> str:
    return f"{opening} the {noun} {verb}"


def _response(key: str, index: int, adjectives: tuple[str, ...]) -> str:
    draw = keyed_generator(SEED, key, index)
    return f" {draw.choice(adjectives)} {draw.choice(_ENDINGS)}."


def _sentence(opening: str, noun: str, verb: str, good: int) -> str:
    adjectives = _GOOD if good else _BAD
    return f"{_prompt(opening, noun, verb)} {adjectives[good]} {_ENDINGS[len(noun) % len(_ENDINGS)]}."


def _rows() -> dict[str, list[dict[str, object]]]:
    """Training rows use the first 96 openings, held-out rows the other 24."""
    openings = [_prompt(*words) for words in _all_words()]
    train, test = openings[:96], openings[96:]

    def pairs(side: str, source: list[str], count: int) -> list[dict[str, object]]:
        return [
            {
                "prompt": source[index % len(source)],
                "chosen": _response(f"{side}-chosen", index, _GOOD),
                "rejected": _response(f"{side}-rejected", index, _BAD),
                "chosen_probability": 0.9,
                "gap": 2.0,
                "source": "tiny",
            }
            for index in range(count)
        ]

    return {
        "prompts": [{"prompt": prompt} for prompt in train[:64]],
        "prompts_test": [{"prompt": prompt} for prompt in test[:16]],
        "pairs_train": pairs("train", train, 128),
        "pairs_test": pairs("test", test, 32),
        "sft_train": [
            {"text": prompt + _response("text", index, _GOOD + _BAD)} for index, prompt in enumerate(train[:64])
        ],
    }


def _tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    pad, eos, bos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    )


def _save_models(tokenizer: PreTrainedTokenizerFast, target: Path) -> None:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    models = {
        "policy": LlamaForCausalLM(_config(tokenizer)),
        "policy_tied": LlamaForCausalLM(_config(tokenizer, tied=True)),
        "reward_model": LlamaForSequenceClassification(_config(tokenizer, num_labels=1)),
    }
    for name, model in models.items():
        _draw_weights(model, name)
        model.save_pretrained(target / name)
        tokenizer.save_pretrained(target / name)


def _config(tokenizer: PreTrainedTokenizerFast, tied: bool = False, **more: int) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        dtype="float32",
        **more,
    )


def _draw_weights(model: PreTrainedModel, key: str) -> None:
    """Normal matrices, one key each; norms stay at 1."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = SCORE_STD if name == "score.weight" else WEIGHT_STD
                values = keyed_generator(SEED, key, name).standard_normal(parameter.shape) * std
                parameter.copy_(torch.from_numpy(values.astype("float32")))
