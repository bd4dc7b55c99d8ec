"""What runs do in, OpenTelemetry metrics and Prometheus text files out; without either asked for, nothing is imported or done.

OpenTelemetry: the process's own meter provider where somebody set one, else one to the endpoint of ``OTEL_EXPORTER_OTLP_ENDPOINT``.
Prometheus: the folder that `write_to` or ``MATERIALIZE_METRICS_DIR`` names. Nothing that goes wrong here fails a run: it is a warning.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from materialize.errors import MismatchError
from materialize.metrics.names import METRICS, Metric, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from materialize.freshness import Freshness
    from materialize.model import FeatureView, RunReport
    from materialize.verify import VerifyReport

__all__ = [
    "FOLDER_VARIABLE",
    "METRICS",
    "Metric",
    "Point",
    "finished",
    "flush",
    "held_back",
    "looked_at",
    "observed",
    "pushed",
    "retried",
    "tell",
    "verified",
    "wanted",
    "write_to",
]

log = logging.getLogger(__name__)

#: The environment variable that names the folder of Prometheus text files.
FOLDER_VARIABLE = "MATERIALIZE_METRICS_DIR"
#: What became of an entity, as a RunReport counts it.
OUTCOMES = ("written", "stale", "unchanged", "expired", "deleted")
#: Milliseconds that a process waits for the receiver of its metrics before it ends, in all.
FLUSH_MS = 5_000


class _Gathered:
    """What calls deep below a run count, until the run tells whose it is. One process works on one view and store at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.retries: Counter[str] = Counter()
        self.held_back = 0.0
        self.folder: Path | None = None
        self.unsent = False

    def take(self, where: tuple[str, str]) -> list[Point]:
        """What was counted since, as points of *where* (view and store)."""
        with self.lock:
            retries, self.retries = self.retries, Counter()
            held_back, self.held_back = self.held_back, 0.0
        points = [Point("materialize.retries", count, (*where, error)) for error, count in retries.items()]
        return points + ([Point("materialize.held_back", held_back, where)] if held_back else [])


_gathered = _Gathered()


def write_to(folder: Path | None) -> None:
    """From now on metrics are also written to *folder*, which goes before ``MATERIALIZE_METRICS_DIR``."""
    _gathered.folder = folder


# --- what is told from below ---------------------------------------------------------------------------------------------


def retried(error: BaseException) -> None:
    """Count a call to the store that *error* ended and that is tried again. Safe from any thread."""
    with _gathered.lock:
        _gathered.retries[type(error.__context__ or error).__name__] += 1


def held_back(seconds: float) -> None:
    """Count *seconds* for which a write waited so that readers come first. Safe from any thread."""
    with _gathered.lock:
        _gathered.held_back += seconds


# --- what is told of whole runs ------------------------------------------------------------------------------------------


def finished(report: RunReport, now: datetime) -> None:
    """Report a run whose watermark has moved, or that had nothing to move."""
    where, run, at = (report.view, report.store), (report.view, report.store, report.mode), now.timestamp()
    points = [
        Point("materialize.runs", 1, (*where, "ok")),
        Point("materialize.rows.read", report.rows_read, run),
        Point("materialize.sent", report.bytes, run),
        Point("materialize.run.duration", report.seconds, run),
        Point("materialize.last_run.timestamp", at, where),
        Point("materialize.last_success.timestamp", at, where),
        Point("materialize.last_run.duration", report.seconds, where),
        Point("materialize.last_run.quarantined", report.quarantined, where),
        *(Point("materialize.stage.duration", spent, (*run, stage)) for stage, spent in report.timings.items()),
        *(Point("materialize.entities", getattr(report, outcome), (*run, outcome)) for outcome in OUTCOMES),
        *(
            Point("materialize.rows.quarantined", rows, (*run, reason))
            for reason, rows in report.quarantine_reasons.items()
        ),
    ]
    _emit(where, points)


@contextmanager
def observed(view: str, store: str, now: Callable[[], datetime]) -> Iterator[None]:
    """Report what a step of a run within it fails with, and the retries and waits of a step that ends without a report.

    A MismatchError is no failed run: it is what `verified` tells.
    """
    points: list[Point] = []
    try:
        yield
    except MismatchError:
        raise
    except BaseException as error:
        points.append(Point("materialize.runs", 1, (view, store, type(error).__name__)))
        points.append(Point("materialize.last_run.timestamp", now().timestamp(), (view, store)))
        raise
    finally:
        _emit((view, store), points)


def pushed(view: str, store: str, to: str, rows: int) -> None:
    """Count *rows* that a push committed."""
    _emit((view, store), [Point("materialize.rows.pushed", rows, (view, store, to))])


def verified(report: VerifyReport) -> None:
    """Report a comparison: how many entities, and how many of them differ in which way."""
    where = (report.view, report.store)
    results = {"equal": report.compared - report.mismatched} | {name: getattr(report, name) for name in report.keys}
    points = [Point("materialize.verify.entities", count, (*where, result)) for result, count in results.items()]
    _emit(where, [*points, Point("materialize.verify.repaired", report.repaired, where)])


def looked_at(view: FeatureView, store: str, found: Freshness, now: datetime) -> None:
    """Report where *view* stands in *store*."""
    where, lag, mark = (view.name, store), found.age(now), found.watermark
    version = -1 if mark is None or mark.version is None else mark.version
    points = [
        Point("materialize.lag", 0.0 if lag is None else lag.total_seconds(), where),
        Point("materialize.watermark.version", version, where),
        Point("materialize.table.version", found.table_version, where),
        Point("materialize.status.timestamp", now.timestamp(), where),
    ]
    if view.freshness is not None:
        points.append(Point("materialize.lag.target", view.freshness.total_seconds(), where))
    _emit(where, points)


# --- what long-lived processes count: materialize.metrics.regular --------------------------------------------------------


def wanted() -> bool:
    """Whether anybody asked for metrics in this process."""
    return bool(_gathered.folder or os.environ.get(FOLDER_VARIABLE)) or _telemetry()


def tell(where: tuple[str, str], points: Sequence[Point]) -> None:
    """Report *points* of one view and store."""
    _emit(where, points)


def flush() -> None:
    """Send what was not sent. Returns after `FLUSH_MS` at the latest, sent or not; a process that ends soon has to call it."""
    if _gathered.unsent:
        from materialize.metrics import otlp  # noqa: PLC0415 - only where it was asked for

        _gathered.unsent = False
        try:
            otlp.flush(FLUSH_MS)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is finished and well
            log.warning("could not send metrics: %s. The run is not affected.", type(error).__name__)


def _emit(where: tuple[str, str], points: Sequence[Point]) -> None:
    points = [*points, *_gathered.take(where)]
    if not points:
        return
    folder = _gathered.folder or os.environ.get(FOLDER_VARIABLE)
    # The text goes no further than the class of an error: a message may hold an endpoint with its credentials.
    try:
        if folder:
            from materialize.metrics import textfile  # noqa: PLC0415 - prometheus_client takes 60 ms

            textfile.update(Path(folder), ".".join(where), points)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is finished and well
        log.warning("could not write metrics to %s: %s. The run is not affected.", folder, _told(error))
    if not _telemetry():
        return
    try:
        from materialize.metrics import otlp  # noqa: PLC0415 - the SDK takes 100 ms

        otlp.record(points)
        _gathered.unsent = True
    except Exception as error:  # noqa: BLE001 - as above
        log.warning("could not report metrics by OpenTelemetry: %s. The run is not affected.", _told(error))


def _telemetry() -> bool:
    """Whether somebody set up OpenTelemetry in this process, or asked for it by the standard variables."""
    if any(os.environ.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT") for kind in ("", "METRICS_")):
        return True
    api = sys.modules.get("opentelemetry.metrics")  # redis-py imports it, and the SDK, so that alone says nothing
    return api is not None and hasattr(api.get_meter_provider(), "force_flush")


def _told(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error.name} is not installed, expected delta-materialize[metrics]"
    return f"{type(error).__name__}{f' ({error.strerror})' if isinstance(error, OSError) else ''}"
