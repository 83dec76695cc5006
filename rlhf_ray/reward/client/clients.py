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
import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict, dataclass
from random import Random
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx
from pydantic import ValidationError

from rlhf_ray.reward.client.errors import (
    DeadlineExceeded,
    InvalidAnswer,
    NotFound,
    RewardServiceError,
    TooLarge,
    Unreachable,
    Unscorable,
    VersionChanged,
    error_of_answer,
)
from rlhf_ray.reward.client.schema import (
    Answer,
    AnsweringModel,
    EachReward,
    Item,
    ModelList,
    OnTooLong,
    PreferenceAnswer,
    Preferences,
    Received,
    ResponsePair,
    RewardAnswer,
    RewardItem,
    Rewards,
    ServedModel,
)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
Part = TypeVar("Part", bound=Received)
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Call:
    """One request of the API, the same in every attempt."""

    method: Literal["GET", "POST"]
    path: str
    content: bytes
    request_id: str
    deadline_s: float


class AsyncRewardClient:
    """Asks a reward service, in asyncio.

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
        place = httpx.URL(url)
        if place.scheme not in ("http", "https") or not place.host:
            raise ValueError("the URL of a reward service begins with http:// or https:// and names a host")
        self._timeout_s, self._request_timeout_s = timeout_s, request_timeout_s
        self._retries, self._max_items = retries, max_items
        self._http = httpx.AsyncClient(
            # Kept out of the URL: exceptions and logs name that.
            base_url=place.copy_with(userinfo=b""),
            auth=httpx.BasicAuth(place.username, place.password) if place.userinfo and token is None else None,
            # Reading the certificates of the system takes longer than a request; plain HTTP needs none.
            verify=place.scheme == "https",
            headers={"Authorization": f"Bearer {token}"} if token is not None else {},
        )

    async def reward(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> Rewards:
        """A score for every item.

        Args:
            model: name or version; None lets the service choose.
            on_too_long: what becomes of a text that is longer than the model takes.

        Raises:
            RewardServiceError: one of its kinds; nothing was scored in part.
        """
        options = {"on_too_long": on_too_long}
        served, outcomes = await self._scored(RewardAnswer, "/v1/reward", items, model, options, keep=False)
        assert served is not None, "what cannot be scored was to be raised"
        return Rewards(served, tuple(each for each in outcomes if not isinstance(each, RewardServiceError)))

    async def reward_each(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> EachReward:
        """As `reward`, but an item that cannot be scored keeps its exception and the others get their scores."""
        options = {"on_too_long": on_too_long}
        return EachReward(*await self._scored(RewardAnswer, "/v1/reward", items, model, options, keep=True))

    async def preference(self, pairs: Sequence[ResponsePair], model: str | None = None) -> Preferences:
        """For every pair the probability that response a is preferred. Arguments and errors as for `reward`."""
        served, outcomes = await self._scored(PreferenceAnswer, "/v1/preference", pairs, model, {}, keep=False, texts=2)
        assert served is not None, "what cannot be scored was to be raised"
        return Preferences(served, tuple(each for each in outcomes if not isinstance(each, RewardServiceError)))

    async def models(self) -> tuple[ServedModel, ...]:
        """The models of the service."""
        return (await self._asked(ModelList, "GET", "/v1/models", None, uuid.uuid4().hex, self._deadline_s())).data

    async def health(self) -> None:
        """Return once the service is healthy.

        Raises:
            RewardServiceError: it is not, within the retries.
        """
        await self._answer(_Call("GET", "/health", b"", uuid.uuid4().hex, self._deadline_s()))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _deadline_s(self) -> float:
        return time.monotonic() + self._timeout_s

    async def _scored(
        self,
        answer_type: type[Answer[Item]],
        path: str,
        items: Sequence[RewardItem] | Sequence[ResponsePair],
        model: str | None,
        options: dict[str, Any],
        *,
        keep: bool,
        texts: int = 1,
    ) -> tuple[AnsweringModel | None, tuple[Item | RewardServiceError, ...]]:
        """All items by one version of one model, in requests of at most `max_items` texts.

        Args:
            keep: put what cannot be scored in its item's place; else it is raised.
            texts: of an item.
        """
        deadline_s, most = self._deadline_s(), max(1, self._max_items // texts)
        for _ in range(2):
            found = await self._scored_by_one(answer_type, path, items, model, options, keep, most, deadline_s)
            if found is not None:
                return found
        raise VersionChanged("the service changed the model twice while the batch was scored")

    async def _scored_by_one(
        self,
        answer_type: type[Answer[Item]],
        path: str,
        items: Sequence[RewardItem] | Sequence[ResponsePair],
        model: str | None,
        options: dict[str, Any],
        keep: bool,
        most: int,
        deadline_s: float,
    ) -> tuple[AnsweringModel | None, tuple[Item | RewardServiceError, ...]] | None:
        """As `_scored`; None where a version took the place of the first request's."""
        served: AnsweringModel | None = None
        outcomes: dict[int, Item | RewardServiceError] = {}
        waiting = deque(
            list(range(start, min(start + most, len(items)))) for start in range(0, max(len(items), 1), most)
        )
        while waiting:
            rows = waiting.popleft()
            # Later requests ask for the version that the first one got: with a canary it may be any.
            name = served.version if served else model
            body = {"items": [asdict(items[row]) for row in rows], **options, **({"model": name} if name else {})}
            request_id = uuid.uuid4().hex
            try:
                answer = await self._asked(answer_type, "POST", path, body, request_id, deadline_s)
            except NotFound:
                if served is None:
                    raise
                return None
            except TooLarge as error:
                if len(rows) > 1:
                    waiting.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
                    continue
                error.index = rows[0] if rows else None
                if not (keep and rows):
                    raise
                outcomes[rows[0]] = error
                continue
            except Unscorable as error:
                if error.index is None or not 0 <= error.index < len(rows):
                    raise InvalidAnswer("a text cannot be scored, and no index says which", request_id) from error
                error.index = rows.pop(error.index)
                if not keep:
                    raise
                outcomes[error.index] = error
                if rows:
                    waiting.appendleft(rows)
                continue
            if len(answer.items) != len(rows):
                raise InvalidAnswer(f"{len(answer.items)} scores for {len(rows)} items", request_id)
            if served is not None and answer.model.version != served.version:
                return None
            served = answer.model
            outcomes.update(zip(rows, answer.items, strict=True))
        return served, tuple(outcomes[row] for row in range(len(items)))

    async def _asked(
        self,
        part: type[Part],
        method: Literal["GET", "POST"],
        path: str,
        body: Any,
        request_id: str,
        deadline_s: float,
    ) -> Part:
        """An answer, exactly as it should be.

        Raises:
            InvalidAnswer: it is not.
        """
        # ASCII: half a surrogate pair has no UTF-8 and is for the service to judge.
        content = b"" if body is None else json.dumps(body).encode("ascii")
        answer = await self._answer(_Call(method, path, content, request_id, deadline_s))
        try:
            return part.model_validate_json(answer)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(str(key) for key in first["loc"]) or "the body"
            raise InvalidAnswer(f"{place}: {first['msg']}", request_id) from None

    async def _answer(self, call: _Call) -> bytes:
        """The first answer among as many attempts as may be made."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._attempt(call)
            except RewardServiceError as error:
                await asyncio.sleep(self._wait_s(error, call, attempt))

    async def _attempt(self, call: _Call) -> bytes:
        left = call.deadline_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s", call.request_id)
        limit_s = left if self._request_timeout_s is None else min(left, self._request_timeout_s)
        headers = {"X-Request-Id": call.request_id}
        if call.method == "POST":
            headers["Content-Type"] = "application/json"
        try:
            # httpx limits each read; an answer that trickles would pass every one of them.
            async with asyncio.timeout(limit_s):
                response = await self._http.request(
                    call.method, call.path, content=call.content, headers=headers, timeout=limit_s
                )
        except (httpx.TimeoutException, TimeoutError):
            raise DeadlineExceeded("the service did not answer in time", call.request_id) from None
        except httpx.RequestError as error:
            raise Unreachable(f"{type(error).__name__}: {error}", call.request_id) from error
        if response.status_code != httpx.codes.OK:
            retry_after = response.headers.get("Retry-After")
            raise error_of_answer(response.status_code, retry_after, response.content, call.request_id)
        return response.content

    def _wait_s(self, error: RewardServiceError, call: _Call, attempt: int) -> float:
        """How long to wait after the first, second, … attempt: what `Retry-After` says, and on top an exponential wait
        with a jitter that parts the clients.

        Raises:
            RewardServiceError: the one given, where no other attempt is to be made.
        """
        own = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempt - 1))
        wait_s = (error.retry_after_s or 0.0) + own * Random(f"{call.request_id}/{attempt}").uniform(0.5, 1.0)
        used_up = self._retries is not None and attempt > self._retries
        if not error.may_pass or used_up or time.monotonic() + wait_s >= call.deadline_s:
            raise error
        return wait_s


class RewardClient:
    """`AsyncRewardClient` for code that waits; see there. May be used by several threads.

    It asks on an event loop of its own, in a thread that ends with `close`.
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
        self._client = AsyncRewardClient(
            url,
            token,
            timeout_s=timeout_s,
            request_timeout_s=request_timeout_s,
            retries=retries,
            max_items=max_items,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()
        self._is_open, self._asking = True, threading.Lock()

    def reward(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> Rewards:
        """See `AsyncRewardClient.reward`."""
        return self._wait(self._client.reward(items, model, on_too_long=on_too_long))

    def reward_each(
        self, items: Sequence[RewardItem], model: str | None = None, *, on_too_long: OnTooLong = "default"
    ) -> EachReward:
        """See `AsyncRewardClient.reward_each`."""
        return self._wait(self._client.reward_each(items, model, on_too_long=on_too_long))

    def preference(self, pairs: Sequence[ResponsePair], model: str | None = None) -> Preferences:
        """See `AsyncRewardClient.preference`."""
        return self._wait(self._client.preference(pairs, model))

    def models(self) -> tuple[ServedModel, ...]:
        """See `AsyncRewardClient.models`."""
        return self._wait(self._client.models())

    def health(self) -> None:
        """See `AsyncRewardClient.health`."""
        self._wait(self._client.health())

    def close(self) -> None:
        """Close the connections; what other threads still wait for ends with `Unreachable`. A second time does
        nothing."""
        if not self._thread.is_alive():
            return
        with self._asking:
            was_open, self._is_open = self._is_open, False
        if not was_open:
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    def _wait(self, asked: Coroutine[Any, Any, Result]) -> Result:
        with self._asking:
            if not (self._is_open and self._thread.is_alive()):
                asked.close()
                raise RuntimeError("the client was closed, or made before this process was forked; make one here")
            waiting = asyncio.run_coroutine_threadsafe(asked, self._loop)
        try:
            return waiting.result()
        except CancelledError:
            raise Unreachable("the client was closed by another thread") from None
        except BaseException:
            waiting.cancel()  # the caller was interrupted: nobody waits for the answer any more
            raise
