"""The story of a run, from what it wrote as it happened: how it went, what went wrong and what became of it.

Everything here is read from the run's folder, so a story can be told of a run that is under way, or was killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import yaml

from rlhf_ray.failures import BadInput, first_sentence
from rlhf_ray.tracking.ledger import LedgerCheck, check_ledger
from rlhf_ray.tracking.logs import Row, read_log
from rlhf_ray.tracking.run_folder import RunFolder

Tone = Literal["good", "bad", "warn", ""]
_Event = Mapping[str, Any]

_FIGURES: dict[str, Literal["highest", "lowest"] | None] = {
    "reward/mean": "highest",
    "kl/reference": None,
    "policy/entropy": None,
    "response/length_mean": None,
    "value/explained_variance": "highest",
    "held_out/reward": "highest",
    "held_out/judge": "highest",
    "loss": "lowest",
    "accuracy": "highest",
    "validation/accuracy": "highest",
    "throughput/tokens_per_s": "highest",
    "time/step_s": "lowest",
}
"""Metrics that a story tells, as far as the run has them, and which of their values was the best."""

_LOST = ("role_lost", "role_silent")
_MENDS = ("role_restarted", "group_rebuilt")
_BY_RAY = (*_LOST, *_MENDS, "rolled_back")
"""Whose causes may be Ray's."""
_TOLD: dict[str, tuple[Tone, Callable[[_Event], str]]] = {
    "run_started": ("", lambda event: "started"),
    "role_lost": ("bad", lambda event: "lost"),
    "role_silent": ("bad", lambda event: f"silent during '{event['doing']}'" if event.get("doing") else "silent"),
    "role_restarted": ("good", lambda event: _back(event)),
    "group_rebuilt": ("good", lambda event: _back(event)),
    "rolled_back": ("warn", lambda event: f"back from step {event.get('from_step')} to step {event.get('to_step')}"),
    "checkpoint_broken": ("bad", lambda event: f"the checkpoint of step {event.get('step')} cannot be used"),
    "checkpoint_loaded": ("", lambda event: f"went on from the checkpoint of step {event.get('step')}"),
    "nothing_to_resume": ("", lambda event: f"no checkpoint: began at the first step{_again(event)}"),
    "checkpoint_failed": ("bad", lambda event: "a checkpoint could not be written"),
    "copy_failed": ("bad", lambda event: f"{event.get('what', 'a checkpoint')} could not be copied"),
    "copy_fetched": ("", lambda event: f"took the checkpoint of step {event.get('step')} from its copy"),
    "supervision_ended": ("bad", lambda event: "lost roles are no longer noticed"),
    "settings_changed": ("warn", lambda event: f"other settings than before: {'; '.join(event.get('changes') or [])}"),
    "sync_repeated": ("warn", lambda event: f"the weights of version {event.get('version')} were sent again"),
    "sink_failed": ("warn", lambda event: f"{event.get('sink')} has failed"),
    "clock_jumped": ("warn", lambda event: "the clock jumped"),
    "run_ended_early": ("warn", lambda event: f"ended early after step {event.get('step')}{_by(event)}"),
    "run_stopped": ("warn", lambda event: f"stopped after step {event.get('step')}"),
    "run_failed": ("bad", lambda event: f"failed{_by(event)}"),
    "run_finished": ("good", lambda event: "finished"),
}
"""Events that are told one by one; every other kind is counted."""


@dataclass(frozen=True)
class Happening:
    """Something that a reader of the story should know of.

    Attributes:
        kind: of the event.
        at_s: seconds since the run's first start.
        time: in UTC.
        what, who, why: in words; who is role and node.
        took_s: until it was mended, or how long it lasted.
        outcome: what became of it.
    """

    kind: str
    tone: Tone
    at_s: float
    time: datetime
    what: str
    who: str = ""
    why: str = ""
    took_s: float | None = None
    outcome: str = ""


@dataclass(frozen=True)
class Figure:
    """The course of one metric; `best` is the value and its step, where one is better than another."""

    name: str
    first: float
    last: float
    best: tuple[float, int] | None
    course: tuple[float, ...]


@dataclass(frozen=True)
class Story:
    """What there is to tell.

    Attributes:
        verdict, tone: how the run ended, in one line.
        starts: how often it was started, resumes included.
        steps: done.
        elapsed_s: from the first event to the last, as if the clock had never been set.
        happenings: in their order; a loss and its recovery are one.
        counts: how often each kind of event occurred that is not told.
        ledger: None for a run without one.
    """

    name: str
    command: str
    verdict: str
    tone: Tone
    started: datetime
    starts: int
    steps: int
    elapsed_s: float
    figures: tuple[Figure, ...]
    happenings: tuple[Happening, ...]
    counts: Mapping[str, int]
    ledger: LedgerCheck | None

    @property
    def lost_roles(self) -> list[Happening]:
        """Every time that a role was lost or went silent."""
        return [each for each in self.happenings if each.kind in _LOST]

    @property
    def recovering_s(self) -> float:
        """How long the recoveries took together."""
        return sum(each.took_s or 0.0 for each in self.lost_roles if each.outcome)


def read_story(folder: RunFolder) -> Story:
    """The story so far.

    Raises:
        BadInput: the folder holds no run, or a log is damaged.
    """
    events: Sequence[_Event] = read_log(folder.events)
    if not events:
        raise BadInput(str(folder.path), "has no events.jsonl with a run in it", "the folder of a run")
    rows = read_log(folder.metrics)
    steps = max((int(row["step"] or 0) for row in rows), default=0)
    happenings, counts = _tell(events)
    ledger = _ledger(folder, steps)
    starts = [event for event in events if event["kind"] == "run_started"]
    first = starts[0] if starts else events[0]
    verdict, tone = _verdict(happenings, steps, ledger)
    return Story(
        name=str(first.get("name") or folder.path.name),
        command={"reward_model": "train-rm"}.get(str(first.get("kind_of_run")), str(first.get("kind_of_run") or "run")),
        verdict=verdict,
        tone=tone,
        started=datetime.fromisoformat(first["time"]),
        starts=len(starts),
        steps=steps,
        elapsed_s=_seconds(events)[-1],
        figures=tuple(figure for name in _FIGURES if (figure := _figure(rows, name)) is not None),
        happenings=tuple(happenings),
        counts=counts,
        ledger=ledger,
    )


def _seconds(events: Sequence[_Event]) -> list[float]:
    """When each event was, since the first; what the wall clock was set by in between is left out."""
    began, jumped, seconds = datetime.fromisoformat(events[0]["time"]), 0.0, []
    for event in events:
        jumped += float(event.get("jump_s") or 0.0)
        seconds.append((datetime.fromisoformat(event["time"]) - began).total_seconds() - jumped)
    return seconds


def _tell(events: Sequence[_Event]) -> tuple[list[Happening], dict[str, int]]:
    """What is told, and how often the rest occurred. A recovery becomes the outcome of the loss that it mends."""
    told: list[Happening] = []
    counts: Counter[str] = Counter()
    for event, at_s in zip(events, _seconds(events), strict=True):
        kind = str(event["kind"])
        if kind not in _TOLD:
            counts[kind] += 1
            continue
        tone, words = _TOLD[kind]
        what = words(event)
        why = str(event.get("cause") or "")
        if kind == "run_started" and any(each.kind == kind for each in told):
            what += " again"
        now = Happening(
            kind=kind,
            tone=tone,
            at_s=at_s,
            time=datetime.fromisoformat(event["time"]),
            what=what,
            who=" on ".join(str(event[name]) for name in ("role", "node") if event.get(name)),
            why=first_sentence(why) if kind in _BY_RAY else why,
            took_s=event.get("seconds"),
        )
        if not _joined(told, now):
            told.append(now)
    return told, dict(counts)


def _joined(told: list[Happening], now: Happening) -> bool:
    """Whether something belongs to losses that are told already: it is said of one once more, or mends them all."""
    role = now.who.split(" on ")[0]
    lost = {place: each.who.split(" on ")[0] for place, each in enumerate(told) if each.kind in _LOST}
    still = {place: name for place, name in lost.items() if not told[place].outcome}
    if now.kind in _LOST:
        same = [place for place, name in still.items() if name == role]
        for place in same:
            before = told[place]
            why = f"{before.why}; {now.why}" if now.why not in before.why else before.why
            told[place] = replace(before, why=why.removeprefix("; "))
        return bool(same)
    if now.kind not in _MENDS:
        return False
    # A group is its ranks.
    mended = [place for place, name in still.items() if role in (name, name.rpartition("-")[0])]
    for place in mended:
        took_s = now.took_s if place == mended[-1] else None
        told[place] = replace(told[place], tone="warn", took_s=took_s, outcome=now.what)
    return bool(mended)


def _verdict(happenings: Sequence[Happening], steps: int, ledger: LedgerCheck | None) -> tuple[str, Tone]:
    """How it ended, in one line."""
    turns = ("run_started", "run_stopped", "run_failed", "run_finished")
    last = next((each for each in reversed(happenings) if each.kind in turns), None)
    if last is None or last.kind == "run_started":
        return f"no end was written: under way, or killed after step {steps}", "warn"
    if last.kind == "run_failed":
        return f"{last.what} after step {steps}: {last.who + ': ' if last.who else ''}{last.why}", "bad"
    if last.kind == "run_stopped":
        return f"{last.what} by {last.why}; continue with --resume", "warn"
    if ledger is not None and ledger.problems:
        return f"finished after {steps} steps, but not every sample was used exactly once", "bad"
    early = [each for each in happenings if each.kind == "run_ended_early"]
    if early:
        return f"{early[-1].what}: {early[-1].why}", "warn"
    recovered = sum(each.kind in _LOST for each in happenings)
    survived = f", {recovered} lost {'role' if recovered == 1 else 'roles'} recovered" if recovered else ""
    exact = ", every sample used exactly once" if ledger is not None else ""
    return f"finished after {steps} steps{survived}{exact}", "good"


def _figure(rows: Sequence[Row], name: str) -> Figure | None:
    found = [(float(value), int(row["step"] or 0)) for row in rows if (value := row.get(name)) is not None]
    if not found:
        return None
    choose = {"highest": max, "lowest": min, None: None}[_FIGURES[name]]
    best = None if choose is None else choose(found, key=lambda point: point[0])
    return Figure(name, found[0][0], found[-1][0], best, tuple(value for value, _ in found))


def _ledger(folder: RunFolder, steps: int) -> LedgerCheck | None:
    """The ledger against the prompts' order that the run's configuration makes."""
    if not folder.ledger.exists() or not folder.config_yaml.exists():
        return None
    sampling = yaml.safe_load(folder.config_yaml.read_text(encoding="utf-8"))["sampling"]
    written = [int(row["step"] or 0) for row in read_log(folder.ledger)]
    drawn = sampling["prompts_per_step"] + sampling.get("spare_prompts", 0)
    return check_ledger(folder.ledger, drawn * sampling["samples_per_prompt"], max([steps, *written]))


def _again(event: _Event) -> str:
    dropped = event.get("dropped_rows")
    return f"; the {dropped} done before are done again" if dropped else ""


def _back(event: _Event) -> str:
    again = f" at attempt {event['attempt']}" if (event.get("attempt") or 1) > 1 else ""
    return f"back{again}" if event["kind"] == "role_restarted" else "group rebuilt"


def _by(event: _Event) -> str:
    return f", stopped by the guard '{event['guard']}'" if event.get("guard") else ""
