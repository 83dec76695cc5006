"""Which models the service should have, and which it has rolled back: what outlives the monitor's process.

An order lies in the cluster's key-value store, as Serve's own state does. A monitor that is started again, and a
replica that asks it, find what was decided last, whichever of the two died first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from ray.experimental import internal_kv

from rlhf_ray.config.serving import ServedModelSettings
from rlhf_ray.reward.serve.model_table import shares
from rlhf_ray.reward.serve.traffic import ModelOrder

_NAMESPACE = b"rlhf_ray_service"


class Decisions(BaseModel):
    """What was ordered, and what was rolled back since.

    Attributes:
        number: of the order; each change of models makes the next.
        models: as configured.
        rolled_back: reasons, by name. An entry is there until it is another one in the configuration.
        configuration: the deployment's, from which the models came or which was there when a command ordered others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = 0
    models: tuple[ServedModelSettings, ...] = ()
    rolled_back: dict[str, tuple[str, ...]] = {}
    configuration: dict[str, Any] = {}

    def ordered(self, models: Sequence[ServedModelSettings], configuration: dict[str, Any]) -> Decisions:
        """The next order. What was rolled back stays so where its entry is the same."""
        kept = {name: why for name, why in self.rolled_back.items() if self.entry(name) in models}
        return Decisions(number=self.number + 1, models=tuple(models), rolled_back=kept, configuration=configuration)

    def without(self, name: str, reasons: tuple[str, ...]) -> Decisions:
        """The next order, with one candidate rolled back."""
        return self.model_copy(update={"number": self.number + 1, "rolled_back": {**self.rolled_back, name: reasons}})

    def entry(self, name: str) -> ServedModelSettings | None:
        """The configuration's entry of a name."""
        return next((model for model in self.models if model.name == name), None)

    @property
    def order(self) -> ModelOrder:
        """The models in force: those that were not rolled back, which take over the shares of those that were."""
        share_of = shares(self.models)
        kept = [model for model in self.models if model.name not in self.rolled_back]
        total = sum(share_of[model.name] for model in kept)
        if len(kept) == len(self.models) or total <= 0:
            return ModelOrder(self.models, self.number)
        return ModelOrder(
            tuple(
                model if model.shadow else model.model_copy(update={"share": share_of[model.name] / total})
                for model in kept
            ),
            self.number,
        )


class Store(Protocol):
    """Where decisions are kept."""

    def load(self) -> Decisions:
        """The last ones; empty where there are none."""

    def save(self, decisions: Decisions) -> None:
        """Keep them; returns once they are kept."""


class ClusterStore:
    """The key-value store of the Ray cluster.

    Args:
        application: name of the service.
    """

    def __init__(self, application: str) -> None:
        self._key = application.encode()

    def load(self) -> Decisions:
        """The last ones; empty where there are none."""
        content = internal_kv._internal_kv_get(self._key, namespace=_NAMESPACE)
        return Decisions.model_validate_json(content) if content else Decisions()

    def save(self, decisions: Decisions) -> None:
        """Keep them; returns once they are kept."""
        internal_kv._internal_kv_put(self._key, decisions.model_dump_json().encode(), namespace=_NAMESPACE)

    def clear(self) -> None:
        """Forget them: the service was stopped."""
        internal_kv._internal_kv_del(self._key, namespace=_NAMESPACE)
