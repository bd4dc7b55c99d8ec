"""Every metric of this package: its name, unit, kind and attributes. Two sinks and the documentation have them from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["METRICS", "Metric", "Point"]

#: Units (UCUM, as OpenTelemetry wants them) and what Prometheus appends to a name for them.
SUFFIXES = {"By": "_bytes", "s": "_seconds"}
RUN = ("view", "store", "mode")
VIEW = ("view", "store")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``labels``: its attributes; none of them is ever an entity key, a run id, a version or a message."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...]

    @property
    def prometheus(self) -> str:
        """Its name there: the unit in it, and ``_total`` after a counter."""
        return self.name.replace(".", "_") + SUFFIXES.get(self.unit, "") + "_total" * (self.kind == "counter")


@dataclass(frozen=True, slots=True)
class Point:
    """What was counted or seen: a value of a metric; *labels* in the metric's order."""

    name: str
    value: float
    labels: tuple[str, ...]


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "materialize.runs",
            "counter",
            "{run}",
            "Runs that finished (outcome ok), and failed steps by the class of their error.",
            (*VIEW, "outcome"),
        ),
        Metric("materialize.rows.read", "counter", "{row}", "Rows of the Delta table that finished runs read.", RUN),
        Metric(
            "materialize.rows.pushed",
            "counter",
            "{row}",
            "Rows that push committed to the Delta table; mode: where it brought them, both or offline.",
            RUN,
        ),
        Metric(
            "materialize.rows.quarantined",
            "counter",
            "{row}",
            "Rows of finished runs that cannot be stored, by reason.",
            (*RUN, "reason"),
        ),
        Metric(
            "materialize.entities",
            "counter",
            "{entity}",
            "Latest rows of finished runs by what became of them: written, stale, unchanged, expired; and entities deleted.",
            (*RUN, "outcome"),
        ),
        Metric("materialize.sent", "counter", "By", "Bytes of keys and values that finished runs sent.", RUN),
        Metric(
            "materialize.retries",
            "counter",
            "{retry}",
            "Calls to the online store that were tried again, by the class of the driver's error.",
            (*VIEW, "error"),
        ),
        Metric(
            "materialize.held_back",
            "counter",
            "s",
            "Seconds that pacing held writes back, so that readers come first.",
            VIEW,
        ),
        Metric(
            "materialize.verify.entities",
            "counter",
            "{entity}",
            "Entities that verify compared: equal, or how they differ: missing, extra, stale, wrong.",
            (*VIEW, "result"),
        ),
        Metric("materialize.verify.repaired", "counter", "{entity}", "Entities that verify repaired.", VIEW),
        Metric("materialize.run.duration", "histogram", "s", "Seconds that finished runs worked.", RUN),
        Metric(
            "materialize.stage.duration",
            "counter",
            "s",
            "Seconds of finished runs by stage (timings); some stages work at the same time.",
            (*RUN, "stage"),
        ),
        Metric(
            "materialize.last_run.timestamp",
            "gauge",
            "s",
            "When the last run ended, well or not, in seconds since 1970.",
            VIEW,
        ),
        Metric(
            "materialize.last_success.timestamp",
            "gauge",
            "s",
            "When the last run finished well, in seconds since 1970.",
            VIEW,
        ),
        Metric("materialize.last_run.duration", "gauge", "s", "Seconds that the last finished run worked.", VIEW),
        Metric(
            "materialize.last_run.quarantined",
            "gauge",
            "{row}",
            "Rows that the last finished run could not store.",
            VIEW,
        ),
        Metric(
            "materialize.lag",
            "gauge",
            "s",
            "How long the oldest commit waits that is not online; 0 when none waits.",
            VIEW,
        ),
        Metric("materialize.lag.target", "gauge", "s", "The view's freshness target.", VIEW),
        Metric(
            "materialize.watermark.version",
            "gauge",
            "{version}",
            "The table version up to which the store has everything; -1 before the first run and while a snapshot run is unfinished.",
            VIEW,
        ),
        Metric("materialize.table.version", "gauge", "{version}", "The table's newest version.", VIEW),
        Metric(
            "materialize.status.timestamp",
            "gauge",
            "s",
            "When lag and versions were looked at, in seconds since 1970.",
            VIEW,
        ),
        Metric(
            "materialize.cache.reads",
            "counter",
            "{entity}",
            "Entities that readers with a cache wanted: hit, miss, or wait for the fetch of another read.",
            (*VIEW, "result"),
        ),
        Metric(
            "materialize.cache.evictions",
            "counter",
            "{entry}",
            "Entries that left a reader's cache early: full, to make room, or changed, as the store told.",
            (*VIEW, "reason"),
        ),
        Metric("materialize.cache.entries", "gauge", "{entry}", "Entries in a reader's cache.", VIEW),
    )
}  # fmt: skip - a table
