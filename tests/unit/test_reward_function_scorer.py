"""A shard scored by a function: what the function sees, and a cause for every sample that has no score."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.reward.core.function_scorer import MAX_LOST_PROCESSES, FunctionScorer
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.source import RewardSource, TimedScorer
from rlhf_ray.rollout import Rollout
from tests.conftest import REPOSITORY
from tests.making import rollout_of

HERE = "tests.unit.reward_functions"
CHAT = ({"role": "user", "content": "What is it?"},)


def scorer(name: str, policy: str, **chosen: Any) -> FunctionScorer:
    return FunctionScorer(RewardSettings(function=f"{HERE}:{name}", **chosen), policy, [str(REPOSITORY)])


def sampled(tokenizer: Any, responses: list[str]) -> Rollout:
    eos = tokenizer.eos_token_id
    tokens = [[*tokenizer(response, add_special_tokens=False).input_ids, eos] for response in responses]
    return rollout_of([[5]] * len(responses), tokens)


def labelled(*labels: object) -> dict[int, Conversation]:
    return {place: Conversation("It is", None, label) for place, label in enumerate(labels)}


def test_the_function_sees_prompt_decoded_response_and_label(
    policy_model: str, policy_tokenizer: Any, capfd: pytest.CaptureFixture[str]
):
    rollout = sampled(policy_tokenizer, [" good", " bad"])
    prompts = {0: Conversation("It is", None, "x"), 1: Conversation("rendered", CHAT, {"y": [1]})}
    column = scorer("what_it_gets", policy_model, batch_size=2).score(rollout, prompts)
    lengths = rollout.response_lengths.tolist()
    assert column.scores.tolist() == lengths
    assert column.failures == ("", "")
    assert column.version.startswith(f"{HERE}:what_it_gets@")
    seen = (["It is", list(CHAT)], [" good", " bad"], ["x", {"y": [1]}], lengths, [False, False])
    assert repr(seen) in capfd.readouterr().out


def test_only_the_call_that_fails_loses_its_samples(policy_model: str, policy_tokenizer: Any):
    rollout = sampled(policy_tokenizer, [" a"] * 5)
    prompts = labelled("", "raise", "hang", "die", "")
    column = scorer("reacts_to_the_label", policy_model, timeout_s=1.0).score(rollout, prompts)
    name = "reacts_to_the_label"
    assert column.failures == (
        "",
        f"{name} raised ValueError: bad label",
        f"{name} did not return within 1 s",
        f"{name} ended its process (exit status 4)",
        "",
    )
    assert column.scores[column.ok].tolist() == [1.0, 1.0]
    assert np.isnan(column.scores[~column.ok]).all()
    assert np.isnan(column.header().scores).tolist() == [False, True, True, True, False]


def test_a_call_of_several_samples_fails_as_a_whole(policy_model: str, policy_tokenizer: Any):
    rollout = sampled(policy_tokenizer, [" a"] * 3)
    column = scorer("reacts_to_the_label", policy_model, batch_size=2).score(rollout, labelled("", "", ""))
    cause = "reacts_to_the_label raised ValueError: too many values to unpack (expected 1)"
    assert column.failures == (cause, cause, "")


def test_a_function_that_is_lost_again_and_again_is_not_called_for_the_rest_of_the_shard(
    policy_model: str, policy_tokenizer: Any
):
    rollout = sampled(policy_tokenizer, [" a"] * (MAX_LOST_PROCESSES + 2))
    dying = scorer("dies", policy_model)
    for _ in range(2):  # the next shard is tried afresh
        column = dying.score(rollout, labelled(*[""] * rollout.num_samples))
        assert column.failures == (
            *["dies ended its process (exit status 3)"] * MAX_LOST_PROCESSES,
            *["not called: dies hung or ended its process 3 times in this shard"] * 2,
        )


def test_a_response_that_nobody_can_read_is_not_shown_to_the_function(policy_model: str, policy_tokenizer: Any):
    rollout = sampled(policy_tokenizer, [" a", " b"])
    rollout.tokens[-1] = 511  # beyond the tokenizer's last token
    column = scorer("brief", policy_model, batch_size=2).score(rollout, labelled("", ""))
    assert column.failures == ("", "the response has a token id that the policy's tokenizer does not know")


def test_a_source_imports_its_function_and_makes_scorers_that_tell_their_time(
    policy_model: str, policy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(REPOSITORY)
    source = RewardSource.read(RewardSettings(function=f"{HERE}:brief"))
    assert source.card is None
    made = source.constructor(policy_model)()
    assert isinstance(made, TimedScorer)
    column = made.score(sampled(policy_tokenizer, [" a"]), labelled(""))
    assert column.version == source.version
    assert 0 < column.time_s == column.header().time_s < 60
    with pytest.raises(BadInput, match=r"^reward\.2\.function: .* no function 'nothing'"):
        RewardSource.read(RewardSettings(function=f"{HERE}:nothing"), "reward.2")
