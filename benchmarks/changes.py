"""What an incremental run costs, by the size and kind of the change: ``python benchmarks/changes.py --plot docs/changes.svg``.

A table of one row per entity in 100 files, clustered by entity. Each commit appends, updates, merges or deletes a share of the
rows, in as few files as hold them (a scattered merge: in five times as many), and is followed by one incremental run; beside them,
one rebuild of the whole table.

``--commits TABLE`` makes the table there and then commits what each line of the standard input asks for: the report's suite `incremental`
runs the command line after each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import servers
from deltalake import DeltaTable, write_deltalake
from figures import environment, where

from materialize import pipeline
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, OnlineStoreConfig
from materialize.online import open_store
from materialize.online.base import OnlineStore

FILES = 100
FEATURES = [f"feature_{number}" for number in range(10)]
SHARES = (0.001, 0.01, 0.05)
#: What is measured: the kind of change and the share of the rows. A scattered merge rewrites 5 % of the files too.
MEASURED = [
    *((kind, share) for share in SHARES for kind in ("append", "update", "merge", "delete")),
    ("scattered", 0.01),
]
SCATTERED = 5
#: Rows of a change that `serve` tells, so that they can be looked up.
SAMPLED = 200
FIRST_EVENT = datetime(2025, 1, 1, tzinfo=timezone.utc)
COMMITS = 1_000
#: The aims: 1 % of the rows in at most this share of the rebuild plus seconds; planning in seconds.
AIM_SHARE, AIM_SECONDS, AIM_PLANNING = 0.03, 0.3, 1.0


@dataclass(frozen=True, slots=True)
class Point:
    """The median run after a *kind* of change to a *share* of the rows."""

    kind: str
    share: float
    seconds: float


def rows(low: int, high: int, day: int) -> pl.DataFrame:
    """One row per entity of ``[low, high)``, with event times on *day*."""
    rng, count = np.random.default_rng((low, day + 1)), high - low
    begin = int((FIRST_EVENT + timedelta(days=day)).timestamp()) * 10**6
    events = begin + rng.integers(0, 86_400_000_000, count)
    return pl.DataFrame(
        {
            "user_id": np.arange(low, high),
            "event_timestamp": pl.Series(events).cast(pl.Datetime("us", "UTC")),
            **{name: rng.standard_normal(count) for name in FEATURES},
        }
    )


class Changes:
    """The kinds of change. Each call commits one to the table, on other entities than the calls before it and in other files.

    When all entities had their turn it begins anew. ``source``: the rows that the last call brought, None for one that brought none.
    """

    def __init__(self, table: str, entities: int, files: int = FILES) -> None:
        self.table, self.entities, self.files, self.next, self.day = table, entities, files, 0, 1
        self.source: pl.DataFrame | None = None

    def create(self) -> None:
        """The first commits: a row of every entity."""
        bounds = [number * self.entities // self.files for number in range(self.files + 1)]
        for low, high in pairwise(bounds):
            write_deltalake(self.table, rows(low, high, day=0), mode="append")

    def take(self, share: float) -> tuple[int, int]:
        count, rows_per_file = max(1, round(self.entities * share)), max(1, self.entities // self.files)
        low = self.next if self.next + count <= self.entities else 0
        self.next = -(-(low + count) // rows_per_file) * rows_per_file
        self.day += 1
        self.source = None
        return low, low + count

    def append(self, share: float) -> None:
        self.source = rows(*self.take(share), day=self.day)
        write_deltalake(self.table, self.source, mode="append")

    def late(self, share: float) -> None:
        """Rows that are older than what every run before brought: all of them lose."""
        write_deltalake(self.table, rows(*self.take(share), day=-1), mode="append")

    def update(self, share: float) -> None:
        low, high = self.take(share)
        predicate = f"user_id >= {low} and user_id < {high}"
        DeltaTable(self.table).update(updates={FEATURES[0]: f"{FEATURES[0]} + 1"}, predicate=predicate)

    def delete(self, share: float) -> None:
        low, high = self.take(share)
        DeltaTable(self.table).delete(predicate=f"user_id >= {low} and user_id < {high}")

    def merge(self, share: float) -> None:
        self._merge(rows(*self.take(share), day=self.day))

    def scattered(self, share: float) -> None:
        self._merge(rows(*self.take(share * SCATTERED), day=self.day).gather_every(SCATTERED))

    def _merge(self, source: pl.DataFrame) -> None:
        self.source = source
        low, high = source["user_id"][0], source["user_id"][-1]
        matched = f"t.user_id = s.user_id and t.user_id >= {low} and t.user_id <= {high}"
        merge = DeltaTable(self.table).merge(source, matched, source_alias="s", target_alias="t")
        merge.when_matched_update_all().when_not_matched_insert_all().execute()


def timed_run(view: FeatureView, store: OnlineStore, expected: int | None = None) -> float:
    """The seconds of one incremental run, planning included; it must write or delete *expected* entities."""
    run = pipeline.Run("default", "benchmark", lambda: datetime.now(timezone.utc))
    begin = time.perf_counter()
    report = pipeline.incremental(view, store, run)
    seconds = time.perf_counter() - begin
    if expected is not None and report.written + report.deleted != expected:
        raise SystemExit(f"found {report.written} written and {report.deleted} deleted, expected {expected} in all")
    return seconds


def measure(view: FeatureView, store: OnlineStore, entities: int, repeats: int) -> tuple[float, list[Point]]:
    """The seconds of the rebuild, and the median run of every kind and share."""
    changes, points = Changes(view.source, entities), []
    changes.create()
    rebuild = timed_run(view, store, entities)
    print(f"rebuild: {rebuild:.2f} s", file=sys.stderr)
    for kind, share in MEASURED:
        seconds = []
        for _ in range(repeats):
            getattr(changes, kind)(share)
            seconds.append(timed_run(view, store, round(entities * share)))
        points.append(Point(kind, share, statistics.median(seconds)))
        print(f"{kind} {share:.1%}: {points[-1].seconds:.2f} s", file=sys.stderr)
    return rebuild, points


def planning(view: FeatureView, store: OnlineStore, repeats: int) -> float:
    """The median seconds of a plan over `COMMITS` commits."""
    write_deltalake(view.source, rows(0, 10, day=0), mode="append")
    timed_run(view, store)
    for commit in range(COMMITS):
        write_deltalake(view.source, rows(commit, commit + 1, day=1), mode="append")
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        plan = pipeline.make_plan(view, store, mode="incremental", store_name="default", run_id="plan")
        seconds.append(time.perf_counter() - begin)
        if plan.to_version - (plan.from_version or 0) != COMMITS:
            raise SystemExit(f"planned {plan}, expected {COMMITS} commits")
    return statistics.median(seconds)


def serve(table: str, entities: int, files: int) -> None:
    """Make the table, then commit what each line of the standard input says, as ``{"kind": ..., "share": ...}``.

    Answers each with a line: the ``version``, and of some of the rows that it brought ``[key, event_us, values]``.
    """
    changes = Changes(table, entities, files)
    changes.create()
    print(json.dumps({"version": DeltaTable(table).version(), "sample": []}), flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        getattr(changes, wanted["kind"])(wanted["share"])
        sample = []
        if changes.source is not None:
            some = changes.source.sample(min(SAMPLED, changes.source.height), seed=0)
            times = some["event_timestamp"].to_physical()
            values = some.select(FEATURES).iter_rows()
            sample = [list(each) for each in zip(some["user_id"].cast(pl.String), times, values, strict=True)]
        print(json.dumps({"version": DeltaTable(table).version(), "sample": sample}), flush=True)


def plot(path: Path, rebuild: float, points: list[Point]) -> None:
    """Seconds over the share of rows changed, a line for each kind."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for kind in dict.fromkeys(point.kind for point in points):
        line = [point for point in points if point.kind == kind]
        axes.plot([100 * point.share for point in line], [point.seconds for point in line], marker="o", label=kind)
    axes.axhline(rebuild, color="black", linestyle="--", label="rebuild")
    axes.plot(1, AIM_SHARE * rebuild + AIM_SECONDS, "kx", label="aim at 1 %")
    axes.set(xscale="log", yscale="log", xlabel="rows changed, %", ylabel="seconds of the incremental run")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Measure, print Markdown, draw."""
    parser = argparse.ArgumentParser(description="Measure incremental runs by the size and kind of the change.")
    parser.add_argument("--entities", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--server", choices=servers.KINDS, default="redis")
    parser.add_argument("--plot", type=Path, help="draw the figure to this file")
    parser.add_argument("--commits", metavar="TABLE", help="make it there, and commit what the standard input asks for")
    parser.add_argument("--files", type=int, default=FILES, help="of the table, with --commits")
    arguments = parser.parse_args()
    if arguments.commits:
        serve(arguments.commits, arguments.entities, arguments.files)
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, servers.running_server(arguments.server) as server:
        setting = environment(server.name)
        kinds = dict.fromkeys(FEATURES, FeatureType("float64"))
        view = FeatureView("changes", f"{folder}/table", ("user_id",), "event_timestamp", kinds, ("default",))
        with open_store(OnlineStoreConfig("default", server.url)) as store:
            rebuild, points = measure(view, store, arguments.entities, arguments.repeats)
            many = FeatureView("commits", f"{folder}/commits", ("user_id",), "event_timestamp", kinds, ("default",))
            planned = planning(many, store, arguments.repeats)
    allowed = AIM_SHARE * rebuild + AIM_SECONDS
    print("\n".join(where(setting)))
    print(f"{arguments.entities:,} rows of {len(FEATURES)} float64 in {FILES} files; median of {arguments.repeats}.\n")
    print("| run | " + " | ".join(f"{share:.1%} of the rows" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    for kind in dict.fromkeys(point.kind for point in points):
        of_kind = {point.share: f"{point.seconds:.2f}" for point in points if point.kind == kind}
        print(f"| {kind}, s | " + " | ".join(of_kind.get(share, "-") for share in SHARES) + " |")
    worst = max(point.seconds for point in points if point.share == 0.01)
    print(f"\nrebuild {rebuild:.2f} s; the slowest at 1 %: {worst:.2f} s, aim at most {allowed:.2f} s")
    print(f"planning over {COMMITS:,} commits: {planned:.2f} s, aim under {AIM_PLANNING:.0f} s")
    if arguments.plot:
        plot(arguments.plot, rebuild, points)


if __name__ == "__main__":
    main()
