"""The folder of a run: which file is where, and who may write into it.

Everything that another program may read while the run goes on is replaced as a whole (`write_atomic`) or only
ever appended to (`logs`). A checkpoint counts once its manifest is there, which is written last (`manifest`).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.failures import BadInput, Finished

MANIFEST = "manifest.json"
"""Written last into a checkpoint: a folder without it is half a checkpoint and never resumed from."""
SUMMARY = "summary.json"
"""Written last into a run's folder: a run that has it is finished."""
BEST = "best.json"
"""Beside the best policy's weights: says which they are, and is there only while they are whole."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a crash at any moment, meets the old or the new content, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private; a run's files are as readable as any other
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring a folder's entries to disk: a new file's name is there only when its folder is."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Child:
    """A file or folder of a run, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """`<paths.runs>/<run.name>`.

    Attributes:
        path: the folder.
    """

    path: Path

    config_yaml = _Child("config.yaml")
    """The resolved configuration."""
    lock = _Child(".lock")
    """Locked by the process that writes into the folder (`run_lock`)."""
    metrics = _Child("metrics.jsonl")
    """One object a step."""
    ledger = _Child("ledger.jsonl")
    """Which samples each step trained."""
    events = _Child("events.jsonl")
    """Starts, stops, deaths, restarts, checkpoints."""
    checkpoints = _Child("checkpoints")
    """Folder of the checkpoints."""
    policy = _Child("policy")
    """The trained policy, a Hugging Face directory."""
    policy_best = _Child("policy_best")
    """The best policy on held-out prompts (`evaluation.keep_best`), a Hugging Face directory."""
    policy_adapters = _Child("policy_adapters")
    """The trained policy's adapters, where it has some, as peft reads them."""
    reward_model = _Child("reward_model")
    """The trained reward model, a Hugging Face directory."""
    evaluation = _Child("evaluation.json")
    """The judgement of a reward model, to compute with."""
    evaluation_page = _Child("evaluation.html")
    """The judgement of a reward model, to look at."""
    logs = _Child("logs")
    """What the engines and libraries print."""
    summary = _Child(SUMMARY)
    """Written last; its presence says that the run is finished."""
    report_page = _Child("report.html")
    """The story of the run."""
    plot = _Child("training.png")
    """The run's curves."""
    trace = _Child("trace.json")
    """A timeline of the first steps."""
    samples_page = _Child("samples.html")
    """Samples before and after, to look at."""
    samples = _Child("samples.jsonl")
    """Samples before and after, to compute with."""
    tensorboard = _Child("tensorboard")
    """TensorBoard's files."""
    wandb = _Child("wandb")
    """Weights & Biases' files."""

    @classmethod
    def create(cls, path: str | Path, config_yaml: str, resume: bool) -> RunFolder:
        """Make or reopen the folder of a run and write the resolved configuration into it.

        Args:
            path: the folder.
            config_yaml: the resolved configuration.
            resume: continue what is there; without it the folder must hold no run.

        Raises:
            BadInput: the folder holds another run, or cannot be written.
            Finished: there is nothing left to resume.
        """
        folder = cls(Path(path))
        folder.refuse_another_run(resume)
        try:
            for needed in (folder.path, folder.checkpoints, folder.logs):
                needed.mkdir(parents=True, exist_ok=True)
            write_atomic(folder.config_yaml, config_yaml)
        except OSError as error:
            raise BadInput(str(path), f"cannot be written ({error.strerror})", "a folder this user may write") from None
        return folder

    def refuse_another_run(self, resume: bool) -> None:
        """See that the folder may be used, without making it.

        Args:
            resume: continue what is there, from its latest checkpoint where it has one.

        Raises:
            BadInput: it holds another run.
            Finished: there is nothing left to resume.
        """
        where = str(self.path)
        finished = self.summary.exists()
        if finished and resume:
            raise Finished(where)
        if finished:
            raise BadInput(where, "holds a finished run", "choose another run.name, or delete the folder")
        if not resume and self.metrics.exists() and self.metrics.stat().st_size:
            raise BadInput(where, "holds an unfinished run", "add --resume, or choose another run.name")

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step belongs: `checkpoints/step-000010`."""
        return self.checkpoints / f"step-{step:06d}"

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest complete checkpoint; whether it is undamaged is for the manifest to say."""
        complete = self.complete_checkpoints()
        return complete[-1] if complete else None

    def complete_checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of every checkpoint with a manifest, oldest first."""
        return [(step, path) for step, path in self.all_checkpoints() if (path / MANIFEST).exists()]

    def prune(self, keep: int, but: Path | None = None) -> None:
        """Delete all but the `keep` newest complete checkpoints, and half ones older than the newest.

        A half one that is newer than all complete ones may be on its way and stays.

        Args:
            but: this one stays, too.
        """
        latest = self.latest_checkpoint()
        if latest is None:
            return
        kept = [path for _, path in self.complete_checkpoints()[-keep:]]
        for step, path in self.all_checkpoints():
            if step <= latest[0] and path not in (*kept, but):
                # First the mark: a deletion that is interrupted must not leave half a checkpoint that looks whole.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)

    def all_checkpoints(self) -> list[tuple[int, Path]]:
        """Step and folder of every checkpoint, half ones included, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = ((step_of(path.name), path) for path in self.checkpoints.iterdir())
        return sorted((step, path) for step, path in found if step is not None)


def step_of(name: str) -> int | None:
    """The step that the name of a checkpoint's folder says; None of any other folder."""
    match = re.fullmatch(r"step-(\d{6,})", name)
    return int(match[1]) if match else None


def _umask() -> int:
    # There is no call that reads the mask without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
