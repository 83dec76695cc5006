"""What the service as a whole knows: which models it should have, how they do, and what its traffic is like.

Replicas send a beat each second and get the order of models back. The order is the monitor's alone: a hot swap is a
new order that replicas follow at their own pace, each loading first and swapping then, while Serve routes as before.
A candidate that breaks a rule leaves the order; it comes back only when its entry in the configuration changes.

Everything is counted by entry and weights (`ModelId`), and candidates are compared with the main model of the replica
that they are in, from the beats of replicas that follow the present order: what the models of an earlier order did
says nothing of these.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_ray.config.serving import CandidateSettings, DriftSettings, ServedModelSettings
from rlhf_ray.reward.serve.audit import Head
from rlhf_ray.reward.serve.candidates import CanaryComparison, ShadowComparison, judge
from rlhf_ray.reward.serve.drift import DriftWatch
from rlhf_ray.reward.serve.exchange import ModelId
from rlhf_ray.reward.serve.exposition import status_exposition
from rlhf_ray.reward.serve.model_table import shares
from rlhf_ray.reward.serve.orders import Decisions, Store
from rlhf_ray.reward.serve.timeline import Timeline
from rlhf_ray.reward.serve.traffic import Beat, ModelOrder, ModelWork, ReplicaModel

SILENT_AFTER_S = 10.0
"""A replica that has not been heard of for so long is gone."""
_EVENTS = 50
_HISTOGRAM_SCORES = 2000


@dataclass
class _Known:
    """A model that some replica has in memory, or the last one of an entry."""

    model: ReplicaModel
    drift: DriftWatch | None
    work: ModelWork = field(default_factory=ModelWork)
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTOGRAM_SCORES))


class ServiceMonitor:
    """The monitor; it knows nothing of Ray.

    Args:
        candidates: when a candidate is rolled back.
        drift: how traffic is compared with the training data.
        store: what was decided, also by monitors before this one.
    """

    def __init__(self, candidates: CandidateSettings, drift: DriftSettings, store: Store) -> None:
        self._candidates = candidates
        self._drift = drift
        self._store = store
        self._decided = store.load()
        self._replicas: dict[str, tuple[float, Beat]] = {}
        self._known: dict[ModelId, _Known] = {}
        self._comparisons: dict[tuple[ModelId, ModelId], ShadowComparison | CanaryComparison] = {}
        self._timeline = Timeline()
        self._errors: dict[str, int] = {}
        self._left_out = 0
        self._audit: dict[str, Head] = {}
        self._events: deque[tuple[float, str]] = deque(maxlen=_EVENTS)

    def configure(self, models: Sequence[ServedModelSettings], configuration: Mapping[str, Any]) -> None:
        """Order the models of the deployment's configuration, unless it is the one that was there before: then what
        was decided since holds.

        Args:
            models: of the configuration.
            configuration: as the deployment has it, all of it.
        """
        if dict(configuration) != self._decided.configuration:
            self._order(models, dict(configuration))

    def refuse(self, cause: str) -> None:
        """Note that other models were to be ordered, and cannot be."""
        self._note(f"the models that are served stay; those of the new configuration are refused: {cause}")

    def order_models(self, models: Sequence[ServedModelSettings]) -> None:
        """Order other models than those of the configuration, or the same once more."""
        self._order(models, self._decided.configuration)

    def _order(self, models: Sequence[ServedModelSettings], configuration: dict[str, Any]) -> None:
        changed = {
            entry.name for entry in (*self._decided.models, *models) if self._decided.entry(entry.name) not in models
        }
        self._decide(self._decided.ordered(models, configuration))
        # Entries that are others now begin anew.
        self._comparisons = {
            pair: comparison
            for pair, comparison in self._comparisons.items()
            if not changed & {model.name for model in pair}
        }
        for model, known in self._known.items():
            if model.name in changed:
                known.work = ModelWork()
        self._note("models ordered: " + ", ".join(model.name for model in models))

    def _decide(self, decided: Decisions) -> None:
        self._store.save(decided)
        self._decided = decided

    def beat(self, beat: Beat) -> ModelOrder:
        """Record a replica's report, and say which models it should have."""
        now = time.monotonic()
        if beat.replica not in self._replicas:
            self._note(f"replica {beat.replica} began to serve")
        self._replicas[beat.replica] = (now, beat)
        for gone in [name for name, (seen, _) in self._replicas.items() if now - seen > SILENT_AFTER_S]:
            del self._replicas[gone]
            self._note(f"replica {gone} went silent")
        for model in beat.models:
            known = self._known.pop(model.info.id, None)
            if known is None:
                # A file of other weights would compare two models.
                fits = model.reference is not None and model.reference.version == model.info.version
                watch = DriftWatch(model.reference, self._drift) if model.reference and fits else None
                known = _Known(model, watch)
                self._note(f"{model.info.name} {model.info.version} is in memory")
            known.model = model
            # Behind all others: what an entry stands for now is what was reported last.
            self._known[model.info.id] = known
        if beat.audit is not None:
            # Also of replicas that are gone: their chains must still be there.
            self._audit[beat.audit.writer] = beat.audit
        self._count(beat, time.time())
        if beat.order == self._decided.number:
            self._compare(beat)
        self._forget()
        self._judge()
        return self.order

    @property
    def order(self) -> ModelOrder:
        """The models that replicas should have."""
        return self._decided.order

    def expositions(self) -> dict[str, bytes]:
        """The metrics of all replicas, as of their last beat, and of the service as a whole."""
        replicas = {name: beat.exposition for name, (_, beat) in sorted(self._replicas.items())}
        return {**replicas, "monitor": status_exposition(self.status())}

    def status(self) -> dict[str, Any]:
        """Everything that the page and `--report` show."""
        now = time.time()
        return {
            "time": now,
            "order": self._decided.number,
            "replicas": [
                {
                    "id": name,
                    "order": beat.order,
                    "models": [model.info.version for model in beat.models],
                    "queued": beat.queued,
                    "age_s": beat.age_s,
                    "load_failure": self._failure(beat),
                }
                for name, (_, beat) in sorted(self._replicas.items())
            ],
            "models": self._model_rows(),
            "series": self._timeline.series(now),
            "errors": dict(sorted(self._errors.items())),
            "drift": [row for model, known in self._known.items() for row in self._drift_rows(model, known)],
            "candidates": self._candidate_rows(),
            "events": [{"time": when, "what": what} for when, what in self._events],
            "left_out": self._left_out,
            "audit": [head.model_dump() for head in self._audit.values()],
        }

    def _count(self, beat: Beat, now: float) -> None:
        traffic = beat.traffic
        self._timeline.add(now, beat.replica, traffic, beat.queued)
        self._left_out += traffic.left_out
        for name, count in traffic.errors.items():
            self._errors[name] = self._errors.get(name, 0) + count
        for model, work in traffic.work.items():
            if model in self._known:
                self._known[model].work.add(work)
        for model, sample in traffic.samples.items():
            known = self._known.get(model)
            if known is None:
                continue
            known.scores.extend(sample.scores.tolist())
            if known.drift is None:
                continue
            for drift in known.drift.add(sample.scores, sample.num_tokens, sample.keys):
                if drift.alarm:
                    self._note(f"drift: the last {self._drift.window_texts} texts of {model.name} differ")

    def _compare(self, beat: Beat) -> None:
        """Count a replica's candidates beside its main model."""
        live = [model for model in beat.models if model.info.role == "live"]
        if not live:
            return
        main = max(live, key=lambda model: model.info.share)
        work, shadows = beat.traffic.work, beat.traffic.shadows
        for model in beat.models:
            if model is main:
                continue
            pair = (main.info.id, model.info.id)
            comparison = self._comparisons.get(pair)
            if comparison is None:
                comparison = ShadowComparison() if model.info.role == "shadow" else CanaryComparison()
                self._comparisons[pair] = comparison
            # Also where it has scored nothing yet: one that fails every text must be rolled back too.
            comparison.add_work(work.get(pair[0], ModelWork()), work.get(pair[1], ModelWork()), model.pace)
            if isinstance(comparison, ShadowComparison) and pair in shadows:
                comparison.add(shadows[pair].live_scores, shadows[pair].shadow_scores, shadows[pair].groups)

    def _judge(self) -> None:
        """Roll back candidates that break a rule."""
        for (_, candidate), comparison in self._comparisons.items():
            name = candidate.name
            if name in self._decided.rolled_back or self._decided.entry(name) is None:
                continue
            if reasons := judge(comparison, self._candidates):
                self._decide(self._decided.without(name, reasons))
                self._note(f"{name} is rolled back: {'; '.join(reasons)}")

    def _forget(self) -> None:
        """Let go of models that no replica has any more, but for the last one of each entry, which the page shows."""
        present = {model.info.id for _, beat in self._replicas.values() for model in beat.models}
        last = {model.name: model for model in self._known}
        self._known = {
            model: known
            for model, known in self._known.items()
            if model in present or (model == last[model.name] and self._decided.entry(model.name) is not None)
        }
        self._comparisons = {
            (main, candidate): comparison
            for (main, candidate), comparison in self._comparisons.items()
            if main in present and (candidate in present or candidate.name in self._decided.rolled_back)
        }

    def _note(self, what: str) -> None:
        self._events.append((time.time(), what))

    def _model_rows(self) -> list[dict[str, Any]]:
        """A row for each configured model, whatever has become of it."""
        share_of = shares(self.order.models)
        beats = [beat for _, beat in self._replicas.values()]
        failures = {failure for beat in beats if (failure := self._failure(beat)) is not None}
        behind = any(beat.order != self._decided.number for beat in beats)
        rows = []
        for model in self._decided.models:
            known = self._newest(model)
            role = "shadow" if model.shadow else "live"
            reason: str | None = None
            if model.name in self._decided.rolled_back:
                role, reason = "rolled_back", "; ".join(self._decided.rolled_back[model.name])
            elif behind or known is None:
                role = "failed" if failures else "loading"
                reason = "; ".join(sorted(failures)) or None
            rows.append(
                {
                    "name": model.name,
                    "version": known.model.info.version if known else None,
                    "role": role,
                    "share": share_of.get(model.name, 0.0),
                    "reason": reason,
                    "texts": known.work.texts if known else 0,
                    "compute_ms_per_text": 1000 * known.work.compute_s / known.work.texts
                    if known and known.work.texts
                    else None,
                }
            )
        return rows

    def _failure(self, beat: Beat) -> str | None:
        """Why a replica cannot follow the present order."""
        failure = beat.load_failure
        return failure[1] if failure is not None and failure[0] == self._decided.number else None

    def _newest(self, model: ServedModelSettings) -> _Known | None:
        found = [
            known
            for known in self._known.values()
            if known.model.info.name == model.name and known.model.path == model.path
        ]
        return found[-1] if found else None

    def _drift_rows(self, model: ModelId, known: _Known) -> list[dict[str, Any]]:
        watch, reference = known.drift, known.model.reference
        if (
            watch is None
            or reference is None
            or not any(model == each.info.id for _, beat in self._replicas.values() for each in beat.models)
        ):
            return []
        rolling = watch.rolling()
        rows = []
        for quantity in ("score", "length"):
            now = getattr(rolling, quantity) if rolling else None
            rows.append(
                {
                    "model": model.name,
                    "version": model.version,
                    "quantity": quantity,
                    "texts": now.texts if now else 0,
                    "ks": now.ks if now else None,
                    "p_value": now.p_value if now else None,
                    "alarm": bool(watch.latest and getattr(watch.latest, quantity).alarm),
                    "windows": watch.windows,
                    "alarms": watch.alarms,
                    "histogram": _histogram(known) if quantity == "score" else None,
                }
            )
        return rows

    def _candidate_rows(self) -> list[dict[str, Any]]:
        rolled_back = self._decided.rolled_back
        return [
            {
                "name": candidate.name,
                "version": candidate.version,
                "role": "shadow" if isinstance(comparison, ShadowComparison) else "canary",
                **comparison.report().as_dict(),
                "rolled_back": candidate.name in rolled_back,
                "reasons": list(rolled_back.get(candidate.name, ())),
            }
            for (_, candidate), comparison in self._comparisons.items()
        ]


def _histogram(known: _Known) -> dict[str, list[float]] | None:
    """Shares of the last live scores, and of the reference, in the same bins."""
    reference = known.model.reference
    scores = np.array(known.scores)
    scores = scores[np.isfinite(scores)]
    if reference is None or len(scores) < 2:
        return None
    points, cumulative = np.array(reference.score.points), np.array(reference.score.shares)
    edges = np.linspace(min(points[0], scores.min()), max(points[-1], scores.max()), 25)
    live = np.histogram(scores, edges)[0] / len(scores)
    below = np.interp(edges, points, cumulative, left=0.0, right=1.0)
    return {"edges": edges.tolist(), "live": live.tolist(), "reference": np.diff(below).tolist()}
