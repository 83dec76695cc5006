"""The process that a reward function runs in. It imports the function, says so, and answers one batch after another.

Only the standard library is imported here, so that the process starts fast and has nothing but the user's code in it.
What the function returns is checked here too: over the connection go finite numbers and causes, and nothing else.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_LONGEST_CAUSE = 200


@dataclass(frozen=True)
class Batch:
    """What one call of the function is given: a list for each name, with one entry a sample.

    Attributes:
        prompts: texts, or lists of chat messages where the prompt's row had those.
        responses: decoded, without special tokens.
        labels: the `label` of the prompt's row, or None.
        num_tokens: tokens of the response.
        truncated: whether the response was cut at `sampling.max_response_tokens`.
    """

    prompts: list[Any]
    responses: list[str]
    labels: list[Any]
    num_tokens: list[int]
    truncated: list[bool]


@dataclass(frozen=True)
class Failed:
    """There is no score, and this is why."""

    cause: str


Outcome = float | Failed


@dataclass(frozen=True)
class Ready:
    """The function is there.

    Attributes:
        version: its name and a hash of its module's file.
    """

    version: str


@dataclass(frozen=True)
class Unusable:
    """The function cannot be imported or called.

    Attributes:
        found, allowed: as in `BadInput`.
    """

    found: str
    allowed: str


class _Refused(Exception):
    def __init__(self, found: str, allowed: str) -> None:
        self.answer = Unusable(found, allowed)


def main() -> None:
    """Serve one function until the other end of the connection is closed. On the command line are the connection's
    descriptor, the function as `module:name`, and folders to import from before all others."""
    descriptor, (function, *search_path) = int(sys.argv[1]), sys.argv[2:]
    _end_with_the_other_side(descriptor)
    connection = Connection(descriptor)
    sys.path[:0] = search_path
    try:
        called, version = resolve(function)
        names = accepted_names(called)
    except _Refused as refused:
        connection.send(refused.answer)
        return
    connection.send(Ready(version))
    while True:
        connection.send(call(called, names, connection.recv()))


def resolve(function: str) -> tuple[Callable[..., Any], str]:
    """Import a function; gives it and its version."""
    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:
        traceback.print_exc()
        raise _Refused(
            f"'{module_name}' cannot be imported ({_described(error)})",
            "a module in the folder where the run is started, on PYTHONPATH, or of an installed package",
        ) from None
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise _Refused(f"'{module_name}' has no function '{name}'", "the name of a function of that module")
    path = Path(getattr(module, "__file__", None) or "")
    digest = hashlib.blake2b(path.read_bytes() if path.is_file() else b"", digest_size=4).hexdigest()
    return found, f"{function}@{digest}"


def accepted_names(function: Callable[..., Any]) -> list[str]:
    """Which lists of a batch a function takes."""
    offered = list(Batch.__dataclass_fields__)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise _Refused(
            "its parameters cannot be read", f"a Python function with some of {', '.join(offered)}"
        ) from None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [parameter.name for parameter in parameters if parameter.kind in by_name and parameter.name in offered]
    for parameter in parameters:
        is_optional = parameter.default is not parameter.empty or parameter.kind is inspect.Parameter.VAR_POSITIONAL
        if parameter.name not in taken and not is_optional:
            raise _Refused(f"it needs '{parameter.name}', which is not given", f"only {', '.join(offered)}")
    return taken


def call(function: Callable[..., Any], names: list[str], batch: Batch) -> list[Outcome]:
    """One score or cause for each sample of a batch, whatever the function does short of ending its process."""
    count = len(batch.responses)
    name = getattr(function, "__name__", type(function).__name__)
    try:
        returned = function(**{key: getattr(batch, key) for key in names})
        if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
            return [Failed(f"{name} returned {_shown(returned)}, not a list of scores")] * count
        scores = list(returned)
    except BaseException as error:  # sys.exit() too
        traceback.print_exc()
        return [Failed(f"{name} raised {_described(error)}")] * count
    if len(scores) != count:
        return [Failed(f"{name} returned {_plural(len(scores), 'score')} for {_plural(count, 'sample')}")] * count
    return [_outcome(name, score) for score in scores]


def _outcome(name: str, score: Any) -> Outcome:
    if score is None:
        return Failed(f"{name} gave no score")
    try:
        number = math.nan if isinstance(score, str | bytes) else float(score)
    except Exception:  # whatever an object's own conversion raises
        number = math.nan
    return number if math.isfinite(number) else Failed(f"{name} returned {_shown(score)} as a score")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"an object of type {type(value).__name__}"
    return _one_line(text, 60)


def _described(error: BaseException) -> str:
    return _one_line(f"{type(error).__name__}: {error}".removesuffix(": "), _LONGEST_CAUSE)


def _one_line(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _end_with_the_other_side(descriptor: int) -> None:
    """End this process, and those that the function has started, once nobody is there to answer: a function that hangs
    must not outlive its run."""

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)  # a hang-up is reported unasked
        poll.poll()
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
