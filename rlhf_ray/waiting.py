"""A role says that it waits for somebody else, so that it is not taken for one that hangs.

A process whose call uses no processor for `cluster.silent_after_s` is taken to hang, and is ended. A call that waits
for another process has a deadline of its own, and says so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_waits = 0


@contextmanager
def waiting() -> Iterator[None]:
    """For the length of a wait that has a deadline."""
    global _waits
    with _lock:
        _waits += 1
    try:
        yield
    finally:
        with _lock:
            _waits -= 1


def is_waiting() -> bool:
    """Whether any thread of this process waits."""
    return _waits > 0
