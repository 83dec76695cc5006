"""A service in place of the reward model: the same scores, and failures that are never numbers."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import SecretStr, ValidationError

from rlhf_ray.config.reward import RewardSettings
from rlhf_ray.failures import BadInput, FailureKind, classify
from rlhf_ray.reward.core.protocol import Conversation
from rlhf_ray.reward.core.remote_scorer import RemoteScorer, check_reward_service
from rlhf_ray.reward.core.scorer import RewardScorer
from tests.loopback import serving
from tests.making import SCORE_ROUNDING, rollout_of

PROMPTS = ["I think the movie was", "I think the story was", "I think the music was"]
RESPONSES = [" good from start to end.", " bad." * 30, ""]
TOKEN = "a-token-of-some-length"


class StubService:
    """The routes that a remote scorer calls, over a real scorer; it fails as planned."""

    def __init__(self, scorer: RewardScorer) -> None:
        self.scorer, self.version, self.num_members = scorer, scorer.version, 1
        self.disagreement, self.temperature = 0.0, 1.0
        self.plan: deque[Response] = deque()
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.models, methods=["GET"])
        self.app.add_api_route("/v1/reward", self.reward, methods=["POST"])

    def refusal(self, request: Request) -> Response | None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return error(401, "unauthorized", "no token")
        return self.plan.popleft() if self.plan else None

    async def models(self, request: Request) -> Any:
        model = {"id": "main", "version": self.version, "role": "live", "share": 1.0, "temperature": self.temperature}
        rest = {"attributes": ["preference"], "num_members": self.num_members, "max_length": 64}
        return self.refusal(request) or {"object": "list", "data": [{**model, **rest}]}

    async def reward(self, request: Request) -> Any:
        refusal = self.refusal(request)
        if refusal is not None:
            return refusal
        body = await request.json()
        encoded = []
        for index, item in enumerate(body["items"]):
            if isinstance(item["prompt"], str):
                ids, cut = self.scorer.texts.encode(item["prompt"] + item["response"])
            else:
                answer = {"role": "assistant", "content": item["response"]}
                ids, cut = self.scorer.texts.encode_messages([*item["prompt"], answer])
            if cut and body["on_too_long"] == "fail":
                return error(422, "unscorable", "the text is longer than 64 tokens", index)
            encoded.append((ids, cut))
        scores = self.scorer.score_tokens([ids for ids, _ in encoded]).scores
        model = {"name": "main", "version": self.version, "temperature": self.temperature, "attributes": ["preference"]}
        return {
            "model": model,
            "items": [
                {
                    "score": float(score),
                    "attributes": {"preference": float(score)},
                    "disagreement": self.disagreement,
                    "num_tokens": len(ids),
                    "truncated": cut,
                }
                for score, (ids, cut) in zip(scores, encoded, strict=True)
            ],
        }


def error(status: int, kind: str, message: str, index: int | None = None) -> Response:
    return JSONResponse({"error": {"type": kind, "message": message, "index": index}}, status)


@pytest.fixture(scope="module")
def local(tiny: Path) -> RewardScorer:
    settings = RewardSettings(model=str(tiny / "reward_model"), max_length=64, on_too_long="truncate")
    return RewardScorer(settings, str(tiny / "policy"))


@pytest.fixture
def running(local: RewardScorer) -> Iterator[tuple[StubService, str]]:
    service = StubService(local)
    with serving(service.app) as url:
        yield service, url


@pytest.fixture
def service(running: tuple[StubService, str]) -> StubService:
    return running[0]


@pytest.fixture
def url(running: tuple[StubService, str]) -> str:
    return running[1]


def remote(url: str, policy: str, **chosen: Any) -> RemoteScorer:
    settings = {"timeout_s": 10.0, "on_too_long": "truncate", **chosen}
    return RemoteScorer(RewardSettings(url=url, **settings), policy, SecretStr(TOKEN))


def sampled(tokenizer: Any) -> Any:
    responses = [[*tokenizer(response).input_ids, tokenizer.eos_token_id] for response in RESPONSES]
    return rollout_of([tokenizer(prompt).input_ids for prompt in PROMPTS], responses, finished=True)


TEXTS = dict(enumerate(Conversation(prompt) for prompt in PROMPTS))
CHATS = dict(enumerate(Conversation("not this", ({"role": "user", "content": prompt},)) for prompt in PROMPTS))


def test_texts_score_as_with_a_model_of_the_runs_own(
    local: RewardScorer, url: str, policy_model: str, policy_tokenizer: Any
):
    expected = local.score(sampled(policy_tokenizer), TEXTS)
    column = remote(url, policy_model, batch_size=2).score(sampled(policy_tokenizer), TEXTS)
    header = column.header()
    np.testing.assert_allclose(column.scores, expected.scores, rtol=0, atol=SCORE_ROUNDING)
    assert np.ptp(column.scores) > 0.1
    assert (column.version, column.num_truncated) == (local.version, expected.num_truncated)
    assert column.num_truncated == 1
    np.testing.assert_array_equal(header.scores, column.scores)
    assert column.disagreement is None


def test_chat_messages_are_left_to_the_services_template(
    local: RewardScorer, url: str, policy_model: str, policy_tokenizer: Any
):
    column = remote(url, policy_model).score(sampled(policy_tokenizer), CHATS)
    for index, response in enumerate(RESPONSES):
        ids, _ = local.texts.encode_messages([*CHATS[index].messages, {"role": "assistant", "content": response}])
        assert column.scores[index] == pytest.approx(local.score_tokens([ids]).scores[0], abs=SCORE_ROUNDING)


def test_what_cannot_be_scored_is_a_failure_in_its_place(url: str, policy_model: str, policy_tokenizer: Any):
    column = remote(url, policy_model, on_too_long="fail").score(sampled(policy_tokenizer), TEXTS)
    header = column.header()
    assert column.failures == ("", "the text is longer than 64 tokens", "")
    assert np.isnan(column.scores[1])
    assert np.isfinite(header.scores).sum() == 2


def test_a_response_that_nobody_can_read_is_not_sent(
    service: StubService, local: RewardScorer, url: str, policy_model: str, policy_tokenizer: Any
):
    whole = sampled(policy_tokenizer)
    expected = local.score(whole, TEXTS)
    unreadable = whole.tokens.copy()
    unreadable[int(whole.prompt_lengths[0])] = len(policy_tokenizer)
    column = remote(url, policy_model).score(replace(whole, tokens=unreadable), TEXTS)
    header = column.header()
    assert header.failure_causes == {"the response has a token id that the policy's tokenizer does not know": 1}
    assert column.ok.tolist() == [False, True, True]
    np.testing.assert_allclose(column.scores[1:], expected.scores[1:], rtol=0, atol=SCORE_ROUNDING)
    every = np.full_like(whole.tokens, len(policy_tokenizer))
    column = remote(url, policy_model).score(replace(whole, tokens=every), TEXTS)
    assert not column.ok.any()


def test_a_pause_is_waited_out_and_a_longer_one_is_the_fleets(
    service: StubService, url: str, policy_model: str, policy_tokenizer: Any
):
    scorer = remote(url, policy_model, timeout_s=1.0)
    service.plan.extend([error(503, "unavailable", "it is starting")] * 2)
    assert scorer.score(sampled(policy_tokenizer), TEXTS).ok.all()
    service.plan.extend([error(503, "unavailable", "it is starting")] * 1000)
    # The last attempt is cut off by the deadline, or refused just before it.
    with pytest.raises((ConnectionError, TimeoutError)) as caught:
        scorer.score(sampled(policy_tokenizer), TEXTS)
    assert classify(caught.value) is FailureKind.INFRASTRUCTURE


def test_the_column_names_the_version_that_scored_it(
    service: StubService, url: str, policy_model: str, policy_tokenizer: Any
):
    scorer = remote(url, policy_model)
    assert scorer.version == service.version
    service.version = "v2"
    column = scorer.score(sampled(policy_tokenizer), TEXTS)
    header = column.header()
    assert column.version == header.version == scorer.version == "v2"


def test_ensembles_bring_their_disagreement_and_the_temperature_divides_both(
    service: StubService, local: RewardScorer, url: str, policy_model: str, policy_tokenizer: Any
):
    service.num_members, service.disagreement, service.temperature = 3, 0.5, 2.0
    plain = remote(url, policy_model).score(sampled(policy_tokenizer), TEXTS)
    scaled = remote(url, policy_model, apply_temperature=True).score(sampled(policy_tokenizer), TEXTS)
    assert plain.disagreement is not None
    assert scaled.disagreement is not None
    np.testing.assert_array_equal(plain.disagreement, [0.5] * 3)
    np.testing.assert_array_equal(scaled.disagreement, [0.25] * 3)
    np.testing.assert_array_equal(scaled.scores, plain.scores / 2)


def test_a_run_is_refused_early(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLHF_RAY_TOKEN", raising=False)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "wrong").write_text("another-token\n")

    def refusal(**chosen: Any) -> BadInput:
        with pytest.raises(BadInput) as caught:
            check_reward_service(RewardSettings(**{"url": url, "token_file": str(tmp_path / "token"), **chosen}))
        return caught.value

    check_reward_service(RewardSettings(url=url, token_file=str(tmp_path / "token")))
    assert refusal(url="http://127.0.0.1:1").where == "reward.url"
    assert "wants a token" in refusal(token_file=None).found
    assert "refuses the token" in refusal(token_file=str(tmp_path / "wrong")).found
    assert refusal(token_file=str(tmp_path / "none")).where == "reward.token_file"
    unknown = refusal(model="other")
    assert (unknown.where, unknown.allowed) == ("reward.model", "one of main")
    monkeypatch.setenv("RLHF_RAY_TOKEN", TOKEN)
    check_reward_service(RewardSettings(url=url, model="main"))


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({}, "model"),
        ({"model": ""}, "model: it is empty"),
        ({"url": "10.0.0.7:8000"}, "begins with http"),
        ({"url": "http://x:hidden@host"}, "it holds a token"),
        ({"url": "http://host", "max_length": 64}, "max_length: with url"),
        ({"url": "http://host", "batch_invariant": True}, "batch_invariant: with url"),
    ],
)
def test_settings_that_contradict_each_other(chosen: dict[str, Any], complaint: str):
    with pytest.raises(ValidationError, match=complaint):
        RewardSettings(**chosen)


def test_settings_of_a_service_are_read_back_as_they_were_written():
    settings = RewardSettings(url="http://host:8000")
    assert settings.model == ""
    assert RewardSettings(**settings.model_dump(mode="json")) == settings
