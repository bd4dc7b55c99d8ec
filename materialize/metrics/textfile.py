"""Points in, a text file for node_exporter's textfile collector out: counters go on over runs, gauges are the last run's.

One file for each view and store, so that two views' runs never write the same one.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

from prometheus_client import write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from materialize.metrics.names import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from prometheus_client.metrics_core import Metric as Family

    from materialize.metrics.names import Point

__all__ = ["update"]

#: A text file has no histogram: a run's duration is there as a gauge, and one run is one observation.
SHOWN = {metric.prometheus: metric for metric in METRICS.values() if metric.kind != "histogram"}
#: Seconds to wait for another process that writes to the folder, which takes milliseconds, unless it was stopped.
LOCK_SECONDS, LOCK_STEP = 2.0, 0.02

#: A series: its name in the file and its labels in the metric's order.
Series = tuple[str, tuple[str, ...]]


def update(folder: Path, name: str, points: Sequence[Point]) -> None:
    """Add the counters of *points* to those in ``materialize.NAME.prom`` and set its gauges.

    The file is replaced by rename: a reader sees the old or the new one, also after a crash. A file that cannot be read is begun
    anew, which Prometheus takes for a counter's reset. Raises OSError, and TimeoutError when another process holds the folder.
    """
    path = folder / f"materialize.{quote(name, safe='')}.prom"
    with _locked(folder):
        series = _read(path)
        for point in points:
            metric = METRICS[point.name]
            key = (metric.prometheus, point.labels)
            if metric.prometheus in SHOWN:
                series[key] = point.value + (series.get(key, 0.0) if metric.kind == "counter" else 0.0)
        write_to_textfile(str(path), _Content(series))


class _Content:
    """What a file will hold, as prometheus_client asks for it."""

    def __init__(self, series: dict[Series, float]) -> None:
        self.series = series

    def collect(self) -> Iterable[Family]:
        for name, metric in SHOWN.items():
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(name, metric.help, labels=metric.labels)
            for (owner, labels), value in sorted(self.series.items()):
                if owner == name:
                    family.add_metric(labels, value)
            if family.samples:
                yield family


def _read(path: Path) -> dict[Series, float]:
    try:
        families = list(text_string_to_metric_families(path.read_text(encoding="utf-8")))
        samples = [sample for family in families for sample in family.samples if sample.name in SHOWN]
        return {
            (one.name, tuple(one.labels[label] for label in SHOWN[one.name].labels)): float(one.value)
            for one in samples
        }
    except (FileNotFoundError, ValueError, KeyError):
        return {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within it no other process of ours writes to *folder*; a lock ends with its process."""
    handle, deadline = os.open(folder, os.O_RDONLY | os.O_DIRECTORY), time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process writes to {folder}") from None
                time.sleep(LOCK_STEP)
        yield
    finally:
        os.close(handle)
