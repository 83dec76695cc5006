"""How a replica comes to have the models that were ordered."""

from __future__ import annotations

import asyncio
import logging
import time

from rlhf_ray.reward.serve.engine import RewardEngine
from rlhf_ray.reward.serve.traffic import ModelOrder, ReplicaModel

_TICK_S = 0.2
_FIRST_PATIENCE_S, _LONGEST_PATIENCE_S = 5.0, 300.0
"""Before an order that could not be followed is tried again."""

logger = logging.getLogger(__name__)


class Follower:
    """Follows orders, one after another: each is loaded beside the present models, and then takes their place. Of
    those that come meanwhile the last is next.

    Args:
        engine: that gets the models.

    Attributes:
        followed: number of the order that the engine's models are of.
        failure: number of the order that it could not follow, and why.
    """

    def __init__(self, engine: RewardEngine) -> None:
        self._engine = engine
        self._wanted = ModelOrder((), 0)
        self._task: asyncio.Task[None] | None = None
        self._patience_s = _FIRST_PATIENCE_S
        self.followed = 0
        self.failure: tuple[int, str] | None = None

    async def begin(self, order: ModelOrder) -> None:
        """Load the first models.

        Raises:
            BadInput, Refused: one cannot be served.
        """
        await self._engine.load(order.models)
        self._wanted, self.followed = order, order.number

    def told(self, order: ModelOrder) -> None:
        """Take an order; it is followed beside the requests."""
        self._wanted = order
        if not self.is_up_to_date and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._follow(order))

    @property
    def is_up_to_date(self) -> bool:
        """Whether the models are those of the last order."""
        return self.followed == self._wanted.number

    def models(self) -> tuple[ReplicaModel, ...]:
        """The models as the monitor is told of them."""
        paces = self._engine.paces
        return tuple(
            ReplicaModel(model.info, model.weights.path, model.reference, paces.get(model.info.name))
            for model in self._engine.table.models
        )

    async def _follow(self, order: ModelOrder) -> None:
        try:
            await self._engine.load(order.models)
        except Exception as error:
            # Whatever is wrong with the new models, the present ones go on; the monitor is told with the next beat.
            logger.error("the ordered models cannot be served, the present ones stay: %s", error)
            again = self.failure is not None and self.failure[0] == order.number
            self._patience_s = min(2 * self._patience_s, _LONGEST_PATIENCE_S) if again else _FIRST_PATIENCE_S
            self.failure = (order.number, str(error))
            # What is wrong may pass: a directory is still being written, or its file system was away.
            retry_at = time.monotonic() + self._patience_s
            while self._wanted.number == order.number and time.monotonic() < retry_at:
                await asyncio.sleep(_TICK_S)
        else:
            self.failure, self.followed = None, order.number
