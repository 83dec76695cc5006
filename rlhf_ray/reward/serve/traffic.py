"""What a replica tells the monitor of its traffic, each second."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config.serving import ServedModelSettings
from rlhf_ray.reward.core.reference_scores import ReferenceScores
from rlhf_ray.reward.serve.audit import Head
from rlhf_ray.reward.serve.exchange import ModelId, ModelInfo

LATENCY_EDGES_S = np.geomspace(0.001, 120.0, 61)
"""Upper edges of the buckets in which requests are counted by their time; a last bucket takes what is longer."""


@dataclass(frozen=True)
class TextSample:
    """Live texts of one model.

    Attributes:
        scores, num_tokens: `[n]`.
        keys: `[n]` hashes of the texts, as scored.
    """

    scores: NDArray[np.float64]
    num_tokens: NDArray[np.int64]
    keys: NDArray[np.uint64]


@dataclass(frozen=True)
class ShadowSample:
    """Texts that the live model and a shadow scored.

    Attributes:
        live_scores, shadow_scores: `[n]`.
        groups: `[n]` the same for texts of one request.
    """

    live_scores: NDArray[np.float64]
    shadow_scores: NDArray[np.float64]
    groups: NDArray[np.uint64]


@dataclass
class ModelWork:
    """What a model did."""

    texts: int = 0
    tokens: int = 0
    failures: int = 0
    compute_s: float = 0.0
    score_sum: float = 0.0
    score_square_sum: float = 0.0

    def add(self, more: ModelWork) -> None:
        """Count what it did since."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(more, each.name))


@dataclass
class Traffic:
    """Counts since the last beat.

    Attributes:
        outcomes: requests `answered`, `refused` (overload, limits, bad requests) and `failed`.
        latencies: `[61 + 1]` answered requests by the edges above.
        work, samples: by model.
        shadows: by live model and shadow.
        left_out: texts that were not kept for comparison because the beat was full.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    texts: int = 0
    tokens: int = 0
    latencies: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LATENCY_EDGES_S) + 1, np.int64))
    work: dict[ModelId, ModelWork] = field(default_factory=dict)
    samples: dict[ModelId, TextSample] = field(default_factory=dict)
    shadows: dict[tuple[ModelId, ModelId], ShadowSample] = field(default_factory=dict)
    left_out: int = 0


@dataclass(frozen=True)
class Pace:
    """How long a candidate and the main model take for one and the same batch.

    Attributes:
        candidate_s, main_s: seconds.
        tokens: of the batch, as the main model reads it.
    """

    candidate_s: float
    main_s: float
    tokens: int


@dataclass(frozen=True)
class ReplicaModel:
    """A model that a replica has in memory; the main one has no pace."""

    info: ModelInfo
    path: str
    reference: ReferenceScores | None
    pace: Pace | None


@dataclass(frozen=True)
class ModelOrder:
    """The models that every replica should have.

    Attributes:
        models: as configured, without those rolled back.
        number: counts orders. Replicas follow each one, also where the entries are those they have: a directory may
            hold other weights by now, and what could not be loaded may be whole.
    """

    models: tuple[ServedModelSettings, ...]
    number: int


@dataclass(frozen=True)
class Beat:
    """A replica's report to the monitor.

    Attributes:
        replica: its id.
        order: number of the order that its models follow.
        models: in its memory.
        load_failure: number of the order that it could not follow, and why.
        queued: requests not yet answered.
        age_s: since it began to serve.
        exposition: its metrics, in Prometheus' text format.
        audit: how far its audit log is.
    """

    replica: str
    order: int
    models: tuple[ReplicaModel, ...]
    load_failure: tuple[int, str] | None
    queued: int
    age_s: float
    traffic: Traffic
    exposition: bytes
    audit: Head | None = None
