"""What the service as a whole knows: which models it should have, how they do, and what its traffic is like.

Replicas send a beat each second and get the order of models back. The order is the monitor's alone: a hot swap is a
new order that replicas follow at their own pace, each loading first and swapping then, while Serve routes as before.
A candidate that breaks a rule leaves the order; it comes back only when the configuration changes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf_ray.config.serving import CandidateSettings, DriftSettings, ServedModelSettings
from rlhf_ray.serving.candidates import CanaryComparison, ShadowComparison, judge
from rlhf_ray.serving.drift import DriftWatch
from rlhf_ray.serving.model_table import shares
from rlhf_ray.serving.timeline import Timeline
from rlhf_ray.serving.traffic import Beat, ModelOrder, ModelWork, ReplicaModel

SILENT_AFTER_S = 10.0
"""A replica that has not been heard of for so long is gone."""
_EVENTS = 50
_HISTOGRAM_SCORES = 2000


@dataclass
class _Known:
    """A version that some replica has or had in memory."""

    model: ReplicaModel
    drift: DriftWatch | None
    work: ModelWork = field(default_factory=ModelWork)
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTOGRAM_SCORES))


class ServiceMonitor:
    """The monitor; it knows nothing of Ray.

    Args:
        candidates: when a candidate is taken back.
        drift: how traffic is compared with the training data.
    """

    def __init__(self, candidates: CandidateSettings, drift: DriftSettings) -> None:
        self._candidates = candidates
        self._drift = drift
        self._models: tuple[ServedModelSettings, ...] = ()
        self._rolled_back: dict[str, tuple[str, ...]] = {}
        self._serial = 0
        self._order = ModelOrder.of(())
        self._replicas: dict[str, tuple[float, Beat]] = {}
        self._known: dict[str, _Known] = {}
        self._shadows: dict[tuple[str, str], ShadowComparison] = {}
        self._canaries: dict[tuple[str, str], CanaryComparison] = {}
        self._timeline = Timeline()
        self._errors: dict[str, int] = {}
        self._left_out = 0
        self._events: deque[tuple[float, str]] = deque(maxlen=_EVENTS)

    def set_models(self, models: Sequence[ServedModelSettings], serial: int) -> None:
        """Order other models. What was taken back stays so unless its entry is another one now.

        Args:
            serial: of the order; a later one is not replaced by it.
        """
        if serial < self._serial:
            return
        self._serial = serial
        before, after = ({model.name: model for model in each} for each in (self._models, models))
        self._models = tuple(models)
        for name in [name for name in before if after.get(name) != before[name]]:
            self._rolled_back.pop(name, None)
            self._forget(name)
        self._reorder()
        self._note("models ordered: " + ", ".join(model.name for model in models))

    def beat(self, beat: Beat) -> ModelOrder:
        """Take a replica's word in, and say which models it should have."""
        now = time.time()
        if beat.order.serial > self._serial:
            # This monitor began anew; the replicas remember what they were told.
            self.set_models(beat.order.models, beat.order.serial)
        if beat.replica not in self._replicas:
            self._note(f"replica {beat.replica} began to serve")
        self._replicas[beat.replica] = (now, beat)
        for gone in [name for name, (seen, _) in self._replicas.items() if now - seen > SILENT_AFTER_S]:
            del self._replicas[gone]
            self._note(f"replica {gone} went silent")
        for model in beat.models:
            if model.info.version not in self._known:
                # A file of other weights would compare two models.
                fits = model.reference is not None and model.reference.version == model.info.version
                watch = DriftWatch(model.reference, self._drift) if model.reference and fits else None
                self._known[model.info.version] = _Known(model, watch)
                self._note(f"{model.info.name} {model.info.version} is in memory")
            self._known[model.info.version].model = model
        self._count(beat, now)
        self._judge()
        return self._order

    @property
    def order(self) -> ModelOrder:
        """The models that replicas should have."""
        return self._order

    def expositions(self) -> dict[str, bytes]:
        """The metrics of all replicas, as of their last beat."""
        return {name: beat.exposition for name, (_, beat) in sorted(self._replicas.items())}

    def status(self) -> dict[str, Any]:
        """Everything that the page and `--report` show."""
        now = time.time()
        return {
            "time": now,
            "order": self._order.digest,
            "replicas": [
                {
                    "id": name,
                    "order": beat.order.digest,
                    "models": [model.info.version for model in beat.models],
                    "queued": beat.queued,
                    "age_s": beat.age_s,
                    "load_failures": beat.load_failures,
                }
                for name, (_, beat) in sorted(self._replicas.items())
            ],
            "models": self._model_rows(),
            "series": self._timeline.series(now),
            "errors": dict(sorted(self._errors.items())),
            "drift": [row for version, known in self._known.items() for row in self._drift_rows(version, known)],
            "candidates": self._candidate_rows(),
            "events": [{"time": when, "what": what} for when, what in self._events],
            "left_out": self._left_out,
        }

    def _count(self, beat: Beat, now: float) -> None:
        traffic = beat.traffic
        self._timeline.add(now, beat.replica, traffic, beat.queued)
        self._left_out += traffic.left_out
        for name, count in traffic.errors.items():
            self._errors[name] = self._errors.get(name, 0) + count
        for version, work in traffic.work.items():
            if version in self._known:
                _add(self._known[version].work, work)
        for version, sample in traffic.samples.items():
            known = self._known.get(version)
            if known is None:
                continue
            known.scores.extend(sample.scores.tolist())
            if known.drift is None:
                continue
            for drift in known.drift.add(sample.scores, sample.num_tokens, sample.keys):
                if drift.alarm:
                    self._note(f"drift: the last {self._drift.window_texts} texts of {known.model.info.name} differ")
        for versions, pairs in traffic.shadows.items():
            comparison = self._shadows.setdefault(versions, ShadowComparison())
            comparison.add(pairs.live_scores, pairs.shadow_scores, pairs.groups)

    def _judge(self) -> None:
        """Take back candidates that break a rule."""
        self._compare_work()
        comparisons: dict[tuple[str, str], ShadowComparison | CanaryComparison] = {**self._shadows, **self._canaries}
        for versions, comparison in comparisons.items():
            known = self._known.get(versions[1])
            if known is None or known.model.info.name in self._rolled_back:
                continue
            name = known.model.info.name
            if not any(model.name == name for model in self._order.models):
                continue
            if reasons := judge(comparison, self._candidates):
                self._rolled_back[name] = reasons
                self._reorder()
                self._note(f"{name} is taken back: {'; '.join(reasons)}")

    def _compare_work(self) -> None:
        """Hand counts of work, which belong to versions, to the comparisons, which belong to pairs of versions."""
        live = [known for known in self._known.values() if known.model.info.role == "live" and known.model.info.share]
        if not live:
            return
        main = max(live, key=lambda known: known.model.info.share)
        main_version = main.model.info.version
        for version, known in self._known.items():
            pace = known.model.pace
            if known is main or pace is None:
                continue
            main_work = replace(main.work, compute_s=pace.main_s, tokens=pace.tokens)
            own_work = replace(known.work, compute_s=pace.candidate_s, tokens=pace.tokens)
            # Also where it has scored nothing yet: one that fails every text must be taken back too.
            if known.model.info.role == "shadow":
                self._shadows.setdefault((main_version, version), ShadowComparison()).set_work(main_work, own_work)
            elif known.model.info.share:
                self._canaries.setdefault((main_version, version), CanaryComparison()).set_work(main_work, own_work)

    def _reorder(self) -> None:
        """The configured models without those taken back; the others take over their shares."""
        share_of = shares(self._models)
        kept = [model for model in self._models if model.name not in self._rolled_back]
        total = sum(share_of[model.name] for model in kept)
        models = self._models
        if len(kept) < len(models) and total > 0:
            models = tuple(
                model if model.shadow else model.model_copy(update={"share": share_of[model.name] / total})
                for model in kept
            )
        self._order = ModelOrder.of(models, self._serial)

    def _forget(self, name: str) -> None:
        """Let go of what is known of a candidate: its entry is another one now."""
        versions = {version for version, known in self._known.items() if known.model.info.name == name}
        for comparisons in (self._shadows, self._canaries):
            for pair in [pair for pair in comparisons if versions & set(pair)]:
                del comparisons[pair]
        for version in versions:
            self._known[version].work = ModelWork()

    def _note(self, what: str) -> None:
        self._events.append((time.time(), what))

    def _model_rows(self) -> list[dict[str, Any]]:
        """A row for each configured model, whatever has become of it."""
        share_of = shares(self._order.models)
        digest = self._order.digest
        beats = [beat for _, beat in self._replicas.values()]
        failures = {beat.load_failures[digest] for beat in beats if digest in beat.load_failures}
        rows = []
        for model in self._models:
            known = self._newest(model)
            role = "shadow" if model.shadow else "live"
            reason: str | None = None
            if model.name in self._rolled_back:
                role, reason = "rolled_back", "; ".join(self._rolled_back[model.name])
            elif any(beat.order.digest != self._order.digest for _, beat in self._replicas.values()) or known is None:
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

    def _newest(self, model: ServedModelSettings) -> _Known | None:
        found = [
            known
            for known in self._known.values()
            if known.model.info.name == model.name and known.model.path == model.path
        ]
        return found[-1] if found else None

    def _drift_rows(self, version: str, known: _Known) -> list[dict[str, Any]]:
        watch, reference = known.drift, known.model.reference
        if (
            watch is None
            or reference is None
            or not any(version == model.info.version for _, beat in self._replicas.values() for model in beat.models)
        ):
            return []
        rolling = watch.rolling()
        rows = []
        for quantity in ("score", "length"):
            now = getattr(rolling, quantity) if rolling else None
            rows.append(
                {
                    "model": known.model.info.name,
                    "version": version,
                    "quantity": quantity,
                    "texts": now.texts if now else 0,
                    "psi": now.psi if now else None,
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
        rows = []
        for role, comparisons in (("shadow", self._shadows), ("canary", self._canaries)):
            for (_, version), comparison in comparisons.items():
                known = self._known.get(version)
                name = known.model.info.name if known else version
                rows.append(
                    {
                        "name": name,
                        "version": version,
                        "role": role,
                        **comparison.report().as_dict(),
                        "rolled_back": name in self._rolled_back,
                        "reasons": list(self._rolled_back.get(name, ())),
                    }
                )
        return rows


def _add(total: ModelWork, more: ModelWork) -> None:
    total.texts += more.texts
    total.tokens += more.tokens
    total.failures += more.failures
    total.compute_s += more.compute_s
    total.score_sum += more.score_sum
    total.score_square_sum += more.score_square_sum


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
