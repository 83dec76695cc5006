"""Watches the processes of a run: who is gone, who is back, and who is alive but silent.

A silent process is ended; from then on it is like one that died by itself. What happens next is not decided here: Ray
starts a process that keeps nothing again, and the loss of a learner's rank ends the wait for its answer. Where the
cluster has no room any more for a process that Ray would start again, those who wait for it are told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray

from rlhf_ray.failures import RoleFailure, first_sentence
from rlhf_ray.runtime.actor_group import ActorGroup, Replica, core_seconds, end_process
from rlhf_ray.runtime.answers import reason_of
from rlhf_ray.runtime.cluster import Reservation
from rlhf_ray.runtime.role_host import Place
from rlhf_ray.runtime.vitals import Pulse
from rlhf_ray.tracking.logs import EventLog

_LOOKS = 5
"""In the time after which a process counts as silent."""
_WORKING_SHARE = 0.2
"""Of a core: what a process that does not answer must use to count as busy."""


@dataclass
class _Watched:
    """What is known of one process.

    Attributes:
        replica: whose it is.
        restarts: whether Ray starts it again.
        place: where it was last.
        started: which start of the role it is.
        asked: the question that it has not answered yet.
        answered_at: when it last answered.
        lost_at: when it was found to be gone.
        used: its core-seconds and when they were read, while it does not answer.
    """

    replica: Replica[Any]
    restarts: bool
    place: Place
    answered_at: float
    started: int = 1
    asked: ray.ObjectRef | None = None
    lost_at: float | None = None
    used: tuple[float, float] | None = None


class Supervisor:
    """A thread of the driver that looks after the processes.

    Args:
        events: where it is told what happened.
        silent_after_s: see `cluster.silent_after_s`.
        say: tells whoever looks at the run.

    Attributes:
        failure: why processes were given up, once some were.
    """

    def __init__(self, events: EventLog, silent_after_s: float, say: Callable[[str], None]) -> None:
        self._events, self._silent_after_s, self._say = events, silent_after_s, say
        self.failure: RoleFailure | None = None
        self._groups: list[list[_Watched]] = []
        self._reservation: Reservation | None = None
        self._no_room_since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def watch(self, groups: Iterable[ActorGroup[Any]], reservation: Reservation | None = None) -> None:
        """Watch these from now on; what is known of processes that were watched before stays known.

        Args:
            reservation: the room that they are in.
        """
        self._reservation = reservation
        known = {id(each.replica.host): each for group in self._groups for each in group}
        now = time.monotonic()
        self._groups = [
            [known.get(id(replica.host)) or _Watched(replica, group.restarts, replica.place, now) for replica in group]
            for group in groups
        ]

    def _watch(self) -> None:
        every_s = self._silent_after_s / _LOOKS
        while not self._ended.wait(every_s):
            try:
                self._look(every_s / 2)
            except Exception as error:  # the run goes on without being watched, and says so
                self._events.write("supervision_ended", cause=f"{type(error).__name__}: {error}")
                return

    def _look(self, patience_s: float) -> None:
        groups = self._groups
        watched = [each for group in groups for each in group if each.restarts or each.lost_at is None]
        for each in watched:
            each.asked = each.asked or each.replica.pulse().reference
        asked = {each.asked: each for each in watched}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=patience_s, fetch_local=False)
        pulses: dict[str, Pulse] = {}
        for reference in answered:
            each = asked[reference]
            each.asked = None
            try:
                pulse: Pulse = ray.get(reference, timeout=patience_s)
            except ray.exceptions.RayError as error:
                self._note_lost(each, reason_of(error))
            else:
                pulses[each.replica.name] = pulse
                self._note_alive(each, pulse)
        if self._ended.is_set():
            return
        for each in watched:
            if each.asked is not None:
                self._suspect(each)
        for group in groups:
            self._end_stuck(group, pulses)
        self._give_up_without_room([each for each in watched if each.replica.name not in pulses])

    def _note_lost(self, each: _Watched, cause: str) -> None:
        if each.lost_at is not None:
            return
        each.lost_at = time.monotonic()
        if each.restarts:  # of a rank, whoever waits for its answer tells
            self._events.write("role_lost", role=each.replica.name, node=each.place.node, cause=cause)
            self._say(f"lost {each.replica.name} on {each.place.node} ({first_sentence(cause)}); Ray starts it again")

    def _note_alive(self, each: _Watched, pulse: Pulse) -> None:
        now = time.monotonic()
        if pulse.pid != each.place.pid or pulse.node_id != each.place.node_id:
            since = each.answered_at if each.lost_at is None else each.lost_at
            self._note_lost(each, pulse.last_words or "gone and back again between two looks")
            self._events.write(
                "role_restarted",
                role=each.replica.name,
                node=pulse.node,
                cause=pulse.last_words,
                attempt=pulse.started,
                seconds=round(now - since, 1),
            )
            self._say(f"{each.replica.name} is back on {pulse.node} after {now - since:.0f} s")
            each.place, each.started = Place(pulse.node, pulse.node_id, pulse.pid), pulse.started
        each.answered_at, each.lost_at, each.used = now, None, None

    def _suspect(self, each: _Watched) -> None:
        """It does not answer: it is gone, hard at work without letting go of the interpreter, or stopped."""
        now, used = time.monotonic(), core_seconds(each.place)
        if used is None:
            return  # Ray will say so
        before, each.used = each.used, (used, now)
        if before is not None and used - before[0] > _WORKING_SHARE * (now - before[1]):
            each.answered_at = now
        elif now - each.answered_at > self._silent_after_s:
            self._end(each, now - each.answered_at, "no answer, and no processor time used")

    def _give_up_without_room(self, missing: Sequence[_Watched]) -> None:
        if not missing or self._reservation is None or self._reservation.holds():
            self._no_room_since = None
            return
        now = time.monotonic()
        since = self._no_room_since = self._no_room_since or now
        if now - since <= self._reservation.settings.placement_timeout_s:
            return
        self.failure = self.failure or self._reservation.no_room(now - since)
        for each in missing:
            ray.kill(each.replica.host)  # those who wait for its answer are told by this

    def _end_stuck(self, group: Sequence[_Watched], pulses: dict[str, Pulse]) -> None:
        """End the ranks of a role whose calls do not get on. One that waits for another rank does nothing wrong."""
        busy = [(each, pulse) for each in group if (pulse := pulses.get(each.replica.name)) and pulse.doing]
        stuck = [
            (each, pulse) for each, pulse in busy if pulse.stuck_s is not None and pulse.stuck_s > self._silent_after_s
        ]
        # Replicas that Ray starts again work on their own.
        together = not all(each.restarts for each in group)
        if not stuck or (together and len(stuck) < len(busy)):
            return
        for each, pulse in stuck:
            self._end(each, pulse.stuck_s or 0.0, f"{', '.join(pulse.doing)}: no processor time used")

    def _end(self, each: _Watched, seconds: float, doing: str) -> None:
        self._events.write(
            "role_silent", role=each.replica.name, node=each.place.node, cause=doing, seconds=round(seconds, 1)
        )
        self._say(f"{each.replica.name} on {each.place.node} is silent ({doing}): ended after {seconds:.0f} s")
        end_process(each.place)
        each.answered_at, each.used = time.monotonic(), None
