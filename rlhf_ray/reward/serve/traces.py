"""Traces in the terms of OpenTelemetry, where Serve is told to make them (see docs/operating.md).

Serve makes a span for each request, below that of a client that sends a `traceparent`, and decides which are kept. Here
are the parts of a request below its span, and where spans go. What a part took is known when it is over, so its span is
made then. No span holds a text.
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry import trace

from rlhf_ray.reward.serve.exchange import ModelId, Timings

_NS = 1_000_000_000


def otlp_exporter() -> list[Any]:
    """For `RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH`: to a collector, as the variables `OTEL_EXPORTER_OTLP_…` say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def record_parts(model: ModelId, timings: Timings, num_texts: int, num_tokens: int) -> None:
    """Make the spans of a request that has just been scored, below the one under way, if that is kept."""
    request = trace.get_current_span()
    if not request.is_recording():
        return
    request.set_attributes(
        {"model": model.name, "model_version": model.version, "texts": num_texts, "tokens": num_tokens}
    )
    parts = {"tokenize": timings.tokenize_s, "queue": timings.queue_s, "compute": timings.compute_s}
    began_ns = time.time_ns() - round(sum(parts.values()) * _NS)
    tracer = trace.get_tracer(__name__)
    for name, seconds in parts.items():
        ended_ns = began_ns + round(seconds * _NS)
        tracer.start_span(name, start_time=began_ns).end(ended_ns)
        began_ns = ended_ns
