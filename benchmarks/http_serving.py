"""What a client of `materialize serve` waits for, and what the server does far above its capacity: a Markdown table out.

    .venv/bin/python -m benchmarks.http_serving                 # 500 requests/s for 20 s
    .venv/bin/python -m benchmarks.http_serving --overload 60   # 256 connections that never rest, for 60 s

A Redis or Valkey on loopback holds --entities entities of 50 float64; one process of `materialize serve` answers; this process asks
for one entity after the other by POST /v1/features, at fixed times whatever the server does (tests/http_load.py): latencies count from
when a request was due. Every answer is compared with what was written.

--overload: each answer must be right, or a 503 with Retry-After; requests under way never more than the limit; the memory of the
server stays; the first requests afterwards are answered as before. Anything else ends the script with exit code 1; slow figures do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from materialize import codec, watermark
from materialize.config import load
from materialize.model import to_us
from materialize.online import open_store
from materialize.order import stamp
from materialize.testing import FOREVER
from tests import servers
from tests.http_load import Question, Seen, flood, paced, request
from tests.processes import end

if TYPE_CHECKING:
    from collections.abc import Iterator

VIEW = "user_features"
FEATURES = 50
TOKEN = secrets.token_hex(16)
#: Seconds a server may take to start, and in which it must have recovered.
START, RECOVERY = 30.0, 2.0
#: MiB that a server may have more after an overload than after the load before it.
MORE_MEMORY = 64


def value(entity: int, feature: int) -> float:
    return entity + feature / 64


def configure(folder: Path, url: str) -> Path:
    (folder / "config" / "feature_views").mkdir(parents=True)
    names = "\n".join(f"  f{feature}: float64" for feature in range(FEATURES))
    (folder / "config" / "feature_views" / f"{VIEW}.yaml").write_text(
        f"source: {folder}/lake\njoin_keys: [user_id]\nevent_timestamp: event_timestamp\nfeatures:\n{names}\nonline_stores: [default]\n"
    )
    (folder / "config" / "online_stores.yaml").write_text(f"default: {{url: {json.dumps(url)}}}\n")
    return folder / "config"


def fill(config: Path, entities: int) -> None:
    loaded = load(config)
    view = loaded.feature_views[VIEW]
    with open_store(loaded.online_store("default")) as store:
        schema_id = watermark.register_schema(store, view)
        keys = pl.Series([str(entity).encode() for entity in range(entities)])
        now = to_us(datetime.now(timezone.utc))
        order = pl.DataFrame(
            {"event_us": [now] * entities, "created_us": [0] * entities, "version": [stamp(1, 1)] * entities}
        )
        frame = pl.DataFrame(
            {f"f{feature}": [value(entity, feature) for entity in range(entities)] for feature in range(FEATURES)}
        )
        store.merge(VIEW, codec.encode(keys, order, frame, view, schema_id=schema_id), tie_wins=True, retention=FOREVER)


def questions(entities: int) -> list[Question]:
    """One for each of some entities, in an order that is no order of keys."""
    asked = []
    for place in range(min(entities, 5_000)):
        entity = place * 7_919 % entities
        body = json.dumps({"lookups": [{"view": VIEW, "entity_keys": [entity]}]}).encode()
        told = {f"f{feature}": value(entity, feature) for feature in range(FEATURES)}
        expected = f'"features":{json.dumps(told, separators=(",", ":"))},"statuses":{{}}'
        asked.append(Question(request("/v1/features", body, TOKEN), expected.encode()))
    return asked


@contextmanager
def serving(config: Path, port: int, in_flight: int) -> Iterator[subprocess.Popen[bytes]]:
    code = "from materialize.cli import main; main()"
    options = ["--port", str(port), "--config", str(config), "--max-in-flight", str(in_flight)]
    environment = os.environ | {"MATERIALIZE_SERVE_TOKENS": TOKEN}
    process = subprocess.Popen([sys.executable, "-c", code, "serve", *options], env=environment)
    try:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz")
                break
            time.sleep(0.05)
        yield process
    finally:
        end(process)


def metrics(port: int) -> dict[str, float]:
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(asked) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(number) for name, number in (line.rsplit(" ", 1) for line in lines)}


def memory(process: subprocess.Popen[bytes]) -> float:
    """MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def row(name: str, seen: Seen, seconds: float) -> None:
    times = " | ".join(f"{seen.quantile(share) * 1e3:.2f}" for share in (0.5, 0.99, 0.999))
    refused = sum(count for status, count in seen.statuses.items() if status != 200)
    print(f"| {name} | {len(seen.seconds) / seconds:,.0f} | {refused:,} | {times} |", flush=True)


def wrong(seen: Seen, *, busy: bool) -> list[str]:
    allowed = {200, 503} if busy else {200}
    found = [f"{seen.wrong} answers differ from what was written"] if seen.wrong else []
    found += [f"{seen.broken} requests were not answered"] if seen.broken else []
    found += [f"{seen.without_retry} answers 503 have no Retry-After"] if seen.without_retry else []
    found += [f"{count} answers {status}" for status, count in seen.statuses.items() if status not in allowed]
    return found


def overload(
    options: argparse.Namespace, port: int, process: subprocess.Popen[bytes], asked: list[Question]
) -> list[str]:
    before, stop = memory(process), time.monotonic() + options.overload
    seen = asyncio.run(flood(port, asked, options.connections, lambda _: time.monotonic() > stop))
    row(f"overload, {options.connections} connections, {options.overload:g} s", seen, options.overload)
    after, found = memory(process), metrics(port)
    peak = found["materialize_http_in_flight_peak"]
    again = asyncio.run(paced(port, asked, options.rate, RECOVERY))
    row("the 2 s after it", again, RECOVERY)
    print(f"\nanswers {dict(seen.statuses)}, in flight at most {peak:.0f} of {options.in_flight}, now {found['materialize_http_in_flight']:.0f}; "
          f"memory of the server {before:.0f} MiB before, {after:.0f} MiB after")  # fmt: skip
    problems = wrong(seen, busy=True) + wrong(again, busy=False)
    if peak > options.in_flight or found["materialize_http_in_flight"]:
        problems.append("more requests under way than the limit, or some that never ended")
    if after - before > MORE_MEMORY:
        problems.append(f"the server's memory rose by {after - before:.0f} MiB")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=servers.KINDS, default="redis")
    parser.add_argument("--entities", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=500.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--in-flight", type=int, default=64, help="the server's --max-in-flight")
    parser.add_argument("--overload", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--connections", type=int, default=256, help="of the overload")
    options = parser.parse_args()
    with servers.running(options.server) as server, tempfile.TemporaryDirectory() as folder:
        config = configure(Path(folder), server.url)
        fill(config, options.entities)
        asked, port = questions(options.entities), servers.free_port()
        with serving(config, port, options.in_flight) as process:
            asyncio.run(paced(port, asked, options.rate, 2.0))  # nobody measures a first request
            print("| load | answers/s | refused | p50 ms | p99 ms | p99.9 ms |\n|---|---|---|---|---|---|")
            seen = asyncio.run(paced(port, asked, options.rate, options.seconds))
            row(f"{options.rate:g} requests/s for {options.seconds:g} s", seen, options.seconds)
            problems = wrong(seen, busy=False)
            if options.overload:
                problems += overload(options, port, process, asked)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
