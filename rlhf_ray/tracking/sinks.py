"""Where metrics go besides `metrics.jsonl`: Weights & Biases and TensorBoard.

A sink is a convenience. When it fails (no network, a full disk, a changed service) the run goes on: the
failure is reported once, and the sink is off from then on; Weights & Biases goes on without its server, offline.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from rlhf_ray.config.settings import TrackingSettings, WandbSettings
from rlhf_ray.tracking.run_folder import RunFolder, write_atomic

Metrics = Mapping[str, float | int | None]

_WANDB_TIMEOUT_S = 60.0
"""How long the begin and the end of a run wait for Weights & Biases, which by itself would wait for ever at the end."""


class Sink(Protocol):
    """Somewhere metrics go."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of one step."""

    def close(self, summary: Mapping[str, object]) -> None:
        """Take the run's final figures, and flush."""


class WandbSink:
    """Weights & Biases. Writes `<folder>/wandb`; offline it needs no network, and `wandb sync` uploads it later.

    Args:
        settings: mode and project.
        folder: the run's folder.
        run_name: name of the run.
        config: the resolved configuration, shown beside the run.
        on_unreachable: called with the cause where the service does not answer; the run is then recorded offline.
    """

    def __init__(
        self,
        settings: WandbSettings,
        folder: Path,
        run_name: str,
        config: Mapping[str, object],
        on_unreachable: Callable[[str], None],
    ) -> None:
        # Its note on another product, when certain libraries are loaded, does not heed `silent`.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        import wandb

        # The id is kept with the run, so that a resume continues the same curve.
        id_file = folder / "wandb" / "run_id"
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(id_file, secrets.token_hex(4))

        def begin(mode: Literal["online", "offline"]) -> wandb.Run:
            return wandb.init(
                project=settings.project,
                name=run_name,
                id=id_file.read_text(encoding="utf-8"),
                # Offline runs cannot ask the server; two of the same id are joined by `wandb sync`.
                resume="allow" if mode == "online" else None,
                dir=folder,
                mode=mode,
                config=dict(config),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=_WANDB_TIMEOUT_S,
                    finish_timeout=_WANDB_TIMEOUT_S,
                    finish_timeout_raises=True,
                ),
            )

        try:
            self._run = begin("online" if settings.mode == "online" else "offline")
        except wandb.errors.CommError as error:
            on_unreachable(f"{_cause(error)}; kept in {folder / 'wandb'}, `wandb sync` uploads it")
            wandb.teardown()  # its service holds on to the id
            self._run = begin("offline")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, summary: Mapping[str, object]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files.

    Args:
        folder: where they are written.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self, summary: Mapping[str, object]) -> None:
        for name, value in _numbers("summary", summary).items():
            self._writer.add_scalar(name, value, 0)
        self._writer.close()


def open_sinks(
    settings: TrackingSettings,
    folder: RunFolder,
    run_name: str,
    config: Mapping[str, object],
    on_failure: Callable[[str, str], None],
) -> list[Sink]:
    """The sinks that the settings ask for; none of them raises.

    Args:
        settings: which sinks.
        folder: the run's folder.
        run_name: name of the run.
        config: the resolved configuration.
        on_failure: called once a sink with its name and the cause, when it fails to open or later.
    """
    factories: dict[str, Callable[[], Sink]] = {}
    if settings.wandb.mode != "disabled":
        unreachable = partial(on_failure, "wandb")
        factories["wandb"] = lambda: WandbSink(settings.wandb, folder.path, run_name, config, unreachable)
    if settings.tensorboard:
        factories["tensorboard"] = lambda: TensorBoardSink(folder.tensorboard)
    return [_Guarded(name, factory, on_failure) for name, factory in factories.items()]


class _Guarded:
    """A sink that switches itself off at its first failure, whatever that is, and says so."""

    def __init__(self, name: str, factory: Callable[[], Sink], on_failure: Callable[[str, str], None]) -> None:
        self._name, self._on_failure = name, on_failure
        self._sink: Sink | None = None
        with self._guard():
            self._sink = factory()

    def log(self, step: int, metrics: Metrics) -> None:
        if self._sink is not None:
            with self._guard():
                self._sink.log(step, metrics)

    def close(self, summary: Mapping[str, object]) -> None:
        if self._sink is not None:
            with self._guard():
                self._sink.close(summary)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sink = None
            self._on_failure(self._name, _cause(error))


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _numbers(prefix: str, values: Mapping[str, object]) -> dict[str, float]:
    """The finite numbers of a nested mapping, by path."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{prefix}/{key}"] = float(value)
    return found
