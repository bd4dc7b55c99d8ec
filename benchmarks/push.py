"""What a push takes, by rows and way: p50 and p99 in milliseconds, beside the bare parts that it cannot do without.

``python -m benchmarks.push`` makes a table on local disk and a Valkey; it ends with an error when a pushed row is not online.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from deltalake import write_deltalake

from materialize import pipeline
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.online.redis import RedisStore
from materialize.push import Pusher, push
from tests import servers

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.online.base import OnlineStore

FEATURES = 50
#: Entities of which random ones are pushed.
ENTITIES = 100_000
START = datetime(2025, 1, 1, tzinfo=timezone.utc)


def rows(generator: random.Random, count: int, turn: int) -> pa.Table:
    """*count* rows of different entities, newer with each *turn*."""
    columns: dict[str, Any] = {
        "user_id": pa.array(generator.sample(range(ENTITIES), count), pa.int64()),
        "event_timestamp": pa.array([START + timedelta(seconds=turn)] * count, pa.timestamp("us", "UTC")),
    }
    columns |= {f"f{number}": pa.array([generator.random()] * count) for number in range(FEATURES)}
    return pa.table(columns)


def timed(
    calls: dict[str, Callable[[pa.Table], Any]], made: Callable[[int], pa.Table], turns: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of each call in each turn, by the clock and of all processors; one after the other, so that all meet a log of the same length."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(turns):
        for number, (name, call) in enumerate(calls.items()):
            given = made(turn * len(calls) + number)
            started, worked = time.perf_counter(), time.process_time()
            call(given)
            taken[name].append(((time.perf_counter() - started) * 1e3, (time.process_time() - worked) * 1e3))
    return taken


def told(name: str, count: int, taken: list[tuple[float, float]]) -> None:
    seconds, worked = zip(*taken, strict=True)
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    print(f"| {name} | {count:,} | {p50:.1f} | {p99:.1f} | {statistics.median(worked):.1f} |", flush=True)


def measured(folder: Path, store: OnlineStore, count: int, turns: int) -> None:
    generator = random.Random(count)
    source = str(folder / f"table-{count}")
    features = {f"f{number}": FeatureType.parse("float64") for number in range(FEATURES)}
    view = FeatureView(f"view_{count}", source, ("user_id",), "event_timestamp", features, ("default",))
    run = pipeline.Run("default", "push", lambda: datetime.now(timezone.utc))
    write_deltalake(source, rows(generator, 1_000, 0), configuration={"delta.checkpointInterval": "10"})
    pipeline.incremental(view, store, run)
    pusher, numbers = Pusher(view, store, run), itertools.count()
    calls: dict[str, Callable[[pa.Table], Any]] = {
        "write-through, a `Pusher`": pusher.push,
        "write-through, a `Pusher`, with `push_id`": lambda given: pusher.push(given, push_id=str(next(numbers))),
        "write-through, `push()`": lambda given: push(view, store, given, run),
        "write-behind, a `Pusher`": lambda given: pusher.push(given, to="offline"),
        "deltalake's append alone": lambda given: write_deltalake(source, given, mode="append"),
    }
    timed(calls, lambda _turn: rows(generator, count, 0), 3)  # to be warm
    for name, taken in timed(calls, lambda turn: rows(generator, count, turn + 1), turns).items():
        told(name, count, taken)
    if pipeline.incremental(view, store, run).stale:
        raise SystemExit("a run found rows older than those that were pushed")
    if pipeline.incremental(view, store, run).written:
        raise SystemExit("a run found something to write after another one")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--turns", type=int, default=200)
    arguments.add_argument("--rows", type=int, nargs="*", default=[1, 1_000])
    chosen = arguments.parse_args()
    print("| what | rows | p50 ms | p99 ms | processor ms |\n|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.running("valkey") as server,
        RedisStore(server.url) as store,
    ):
        for count in chosen.rows:
            measured(Path(folder), store, count, chosen.turns)


if __name__ == "__main__":
    main()
