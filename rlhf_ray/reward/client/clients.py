"""A typed client of the reward service's own API, for programs that wait and for programs that do not.

A score is a finite number of one version of one model, or there is an exception that says why there is none. What can
be asked again is asked again: scoring changes nothing in the service, so every lost answer may be fetched twice. What
would fail again (a wrong token, a text that cannot be scored) is raised at once. Each failure says itself which kind
it is: those of the fleet are `ConnectionError` or `TimeoutError` too.

    with RewardClient("http://127.0.0.1:8000") as client:
        rewards = client.reward([PromptResponse("The movie was", " good from start to end.")])
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from rlhf_ray.reward.client.calls import (
    Call,
    EachReward,
    Flow,
    Messages,
    OnTooLong,
    Preferences,
    PromptResponse,
    ResponsePair,
    RewardItem,
    Rewards,
    ServedModel,
    Text,
    TokenIds,
    ask_each_reward,
    ask_health,
    ask_models,
    ask_preferences,
    ask_rewards,
)
from rlhf_ray.reward.client.errors import DeadlineExceeded, RewardServiceError, Unreachable, error_of_answer

__all__ = ["AsyncRewardClient", "Messages", "PromptResponse", "ResponsePair", "RewardClient", "Text", "TokenIds"]

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
Result = TypeVar("Result")


class _Connection:
    """Where the service is, and how patient the client is."""

    def __init__(
        self,
        url: str,
        token: str | None,
        timeout_s: float,
        request_timeout_s: float | None,
        retries: int | None,
        max_items: int,
    ) -> None:
        place = httpx.URL(url)
        if place.scheme not in ("http", "https") or not place.host:
            raise ValueError("the URL of a reward service begins with http:// or https:// and names a host")
        # Kept out of the URL: exceptions and logs name that.
        basic = httpx.BasicAuth(place.username, place.password) if place.userinfo and token is None else None
        self._request_timeout_s, self._retries = request_timeout_s, retries
        self.timeout_s, self.max_items = timeout_s, max_items
        self.http_options: dict[str, Any] = {
            "base_url": place.copy_with(userinfo=b""),
            "auth": basic,
            # Reading the certificates of the system takes longer than a request; plain HTTP needs none.
            "verify": place.scheme == "https",
            "headers": {"Authorization": f"Bearer {token}"} if token is not None else {},
        }

    def attempt_s(self, call: Call, deadline_s: float) -> float:
        """How long the next attempt may take.

        Raises:
            DeadlineExceeded: not at all.
        """
        left = deadline_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"no answer within {self.timeout_s:g} s", call.request_id)
        return left if self._request_timeout_s is None else min(left, self._request_timeout_s)

    def headers(self, call: Call) -> dict[str, str]:
        """The same for every attempt of a call."""
        content = {"Content-Type": "application/json"} if call.method == "POST" else {}
        return {"X-Request-Id": call.request_id, **content}

    def wait_s(self, error: RewardServiceError, call: Call, attempt: int, deadline_s: float) -> float:
        """How long to wait after the first, second, … attempt: what `Retry-After` says, and on top an exponential wait
        with a jitter that parts the clients.

        Raises:
            RewardServiceError: the one given, where no other attempt is to be made.
        """
        own = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempt - 1))
        wait_s = (error.retry_after_s or 0.0) + own * Random(f"{call.request_id}/{attempt}").uniform(0.5, 1.0)
        used_up = self._retries is not None and attempt > self._retries
        if not error.may_pass or used_up or time.monotonic() + wait_s >= deadline_s:
            raise error
        return wait_s


def _lost(error: httpx.RequestError, call: Call) -> RewardServiceError:
    if isinstance(error, httpx.TimeoutException):
        return DeadlineExceeded("the service did not answer in time", call.request_id)
    return Unreachable(f"{type(error).__name__}: {error}", call.request_id)


def _content(response: httpx.Response, content: bytes, call: Call) -> bytes:
    if response.status_code != httpx.codes.OK:
        raise error_of_answer(response.status_code, response.headers.get("Retry-After"), content, call.request_id)
    return content


class RewardClient:
    """Asks a reward service and waits for the answer. May be used by several threads.

    Args:
        url: of the service; a token may be given as user info (`http://x:TOKEN@host`).
        token: bearer token.
        timeout_s: of one method call, with all its requests and retries.
        request_timeout_s: of one attempt, so that a lost one leaves time for another; None is whatever is left.
        retries: attempts after the first of each request; None is as many as the time allows.
        max_items: texts in one request; more are cut into several and put together in order.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 60.0,
        request_timeout_s: float | None = None,
        retries: int | None = 5,
        max_items: int = 64,
    ) -> None:
        self._connection = _Connection(url, token, timeout_s, request_timeout_s, retries, max_items)
        self._http = httpx.Client(**self._connection.http_options)

    def reward(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> Rewards:
        """A score for every item.

        Args:
            model: name or version; None lets the service choose.
            on_too_long: what becomes of a text that is longer than the model takes.

        Raises:
            RewardServiceError: one of its kinds; nothing was scored in part.
        """
        return self._run(ask_rewards(items, model, on_too_long, self._connection.max_items))

    def reward_each(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> EachReward:
        """As `reward`, but an item that cannot be scored keeps its exception and the others get their scores."""
        return self._run(ask_each_reward(items, model, on_too_long, self._connection.max_items))

    def preference(self, pairs: Sequence[ResponsePair], model: str | None = None) -> Preferences:
        """For every pair the probability that response a is preferred. Arguments and errors as for `reward`."""
        return self._run(ask_preferences(pairs, model, self._connection.max_items))

    def models(self) -> tuple[ServedModel, ...]:
        """The models of the service."""
        return self._run(ask_models())

    def health(self) -> None:
        """Return once the service is healthy.

        Raises:
            RewardServiceError: it is not, within the retries.
        """
        self._run(ask_health())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flow: Flow[Result]) -> Result:
        deadline_s = time.monotonic() + self._connection.timeout_s
        try:
            call = next(flow)
            while True:
                try:
                    content = self._answer(call, deadline_s)
                except RewardServiceError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(content)
        except StopIteration as end:
            return end.value

    def _answer(self, call: Call, deadline_s: float) -> bytes:
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._attempt(call, deadline_s)
            except RewardServiceError as error:
                time.sleep(self._connection.wait_s(error, call, attempt, deadline_s))

    def _attempt(self, call: Call, deadline_s: float) -> bytes:
        limit_s = self._connection.attempt_s(call, deadline_s)
        end_s = time.monotonic() + limit_s
        headers = self._connection.headers(call)
        content = bytearray()
        try:
            with self._http.stream(
                call.method, call.path, content=call.content, headers=headers, timeout=limit_s
            ) as response:
                for part in response.iter_bytes():
                    content += part
                    # httpx limits each read; an answer that trickles would pass every one of them.
                    if time.monotonic() > end_s:
                        raise DeadlineExceeded("the service did not answer in time", call.request_id)
        except httpx.RequestError as error:
            raise _lost(error, call) from error
        return _content(response, bytes(content), call)


class AsyncRewardClient:
    """As `RewardClient`, for asyncio."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 60.0,
        request_timeout_s: float | None = None,
        retries: int | None = 5,
        max_items: int = 64,
    ) -> None:
        self._connection = _Connection(url, token, timeout_s, request_timeout_s, retries, max_items)
        self._http = httpx.AsyncClient(**self._connection.http_options)

    async def reward(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> Rewards:
        """See `RewardClient.reward`."""
        return await self._run(ask_rewards(items, model, on_too_long, self._connection.max_items))

    async def reward_each(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> EachReward:
        """See `RewardClient.reward_each`."""
        return await self._run(ask_each_reward(items, model, on_too_long, self._connection.max_items))

    async def preference(self, pairs: Sequence[ResponsePair], model: str | None = None) -> Preferences:
        """See `RewardClient.preference`."""
        return await self._run(ask_preferences(pairs, model, self._connection.max_items))

    async def models(self) -> tuple[ServedModel, ...]:
        """See `RewardClient.models`."""
        return await self._run(ask_models())

    async def health(self) -> None:
        """See `RewardClient.health`."""
        await self._run(ask_health())

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[Result]) -> Result:
        deadline_s = time.monotonic() + self._connection.timeout_s
        try:
            call = next(flow)
            while True:
                try:
                    content = await self._answer(call, deadline_s)
                except RewardServiceError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(content)
        except StopIteration as end:
            return end.value

    async def _answer(self, call: Call, deadline_s: float) -> bytes:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._attempt(call, deadline_s)
            except RewardServiceError as error:
                await asyncio.sleep(self._connection.wait_s(error, call, attempt, deadline_s))

    async def _attempt(self, call: Call, deadline_s: float) -> bytes:
        limit_s = self._connection.attempt_s(call, deadline_s)
        headers = self._connection.headers(call)
        try:
            async with asyncio.timeout(limit_s):
                response = await self._http.request(
                    call.method, call.path, content=call.content, headers=headers, timeout=limit_s
                )
        except httpx.RequestError as error:
            raise _lost(error, call) from error
        except TimeoutError:
            raise DeadlineExceeded("the service did not answer in time", call.request_id) from None
        return _content(response, response.content, call)
