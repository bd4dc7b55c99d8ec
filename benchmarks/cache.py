"""What a reader's cache costs and saves: sizes in, Markdown out.

    .venv/bin/python benchmarks/cache.py --entities 20000 --rows 300000

On one fresh server: single reads of 50 float64 and batches of 100 with and without the cache, beside a bare redis-py GET; then a load of
--rows rows while nobody, and while a process with CacheSettings(tracking=True), listens to what changes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import redis
from servers import running_server

from materialize import codec, watermark
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, OnlineStoreConfig, Retention, to_us
from materialize.online.following import open_follower
from materialize.online.redis import RedisStore
from materialize.order import stamp
from materialize.serving import CacheSettings, OnlineFeatures
from materialize.serving.cache import RecordCache
from materialize.serving.core import Core

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = [f"f{number}" for number in range(50)]
VIEW = FeatureView("v", "s", ("k",), "ts", dict.fromkeys(NAMES, FeatureType("float64")), ("default",))
LONG = timedelta(days=365)
ROWS = 10_000
QUANTILES = (0.5, 0.99, 0.999)


def batch(low: int, high: int, schema_id: int, version: int) -> Any:
    count = high - low
    now = to_us(datetime.now(timezone.utc))
    order = pl.DataFrame({"event_us": [now] * count, "created_us": [0] * count, "version": [stamp(1, version)] * count})
    frame = pl.DataFrame({name: np.random.default_rng(low).random(count) for name in NAMES})
    keys = pl.Series([b"%d" % key for key in range(low, high)])
    return codec.encode(keys, order, frame, VIEW, schema_id=schema_id)


def load(store: RedisStore, rows: int, version: int) -> float:
    """Rows a second."""
    schema_id = watermark.register_schema(store, VIEW)
    batches = [batch(low, min(low + ROWS, rows), schema_id, version) for low in range(0, rows, ROWS)]
    began = time.perf_counter()
    for one in batches:
        store.merge("v", one, tie_wins=True, retention=Retention(None, 2**62))
    return rows / (time.perf_counter() - began)


def timed(call: Callable[[int], object], reads: int) -> str:
    took = []
    for number in range(reads):
        began = time.perf_counter_ns()
        call(number)
        took.append(time.perf_counter_ns() - began)
    return " | ".join(f"{value / 1000:,.1f}" for value in np.quantile(took, QUANTILES))


def reading(url: str, store: RedisStore, entities: int) -> list[str]:
    bare = redis.Redis.from_url(url)
    plain = OnlineFeatures(Core([VIEW], "default", "bench"), store)
    cached = OnlineFeatures(
        Core([VIEW], "default", "bench"),
        store,
        RecordCache([VIEW], CacheSettings(ttl=LONG, max_bytes=2**40), deadline=1),
    )
    keys = [[(100 * number + key) % entities for key in range(100)] for number in range(1_000)]
    cached.batch_read("v", [0])
    rows = [
        ("bare redis-py GET", timed(lambda number: bare.get(b"fs:v:{%d}" % (number % entities)), 10_000)),
        ("`read_features`, no cache", timed(lambda number: plain.read_features("v", number % entities), 10_000)),
        (
            "`read_features`, a miss",
            timed(lambda number: cached.read_features("v", 1 + number), min(10_000, entities - 1)),
        ),
        (
            "`read_features`, the first hit",
            timed(lambda number: cached.read_features("v", 1 + number), min(10_000, entities - 1)),
        ),
        ("`read_features`, a hit", timed(lambda number: cached.read_features("v", 1 + number % 5_000), 10_000)),
        (
            "`read_features` of 50 names, a hit",
            timed(lambda number: cached.read_features("v", 1 + number % 100, NAMES), 10_000),
        ),
        (
            "100 entities to numpy, no cache",
            timed(lambda number: plain.batch_read("v", keys[number]).to_numpy(), 1_000),
        ),
    ]
    for some in keys:
        cached.batch_read("v", some)
    rows.append(
        (
            "100 entities to numpy, all hits",
            timed(lambda number: cached.batch_read("v", keys[number]).to_numpy(), 1_000),
        )
    )
    bare.close()
    return [f"| {name} | {figures} |" for name, figures in rows]


def follow(url: str, last: int) -> None:
    """The process that listens: says when it does, and then when *last* changed, how many changes it heard, and its CPU seconds."""
    cache = RecordCache([VIEW], CacheSettings(ttl=LONG, tracking=True), deadline=1)
    heard, changed = [0, 0.0], cache.changed

    def count(view: str, keys: Any) -> None:
        keys = list(keys)
        heard[0] += len(keys)
        if b"%d" % last in keys:
            heard[1] = time.monotonic()
        changed(view, keys)

    cache.changed = count  # type: ignore[method-assign]
    follower = open_follower(OnlineStoreConfig("default", url), ["v"], cache)
    follower.begin()
    while not cache.live:
        time.sleep(0.01)
    print("ready", flush=True)
    began = time.process_time()
    while not heard[1]:
        time.sleep(0.1)
    print(json.dumps({"heard": heard[0], "at": heard[1], "cpu": time.process_time() - began}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entities", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--server", default="valkey", choices=["valkey", "redis"])
    parser.add_argument("--follow", nargs=2)
    options = parser.parse_args()
    if options.follow:
        follow(options.follow[0], int(options.follow[1]))
        return
    with running_server(options.server) as server, RedisStore(server.url) as store:
        print(f"{server.name}, microseconds\n\n| read | p50 | p99 | p99.9 |\n|---|---|---|---|")
        load(store, options.entities, 1)
        print("\n".join(reading(server.url, store, options.entities)))
        alone = [load(store, options.rows, version) for version in (2, 3)]
        command = [sys.executable, __file__, "--follow", server.url, str(options.rows - 1)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "ready\n"
            listened = load(store, options.rows, 4)
            ended = time.monotonic()
            told = json.loads(listener.stdout.readline())
        print(
            f"\nLoad of {options.rows:,} rows: {max(alone):,.0f} rows/s; while one process listens {listened:,.0f} rows/s. It heard {told['heard']:,} "
            f"changes, the last one {1000 * (told['at'] - ended):,.0f} ms after the load, and took {told['cpu'] / told['heard'] * 1e6:.1f} us of CPU for each."
        )


if __name__ == "__main__":
    main()
