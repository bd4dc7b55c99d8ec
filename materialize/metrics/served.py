"""What an HTTP server did in, text for Prometheus out; over all processes of a server where prometheus_client is told to (PROMETHEUS_MULTIPROC_DIR)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector

from materialize.metrics.names import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from materialize.metrics.names import Metric, Point

__all__ = ["Served"]

#: Seconds; the target is a p99 below 5 ms.
BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Served:
    """The metrics of one server. They count what was asked for and never say which entities."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "materialize_http_requests", "Answers by route and status.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "materialize_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["route"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._refused = Counter(
            "materialize_http_refused",
            "Requests that the server did not take on: busy, unauthorized, large, slow, late, unavailable.",
            ["reason"],
            registry=registry,
        )
        self._values = Counter(
            "materialize_http_values", "Feature values that were given, by status.", ["status"], registry=registry
        )
        self.in_flight = Gauge(
            "materialize_http_in_flight", "Requests under way.", registry=registry, multiprocess_mode="livesum"
        )
        self.peak = Gauge(
            "materialize_http_in_flight_peak",
            "The most that were under way at once in one process since it started.",
            registry=registry,
            multiprocess_mode="livemax",
        )
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._given: dict[str, Counter] = {}
        self._counted: Callable[[], Iterable[Point]] = tuple
        self._followed: dict[str, Counter | Gauge] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self.shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if not self.shared:
            ProcessCollector(registry=registry)

    def follow(self, counted: Callable[[], Iterable[Point]]) -> None:
        """Tell from now on what *counted* gives, which is asked when somebody looks: counters as totals of this process, and gauges."""
        self._counted = counted

    def look(self) -> None:
        """Ask what is followed. `text` does so itself, of the process that it is asked of; the others of its server have to."""
        for point in self._counted():
            metric = self._followed.get(point.name) or self._following(METRICS[point.name])
            told = metric.labels(*point.labels)
            if isinstance(told, Gauge):
                told.set(point.value)
                continue
            place = (point.name, point.labels)
            told.inc(point.value - self._told.get(place, 0.0))
            self._told[place] = point.value

    def _following(self, metric: Metric) -> Counter | Gauge:
        if metric.kind == "gauge":
            made: Counter | Gauge = Gauge(
                metric.prometheus, metric.help, metric.labels, registry=self.registry, multiprocess_mode="livesum"
            )
        else:
            made = Counter(metric.prometheus, metric.help, metric.labels, registry=self.registry)
        self._followed[metric.name] = made
        return made

    def answered(self, route: str, status: int, seconds: float) -> None:
        found = self._answered.get((route, status))
        if found is None:  # finding them by their labels takes longer than counting
            found = self._requests.labels(route, str(status)), self._seconds.labels(route)
            self._answered[route, status] = found
        found[0].inc()
        found[1].observe(seconds)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def values(self, by_status: Mapping[str, int]) -> None:
        for status, count in by_status.items():
            found = self._given.get(status)
            if found is None:
                found = self._given[status] = self._values.labels(status)
            found.inc(count)

    def end(self) -> None:
        """The process has nothing under way any more, which the others of its server shall not go on to tell."""
        self.look()
        if self.shared:
            mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        self.look()
        registry = self.registry
        if self.shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
