"""Small runs in a process that is warm: a table and a server in; the seconds of each run, and of the least that could do it, out.

Nothing new: `pipeline.incremental` beside opening the table and one PING. A thousand new rows: `pipeline.incremental` beside reading the
new file and sending as many SETs of ready values by redis-py's pipeline. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import polars as pl
import redis
from changes import FEATURES, Changes
from deltalake import DeltaTable
from lake import VIEW
from measure import WrongResult

from materialize import pipeline
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, OnlineStoreConfig
from materialize.online import open_store

if TYPE_CHECKING:
    from collections.abc import Callable

#: Runs of each kind before the first that counts.
WARM = 2


def seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="Small runs in a process that is warm.")
    parser.add_argument("--table", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--entities", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    given = parser.parse_args()
    kinds = dict.fromkeys(FEATURES, FeatureType("float64"))
    view = FeatureView(VIEW, given.table, ("user_id",), "event_timestamp", kinds, ("default",))
    client, changes = redis.Redis(port=given.port), Changes(given.table, given.entities)
    changes.day = 100  # newer than what the command line brought before, and not in the future
    found: dict[str, list[float]] = {name: [] for name in ("nothing", "open", "rows", "bare")}
    with open_store(OnlineStoreConfig("default", f"redis://127.0.0.1:{given.port}/0")) as store:

        def run(expected: int) -> None:
            report = pipeline.incremental(
                view, store, pipeline.Run("default", "small", lambda: datetime.now(timezone.utc))
            )
            if report.written != expected:
                raise WrongResult(f"small run: found {report.written:,} entities written, expected {expected:,}")

        def opened() -> None:
            DeltaTable(given.table).version()
            client.ping()

        def bare(file: str) -> None:
            rows = pl.read_parquet(file)
            pipe = client.pipeline(transaction=False)
            for key, value in ready:
                pipe.set(key, value)
            pipe.execute()
            if rows.height != len(ready):
                raise WrongResult(f"found {rows.height:,} rows in the new file, expected {len(ready):,}")

        ready = [(f"bare:{number}", b"x" * (36 + 8 * len(FEATURES))) for number in range(given.rows)]
        run(0)
        for number in range(-WARM, given.rounds):
            before = set(DeltaTable(given.table).file_uris())
            changes.append(given.rows / given.entities)
            (file,) = set(DeltaTable(given.table).file_uris()) - before
            timed = {
                "rows": seconds(lambda: run(given.rows)),
                "bare": seconds(lambda: bare(file)),  # noqa: B023 - called at once
                "nothing": seconds(lambda: run(0)),
                "open": seconds(opened),
            }
            if number >= 0:
                for name, each in timed.items():
                    found[name].append(each)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
