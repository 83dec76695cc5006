"""A copy of a run away from its machine, at any URL that fsspec knows, from which an empty folder can take it up again.

Below the URL are `<run.name>/checkpoints/step-000010/…` and the run's other files but for what its processes print and
what the sinks keep. The manifest of a checkpoint goes last, as on the disk: without it there is none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec

from rlhf_ray.config.settings import CheckpointSettings
from rlhf_ray.failures import BadInput
from rlhf_ray.tracking.manifest import begin
from rlhf_ray.tracking.run_folder import BEST, MANIFEST, SUMMARY, RunFolder, step_of

KEY = "checkpoint.copy_to"


class RunCopy:
    """The copy of one run.

    Args:
        settings: where copies are, and how many checkpoints are kept.
        name: of the run.

    Attributes:
        url: of the copy.

    Raises:
        BadInput: fsspec does not know the URL.
    """

    def __init__(self, settings: CheckpointSettings, name: str) -> None:
        assert settings.copy_to is not None, "there is a copy only where one is asked for"
        self.url, self._keep = f"{settings.copy_to.rstrip('/')}/{name}", settings.keep
        self._sent: dict[Path, tuple[int, int]] = {}
        try:
            self._files, self._root = fsspec.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise BadInput(KEY, f"'{settings.copy_to}': {error}", "a URL that fsspec knows: s3://bucket/runs") from None

    @classmethod
    def of(cls, settings: CheckpointSettings, name: str) -> RunCopy | None:
        """The copy that the settings ask for, if they do."""
        return cls(settings, name) if settings.copy_to is not None else None

    def check(self, resume: bool) -> None:
        """See that it can be written, and that it is of this run.

        Raises:
            BadInput: it is not.
        """
        probe = f"{self._root}/.probe"
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(probe, b"may be deleted")
            self._files.rm_file(probe)
            steps, is_finished = self.steps(), self._files.exists(f"{self._root}/{SUMMARY}")
        except Exception as error:  # each file system has errors of its own
            cause = f"'{self.url}' cannot be written ({type(error).__name__}: {error})"
            raise BadInput(KEY, cause, "a place that this user may write, and a network to it") from None
        if (steps or is_finished) and not resume:
            what = "a finished run" if is_finished else f"a run, up to step {steps[-1]}"
            raise BadInput(KEY, f"'{self.url}' holds {what}", "--resume, or another run.name")

    def steps(self) -> list[int]:
        """Of its checkpoints, oldest first."""
        found = self._files.glob(f"{self._root}/checkpoints/step-*/{MANIFEST}")
        return sorted(step for path in found if (step := step_of(path.rsplit("/", 2)[-2])) is not None)

    def send(self, folder: RunFolder, checkpoint: Path) -> None:
        """Copy a complete checkpoint and what else has changed, and delete what is too old."""
        paths = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
        self._send(folder, paths)
        self._send_changed(folder)
        self._send(folder, [checkpoint / MANIFEST])
        for step in self.steps()[: -self._keep]:
            old = f"{self._root}/{folder.checkpoint_path(step).relative_to(folder.path).as_posix()}"
            self._files.rm_file(f"{old}/{MANIFEST}")
            self._files.rm(old, recursive=True)

    def send_results(self, folder: RunFolder) -> None:
        """Copy what has changed since the last checkpoint; the summary, which says that the run is finished, last."""
        self._send_changed(folder, but=folder.summary)
        self._send_changed(folder)

    def fetch(self, folder: RunFolder) -> int | None:
        """Bring the newest checkpoint and the run's other files here, where the folder has none as new; of a finished
        run its results, whether it ever had a checkpoint or not.

        Returns:
            The checkpoint's step, 0 where there is none; or None where nothing was brought.

        Raises:
            BadInput: it cannot be read.
        """
        try:
            names = [name.removeprefix(f"{self._root}/") for name in self._files.find(self._root)]
            steps, latest = self.steps(), folder.latest_checkpoint()
            is_finished = SUMMARY in names
            step = steps[-1] if steps else 0
            if not (step or is_finished) or (latest is not None and latest[0] >= step and not is_finished):
                return None
            # What says that all is there comes last: the manifest of a checkpoint, the summary of a run.
            last = [SUMMARY] if is_finished else []
            self._fetch(folder, [name for name in names if not name.startswith("checkpoints/") and name not in last])
            if step:
                checkpoint = folder.checkpoint_path(step)
                if checkpoint.exists():
                    shutil.rmtree(checkpoint)
                begin(checkpoint)
                own = [name for name in names if name.startswith(f"checkpoints/{checkpoint.name}/")]
                self._fetch(folder, [name for name in own if not name.endswith(f"/{MANIFEST}")])
                self._fetch(folder, [name for name in own if name.endswith(f"/{MANIFEST}")])
            self._fetch(folder, last)
        except Exception as error:  # as above
            cause = f"'{self.url}' cannot be brought here ({type(error).__name__}: {error})"
            raise BadInput(KEY, cause, "a copy that this user may read, and room for it") from None
        return step

    def _send_changed(self, folder: RunFolder, but: Path | None = None) -> None:
        """Send files of the run beside its checkpoints that were not sent as they are now.

        Args:
            but: this one stays.
        """
        there = {path: state for path, state in _files_of(folder).items() if path != but}
        changed = {path for path, state in there.items() if self._sent.get(path) != state}
        # Whatever a mark speaks for is sent before it, and what it spoke for before is not what is there then.
        marks = [path for path in there if path.name == BEST and any(path.parent in each.parents for each in changed)]
        for mark in [path for path in self._sent if path.name == BEST and (path in marks or path not in there)]:
            self._remove(folder, mark)
        self._send(folder, changed.difference(marks))
        self._sent |= {path: there[path] for path in changed.difference(marks)}
        for mark in marks:
            if _state_of(mark) == there[mark]:
                self._send(folder, [mark])
                self._sent[mark] = there[mark]

    def _remove(self, folder: RunFolder, path: Path) -> None:
        self._files.rm_file(f"{self._root}/{path.relative_to(folder.path).as_posix()}")
        del self._sent[path]

    def _send(self, folder: RunFolder, paths: Iterable[Path]) -> None:
        pairs = [(path, f"{self._root}/{path.relative_to(folder.path).as_posix()}") for path in paths]
        for parent in sorted({there.rsplit("/", 1)[0] for _, there in pairs}):
            self._files.makedirs(parent, exist_ok=True)
        if pairs:
            self._files.put([str(here) for here, _ in pairs], [there for _, there in pairs])

    def _fetch(self, folder: RunFolder, names: Iterable[str]) -> None:
        pairs: list[tuple[str, Any]] = [(f"{self._root}/{name}", folder.path / name) for name in names]
        for _, here in pairs:
            here.parent.mkdir(parents=True, exist_ok=True)
        if pairs:
            self._files.get([there for there, _ in pairs], [str(here) for _, here in pairs])


def _files_of(folder: RunFolder) -> dict[Path, tuple[int, int]]:
    """Size and time of the run's files beside its checkpoints. Any of them may go while it is looked at."""
    left_out = {path.name for path in (folder.checkpoints, folder.logs, folder.tensorboard, folder.wandb)}
    found: dict[Path, tuple[int, int]] = {}
    for place, folders, names in os.walk(folder.path):
        if Path(place) == folder.path:
            folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            state = _state_of(Path(place, name))
            if state is not None and not name.startswith("."):
                found[Path(place, name)] = state
    return found


def _state_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns
