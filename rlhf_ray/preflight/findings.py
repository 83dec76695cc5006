"""What a check has found: a line each, and what to change where it is not well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from rlhf_ray.failures import BadInput, OutOfReach

T = TypeVar("T")


class State(Enum):
    """Of a check."""

    OK = "ok"
    CHANGE = "to change"
    UNKNOWN = "not known here"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        what: was checked; the key, or the place in a file, where something must be changed.
        found: there.
        allowed: what would have been accepted; empty where all is well.
    """

    state: State
    what: str
    found: str
    allowed: str = ""


@dataclass
class Findings:
    """All that was found so far.

    Attributes:
        show: is given each finding as it is made.
    """

    show: Callable[[Finding], None] = lambda finding: None
    found: list[Finding] = field(default_factory=list)

    def ok(self, what: str, found: str) -> None:
        """All is well."""
        self._add(Finding(State.OK, what, found))

    def change(self, what: str, found: str, allowed: str) -> None:
        """Something must be changed."""
        self._add(Finding(State.CHANGE, what, found, allowed))

    def unknown(self, what: str, why: str) -> None:
        """It cannot be known here."""
        self._add(Finding(State.UNKNOWN, what, why))

    def check(self, what: str, action: Callable[[], T], found: Callable[[T], str] | None = None) -> T | None:
        """Do what a run does at its start, and turn its refusal into a finding.

        Args:
            found: says what was found, where all is well; None: nothing is said then.

        Returns:
            What the action gave; None after a refusal.
        """
        try:
            value = action()
        except OutOfReach as error:
            self.unknown(error.where, f"not readable here: {error.found}")
        except BadInput as error:
            self.change(error.where, error.found, error.allowed)
        else:
            if found is not None:
                self.ok(what, found(value))
            return value
        return None

    def of(self, state: State) -> list[Finding]:
        """Those of one state."""
        return [finding for finding in self.found if finding.state is state]

    def _add(self, finding: Finding) -> None:
        self.found.append(finding)
        self.show(finding)


def size_text(size: float) -> str:
    """Bytes, in decimal units."""
    unit = next((unit for unit in _UNITS if size >= _UNITS[unit]), "kB")
    number = size / _UNITS[unit]
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:,.0f} {unit}"


_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
