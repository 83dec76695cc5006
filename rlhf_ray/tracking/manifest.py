"""Which files a checkpoint has, and a hash of each: how a whole checkpoint is told from half a one or a damaged one.

The manifest is written last, and only once every file that it lists is on disk. So a folder without a manifest is a
checkpoint that was never completed, and a file that differs from its entry was damaged since.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from rlhf_ray.tracking.run_folder import MANIFEST, sync_folder, write_atomic

_THREADS = min(os.cpu_count() or 1, 8)
"""Reading and hashing both release the interpreter's lock."""
_CHUNK_BYTES = 1 << 20
_BEGUN = "begun"
"""There while a checkpoint is written: without it, one that lacks a manifest has lost it."""


@dataclass(frozen=True)
class FileSum:
    """One file of a checkpoint.

    Attributes:
        name: path below the checkpoint's folder.
        size: bytes.
        xxh3: 128-bit XXH3 hash in hexadecimal.
    """

    name: str
    size: int
    xxh3: str


def begin(checkpoint: Path) -> None:
    """Make the folder of a checkpoint that is going to be written."""
    checkpoint.mkdir(parents=True)
    (checkpoint / _BEGUN).touch()


def was_completed(checkpoint: Path) -> bool:
    """Whether there was a time when a checkpoint was whole."""
    return (checkpoint / MANIFEST).exists() or not (checkpoint / _BEGUN).exists()


def write_manifest(checkpoint: Path) -> None:
    """Bring every file to disk, then list them all: this completes the checkpoint."""
    ours = (MANIFEST, _BEGUN)
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name not in ours)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(lambda path: _synced(checkpoint, path), paths))
    for folder in {path.parent for path in paths}:
        sync_folder(folder)
    write_atomic(checkpoint / MANIFEST, json.dumps({"files": [asdict(each) for each in sums]}, indent=1) + "\n")
    (checkpoint / _BEGUN).unlink(missing_ok=True)


def read_manifest(checkpoint: Path) -> list[FileSum]:
    """The files that a checkpoint should have.

    Raises:
        ValueError: there is no manifest, or it cannot be read.
    """
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return [FileSum(**entry) for entry in content["files"]]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing: the checkpoint was never completed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None


def find_fault(checkpoint: Path, names: Sequence[str] | None = None) -> str | None:
    """The first thing that is wrong with a checkpoint, or None if it is whole.

    Args:
        names: look at these files only.
    """
    try:
        listed = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    wanted = [each for each in listed if names is None or each.name in names]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda each: _fault_of(checkpoint, each), wanted)
        return next((fault for fault in found if fault is not None), None)


def revoke(checkpoint: Path) -> None:
    """A damaged checkpoint no longer counts as complete; its files and its manifest stay, to be looked at."""
    if (checkpoint / MANIFEST).exists():
        os.replace(checkpoint / MANIFEST, checkpoint / f"{MANIFEST}.revoked")


def checkpoint_bytes(checkpoint: Path) -> int:
    """How much room a checkpoint takes."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _synced(checkpoint: Path, path: Path) -> FileSum:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sum_of(checkpoint, path.relative_to(checkpoint).as_posix())


def _sum_of(checkpoint: Path, name: str) -> FileSum:
    state, size = xxhash.xxh3_128(), 0
    buffer = bytearray(_CHUNK_BYTES)
    with (checkpoint / name).open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(memoryview(buffer)[:count])
            size += count
    return FileSum(name, size, state.hexdigest())


def _fault_of(checkpoint: Path, listed: FileSum) -> str | None:
    try:
        size = (checkpoint / listed.name).stat().st_size
        if size != listed.size:
            return f"{listed.name} has {size:,} bytes, {listed.size:,} were written"
        same = _sum_of(checkpoint, listed.name) == listed
    except FileNotFoundError:
        return f"{listed.name} is missing"
    except OSError as error:
        return f"{listed.name} cannot be read ({error.strerror})"
    return None if same else f"{listed.name} is not what was written (its hash differs)"
