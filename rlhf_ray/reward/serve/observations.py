"""What is kept of a replica's traffic: metrics for Prometheus, samples for the monitor, records for the audit.

Never a text: only hashes, lengths and scores, unless the audit is asked to keep token ids.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rlhf_ray.config.serving import CandidateSettings
from rlhf_ray.reward.client.service_errors import ErrorType
from rlhf_ray.reward.core.encoding import Encoded
from rlhf_ray.reward.core.scorer import ScoredTexts
from rlhf_ray.reward.serve.audit import AuditRecord
from rlhf_ray.reward.serve.batcher import BatchRecord
from rlhf_ray.reward.serve.context import RequestContext
from rlhf_ray.reward.serve.exchange import ModelId, Timings
from rlhf_ray.reward.serve.model_table import LoadedModel, unit_hash
from rlhf_ray.reward.serve.traffic import LATENCY_EDGES_S, ModelWork, ShadowSample, TextSample, Traffic

_SAID_BY_SERVE = {499: "client_gone", 500: ErrorType.INTERNAL.value}
"""What Serve answers itself: where nobody waits any more, and where our part was lost; else it has no replica."""
_MOST_SAMPLES = 4096
"""Texts of one model that a beat carries; the rest is counted."""
_MOST_SHADOW_TEXTS = 2048
"""Texts that may wait for shadows; more are let go, and counted."""
_NOT_TRAFFIC = {"operations", "page", "explain", "other"}
"""Families that the page's charts leave out: they would show the page's own calls."""
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_QUANTILE_TEXTS = 1000
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_REFUSALS = {ErrorType.OVERLOADED, ErrorType.OVER_LIMIT, ErrorType.UNAVAILABLE, ErrorType.TOO_LARGE} | {
    ErrorType.BAD_REQUEST,
    ErrorType.UNAUTHORIZED,
    ErrorType.NOT_FOUND,
    ErrorType.UNSCORABLE,
}


class ServiceMetrics:
    """The metrics of one replica, as `docs/serving.md` lists them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counts = {
            "requests": ("Requests by protocol and status.", ("family", "status")),
            "errors": ("Requests that got no scores, by type.", ("type",)),
            "texts": ("Texts scored.", ("model", "version")),
            "tokens": ("Tokens scored.", ("model", "version")),
            "truncated_texts": ("Texts that were cut.", ("model", "version")),
            "failed_texts": ("Texts that got no finite score.", ("model", "version")),
            "caller_requests": ("Requests by the name of the caller's token.", ("caller",)),
            "caller_texts": ("Texts scored, by caller.", ("caller",)),
            "caller_refusals": ("Requests that were refused, by caller and type.", ("caller", "type")),
            "token_file_errors": ("Changes of the token file that could not be used.", ()),
            "shadow_texts": ("Texts a shadow scored.", ("model", "version")),
            "shadow_skipped_texts": ("Texts a shadow had no time for.", ("model", "version")),
        }
        self.counters = {
            name: Counter(f"rlhf_ray_{name}", text, labels, registry=self.registry)
            for name, (text, labels) in counts.items()
        }
        seconds = {
            "request_seconds": ("From arrival to answer.", ("family",)),
            "tokenize_seconds": ("Turning texts into tokens, a request.", ()),
            "queue_seconds": ("Waiting for a forward pass, a request.", ()),
            "compute_seconds": ("From the first forward pass to the end of the last, a request.", ()),
        }
        self.seconds = {
            name: Histogram(f"rlhf_ray_{name}", text, labels, buckets=_SECONDS, registry=self.registry)
            for name, (text, labels) in seconds.items()
        }
        powers = [2**power for power in range(15)]
        self.batch_texts = Histogram("rlhf_ray_batch_texts", "Texts a batch.", buckets=powers, registry=self.registry)
        self.batch_tokens = Histogram(
            "rlhf_ray_batch_tokens", "Tokens a batch.", buckets=powers, registry=self.registry
        )
        self.audit_lost = Counter(
            "rlhf_ray_audit_lost_texts", "Scores that could not be written to the audit log.", registry=self.registry
        )
        self.ready = Gauge("rlhf_ray_ready", "Whether `/readyz` answers 200.", registry=self.registry)
        self.queued = Gauge("rlhf_ray_queued_requests", "Requests not yet answered.", registry=self.registry)
        self.restarts = Gauge("rlhf_ray_scorer_restarts", "Deaths of the scoring process.", registry=self.registry)
        self.score_quantiles = Gauge(
            "rlhf_ray_score", "Quantiles of the last scores.", ("model", "version", "quantile"), registry=self.registry
        )
        self.disagreement = Gauge(
            "rlhf_ray_disagreement_mean",
            "Mean disagreement of an ensemble's members over the last texts.",
            ("model", "version"),
            registry=self.registry,
        )


class Observer:
    """Told of everything that happens in a replica.

    Args:
        candidates: what share of texts shadows score.
        batch_invariant: whether scores are free of their batches.

    Attributes:
        audit: takes every score; None where no log is kept.
        trace: takes model, times, texts and tokens of every request; None where there are no traces.
    """

    def __init__(self, candidates: CandidateSettings, batch_invariant: bool) -> None:
        self.audit: Callable[[Sequence[AuditRecord]], None] | None = None
        self.trace: Callable[[ModelId, Timings, int, int], None] | None = None
        self._batch_invariant = batch_invariant
        self.metrics = ServiceMetrics()
        self._candidates = candidates
        self._traffic = Traffic()
        self._samples: dict[ModelId, list[tuple[np.ndarray, np.ndarray, list[int]]]] = defaultdict(list)
        self._num_samples: dict[ModelId, int] = defaultdict(int)
        self._shadows: dict[tuple[ModelId, ModelId], list[tuple[np.ndarray, np.ndarray, int]]] = defaultdict(list)
        self._waiting_for_shadow = 0
        self._recent: dict[ModelId, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=_QUANTILE_TEXTS))

    def scored(
        self, context: RequestContext, model: LoadedModel, encoded: Sequence[Encoded], scored: ScoredTexts, t: Timings
    ) -> None:
        """A request's texts got their scores."""
        labels = model.info.id
        num_texts, num_tokens = len(encoded), int(scored.num_tokens.sum())
        counters = self.metrics.counters
        counters["texts"].labels(*labels).inc(num_texts)
        counters["tokens"].labels(*labels).inc(num_tokens)
        if context.caller.name is not None:
            counters["caller_texts"].labels(context.caller.name).inc(num_texts)
        if truncated := int(scored.truncated.sum()):
            counters["truncated_texts"].labels(*labels).inc(truncated)
        for name, value in (
            ("tokenize_seconds", t.tokenize_s),
            ("queue_seconds", t.queue_s),
            ("compute_seconds", t.compute_s),
        ):
            self.metrics.seconds[name].observe(value)
        if self.trace is not None:
            self.trace(labels, t, num_texts, num_tokens)
        self._traffic.texts += num_texts
        self._traffic.tokens += num_tokens
        work = self._work(labels)
        work.texts += num_texts
        good = np.flatnonzero(np.isfinite(scored.scores))
        scores = scored.scores[good]
        work.score_sum += float(scores.sum())
        work.score_square_sum += float((scores**2).sum())
        if failures := num_texts - len(good):
            work.failures += failures
            counters["failed_texts"].labels(*labels).inc(failures)
        self.record(context, model, encoded, scored)
        if len(good):
            self._recent[labels].extend(zip(scores.tolist(), scored.disagreement[good].tolist(), strict=True))
        if self._num_samples[labels] + len(good) > _MOST_SAMPLES:
            self._traffic.left_out += len(good)
        elif len(good):
            self._num_samples[labels] += len(good)
            self._samples[labels].append((scores, scored.num_tokens[good], [_key(encoded[row][0]) for row in good]))

    def failed(self, model: LoadedModel, num_texts: int) -> None:
        """A model gave a request's texts no scores."""
        self.metrics.counters["failed_texts"].labels(*model.info.id).inc(num_texts)
        work = self._work(model.info.id)
        work.texts += num_texts
        work.failures += num_texts

    def keep_only(self, models: Sequence[ModelId]) -> None:
        """Let go of what the last texts of other models were."""
        for gone in self._recent.keys() - set(models):
            del self._recent[gone]
            with suppress(KeyError):  # it was never asked for
                self.metrics.disagreement.remove(*gone)
                for quantile in _QUANTILES:
                    self.metrics.score_quantiles.remove(*gone, str(quantile))

    def record(
        self, context: RequestContext, model: LoadedModel, encoded: Sequence[Encoded], scored: ScoredTexts
    ) -> None:
        """Hand the scores of the first texts, as many as are given, to the audit log."""
        if self.audit is not None:
            self.audit(
                [
                    AuditRecord(
                        context.request_id,
                        *model.info.id,
                        token_ids,
                        was_cut,
                        float(score),
                        self._batch_invariant,
                        context.caller.name,
                    )
                    for (token_ids, was_cut), score in zip(encoded, scored.scores[: len(encoded)], strict=True)
                    if np.isfinite(score)
                ]
            )

    def batch(self, record: BatchRecord) -> None:
        """A forward pass was done."""
        self.metrics.batch_texts.observe(record.texts)
        self.metrics.batch_tokens.observe(record.tokens)
        work = self._work(record.model.info.id)
        work.tokens += record.tokens
        work.compute_s += record.compute_s

    def finished(self, context: RequestContext, status: int, elapsed_s: float) -> None:
        """A request was answered, one way or the other."""
        error = context.error
        fault = None if error is None else error.value
        if error is None and status >= 400:  # nobody here said so, but Serve: the client left, or there is no replica
            fault = _SAID_BY_SERVE.get(status, ErrorType.UNAVAILABLE.value)
        self.metrics.counters["requests"].labels(context.family, str(status)).inc()
        if context.caller.name is not None:
            self.metrics.counters["caller_requests"].labels(context.caller.name).inc()
            if error in _REFUSALS:
                self.metrics.counters["caller_refusals"].labels(context.caller.name, error.value).inc()
        self.metrics.seconds["request_seconds"].labels(context.family).observe(elapsed_s)
        if context.family in _NOT_TRAFFIC:
            return
        outcome = "answered" if fault is None else "refused" if error in _REFUSALS else "failed"
        self._traffic.outcomes[outcome] = self._traffic.outcomes.get(outcome, 0) + 1
        if fault is None:
            self._traffic.latencies[np.searchsorted(LATENCY_EDGES_S, elapsed_s)] += 1
            return
        self.metrics.counters["errors"].labels(fault).inc()
        self._traffic.errors[fault] = self._traffic.errors.get(fault, 0) + 1

    def wants_shadow(self, shadow: LoadedModel, request_id: str, num_texts: int) -> bool:
        """Whether a shadow is to score a request's texts; a request is taken whole or not at all."""
        if unit_hash("shadow", request_id) >= self._candidates.shadow_share:
            return False
        if self._waiting_for_shadow + num_texts > _MOST_SHADOW_TEXTS:
            self.metrics.counters["shadow_skipped_texts"].labels(*shadow.info.id).inc(num_texts)
            return False
        self._waiting_for_shadow += num_texts
        return True

    def shadowed(
        self, request_id: str, live: LoadedModel, shadow: LoadedModel, seen: ScoredTexts, unseen: ScoredTexts
    ) -> None:
        """A shadow scored what a live model had scored."""
        self._waiting_for_shadow -= len(seen.scores)
        self.metrics.counters["shadow_texts"].labels(*shadow.info.id).inc(len(seen.scores))
        work = self._work(shadow.info.id)
        work.texts += len(seen.scores)
        work.failures += int((~np.isfinite(unseen.scores)).sum())
        group = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "big")
        self._shadows[(live.info.id, shadow.info.id)].append((seen.scores, unseen.scores, group))

    def shadow_skipped(self, shadow: LoadedModel, num_texts: int) -> None:
        """Texts that a live model had scored were not scored by a shadow, through no fault of its own."""
        self._waiting_for_shadow -= num_texts
        self.metrics.counters["shadow_skipped_texts"].labels(*shadow.info.id).inc(num_texts)

    def shadow_failed(self, shadow: LoadedModel, num_texts: int) -> None:
        """A shadow could not score texts that a live model had scored."""
        self._waiting_for_shadow -= num_texts
        work = self._work(shadow.info.id)
        work.texts += num_texts
        work.failures += num_texts

    def take(self) -> Traffic:
        """Everything since the last call."""
        traffic, self._traffic = self._traffic, Traffic()
        for model, parts in self._samples.items():
            scores, num_tokens, keys = zip(*parts, strict=True)
            flat = np.array([key for part in keys for key in part], dtype=np.uint64)
            traffic.samples[model] = TextSample(np.concatenate(scores), np.concatenate(num_tokens), flat)
        for models, pairs in self._shadows.items():
            live, unseen, groups = zip(*pairs, strict=True)
            repeated = np.repeat(np.array(groups, dtype=np.uint64), [len(part) for part in live])
            traffic.shadows[models] = ShadowSample(np.concatenate(live), np.concatenate(unseen), repeated)
        self._samples.clear()
        self._num_samples.clear()
        self._shadows.clear()
        return traffic

    def exposition(self, ready: bool, queued: int, restarts: int) -> bytes:
        """The metrics in Prometheus' text format.

        Args:
            ready: whether a request would be taken.
            queued: requests not yet answered.
            restarts: of the scoring process.
        """
        self.metrics.ready.set(ready)
        self.metrics.queued.set(queued)
        self.metrics.restarts.set(restarts)
        for labels, recent in self._recent.items():
            scores, disagreement = np.array(recent).T
            finite = scores[np.isfinite(scores)]
            if len(finite):
                for quantile, value in zip(_QUANTILES, np.quantile(finite, _QUANTILES), strict=True):
                    self.metrics.score_quantiles.labels(*labels, str(quantile)).set(float(value))
                self.metrics.disagreement.labels(*labels).set(float(np.nanmean(disagreement)))
        return generate_latest(self.metrics.registry)

    def _work(self, model: ModelId) -> ModelWork:
        return self._traffic.work.setdefault(model, ModelWork())


def _key(token_ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(np.array(token_ids, dtype=np.int32).tobytes(), digest_size=8).digest(), "big")
