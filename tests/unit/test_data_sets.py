"""Prompts, training text and preference pairs: every format, every kind of bad row."""

import json

import numpy as np
import pytest

from rlhf_ray.config.reward_model import PreferenceSettings
from rlhf_ray.config.settings import PromptSettings, TextSettings
from rlhf_ray.data.preferences import attribute_names, load_preferences
from rlhf_ray.data.prompts import Prompt, PromptSet, load_prompts
from rlhf_ray.data.rows import BadRows
from rlhf_ray.data.text import load_text
from rlhf_ray.failures import BadInput

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
OTHER_USER = {"role": "user", "content": "Bye"}


def answer(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


@pytest.fixture
def without_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write_rows(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write_rows


def prompts_of(path, tokenizer, max_prompt_tokens=20, context_tokens=30, section="sampling", **settings):
    return load_prompts(
        PromptSettings(path=path, **settings),
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        context_tokens=context_tokens,
        max_response_tokens=10,
        key="prompts.path",
        section=section,
    )


# Prompts


def test_prompts_are_strings_or_messages(write, tokenizer):
    path = write({"prompt": " A b ", "label": {"x": 1}}, {"prompt": [USER]}, {"input": "see"})
    prompts = prompts_of(path, tokenizer, max_prompt_tokens=30, context_tokens=40)
    assert [prompt.text for prompt in prompts] == [" A b ", "[user]Hi<eos>\n[assistant]", "see"]
    assert [prompt.index for prompt in prompts] == [0, 1, 2]
    assert prompts[0].label == {"x": 1}
    assert prompts[1].label is None
    assert prompts[0].token_ids.dtype == np.int32
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [prompt.text for prompt in prompts]


def test_another_column_can_hold_the_prompt(write, tokenizer):
    assert prompts_of(write({"question": "Q"}), tokenizer, field="question")[0].text == "Q"
    with pytest.raises(BadInput, match="has no `question`"):
        prompts_of(write({"prompt": "Q"}), tokenizer, field="question")


@pytest.mark.parametrize(
    ("row", "found", "allowed"),
    [
        ({"text": "x"}, "has no `prompt`", "this one has `text`"),
        ({"prompt": None}, "has no `prompt`", "`prompt`"),
        ({"prompt": 3}, "`prompt` is a number", "a string or chat messages"),
        ({"prompt": ""}, "`prompt` is empty", "not blank"),
        ({"prompt": " \n"}, "`prompt` is empty", "not blank"),
        ({"prompt": []}, "`prompt` has no messages", "`role` and `content`"),
        ({"prompt": [{"role": "user"}]}, "message 1 of `prompt` is malformed", "`role` and `content`"),
        ({"prompt": ["Hi"]}, "message 1 of `prompt` is malformed", "`role` and `content`"),
        ({"prompt": [{"role": "critic", "content": "x"}]}, "the chat template refuses", "roles"),
        ({"prompt": "x" * 21}, "the prompt has 21 tokens", "at most 20 (sampling.max_prompt_tokens)"),
    ],
)
def test_a_bad_prompt_names_line_and_rule(write, tokenizer, row, found, allowed):
    path = write({"prompt": "good"}, row)
    with pytest.raises(BadInput) as error:
        prompts_of(path, tokenizer)
    assert error.value.where == f"{path}:2"
    assert found in error.value.found
    assert allowed in error.value.allowed
    prompts = prompts_of(path, tokenizer, on_bad_row="skip")
    assert len(prompts) == prompts.num_skipped == prompts.bad_rows.count == 1
    assert found in prompts.bad_rows.messages[0]


def test_prompt_and_response_must_fit_the_context(write, tokenizer):
    path = write({"prompt": "x" * 15})
    assert len(prompts_of(path, tokenizer, context_tokens=25)) == 1
    with pytest.raises(BadInput, match="with the response 25; at most 24 together"):
        prompts_of(path, tokenizer, context_tokens=24)


def test_the_limits_are_named_in_the_section_that_has_them(write, tokenizer):
    path = write({"prompt": "x" * 15})
    with pytest.raises(BadInput, match=r"at most 14 \(best_of_n\.max_prompt_tokens\)"):
        prompts_of(path, tokenizer, max_prompt_tokens=14, section="best_of_n")
    with pytest.raises(BadInput, match=r"best_of_n\.max_response_tokens is 10"):
        prompts_of(path, tokenizer, context_tokens=24, section="best_of_n")


def test_messages_need_a_template(write, without_template):
    with pytest.raises(BadInput, match="the tokenizer has no chat template"):
        prompts_of(write({"prompt": [USER]}), without_template)


def test_no_usable_prompt_is_bad_input_even_when_skipping(write, tokenizer):
    with pytest.raises(BadInput, match="has no usable prompt"):
        prompts_of(write({"prompt": ""}), tokenizer, on_bad_row="skip")


def prompt_set(size):
    return PromptSet([Prompt(i, np.array([i], np.int32), str(i), None) for i in range(size)], BadRows("fail", "x"))


@pytest.mark.parametrize(("size", "count"), [(7, 3), (7, 7), (3, 8), (1, 4), (10, 1)])
def test_draws_cover_every_epoch_exactly_once(size, count):
    prompts = prompt_set(size)
    drawn = [entry for step in range(2 * size) for entry in prompts.draw(5, step, count)]
    assert [number for number, _ in drawn] == list(range(2 * size * count))
    for epoch in range(2 * count):
        indices = [prompt.index for _, prompt in drawn[epoch * size : (epoch + 1) * size]]
        assert sorted(indices) == list(range(size))


def test_a_draw_depends_on_nothing_drawn_before():
    def ids(prompts, step, seed=3):
        return [(number, prompt.index) for number, prompt in prompts.draw(seed, step, 8)]

    fresh, used = prompt_set(20), prompt_set(20)
    for step in (9, 0, 4, 4):
        used.draw(1, step, 5)
    assert ids(fresh, 6) == ids(used, 6) == ids(prompt_set(20), 6)
    assert ids(fresh, 6) != ids(fresh, 6, seed=4)
    orders = [[prompt.index for _, prompt in fresh.draw(3, epoch, 20)] for epoch in range(2)]
    assert orders[0] != orders[1]


# Training text


def texts_of(path, tokenizer, **settings):
    return load_text(TextSettings(path=path, **settings), tokenizer, 512)


@pytest.mark.parametrize(
    ("row", "text", "context"),
    [
        ({"text": "A film"}, "A film<eos>", "A"),
        ({"text": "A film<eos>"}, "A film<eos>", "A"),
        ({"prompt": "A", "response": " film"}, "A film<eos>", "A"),
        ({"prompt": "A", "completion": " film"}, "A film<eos>", "A"),
        ({"input": "A", "output": " film"}, "A film<eos>", "A"),
        ({"messages": [USER, answer("Yo")]}, "[user]Hi<eos>\n[assistant]Yo<eos>", "[user]Hi<eos>\n[assistant]"),
        (
            {"prompt": [USER], "completion": [answer("Yo")]},
            "[user]Hi<eos>\n[assistant]Yo<eos>",
            "[user]Hi<eos>\n[assistant]",
        ),
        ({"prompt": [USER], "response": "Yo"}, "[user]Hi<eos>\n[assistant]Yo<eos>", "[user]Hi<eos>\n[assistant]"),
    ],
)
def test_text_formats(write, tokenizer, row, text, context):
    (example,) = texts_of(write(row), tokenizer).examples
    assert example.token_ids.dtype == np.int32
    assert tokenizer.decode(example.token_ids) == text
    assert tokenizer.decode(example.token_ids[: example.learn_from]) == context


def test_no_token_spans_prompt_and_response(write):
    """A tokenizer that would merge `ab` must not do so across the boundary, as the policy never sees that."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    examples = texts_of(write({"prompt": "a", "response": "b"}, {"text": "ab"}), merging).examples
    assert [list(example.token_ids) for example in examples] == [[1, 2, 0], [3, 0]]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"body": "x"}, "has no `text`"),
        ({"prompt": "x"}, "has no `response`"),
        ({"text": 1}, "`text` is a number"),
        ({"text": " "}, "`text` is empty"),
        ({"prompt": "x", "response": ""}, "`response` is empty"),
        ({"prompt": "", "response": "x"}, "`prompt` is empty"),
        ({"messages": [USER]}, "`messages` does not end with an answer"),
        ({"messages": [answer("x"), USER]}, "`messages` does not end with an answer"),
        ({"messages": [USER, answer(" ")]}, "the answer is empty"),
    ],
)
def test_a_bad_text_names_the_line(write, tokenizer, row, found):
    path = write({"text": "good"}, row)
    with pytest.raises(BadInput) as error:
        texts_of(path, tokenizer)
    assert error.value.where == f"{path}:2"
    assert found in error.value.found
    texts = texts_of(path, tokenizer, on_bad_row="skip")
    assert (len(texts.examples), texts.num_skipped, texts.bad_rows.count) == (1, 1, 1)


def test_too_long_text_fails_is_cut_or_is_skipped(write, tokenizer):
    path = write({"text": "1234567"}, {"text": "12345678"}, {"prompt": "123", "response": "45678901"})
    with pytest.raises(BadInput, match=r"rows.jsonl:2: the text has 9 tokens; at most 8 \(text.max_tokens\)"):
        texts_of(path, tokenizer, max_tokens=8)
    cut = texts_of(path, tokenizer, max_tokens=8, on_too_long="truncate")
    assert [tokenizer.decode(e.token_ids) for e in cut.examples] == ["1234567<eos>", "12345678", "12345678"]
    assert (cut.num_truncated, cut.num_skipped) == (2, 0)
    skipped = texts_of(path, tokenizer, max_tokens=8, on_too_long="skip")
    assert (len(skipped.examples), skipped.num_truncated, skipped.num_skipped) == (1, 0, 2)
    with pytest.raises(BadInput, match=r"rows.jsonl:3: the prompt alone has 3 tokens; fewer than 3"):
        texts_of(path, tokenizer, max_tokens=3, on_too_long="truncate")


# Preferences


def preferences_of(path, tokenizer, **settings):
    return load_preferences(PreferenceSettings(path=path, **settings), tokenizer, "pairs.path")


CHAT_PROMPT = "[user]Hi<eos>\n[assistant]"


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "P", "chosen": " c", "rejected": " r"}, ("P", " c", " r")),
        ({"input": "P", "chosen": " c", "rejected": " r"}, ("P", " c", " r")),
        ({"chosen": "P c", "rejected": "P r"}, ("", "P c", "P r")),
        ({"prompt": [USER], "chosen": [answer("c")], "rejected": [answer("r")]}, (CHAT_PROMPT, "c<eos>\n", "r<eos>\n")),
        ({"prompt": [USER], "chosen": "c", "rejected": "r"}, (CHAT_PROMPT, "c<eos>\n", "r<eos>\n")),
        ({"chosen": [USER, answer("c")], "rejected": [USER, answer("r")]}, (CHAT_PROMPT, "c<eos>\n", "r<eos>\n")),
        (
            {"prompt": "Hi", "chosen": [USER, answer("c")], "rejected": [USER, answer("r")]},
            (CHAT_PROMPT, "c<eos>\n", "r<eos>\n"),
        ),
        (
            {"prompt": [USER], "chosen": [USER, answer("c")], "rejected": [USER, answer("r")]},
            (CHAT_PROMPT, "c<eos>\n", "r<eos>\n"),
        ),
        (
            {
                "prompt": "Hi",
                "chosen": [USER, answer("x"), OTHER_USER, answer("c")],
                "rejected": [USER, answer("x"), OTHER_USER, answer("r")],
            },
            ("[user]Hi<eos>\n[assistant]x<eos>\n[user]Bye<eos>\n[assistant]", "c<eos>\n", "r<eos>\n"),
        ),
    ],
)
def test_preference_formats(write, tokenizer, row, texts):
    (pair,) = preferences_of(write(row), tokenizer).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == texts
    assert (pair.chosen_probability, pair.margin, pair.weight, pair.source) == (1.0, None, 1.0, None)
    assert (pair.attributes, pair.gap) == ({}, None)
    assert (pair.votes, pair.raters, pair.chosen_is_first) == (None, None, None)


def test_optional_columns(write, tokenizer):
    row = {"prompt": "P", "chosen": "c", "rejected": "r", "margin": 2, "weight": 0.5, "source": "s", "gap": 1.5}
    path = write({**row, "attributes": {"helpful": 3, "safe": None}, "chosen_probability": 0.25})
    (pair,) = preferences_of(path, tokenizer).pairs
    assert (pair.margin, pair.weight, pair.source, pair.gap) == (2.0, 0.5, "s", 1.5)
    assert (pair.attributes, pair.chosen_probability, pair.place) == ({"helpful": 3.0}, 0.25, f"{path}:1")


@pytest.mark.parametrize(
    ("votes", "chosen", "probability"),
    [
        ({"a": 3, "b": 0, "tie": 0}, "A", 1.0),
        ({"a": 0, "b": 2, "tie": 1}, "B", 2.5 / 3),
        ({"a": 2, "b": 1}, "A", 2 / 3),
        ({"a": 1, "b": 1, "tie": 1}, "A", 0.5),
        ({"a": 0, "b": 0, "tie": 3}, "A", 0.5),
    ],
)
def test_votes_become_a_soft_label(write, tokenizer, votes, chosen, probability):
    row = {"prompt": "P", "response_a": "A", "response_b": "B", "votes": votes}
    preferences = preferences_of(write(row), tokenizer)
    (pair,) = preferences.pairs
    assert pair.chosen == chosen
    assert {pair.chosen, pair.rejected} == {"A", "B"}
    assert pair.chosen_is_first == (chosen == "A")
    assert pair.votes.chosen == votes[chosen.lower()]
    assert pair.votes.chosen >= pair.votes.rejected
    assert pair.raters == sum(votes.values())
    assert pair.chosen_probability == pytest.approx(probability)
    assert preferences.num_ties == (probability == 0.5)


GOOD = {"prompt": "P", "chosen": "c", "rejected": "r"}
VOTED = {"prompt": "P", "response_a": "A", "response_b": "B"}


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "P", "rejected": "r"}, "has no `chosen`"),
        ({"prompt": "P", "chosen": "c", "rejected": None}, "has no `rejected`"),
        ({**GOOD, "prompt": " "}, "`prompt` is empty"),
        ({**GOOD, "chosen": ""}, "`chosen` is empty"),
        ({**GOOD, "rejected": 5}, "`rejected` is a number"),
        ({**GOOD, "margin": float("nan")}, "`margin` is nan"),
        ({**GOOD, "margin": "big"}, "`margin` is a string"),
        ({**GOOD, "margin": -0.5}, "`margin` is -0.5"),
        ({**GOOD, "weight": float("inf")}, "`weight` is inf"),
        ({**GOOD, "weight": -1}, "`weight` is -1"),
        ({**GOOD, "weight": True}, "`weight` is a boolean"),
        ({**GOOD, "chosen_probability": 1.2}, "`chosen_probability` is 1.2"),
        ({**GOOD, "source": 3}, "`source` is not a string"),
        ({**GOOD, "attributes": [1]}, "`attributes` is not an object"),
        ({**GOOD, "attributes": {"a": "x"}}, "`attributes.a` is a string"),
        ({**GOOD, "attributes": {"a": {"chosen": 1, "rejected": None}}}, "`attributes.a.rejected` is null"),
        ({**GOOD, "attributes": {"a": {"a": 1, "b": 2}}}, "`attributes.a` has `a`, `b`"),
        ({**GOOD, "attributes": {"a": {"chosen": 1e308, "rejected": -1e308}}}, "`attributes.a` is inf"),
        ({**GOOD, "margin": 10**400}, "`margin` is an integer beyond what a float holds"),
        ({**GOOD, "rejected": "c"}, "the two responses are the same text"),
        ({**VOTED}, "has no `votes`"),
        ({**VOTED, "votes": {"a": 1}}, "`votes` is malformed"),
        ({**VOTED, "votes": {"a": 0, "b": 0}}, "`votes` has no votes"),
        ({**VOTED, "votes": {"a": -1, "b": 2}}, "`votes.a` is -1"),
        ({"chosen": [answer("c")], "rejected": [answer("r")]}, "do not begin with the same message"),
        (
            {"prompt": "No", "chosen": [USER, answer("c")], "rejected": [USER, answer("r")]},
            "do not begin with `prompt`",
        ),
        ({"prompt": [USER], "chosen": [answer("")], "rejected": [answer("r")]}, "`chosen` is empty"),
    ],
)
def test_a_bad_preference_names_the_line(write, tokenizer, row, found):
    path = write({"prompt": "P", "chosen": "good", "rejected": "bad"}, row)
    with pytest.raises(BadInput) as error:
        preferences_of(path, tokenizer)
    assert error.value.where == f"{path}:2"
    assert found in error.value.found
    preferences = preferences_of(path, tokenizer, on_bad_row="skip")
    assert (len(preferences.pairs), preferences.num_rows, preferences.num_skipped) == (1, 2, 1)


ATTRIBUTES = {"helpful": {"chosen": 1, "rejected": 4}, "safe": 0.5, "brief": 0, "true": None, "kind": {}}


def test_attributes_are_differences_and_may_be_missing(write, tokenizer):
    nothing = {"chosen": None, "rejected": None}
    path = write({**GOOD, "attributes": ATTRIBUTES}, GOOD, {**GOOD, "attributes": {"kind": nothing, "odd": -2}})
    pairs = preferences_of(path, tokenizer).pairs
    assert [pair.attributes for pair in pairs] == [{"helpful": -3.0, "safe": 0.5, "brief": 0.0}, {}, {"odd": -2.0}]
    assert attribute_names(pairs) == ("brief", "helpful", "odd", "safe")


@pytest.mark.parametrize(("votes", "sign"), [({"a": 2, "b": 1}, 1), ({"a": 1, "b": 2}, -1)])
def test_attributes_turn_with_the_pair(write, tokenizer, votes, sign):
    attributes = {"helpful": {"a": 1, "b": 4}, "safe": 0.5, "brief": 0}
    (pair,) = preferences_of(write({**VOTED, "votes": votes, "attributes": attributes}), tokenizer).pairs
    assert pair.attributes == {"helpful": -3.0 * sign, "safe": 0.5 * sign, "brief": 0.0}
    assert str(pair.attributes["brief"]) == "0.0"


def test_broken_lines_are_bad_rows_of_every_loader(tmp_path, tokenizer):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{json.dumps({**GOOD, "text": "t"})}\n{{"prompt"\n[1]\n')
    preferences = preferences_of(str(file), tokenizer, on_bad_row="skip")
    assert (len(preferences.pairs), preferences.num_rows, preferences.num_skipped) == (1, 3, 2)
    for loaded in (
        preferences,
        prompts_of(str(file), tokenizer, on_bad_row="skip"),
        texts_of(str(file), tokenizer, on_bad_row="skip"),
    ):
        assert loaded.num_skipped == 2
        assert [message.partition(": ")[0] for message in loaded.bad_rows.messages] == [f"{file}:2", f"{file}:3"]
    with pytest.raises(BadInput, match=r"rows\.jsonl:2: is not JSON .* \(2 such rows, also .*rows\.jsonl:3; "):
        preferences_of(str(file), tokenizer)


def test_identical_responses_stay_only_as_ties(write, tokenizer):
    same = {"prompt": "P", "chosen": "x", "rejected": "x"}
    path = write({**same, "chosen_probability": 0.5}, same, GOOD)
    preferences = preferences_of(path, tokenizer, on_bad_row="skip")
    assert [pair.place for pair in preferences.pairs] == [f"{path}:1", f"{path}:3"]
    assert (preferences.num_identical, preferences.num_ties, preferences.num_skipped) == (2, 1, 1)


def test_a_template_that_rewrites_the_prompt_is_refused(write, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(BadInput, match="renders the prompt differently"):
        preferences_of(write({**GOOD, "prompt": [USER]}), tokenizer)
