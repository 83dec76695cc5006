"""What is wrong with a reward model or its data, in words: one kind of finding for terminal, page, card and gate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from rlhf_ray.reward.judge.groups import Estimate, Proportion

Severity = Literal["refusal", "high", "medium", "low"]
"""A refusal is what the release gate refuses the model for."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        name: what it is about, in a word.
        found: the number, and what it is compared with; a sentence.
        meaning: for a policy trained with this reward model, or for what can be concluded.
        lever: the nearest thing to change, with its settings key; empty where the name says it.
        severity: how much it matters.
    """

    name: str
    found: str
    meaning: str
    lever: str
    severity: Severity

    @property
    def line(self) -> str:
        """In one line, for the terminal and the card."""
        return f"{self.name}: {self.found} {self.meaning}"


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The most important first; among equals, in the order in which they were found."""
    return tuple(sorted(findings, key=lambda finding: get_args(Severity).index(finding.severity)))


def percent(share: float) -> str:
    """`87.5 %`."""
    return f"{100 * share:.1f} %"


def interval_text(share: Estimate) -> str:
    """`87.5 % (85.1–89.7 %)`, or without an interval where there is none."""
    if share.value is None:
        return "–"
    if share.low is None or share.high is None:
        return percent(share.value)
    return f"{percent(share.value)} ({100 * share.low:.1f}–{100 * share.high:.1f} %)"


def counted(share: Proportion) -> str:
    """`87.5 % (85.1–89.7 %) on 400 pairs`."""
    return f"{interval_text(share)} on {share.count:,} pairs"


def surely(estimate: Estimate, distance: float) -> bool:
    """Further above 0 than this, and not by chance."""
    return estimate.value is not None and estimate.value > distance and estimate.low is not None and estimate.low > 0
