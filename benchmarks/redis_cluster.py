"""Rows per second of one Valkey and of a cluster of three: writes, rows that are all stale, reads; and with slots half moved.

python -m benchmarks.redis_cluster --rows 200000
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from redis.crc import key_slot

from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.testing import FOREVER, Row, make_batch
from tests import cluster as clusters, servers

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.online.base import OnlineStore

BATCH, VALUE_BYTES, READ_AT_ONCE = 10_000, 400, 100
#: Slots that are half moved at once.
OPEN = 20


def measure(store: OnlineStore, rows: int, half_move: Callable[[], None] | None) -> list[str]:
    """Thousands of rows per second: first write, the same rows again, the same with half-moved slots, reads of 100 keys."""
    keys = [b"user%d" % number for number in range(rows)]
    batches = [
        make_batch([Row(key, payload=b"x" * VALUE_BYTES) for key in keys[low : low + BATCH]])
        for low in range(0, rows, BATCH)
    ]

    def load() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(store.parallel_writes) as pool:
            list(pool.map(lambda batch: store.merge("view", batch, tie_wins=True, retention=FOREVER), batches))
        return rows / (time.perf_counter() - began) / 1e3

    figures = [load(), load()]
    began = time.perf_counter()
    for low in range(0, rows, READ_AT_ONCE):
        store.read("view", keys[low : low + READ_AT_ONCE])
    reads = rows / (time.perf_counter() - began) / 1e3
    if half_move is not None:
        half_move()
        figures.append(load())
    told = [f"{figure:.0f}" for figure in figures]
    return [*told, *([] if half_move else ["-"]), f"{reads:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    print(
        "| thousand rows/s | first write | again, unchanged | the same, 20 slots half moved | reads of 100 |\n|---|---|---|---|---|"
    )
    with servers.running("valkey") as server, RedisStore(server.url) as store:
        print(f"| one Valkey | {' | '.join(measure(store, rows, None))} |")
    with clusters.running() as cluster, RedisClusterStore(cluster.url) as store:

        def half_move() -> None:
            source, target = cluster.servers[:2]
            slots = sorted({int(key_slot(b"fs:view:{user%d}" % number)) for number in range(1_000)})
            for slot in [slot for slot in slots if cluster.owns(source, slot)][:OPEN]:
                cluster.open_slot(slot, target)
                cluster.move_keys(slot, source, target, most=3)

        print(f"| three in a cluster | {' | '.join(measure(store, rows, half_move))} |")


if __name__ == "__main__":
    main()
