"""What the layouts `vector` and `hash` cost for 50 float64: ``python -m benchmarks.layouts [--entities N] [--listpack BYTES]``.

For Redis and Valkey, each started for this: memory of an entity, the server's time for a row that is written over an older one and for
one that is refused, and the median read of one entity and of 100 by this package.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from materialize import codec
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.online.redis import RedisStore
from materialize.testing import AT, FOREVER
from tests import servers

if TYPE_CHECKING:
    from materialize.online.base import EncodedBatch

FEATURES = {f"feature_{number:02}": FeatureType("float64") for number in range(50)}
READS = 1_000


def batch(layout: Any, entities: int, event: int) -> EncodedBatch:
    view = FeatureView("view", "source", ("k",), "ts", FEATURES, ("default",), layout=layout)
    random = np.random.default_rng(event)
    keys = pl.Series([b"%d" % number for number in range(entities)])
    order = pl.DataFrame(
        {
            "event_us": np.full(entities, event, dtype=np.int64),
            "created_us": np.zeros(entities, dtype=np.int64),
            "version": np.full(entities, AT, dtype=np.int64),
        }
    )
    values = pl.DataFrame({name: random.random(entities) for name in FEATURES})
    return codec.encode(keys, order, values, view, schema_id=1)


def busy(server: servers.Server) -> float:
    info = server.client.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


def measured(server: servers.Server, layout: str, entities: int) -> str:
    server.client.flushall()
    before, costs = server.client.info("memory")["used_memory"], []
    with RedisStore(server.url) as store:
        store.hashed = frozenset({"view"} if layout == "hash" else ())
        for event in (1, 2, 1):
            rows, began = batch(layout, entities, event), busy(server)
            store.merge("view", rows, tie_wins=True, retention=FOREVER)
            costs.append((busy(server) - began) / entities * 1e6)
        each = (server.client.info("memory")["used_memory"] - before) / entities
        medians = []
        for size in (1, 100):
            times = []
            for number in range(READS):
                keys = [b"%d" % ((number * size + one) % entities) for one in range(size)]
                began = time.perf_counter()
                store.read("view", keys)
                times.append(time.perf_counter() - began)
            medians.append(statistics.median(times) * 1e6)
    return (
        f"{server.kind:6} {layout:6} {each:7,.0f} {each / len(FEATURES):6.1f} {costs[1]:6.1f} {costs[2]:6.1f} "
        f"{medians[0]:6.0f} {medians[1]:6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entities", type=int, default=20_000)
    parser.add_argument("--listpack", type=int, default=64, help="hash-max-listpack-value of the servers")
    arguments = parser.parse_args()
    print("server layout bytes/entity bytes/feature us/row-written us/row-refused us/read us/read-of-100")
    for kind in servers.KINDS:
        if servers.binary(kind) is None:
            continue
        with servers.running(kind, "--hash-max-listpack-value", str(arguments.listpack)) as server:
            for layout in ("vector", "hash"):
                print(measured(server, layout, arguments.entities), flush=True)


if __name__ == "__main__":
    main()
