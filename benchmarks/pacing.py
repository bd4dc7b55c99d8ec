"""What readers of a store feel while it is loaded, measured from outside: sizes in, a Markdown table out.

    .venv/bin/python benchmarks/pacing.py --entities 1000000

For Redis and Valkey, each on fresh servers: a reader in a process of its own GETs a key every 2 ms and never waits for more than its
answer, while nothing else happens (idle), while `materialize incremental --max-speed` loads the table (unpaced), and while
`materialize incremental` does (paced at 5 ms, and at --tight ms). SLOWLOG has every command that blocked the server for longer than 2 ms.

On Linux with two cores or more the server has the first core for itself and everything else the others, and the load gives way to the
reader (nice 10): a server that shares its core is slow because it does not run, which SLOWLOG counts as a long command.

Wrong counts end the script with exit code 1; slow figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lake
import redis
import servers
from figures import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import Server

HERE = Path(__file__).parent
#: Microseconds; the claim is that no command blocks for longer. Entries that SLOWLOG keeps.
SLOW_US, KEPT = 2_000, 100_000
#: Seconds between two reads, and of reading an idle server.
EVERY, IDLE = 0.002, 5.0
QUANTILES = (0.5, 0.99, 0.999)


def read(port: int, key: str) -> None:
    """The reader: GET until a line comes, then print the quantiles of so many last seconds as the line says, in milliseconds."""
    client = redis.Redis(port=port)
    client.get(key)
    print("ready", flush=True)
    found: list[tuple[float, float]] = []
    due = time.perf_counter()
    os.set_blocking(sys.stdin.fileno(), False)
    while sys.stdin.buffer.read(1) is None:
        # A read that had to wait for the one before counts from when it was due.
        begin = due
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
            begin = time.perf_counter()
        client.get(key)
        found.append((begin, time.perf_counter() - begin))
        due += EVERY
    os.set_blocking(sys.stdin.fileno(), True)
    since = time.perf_counter() - float(sys.stdin.readline())
    waits = sorted(wait for begin, wait in found if begin >= since)
    quantiles = {f"p{100 * q:g}": 1e3 * waits[min(len(waits) - 1, int(q * len(waits)))] for q in QUANTILES}
    print(json.dumps({"reads": len(waits), "max": 1e3 * waits[-1]} | quantiles), flush=True)


@contextmanager
def reader(server: Server, key: str) -> Iterator[dict[str, float]]:
    """What another process reads meanwhile; the figures, of the last ``seconds`` that the caller puts there, are there afterwards."""
    command = [sys.executable, __file__, "--read", str(server.port), key]
    found: dict[str, float] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield found
            process.stdin.write(f" {found['seconds']}\n")
            process.stdin.flush()
            found.update(json.loads(process.stdout.readline()))
        finally:
            process.terminate()


def load(server: Server, table: lake.Lake, pace: str) -> dict[str, Any]:
    """One first load by the command line. Returns its report, with the reader's figures and what SLOWLOG has."""
    client = server.client
    client.config_set("slowlog-log-slower-than", SLOW_US)
    client.config_set("slowlog-max-len", KEPT)
    with tempfile.TemporaryDirectory(prefix="bench-config-") as folder, reader(server, f"fs:{lake.VIEW}:{{1}}") as felt:
        table.write_config(Path(folder), server.url, pace)
        client.slowlog_reset()
        command = [
            str(Path(sys.executable).with_name("materialize")),
            "incremental",
            lake.VIEW,
            "--config",
            folder,
            "--json",
        ]
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
            preexec_fn=lambda: os.nice(10),
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        report = json.loads(done.stdout.splitlines()[-1])
        if (report["written"], report["quarantined"]) != (table.entities, 0):
            raise SystemExit(f"found {report['written']:,} written rows, expected {table.entities:,}")
        felt["seconds"] = report["seconds"]
    blocks = [entry["duration"] for entry in client.slowlog_get(KEPT)]
    return {"report": report, "felt": felt, "blocks": len(blocks), "longest_ms": max(blocks, default=0) / 1e3}


def idle(kind: str) -> dict[str, float]:
    with servers.running_server(kind) as server:
        servers.apart(server)
        with reader(server, f"fs:{lake.VIEW}:{{1}}") as felt:
            time.sleep(IDLE)
            felt["seconds"] = IDLE
    return felt


def lines(kind: str, table: lake.Lake, paces: list[str]) -> Iterator[str]:
    """The rows of the table, as they are measured."""
    felt = idle(kind)
    yield f"| {kind}, idle | {felt['p50']:.2f} | {felt['p99']:.2f} | {felt['p99.9']:.2f} | {felt['max']:.1f} | | | | | |"
    for pace in paces:
        with servers.running_server(kind) as server:
            name = server.name
            servers.apart(server)
            done = load(server, table, pace)
        felt, report = done["felt"], done["report"]
        probe = report["probe"].get("during", {})
        seen = f"{probe['p50_ms']:.2f} / {probe['p99_ms']:.2f}" if probe else "-"
        longest = f"{done['longest_ms']:.1f}" if done["blocks"] else f"below {SLOW_US / 1e3:g}"
        yield (
            f"| {name}, pace {pace} | {felt['p50']:.2f} | {felt['p99']:.2f} | {felt['p99.9']:.2f} | {felt['max']:.1f} "
            f"| {seen} | {report['seconds']:.1f} | {report['entities'] / report['seconds']:,.0f} | {report['held_back']:.1f} "
            f"| {longest} ({done['blocks']}) |"
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what readers feel during a load.")
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--servers", nargs="+", choices=servers.KINDS, default=list(servers.KINDS))
    parser.add_argument("--tight", type=int, metavar="MS", default=1, help="one more, tighter pace")
    parser.add_argument("--work", type=Path, help="folder for the table, used again when its sizes fit")
    parser.add_argument("--read", nargs=2, metavar=("PORT", "KEY"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    if arguments.read:
        read(int(arguments.read[0]), arguments.read[1])
        return
    with servers.running_server(arguments.servers[0]) as server:
        setting = environment(server.name)
        alone = servers.apart(server)
    with tempfile.TemporaryDirectory(prefix="bench-") as made:
        work = arguments.work or Path(made)
        sizes = {"entities": arguments.entities, "rows_per_entity": 1, "features": arguments.features}
        table = lake.generated(work, **sizes)
        where = "a core of its own for the server, the load at nice 10" if alone else "all on the same cores"
        print(f"{arguments.entities:,} entities x {arguments.features} float64, seed {lake.SEED}, {where}.")
        print(f"{', '.join(f'{name} {value}' for name, value in setting.items())}.\n")
        print(
            "| store | reader p50 ms | p99 | p99.9 | max | probe p50 / p99 | load s | entities/s | held back s | longest block ms (over 2) |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for kind in arguments.servers:
            for line in lines(kind, table, ["max-speed", "5ms", f"{arguments.tight}ms"]):
                print(line, flush=True)


if __name__ == "__main__":
    main()
