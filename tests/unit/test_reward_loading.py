"""How a text becomes the tokens that a reward model scores, and the card beside its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.data.rows import RowError
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reward.core.card import (
    MemberLayout,
    RewardModelCard,
    ScoreAggregation,
    directory_version,
    weights_version,
)
from rlhf_ray.reward.core.encoding import RewardEncoding
from rlhf_ray.reward.core.loading import (
    head_hash,
    load_reward_network,
    load_reward_tokenizer,
    pad_texts,
    written_head_hash,
)
from rlhf_ray.reward.core.texts import RewardTexts
from rlhf_ray.reward.judge.inputs import read_pairs

TEXT = "I think the movie was good in every way."


@pytest.fixture(scope="module")
def encoder_tokenizer() -> Any:
    """WordPiece with special tokens around the text, as BERT has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *TEXT.removesuffix(".").split(), "."]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def test_decoder_texts_end_in_one_eos(policy_tokenizer: Any):
    encoding = RewardEncoding.for_backbone(policy_tokenizer, 64)
    assert encoding.append_eos
    plain = policy_tokenizer(TEXT).input_ids
    eos = policy_tokenizer.eos_token_id
    assert encoding.encode(TEXT) == ([*plain, eos], False)
    assert encoding.finish([*plain, eos]) == ([*plain, eos], False)
    assert encoding.encode("") == ([eos], False)


def test_decoder_texts_are_cut_at_the_front(policy_tokenizer: Any):
    whole, _ = RewardEncoding(policy_tokenizer, 64, True).encode(TEXT)
    assert RewardEncoding(policy_tokenizer, 5, True).encode(TEXT) == (whole[-5:], True)
    assert RewardEncoding(policy_tokenizer, len(whole), True).encode(TEXT) == (whole, False)
    assert RewardEncoding(policy_tokenizer, len(whole) - 1, True).encode(TEXT) == (whole[1:], True)


def test_encoder_texts_keep_their_special_tokens(encoder_tokenizer: Any):
    encoding = RewardEncoding.for_backbone(encoder_tokenizer, 64)
    assert not encoding.append_eos
    whole, was_cut = encoding.encode(TEXT)
    assert (whole[0], whole[-1], was_cut) == (2, 3, False)
    ids, was_cut = RewardEncoding(encoder_tokenizer, 6, False).encode(TEXT)
    assert was_cut
    assert ids == [2, *whole[-5:]]


@pytest.mark.parametrize("kind", ["policy_tokenizer", "encoder_tokenizer"])
def test_a_text_far_too_long_has_the_tokens_of_the_whole(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    """Most of it is not even tokenised."""
    tokenizer, random = request.getfixturevalue(kind), np.random.default_rng(0)
    words = ["good", "a", "film,", "I", "think.", "émouvant", "好。", "!!", "\n\n", "   ", "x" * 3000, "12345"]
    for length in (8, 40):
        encoding = RewardEncoding.for_backbone(tokenizer, length)
        for keep in ("end", "start"):
            for templated in (False, True):
                text = " ".join(random.choice(words, 2000).tolist())
                asked = {"templated": templated, "max_tokens": length - 1, "keep": keep}
                found = encoding.encode(text, **asked)
                assert len(encoding.decisive(text, length - 1, keep)) < len(text) / 2
                with monkeypatch.context() as patch:
                    patch.setattr(RewardEncoding, "_without_middle", lambda self, text, *_: text)
                    assert encoding.encode(text, **asked) == found
                assert found[1]
    run = "a" * 20_000  # where the pieces of one long word begin depends on where it does
    assert encoding.decisive(run, 40) == run


def test_a_batch_is_padded_behind_the_text_to_a_multiple_of_eight():
    batch = pad_texts([[5, 6, 7], list(range(9))], pad_token_id=0)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [0] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]


def test_pickled_weights_of_a_member_are_refused(tiny: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny / "reward_model", tmp_path / "model"))
    shutil.copytree(tiny / "reward_model", model / "member-1")
    card = RewardModelCard(
        version="",
        base_model="",
        max_length=64,
        append_eos=True,
        chat_template=None,
        training_data="",
        layout=MemberLayout(folders=(".", "member-1")),
    )
    card.save(model)
    RewardTexts.read(str(model))
    (model / "member-1" / "model.safetensors").rename(model / "member-1" / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"member-1' has pickled weights \(pytorch_model\.bin\)"):
        RewardTexts.read(str(model))


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_padding_that_looks_like_the_end_is_refused(tiny: Path, tmp_path: Path, pad: str | None):
    model = shutil.copytree(tiny / "reward_model", tmp_path / "model")
    tokenizer = load_tokenizer(str(model), "reward.model")
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(model)
    with pytest.raises(BadInput, match=r"reward\.model: .*no padding token of its own"):
        load_reward_tokenizer(str(model), "reward.model")


def test_network_has_the_labels_and_the_dropout_that_are_asked_for(tiny: Path):
    network = load_reward_network(
        str(tiny / "reward_model"),
        dtype="bfloat16",
        pad_token_id=0,
        attention="eager",
        num_labels=3,
        new_head=True,
        dropout=0.25,
    )
    assert network.config.num_labels == 3
    assert network.score.weight.shape[0] == 3
    assert network.config.attention_dropout == 0.25
    assert next(network.parameters()).dtype == torch.bfloat16


def test_a_text_that_is_cut_still_begins_as_it_should(tiny: Path):
    tokenizer = load_tokenizer(str(tiny / "reward_model"), "reward.model")
    ids = [tokenizer.bos_token_id, *range(10, 20)]
    assert RewardEncoding(tokenizer, 5, False).finish(ids) == ([tokenizer.bos_token_id, 16, 17, 18, 19], True)
    assert RewardEncoding(tokenizer, 5, False).finish(ids[1:]) == ([15, 16, 17, 18, 19], True)


def test_templated_texts_get_no_second_special_tokens(encoder_tokenizer: Any):
    encoding = RewardEncoding(encoder_tokenizer, 64, False)
    plain, _ = encoding.encode(TEXT)
    templated, _ = encoding.encode(TEXT, templated=True)
    assert templated == plain[1:-1]


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURN = [{"role": "user", "content": "Was it good?"}, {"role": "assistant", "content": "Yes, it was."}]


def with_template(tiny: Path, folder: Path, template: str | None, eos_token: str | None = None) -> Path:
    """The tiny reward model under another template; `eos_token` becomes a token of its vocabulary."""
    model = Path(shutil.copytree(tiny / "reward_model", folder))
    tokenizer = load_tokenizer(str(model), "reward.model")
    (model / "chat_template.jinja").unlink()
    tokenizer.chat_template = template
    if eos_token is not None:
        tokenizer.add_special_tokens({"eos_token": eos_token})
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
    tokenizer.save_pretrained(model)
    return model


@pytest.mark.parametrize(
    ("template", "eos_token"),
    [
        (CHATML, None),
        (CHATML, "<|im_end|>"),
        (CHATML.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>"), None),
    ],
    ids=["ChatML that does not end in eos", "ChatML with white space behind eos", "Gemma"],
)
def test_a_published_model_is_shown_the_rendered_template_as_it_is(
    tiny: Path, tmp_path: Path, template: str, eos_token: str | None
):
    """As model cards of published reward models have it: `tokenizer(apply_chat_template(…, tokenize=False))`."""
    model = with_template(tiny, tmp_path / "model", template, eos_token)
    texts = RewardTexts.read(str(model))
    rendered = texts.tokenizer.apply_chat_template(TURN, tokenize=False)
    published = texts.tokenizer(rendered, add_special_tokens=False).input_ids
    assert texts.encode_messages(TURN) == (published, False)
    assert texts.encode(rendered, templated=True) == (published, False)
    # Pairs that are judged, and chats that a service cuts.
    row = {"prompt": TURN[:1], "chosen": TURN[1:], "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    encoding = RewardEncoding.of_model(texts.tokenizer, None, 256)
    used = read_pairs(PreferenceSettings(path=str(tmp_path / "pairs.jsonl")), "pairs.path", encoding, "fail")
    assert used.chosen == (tuple(published),)
    assert texts.encode_messages(TURN, max_tokens=5) == ([published[0], *published[-4:]], True)
    # One that was trained here ends as it did in training: where a policy stops.
    card_of(chat_template=template, max_length=256).save(model)
    [*kept, last], _ = RewardTexts.read(str(model)).encode_messages(TURN)
    assert last == texts.tokenizer.eos_token_id
    assert kept == (published if eos_token is None else published[: len(kept)])


def test_one_turn_without_a_chat_template_is_prompt_and_response(tiny: Path, tmp_path: Path):
    texts = RewardTexts.read(str(with_template(tiny, tmp_path / "model", None)))
    assert texts.encode_messages(TURN) == texts.encode(TURN[0]["content"] + TURN[1]["content"])
    assert texts.encode_messages(TURN, max_tokens=5)[1]
    for messages in ([{"role": "system", "content": "Be brief."}, *TURN], [*TURN, *TURN], TURN[1:]):
        with pytest.raises(RowError, match="no chat template"):
            texts.encode_messages(messages)


def card_of(**chosen: Any) -> RewardModelCard:
    known = {"base_model": "base", "max_length": 77, "append_eos": True, "chat_template": "{{ messages }}"}
    return RewardModelCard(**{"version": "v1", "training_data": "hash", **known, **chosen})


def test_card_round_trip(tmp_path: Path):
    card = card_of(evaluation={"accuracy": 0.9}, layout=MemberLayout(heads=3), released=False, refusals=("no",))
    card.save(tmp_path)
    assert RewardModelCard.load(str(tmp_path), "reward.model") == card
    assert RewardModelCard.load(str(tmp_path / "elsewhere"), "reward.model") is None


def test_version_names_everything_a_score_depends_on(tiny: Path):
    folder = tiny / "reward_model"
    version = card_of().version_of(folder)
    changed = [{"append_eos": False}, {"chat_template": None}, {"max_length": 78}, {"layout": MemberLayout(heads=2)}]
    versions = {card_of(**change).version_of(folder) for change in changed}
    assert len(versions | {version}) == len(changed) + 1
    for change in ({"released": True}, {"evaluation": {"accuracy": 1.0}}, {"temperature": 2.0}):
        assert card_of(**change).version_of(folder) == version


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "v1"}', '{"colour": 1}'])
def test_a_broken_card_is_bad_input(tmp_path: Path, content: str):
    (tmp_path / "reward_model.json").write_text(content)
    with pytest.raises(BadInput, match=r"reward_model\.json' is not a reward model's card"):
        RewardModelCard.load(str(tmp_path), "reward.model")


def test_version_names_the_weights(tiny: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny / "reward_model", tmp_path / "model"))
    first = weights_version(model)
    assert first == weights_version(tiny / "reward_model")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    assert weights_version(model) != first


def test_version_names_the_tokenizer_where_the_card_says_so(tiny: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny / "reward_model", tmp_path / "model"))
    old, new = card_of(), card_of(covers_tokenizer=True)
    before = old.version_of(model), new.version_of(model), directory_version(model)
    assert before[0] != before[1]
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    after = old.version_of(model), new.version_of(model), directory_version(model)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_the_head_that_was_written_is_told_from_another(tiny: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny / "reward_model", tmp_path / "model"))
    network = AutoModelForSequenceClassification.from_pretrained(model)
    assert written_head_hash(model) == head_hash(network.state_dict())
    network.score.weight.data += 1
    network.save_pretrained(model)
    assert written_head_hash(model) == head_hash(network.state_dict())
    assert written_head_hash(model) != written_head_hash(tiny / "reward_model")


def test_the_penalty_for_disagreement_does_not_depend_on_the_scale_of_the_members():
    random = np.random.default_rng(0)
    heads = random.normal(size=(50, 1, 4))
    count = np.zeros(50, dtype=np.int64)
    offsets, scales = heads[:, 0].mean(0), heads[:, 0].std(0)

    def scores(factor: float) -> tuple[np.ndarray, np.ndarray]:
        aggregation = ScoreAggregation(
            members="mean_minus_variance",
            variance_weight=0.7,
            offsets=tuple(offsets * factor),
            scales=tuple(scales * factor),
        )
        return aggregation.scores(heads * factor, count)

    standard = (heads[:, 0] - offsets) / scales
    unit = scales.mean()
    expected = (standard.mean(1) - 0.7 * standard.var(1)) * unit + offsets.mean()
    np.testing.assert_allclose(scores(1.0)[0], expected, rtol=0, atol=1e-12)
    for one, other in zip(scores(1.0), scores(10.0), strict=True):
        np.testing.assert_allclose(one * 10, other, rtol=0, atol=1e-11)
