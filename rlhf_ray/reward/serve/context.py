"""What belongs to the request under way, wherever in the replica it is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rlhf_ray.reward.client.service_errors import ApiError, ErrorType


@dataclass
class Caller:
    """Who asks.

    Attributes:
        name: in the token file; None where the service is open.
        max_texts: that it may have under way in this replica.
        texts: that it has; a request counts as one until it is read.
    """

    name: str | None = None
    max_texts: float = math.inf
    texts: int = 0

    @contextmanager
    def holding(self, texts: int, retry_after_s: int) -> Iterator[None]:
        """Count texts as under way.

        Raises:
            ApiError: they are more than it may have; none of them is counted.
        """
        if self.texts + texts > self.max_texts:
            message = f"too many texts of '{self.name}' at a time; at most {self.max_texts} may be under way"
            raise ApiError(ErrorType.OVER_LIMIT, message, retry_after_s=retry_after_s)
        self.texts += texts
        try:
            yield
        finally:
            self.texts -= texts


@dataclass
class RequestContext:
    """A request under way.

    Attributes:
        request_id: the client's own, or one made for it; in the answer, the log and the audit.
        family: which protocol it speaks.
        caller: who sent it.
        error: what it was answered in place of scores.
        started: `time.perf_counter()` at its arrival.
    """

    request_id: str
    family: str
    caller: Caller = field(default_factory=Caller)
    error: ErrorType | None = None
    started: float = field(default_factory=time.perf_counter)


REQUEST: ContextVar[RequestContext] = ContextVar("request")


def speaks(family: str) -> None:
    """Note which protocol the request under way turned out to speak, where a path belongs to several."""
    context = REQUEST.get(None)
    if context is not None:
        context.family = family
