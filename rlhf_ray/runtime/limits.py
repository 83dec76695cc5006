"""How long roles may take, and how often their processes may be started again."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.settings import ClusterSettings


@dataclass(frozen=True)
class Limits:
    """What a role may do to a run.

    Attributes:
        start_s: to load its model.
        call_s: for one call.
        max_restarts: of one process within `restart_window_s` seconds.
    """

    start_s: float
    call_s: float
    max_restarts: int = 0
    restart_window_s: float = 3600.0

    @classmethod
    def of(cls, settings: ClusterSettings) -> Limits:
        """As the settings say."""
        return cls(settings.start_timeout_s, settings.call_timeout_s, settings.max_restarts, settings.restart_window_s)
