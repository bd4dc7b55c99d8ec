"""Points in, OpenTelemetry metrics out: by the process's meter provider, or one of our own that sends OTLP over HTTP."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics as api

from materialize.metrics.names import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.metrics.names import Point

__all__ = ["flush", "record"]

log = logging.getLogger(__name__)

#: Seconds one attempt to send may take, its retries included, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise.
SEND_SECONDS = 3.0
PROTOCOL = "http/protobuf"


def record(points: Sequence[Point]) -> None:
    """Count *points*; they are sent by and by, or by `flush`."""
    provider = _provider()
    if provider is None:
        return
    for point in points:
        metric, instrument = METRICS[point.name], _instrument(provider, point.name)
        attributes = dict(zip(metric.labels, point.labels, strict=True))
        add = {"counter": "add", "gauge": "set", "histogram": "record"}[metric.kind]
        getattr(instrument, add)(point.value, attributes)


def flush(milliseconds: int) -> None:
    """Send what was recorded and wait for it, at most so long."""
    provider = _provider()
    if provider is not None and not provider.force_flush(milliseconds):
        log.warning("could not send metrics within %.1f s. The run is not affected.", milliseconds / 1000)


def _provider() -> Any:
    """The meter provider that the process has, as Airflow with its own OpenTelemetry settings does; else ours; None for none."""
    found = api.get_meter_provider()
    return found if hasattr(found, "force_flush") else _own_provider()


@lru_cache(maxsize=1)
def _own_provider() -> Any:
    """A provider by the standard variables. Not the process's own: whoever sets that one up later still may.

    Each process of ours lives for seconds, so it sends what it added (delta), not totals since its start: of totals,
    a receiver would see each process begin at its first value, and take two that end at the same one for no change.
    """
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter  # noqa: PLC0415 - optional
    from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider  # noqa: PLC0415 - optional
    from opentelemetry.sdk.metrics.export import (  # noqa: PLC0415 - optional
        AggregationTemporality,
        PeriodicExportingMetricReader,
    )
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - optional

    env = os.environ.get
    if env("OTEL_SDK_DISABLED", "").lower() == "true" or env("OTEL_METRICS_EXPORTER", "otlp") != "otlp":
        return None
    protocol = env("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL") or env("OTEL_EXPORTER_OTLP_PROTOCOL") or PROTOCOL
    if protocol != PROTOCOL:
        log.warning(
            "metrics are not sent: found OTEL_EXPORTER_OTLP_PROTOCOL=%s, expected %s. The run is not affected.",
            protocol,
            PROTOCOL,
        )
        return None
    delta: dict[type, AggregationTemporality] = {
        Counter: AggregationTemporality.DELTA,
        Histogram: AggregationTemporality.DELTA,
    }
    timed = env("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT") or env("OTEL_EXPORTER_OTLP_TIMEOUT")
    exporter = OTLPMetricExporter(
        timeout=None if timed else SEND_SECONDS,
        preferred_temporality=None if env("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE") else delta,
    )
    named = env("OTEL_SERVICE_NAME") or "service.name=" in env("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": "materialize"})
    return MeterProvider([PeriodicExportingMetricReader(exporter)], resource, shutdown_on_exit=False)


@lru_cache(maxsize=2 * len(METRICS))
def _instrument(provider: Any, name: str) -> Any:
    metric, meter = METRICS[name], provider.get_meter("materialize")
    return getattr(meter, f"create_{metric.kind}")(name, unit=metric.unit, description=metric.help)
