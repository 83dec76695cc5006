"""One writer a run: the folder of a run is locked by the process that writes into it.

The lock is the kernel's (`flock`) and belongs to an open file, so it ends with its process however that ends; nothing
has to be cleaned up after a crash. The file stays, and says who had the lock last. On NFS the lock also holds between
machines; the server takes it from a machine that is gone when its lease runs out, by default after 90 s.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rlhf_ray.failures import BadInput

_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
_LONGEST_RECORD = 4096


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold a run's lock for the length of a block.

    Args:
        path: the lock's file; its folder is made where it is missing.

    Raises:
        BadInput: another process holds it, the folder cannot be written, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not handed on to programs that this process starts (PEP 446): a child that outlives it would keep the lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _lock(descriptor, path)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        os.close(descriptor)


def refuse_locked(path: Path) -> None:
    """See that nobody holds a run's lock, without taking it.

    Raises:
        BadInput: somebody does.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BadInput(
                str(path.parent),
                f"another process writes into it ({_holder(descriptor)})",
                "wait for its end, or choose another run.name",
            ) from None
        raise BadInput(
            str(path), f"cannot be locked ({error.strerror})", "a paths.runs on a file system with locks (flock)"
        ) from None


def _unwritable(path: Path, error: OSError) -> BadInput:
    return BadInput(str(path.parent), f"cannot be written ({error.strerror})", "a folder this user may write")


def _holder(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, _LONGEST_RECORD, 0))
        return f"process {record['pid']} on {record['host']}, since {record['since']}"
    except (ValueError, KeyError, TypeError):
        return "which one is not recorded"
