"""A score depends on its own text alone, and what cannot be scored is a failure, never a number."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.reward.core.card import MemberLayout, RewardModelCard, ScoreAggregation
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.scorer import RewardScorer
from tests.making import HIDDEN_SIZE, SCORE_ROUNDING, rollout_of, rounding
from tests.planting import copied, write_encoder

PROMPTS = [f"I think the {noun} was" for noun in ("movie", "story", "music", "actor", "ending", "book")]
RESPONSES = [
    " good from start to end.",
    " bad.",
    " moving in every way, and that is all.",
    " clumsy for the most part.",
    "",
    " x" * 20,
]


def card_of(**chosen: Any) -> RewardModelCard:
    """A card; what is not chosen is as for the tiny reward model."""
    known = {
        "version": "v7",
        "base_model": "base",
        "max_length": 64,
        "append_eos": True,
        "chat_template": None,
        "training_data": "hash",
    }
    return RewardModelCard(**{**known, **chosen})


@pytest.fixture(scope="module")
def scorer(tiny: Path) -> RewardScorer:
    return RewardScorer(RewardSettings(model=str(tiny / "reward_model")), str(tiny / "policy"))


def texts() -> list[str]:
    return [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def sampled(tokenizer: Any, ended: bool = True) -> Any:
    """The prompts and responses as a rollout of the tokenizer's ids."""
    responses = [tokenizer(response).input_ids or [tokenizer.eos_token_id] for response in RESPONSES]
    if ended:
        responses = [ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id] for ids in responses]
    return rollout_of([tokenizer(prompt).input_ids for prompt in PROMPTS], responses, finished=ended)


def conversations(prompts: list[Conversation] | None = None) -> dict[int, Conversation]:
    return dict(enumerate(prompts or [Conversation(prompt) for prompt in PROMPTS]))


def test_scores_are_the_models(scorer: RewardScorer, tiny: Path):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny / "reward_model").eval()
    tokenizer = load_tokenizer(str(tiny / "reward_model"), "reward.model")
    scored = scorer.score_texts(texts())
    column = scored.column()
    for text, score in zip(texts(), column.scores, strict=True):
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            assert abs(float(model(input_ids=ids).logits[0, 0]) - score) <= SCORE_ROUNDING
    assert np.ptp(column.scores) > 0.1, "the texts must have scores that differ, or this proves nothing"
    assert column.version == scorer.version != ""


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_neighbours_and_order_change_nothing(scorer: RewardScorer, tiny: Path, batch_size: int):
    expected = scorer.score_texts(texts()).scores
    order = [3, 0, 5, 1, 4, 2]
    other = RewardScorer(RewardSettings(model=str(tiny / "reward_model"), batch_size=batch_size))
    found = other.score_texts([texts()[index] for index in order] + ["They say the song is dull " * 6]).scores
    np.testing.assert_allclose(found[:-1], expected[order], rtol=0, atol=SCORE_ROUNDING)


@pytest.mark.parametrize("ended", [True, False])
def test_sampled_tokens_score_like_their_text(scorer: RewardScorer, policy_tokenizer: Any, ended: bool):
    column = scorer.score(sampled(policy_tokenizer, ended), conversations())
    header = column.header()
    np.testing.assert_allclose(column.scores, scorer.score_texts(texts()).scores, rtol=0, atol=SCORE_ROUNDING)
    np.testing.assert_array_equal(header.scores, column.scores)
    assert np.isfinite(header.scores).all()


@pytest.fixture(scope="module")
def foreign_policy(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same policy with one more token, so that ids cannot be handed over."""
    folder = tmp_path_factory.mktemp("foreign") / "policy"
    shutil.copytree(tiny / "policy", folder)
    tokenizer = load_tokenizer(str(folder), "policy.model")
    tokenizer.add_tokens(["<unheard-of>"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_another_tokenizer_is_scored_by_its_text(scorer: RewardScorer, tiny: Path, foreign_policy: str):
    foreign = RewardScorer(RewardSettings(model=str(tiny / "reward_model")), foreign_policy)
    tokenizer = load_tokenizer(foreign_policy, "policy.model")
    column = foreign.score(sampled(tokenizer), conversations())
    np.testing.assert_allclose(column.scores, scorer.score_texts(texts()).scores, rtol=0, atol=SCORE_ROUNDING)


@pytest.mark.parametrize("shared_ids", [True, False])
def test_chat_messages_are_rendered_with_the_reward_models_template(
    scorer: RewardScorer, tiny: Path, foreign_policy: str, shared_ids: bool
):
    """Without a card as the template has it, even where the policy has the same: its ids end at the eos."""
    own = scorer if shared_ids else RewardScorer(RewardSettings(model=str(tiny / "reward_model")), foreign_policy)
    tokenizer = load_tokenizer(str(tiny / "policy") if shared_ids else foreign_policy, "policy.model")
    prompts = [Conversation("not this", ({"role": "user", "content": prompt},)) for prompt in PROMPTS]
    column = own.score(sampled(tokenizer), conversations(prompts))
    rendered = [
        f"<bos>user\n{prompt}<eos>\n<bos>assistant\n{response}<eos>\n"
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    np.testing.assert_allclose(
        column.scores, scorer.score_texts(rendered, templated=True).scores, rtol=0, atol=SCORE_ROUNDING
    )


OTHER_TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + ': ' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("same_template", [True, False])
def test_sampled_ids_of_a_chat_are_shared_only_under_the_same_template(
    scorer: RewardScorer, altered: Path, tiny: Path, policy_tokenizer: Any, same_template: bool
):
    """One vocabulary. Under another template the ids that the policy sampled are not what the model was trained on."""
    template = policy_tokenizer.chat_template if same_template else OTHER_TEMPLATE
    card_of(chat_template=template, append_eos=True).save(altered)
    own = RewardScorer(RewardSettings(model=str(altered)), str(tiny / "policy"))
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rendered = [policy_tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    rollout = rollout_of(
        [policy_tokenizer(text, add_special_tokens=False).input_ids for text in rendered],
        [[*policy_tokenizer(response).input_ids, policy_tokenizer.eos_token_id] for response in RESPONSES],
    )
    prompts = [Conversation(text, tuple(chat)) for text, chat in zip(rendered, chats, strict=True)]
    column = own.score(rollout, conversations(prompts))
    shape = (
        "<bos>user\n{}<eos>\n<bos>assistant\n{}<eos>" if same_template else "<bos>user: {}<eos><bos>assistant: {}<eos>"
    )
    seen = [shape.format(prompt, response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    expected = scorer.score_texts(seen, templated=True).scores
    np.testing.assert_allclose(column.scores, expected, rtol=0, atol=SCORE_ROUNDING)


@pytest.mark.parametrize("shared_ids", [True, False])
def test_an_id_that_no_token_has_fails_its_own_sample(
    scorer: RewardScorer, tiny: Path, foreign_policy: str, shared_ids: bool
):
    """A policy whose embedding was padded to a round number of rows samples one of the rows behind the last token."""
    own = scorer if shared_ids else RewardScorer(RewardSettings(model=str(tiny / "reward_model")), foreign_policy)
    tokenizer = load_tokenizer(str(tiny / "policy") if shared_ids else foreign_policy, "policy.model")
    whole = sampled(tokenizer)
    expected = own.score(whole, conversations())
    tokens = whole.tokens.copy()
    tokens[int(whole.token_starts()[2]) + int(whole.prompt_lengths[2]) + 1] = len(tokenizer)
    column = own.score(replace(whole, tokens=tokens), conversations())
    header = column.header()
    assert [bool(cause) for cause in column.failures] == [False, False, True, False, False, False]
    assert header.failure_causes == {"the response has a token id that the policy's tokenizer does not know": 1}
    np.testing.assert_allclose(np.delete(column.scores, 2), np.delete(expected.scores, 2), rtol=0, atol=SCORE_ROUNDING)


def test_a_chat_that_the_reward_models_template_refuses_fails_its_own_sample(
    altered: Path, tiny: Path, policy_tokenizer: Any
):
    refusing = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + OTHER_TEMPLATE
    card_of(chat_template=refusing).save(altered)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    chats = [({"role": "user", "content": prompt},) for prompt in PROMPTS]
    prompts = [Conversation("", ((*turns, *chat) if index == 4 else chat)) for index, chat in enumerate(chats)]
    own = RewardScorer(RewardSettings(model=str(altered)), str(tiny / "policy"))
    column = own.score(sampled(policy_tokenizer), conversations(prompts))
    assert column.ok.tolist() == [True, True, True, True, False, True]
    assert "one turn only" in column.failures[4]


def test_a_text_that_is_too_long_fails_or_is_cut_and_counted(scorer: RewardScorer, tiny: Path):
    settings = RewardSettings(model=str(tiny / "reward_model"), max_length=12)
    failing = RewardScorer(settings).score_texts(texts())
    assert failing.failures[1] == ""
    assert failing.failures[5] == "the text is longer than 12 tokens"
    assert np.isnan(failing.scores[5])
    header = failing.column().header()
    num_failed = int(np.isnan(header.scores).sum())
    assert num_failed
    assert header.failure_causes == {failing.failures[5]: num_failed}

    cut = RewardScorer(settings.model_copy(update={"on_too_long": "truncate"})).score_texts(texts())
    assert cut.column().ok.all()
    assert cut.column().num_truncated == num_failed
    kept = failing.column().ok
    np.testing.assert_allclose(cut.scores[kept], failing.scores[kept], rtol=0, atol=SCORE_ROUNDING)


@pytest.fixture
def altered(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "reward_model", tmp_path / "model"))


def test_scores_that_are_not_finite_are_failures(altered: Path, tiny: Path):
    from safetensors.torch import load_file, save_file

    tokenizer = load_tokenizer(str(altered), "reward.model")
    weights = load_file(altered / "model.safetensors")
    poisoned = tokenizer(" moving").input_ids[0]
    weights["model.embed_tokens.weight"][poisoned] = float("nan")
    save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
    expected = RewardScorer(RewardSettings(model=str(tiny / "reward_model"))).score_texts(texts()).scores
    column = RewardScorer(RewardSettings(model=str(altered))).score_texts(texts())
    assert column.failures[2] == "the reward model returned nan"
    assert np.isnan(column.scores[2])
    others = [0, 1, 3, 4, 5]
    assert [column.failures[index] for index in others] == [""] * 5, "a neighbour's NaN spread over the batch"
    np.testing.assert_allclose(column.scores[others], expected[others], rtol=0, atol=SCORE_ROUNDING)


def test_the_card_decides_as_in_training(scorer: RewardScorer, altered: Path):
    card_of(max_length=10, append_eos=False, chat_template="{{ messages[0]['content'] }}").save(altered)
    carded = RewardScorer(RewardSettings(model=str(altered)))
    assert carded.version == "v7"
    column = carded.score_texts([texts()[1], texts()[5]])
    assert column.failures == ("", "the text is longer than 10 tokens")
    assert abs(column.scores[0] - scorer.score_texts(texts()).scores[1]) > 1e-4, "no eos was in training"


def test_a_text_without_tokens_is_a_failure(altered: Path):
    card_of(append_eos=False).save(altered)
    assert RewardScorer(RewardSettings(model=str(altered))).score_texts([""]).failures == ("the text has no tokens",)


def test_positions_beyond_the_tokenizers_own_limit_are_too_long(altered: Path):
    """A model may hold more positions than texts may have (RoBERTa holds two more)."""
    tokenizer = load_tokenizer(str(altered), "reward.model")
    tokenizer.model_max_length = 20
    tokenizer.save_pretrained(altered)
    [failure] = RewardScorer(RewardSettings(model=str(altered))).score_texts(["good " * 40]).failures
    assert failure == "the text is longer than 20 tokens"


def several_labels(folder: Path, labels: int, seed: int) -> None:
    """Give a reward model a head of several labels."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    network.save_pretrained(folder)


def test_members_are_centred_within_the_prompts_of_a_rollout(altered: Path, tiny: Path, policy_tokenizer: Any):
    several_labels(altered, 3, seed=0)
    aggregation = ScoreAggregation(members="minimum", offsets=(0.0, 0.1, -0.1), scales=(1.0, 2.0, 0.5))
    card_of(layout=MemberLayout(heads=3), aggregation=aggregation).save(altered)
    scorer = RewardScorer(RewardSettings(model=str(altered)), str(tiny / "policy"))
    rollout = sampled(policy_tokenizer)
    groups = np.array([0, 0, 0, 1, 1, 2])
    prompts = {group: Conversation(PROMPTS[group]) for group in range(3)}
    apart = scorer.score(rollout, conversations())
    together = scorer.score(replace(rollout, prompt_ids=groups), prompts)
    members = aggregation.member_scores(scorer.score_texts(texts()).heads)
    expected = members.copy()
    for group in (0, 1):
        own = members[groups == group]
        expected[groups == group] = own - own.mean(0) + own.mean()
    np.testing.assert_allclose(apart.scores, members.min(1), rtol=0, atol=4 * SCORE_ROUNDING)
    np.testing.assert_allclose(together.scores, expected.min(1), rtol=0, atol=4 * SCORE_ROUNDING)
    np.testing.assert_allclose(together.disagreement, expected.std(1), rtol=0, atol=4 * SCORE_ROUNDING)
    assert together.scores[5] == apart.scores[5]
    assert (together.disagreement[:5] < 0.5 * apart.disagreement[:5]).any()


def test_heads_members_and_models_become_one_score(altered: Path, tiny: Path):
    """Two attributes, two heads on each of two trunks: in the places that the card says."""
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(tiny / "reward_model", altered / "member-1")
    for number, folder in enumerate((altered, altered / "member-1")):
        several_labels(folder, 4, seed=number)
    layout = MemberLayout(attributes=("preference", "safety"), heads=2, folders=(".", "member-1"))
    aggregation = ScoreAggregation(
        members="minimum",
        attribute_weights=(1.0, 0.5),
        offsets=(0.1, 0.0, -0.2, 0.3),
        scales=(1.0, 2.0, 1.5, 0.5),
        length_coefficient=0.01,
    )
    card_of(layout=layout, aggregation=aggregation).save(altered)
    scored = RewardScorer(RewardSettings(model=str(altered))).score_texts(texts())
    tokenizer = load_tokenizer(str(altered), "reward.model")
    networks = [
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (altered, altered / "member-1")
    ]
    for index, text in enumerate(texts()):
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = [network(input_ids=torch.tensor([ids])).logits[0].double().numpy() for network in networks]
        members = []
        for own in logits:
            for head in range(2):
                members.append(own[head] + 0.5 * own[2 + head])
        unit, offset = 1.25, 0.05
        brought = [
            (member - origin) / scale * unit + offset
            for member, origin, scale in zip(members, aggregation.offsets, aggregation.scales, strict=True)
        ]
        # A logit is multiplied by at most 1.25 / 0.5 on the way.
        tolerance = rounding(HIDDEN_SIZE, 2.5)
        assert scored.scores[index] == pytest.approx(min(brought) - 0.01 * len(ids), abs=tolerance)
        assert scored.disagreement[index] == pytest.approx(np.std(brought), abs=tolerance)
    assert scored.column().disagreement is scored.disagreement


def test_one_judge_does_not_disagree(scorer: RewardScorer):
    scored = scorer.score_texts(texts())
    assert (scored.disagreement == 0).all()
    assert scored.column().disagreement is None


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = ["one short text", "a text of some more words than that one has", "words"]
    return write_encoder(tmp_path_factory.mktemp("bert") / "encoder", texts, num_labels=1)


@pytest.mark.parametrize("batch_invariant", [True, False])
@pytest.mark.parametrize("architecture", ["decoder", "bert"])
def test_a_score_is_the_same_in_any_company(tiny: Path, bert: Path, architecture: str, batch_invariant: bool):
    """Bit-for-bit alone, and with the kernels for AVX-512; others treat the rows of a block differently."""
    plain = torch.backends.cpu.get_cpu_capability() == "AVX512" and "MKL_ENABLE_INSTRUCTIONS" not in os.environ
    bound = 0.0 if batch_invariant or plain else SCORE_ROUNDING
    model = {"decoder": tiny / "reward_model", "bert": bert}[architecture]
    scorer = RewardScorer(RewardSettings(model=str(model), batch_invariant=batch_invariant))
    random = np.random.default_rng(0)
    vocabulary = len(scorer.texts.tokenizer)
    tokens = [random.integers(3, vocabulary, random.integers(1, 60)).tolist() for _ in range(64)]
    expected = scorer.score_tokens(tokens).scores
    for size in (1, 2, 5, 16, 33, 64):
        order = random.permutation(64)
        found = [
            scorer.score_tokens([tokens[index] for index in order[start : start + size]]).scores
            for start in range(0, 64, size)
        ]
        np.testing.assert_allclose(np.concatenate(found), expected[order], rtol=0, atol=bound)
    assert len(np.unique(expected)) > 32


def test_the_modes_agree(tiny: Path):
    tokens = [list(range(3, 3 + length)) for length in range(1, 60)]
    packed, fixed = (
        RewardScorer(RewardSettings(model=str(tiny / "reward_model"), batch_invariant=invariant)).score_tokens(tokens)
        for invariant in (False, True)
    )
    np.testing.assert_allclose(packed.scores, fixed.scores, rtol=0, atol=SCORE_ROUNDING)


def test_a_head_that_was_not_saved_is_refused(altered: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(altered / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, altered / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"no weights for score\.weight; transformers would make them up"):
        RewardScorer(RewardSettings(model=str(altered)))


def test_the_cards_temperature_is_applied_on_request(altered: Path, scorer: RewardScorer):
    card_of(temperature=2.5).save(altered)
    raw = RewardScorer(RewardSettings(model=str(altered))).score_texts(texts()).scores
    np.testing.assert_allclose(raw, scorer.score_texts(texts()).scores, rtol=0, atol=SCORE_ROUNDING)
    scaled = RewardScorer(RewardSettings(model=str(altered), apply_temperature=True)).score_texts(texts()).scores
    np.testing.assert_allclose(scaled, raw / 2.5, rtol=1e-12)


def test_an_encoder_is_read_at_its_first_token(tmp_path: Path):
    texts = ["one short text", "a text of some more words than that one has", "words"] * 3
    model = str(write_encoder(tmp_path / "encoder", texts, num_labels=1))
    found = RewardScorer(RewardSettings(model=model)).score_texts(texts).scores
    padded = RewardScorer(RewardSettings(model=model, batch_invariant=True)).score_texts(texts).scores
    assert len(np.unique(found.round(4))) == 3
    np.testing.assert_allclose(found, padded, rtol=0, atol=SCORE_ROUNDING)


def test_scores_do_not_change_with_the_file_that_they_were_read_from(tiny, tmp_path):
    folder = copied(tiny / "reward_model", tmp_path / "model")
    scorer = RewardScorer(RewardSettings(model=str(folder)))
    before = scorer.score_texts(["The film was good."]).scores
    file = folder / "model.safetensors"
    with file.open("r+b") as weights:
        weights.seek(file.stat().st_size // 2)
        weights.write(bytes(file.stat().st_size // 2))
    assert scorer.score_texts(["The film was good."]).scores == before


def test_padding_counts_towards_the_tokens_of_a_pass(tiny, monkeypatch):
    scorer = RewardScorer(RewardSettings(model=str(tiny / "reward_model"), batch_tokens=64))
    for packed, expected in ((True, [4, 4]), (False, [2, 4, 2])):
        scorer._packed = packed
        lengths = np.array([32, 9, 9, 9, 9, 9, 9, 8])
        assert [len(rows) for rows in scorer._batches(range(8), lengths)] == expected
        assert [len(rows) for rows in scorer._batches(range(2), np.array([500, 8]))] == [1, 1]


def test_one_scorer_computes_on_one_gpu():
    with pytest.raises(ValueError, match=r"gpus \(2\) must not be above 1"):
        RewardSettings(model="x", gpus=2)
