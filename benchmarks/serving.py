"""What a read costs a model server, beside the driver's own GET and MGET and beside Feast's SDK: sizes in, a Markdown table out.

    .venv/bin/python benchmarks/serving.py --feast

Entities of 50 float64 features are loaded by `materialize incremental`. Then one process reads chance entities, each kind of read in
turn, so that all see the same machine: redis-py's GET and MGET of the same keys (bytes, not decoded), `OnlineFeatures.read_features`
and `.batch_read` as dicts and as a matrix, and a read that its cache answers. Again while a paced load rewrites all entities. Feast
reads the same number of entities of the same width in a process of its own, from a server of its own that it has loaded.

Where there are two cores the server has the first for itself, and reader and load share the other, the load at nice 10.

Wrong values end the script with exit code 1; slow figures do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import feast_materialize
import lake
import redis
import servers
from figures import environment
from lake import VIEW

from materialize.serving import CacheSettings, OnlineFeatures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from servers import Server

HERE = Path(__file__).parent
MATERIALIZE = str(Path(sys.executable).with_name("materialize"))
BATCH = 100
#: Reads of one kind in a row, before the next kind's turn.
TURN = 100
QUANTILES = (0.5, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Reads:
    """Seconds of each read by its kind; what an entity takes in the server, key and all; the report of the load that went on meanwhile."""

    waits: dict[str, list[float]]
    server: str
    bytes_per_entity: float
    load: dict[str, Any] | None = None


def materialize(command: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [MATERIALIZE, command, VIEW, "--config", str(folder), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        preexec_fn=lambda: os.nice(10),  # noqa: PLW1509 - there is one thread
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}:\n{err[-3000:]}")
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


def kinds(
    features: OnlineFeatures, cached: OnlineFeatures, server: Server, entities: int
) -> dict[str, Callable[[], Any]]:
    """Name of a read -> what does it once, for entities drawn by chance, but the cached one."""
    client = redis.Redis(port=server.port)
    names = list(features.core.schemas[VIEW].view.features)
    draw = random.Random(7)

    def one() -> int:
        return draw.randrange(entities)

    def many() -> list[int]:
        return [draw.randrange(entities) for _ in range(BATCH)]

    return {
        "redis-py GET": lambda: client.get(f"fs:{VIEW}:{{{one()}}}"),
        "read_features": lambda: features.read_features(VIEW, one(), names),
        f"redis-py MGET of {BATCH}": lambda: client.mget([f"fs:{VIEW}:{{{key}}}" for key in many()]),
        f"batch_read of {BATCH}, to_dicts": lambda: features.batch_read(VIEW, many(), names).to_dicts(),
        f"batch_read of {BATCH}, to_numpy": lambda: features.batch_read(VIEW, many(), names).to_numpy(),
        "read_features, cached": lambda: cached.read_features(VIEW, 1, names),
    }


def timed(
    reads: dict[str, Callable[[], Any]], count: int, going: Callable[[], bool] = lambda: True
) -> dict[str, list[float]]:
    """Seconds of each of *count* reads of each kind, while *going*."""
    waits: dict[str, list[float]] = {name: [] for name in reads}
    gc.collect()
    gc.freeze()
    while going() and any(len(some) < count for some in waits.values()):
        for name, read in reads.items():
            for _ in range(TURN):
                begin = time.perf_counter()
                read()
                waits[name].append(time.perf_counter() - begin)
    return waits


def check(features: OnlineFeatures, server: Server, entities: int) -> None:
    """Every feature of some entities is what the stored bytes hold: 50 little-endian float64 at the end of a record."""
    batch = features.batch_read(VIEW, range(0, entities, max(entities // 500, 1)))
    for key, vector in zip(range(0, entities, max(entities // 500, 1)), batch, strict=True):
        record = server.client.get(f"fs:{VIEW}:{{{key}}}")
        values = list(vector.features.values())
        if vector.status != "present" or values != list(struct.unpack(f"<{len(values)}d", record[-8 * len(values) :])):
            raise SystemExit(f"entity {key}: found {vector.status} with other values than the store holds")


@contextmanager
def loading(folder: Path) -> Iterator[tuple[Callable[[], bool], dict[str, Any]]]:
    """Rebuild the view; gives whether the load still goes on, and its report, which is there afterwards."""
    process, report = materialize("rebuild", folder), {}
    try:
        yield lambda: process.poll() is None, report
        report.update(finished(process))
    finally:
        process.terminate()


def quantiles(waits: list[float]) -> list[float]:
    """`QUANTILES` of *waits*, in milliseconds."""
    ordered = sorted(waits)
    return [1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES]


def row(name: str, waits: list[float], beside: list[float] | None) -> str:
    told = quantiles(waits)
    ratio = "" if beside is None else f"{told[0] / quantiles(beside)[0]:.2f}"
    return f"| {name} | {len(waits):,} | {' | '.join(f'{value:.3f}' for value in told)} | {ratio} |"


def table_of(waits: dict[str, list[float]]) -> Iterator[str]:
    yield "| read | reads | p50 ms | p99 ms | p99.9 ms | p50 of the line above it |"
    yield "|---|---|---|---|---|---|"
    beside = None
    for name, some in waits.items():
        yield row(name, some, None if name.startswith("redis-py") else beside)
        beside = some if name.startswith("redis-py") else beside


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure reads of a model server.")
    parser.add_argument("--entities", type=int, default=100_000)
    parser.add_argument("--load-entities", type=int, default=1_000_000, help="of the load beside the reads")
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--reads", type=int, default=10_000, help="of each kind")
    parser.add_argument("--server", choices=servers.KINDS, default="redis")
    parser.add_argument("--feast", action="store_true", help="also read by Feast's SDK")
    parser.add_argument("--work", type=Path, help="folder for the tables, used again when their sizes fit")
    return parser.parse_args()


def ours(table: lake.Lake, kind: str, reads: int, *, loaded: bool) -> Reads:
    """Load the view and time *reads* of it of each kind; *loaded*: while a paced rebuild writes all of it again, as many as that takes."""
    with (
        servers.running_server(kind) as server,
        tempfile.TemporaryDirectory(prefix="bench-config-") as made,
    ):
        servers.apart(server)
        folder = Path(made)
        table.write_config(folder, server.url)
        before = server.memory()["used"]
        finished(materialize("incremental", folder))
        taken = (server.memory()["used"] - before) / table.entities
        with (
            OnlineFeatures.connect(folder) as features,
            OnlineFeatures.connect(folder, cache=CacheSettings(ttl=timedelta(hours=1))) as cached,
        ):
            check(features, server, table.entities)
            chosen = kinds(features, cached, server, table.entities)
            timed(chosen, TURN)
            if not loaded:
                return Reads(timed(chosen, reads), server.name, taken)
            with loading(folder) as (going, report):
                waits = timed(chosen, sys.maxsize, going)
            return Reads(waits, server.name, taken, report)


def main() -> None:
    arguments = parsed()
    with servers.running_server(arguments.server) as server:
        setting = environment(server.name)
    print(
        f"{arguments.entities:,} entities x {arguments.features} float64. {', '.join(f'{k} {v}' for k, v in setting.items())}.\n"
    )
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        work = arguments.work or Path(made)
        sizes = {"rows_per_entity": 1, "features": arguments.features}
        tables = [
            lake.generated(work, entities=count, **sizes) for count in (arguments.entities, arguments.load_entities)
        ]
        found = ours(tables[0], arguments.server, arguments.reads, loaded=False)
        taken, quiet = found.bytes_per_entity, found.waits
        print(
            f"{found.server}: {taken:.0f} bytes per entity, {taken / arguments.features:.2f} per feature, key and all.\n"
        )
        print("\n".join(table_of(quiet)), flush=True)
        found = ours(tables[1], arguments.server, arguments.reads, loaded=True)
        load = found.load or {}
        print(
            f"\nA load wrote {load['written']:,} entities in {load['seconds']:.1f} s, held back {load['held_back']:.1f} s.\n"
        )
        print("\n".join(table_of(found.waits)), flush=True)
    if arguments.feast:
        sizes = {"entities": arguments.entities // 10, "rows_per_entity": 1, "features": arguments.features}
        with servers.running_server(arguments.server) as server:
            servers.apart(server)
            waits = feast_materialize.measure(server, sizes, reads=arguments.reads)["waits"]
        print("\n| Feast's SDK | reads | p50 ms | p99 ms | p99.9 ms | p50 of ours |\n|---|---|---|---|---|---|")
        print(row("get_online_features of 1", waits["1"], quiet["read_features"]))
        print(row(f"of {BATCH}", waits[str(BATCH)], quiet[f"batch_read of {BATCH}, to_dicts"]))


if __name__ == "__main__":
    main()
