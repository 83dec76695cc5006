"""What belongs to the request under way, wherever in the replica it is asked for."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from rlhf_ray.reward.client.service_errors import ErrorType


@dataclass
class RequestContext:
    """A request under way.

    Attributes:
        request_id: the client's own, or one made for it; in the answer, the log and the audit.
        family: which protocol it speaks.
        error: what it was answered in place of scores.
        started: `time.perf_counter()` at its arrival.
    """

    request_id: str
    family: str
    error: ErrorType | None = None
    started: float = field(default_factory=time.perf_counter)


REQUEST: ContextVar[RequestContext] = ContextVar("request")


def speaks(family: str) -> None:
    """Note which protocol the request under way turned out to speak, where a path belongs to several."""
    context = REQUEST.get(None)
    if context is not None:
        context.family = family
