"""`/livez` and `/readyz`: what a scheduler or a load balancer asks every few seconds.

Neither scores anything nor waits for the scoring process, so that they answer at once under any load. Whether the
models really score is what `/health` finds out. A replica whose queue is full is ready: it says itself when to come
again, and a balancer that took it away would only move its load to the next one.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from typing_extensions import TypedDict


class Probed(TypedDict):
    """The answer of a probe that is content."""

    status: str


def probe_routes(check_ready: Callable[[], None]) -> APIRouter:
    """Both probes.

    Args:
        check_ready: raises the `ApiError` that says why nothing is scored here.
    """
    router = APIRouter(tags=["operations"])

    @router.get("/livez", response_model=Probed)
    async def livez() -> Probed:
        """The replica answers requests."""
        return {"status": "ok"}

    @router.get("/readyz", response_model=Probed)
    async def readyz() -> Probed:
        """The replica has a model in memory and scores; else 503 with the reason."""
        check_ready()
        return {"status": "ok"}

    return router
