"""Measures what an item costs a client of DynamoDB: sizes in, CPU and throughput beside three yardsticks out, as Markdown.

    .venv/bin/python benchmarks/dynamodb.py --entities 20000 --rounds 3 --json figures.json

Each round loads the same rows with each client (`dynamodb_clients.py`) as a process of its own into a table of its own, first on a
server that does nothing (`null_dynamodb.py`), then on DynamoDB Local. After each load of DynamoDB Local every entity must be there,
and after each of the product's, sampled entities must have the very bytes. Anything wrong ends the script with exit code 1; slow
figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import dynamodb_clients as clients
import feast_materialize
import numpy as np
from figures import environment, where
from render import count, spread

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
NULL, LOCAL = "null server", "DynamoDB Local"
SCRIPTS = {NULL: [str(HERE / "null_dynamodb.py")], LOCAL: [str(HERE.parent / "scripts" / "dynamodb_local.py")]}
OPTIONS = {NULL: [], LOCAL: ["--port", "0", "--end-with-stdin"]}
#: The rows of the table: clients by name, and what they are.
NAMES = {
    "ours": "materialize: encode and merge",
    "bare": "bare: ready requests through boto3's client",
    "batch_writer": "boto3's batch_writer, an attribute per feature",
    "feast": f"Feast {feast_materialize.FEAST}, write_to_online_store",
}
PEERS = ("batch_writer", "feast")
FIGURES = {"cpu_us": "CPU", "per_second": "items/s"}
#: No client may find a configuration, credentials or a proxy of the user's.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": clients.KEY,
    "AWS_SECRET_ACCESS_KEY": clients.SECRET,
    "AWS_DEFAULT_REGION": clients.REGION,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "FEAST_USAGE": "False",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
#: Entities whose bytes are compared after each load of the product's, and entities of a read (BatchGetItem's own limit).
SAMPLED, READ = 200, 100
#: Entities that each client loads into DynamoDB Local first, unmeasured: its JVM compiles what it runs often.
HEAT = 2_000
#: Seconds a server may take to answer, and to end.
START_SECONDS, STOP_SECONDS = 30.0, 10.0
#: Loaded machines give figures that say nothing: warn above this many busy processes per core at the start.
BUSY = 0.25


class WrongResult(SystemExit):
    """A load left something else in the table than it was given; a figure of it would be worth nothing."""


@dataclass(frozen=True, slots=True)
class Load:
    """One load by one client: CPU of its process in microseconds per item, user and system; items per second of wall time."""

    cpu_us: float
    per_second: float
    boto3: str


#: The loads of one round by server and client.
Round = dict[str, dict[str, Load]]


# --- servers -----------------------------------------------------------------------------------------------------------


@contextmanager
def running(server: str) -> Iterator[str]:
    """The address of a fresh server; it is ended on the way out, and ends with this process, however that ends."""
    command = [sys.executable, *SCRIPTS[server], *OPTIONS[server]]
    with tempfile.TemporaryDirectory(prefix="bench-server-") as folder:
        told = Path(folder) / "told"
        with told.open("wb") as output:
            environ = os.environ | {"TMPDIR": folder}
            process = subprocess.Popen(
                command, cwd=folder, env=environ, stdin=subprocess.PIPE, stdout=output, stderr=output
            )
        try:
            yield address(process, told)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def address(process: subprocess.Popen[bytes], told: Path) -> str:
    """What the server prints once it answers."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"(http://127\.0\.0\.1:\d+)\s", told.read_text()):
            return found[1]
        time.sleep(0.02)
    raise SystemExit(f"could not start {process.args!r}: {told.read_text()[-3000:]}")


# --- one load ----------------------------------------------------------------------------------------------------------


def load(client: str, endpoint: str, prefix: str, entities: int, features: int) -> Load:
    """Run one client as a process of its own, with its temporary files in a folder that is removed."""
    python = feast_materialize.feast_python() if client == "feast" else sys.executable
    command = [str(python), str(HERE / "dynamodb_clients.py"), client, f"--endpoint={endpoint}", f"--prefix={prefix}"]
    command += [f"--entities={entities}", f"--features={features}"]
    with tempfile.TemporaryDirectory(prefix="bench-dynamodb-") as folder:
        changed = os.environ | {"TMPDIR": folder}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=changed)
    if done.returncode:
        raise WrongResult(f"the load by {client} of {endpoint} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Load(1e6 * found["cpu_seconds"] / entities, entities / found["seconds"], found["boto3"])


def check(client: str, endpoint: str, prefix: str, entities: int, features: int) -> None:
    """Compare what is in the table of DynamoDB Local with the rows, then delete both tables of the load."""
    api: Any = boto3.client("dynamodb", endpoint_url=endpoint)
    table = f"{prefix}.{clients.VIEW}"
    pages = api.get_paginator("scan").paginate(TableName=table, Select="COUNT", ConsistentRead=True)
    found = sum(page["Count"] for page in pages)
    if found != entities:
        raise WrongResult(f"{client}: found {found:,} items in {table}, expected {entities:,}")
    if client == "ours":
        check_bytes(api, table, entities, features)
    for view in (clients.VIEW, clients.WARM_VIEW):
        api.delete_table(TableName=f"{prefix}.{view}")


def check_bytes(api: Any, table: str, entities: int, features: int) -> None:
    """Compare sampled items with the rows by docs/format.md: times, and the record without its order, bit for bit."""
    rows = clients.rows(entities, features)
    sample = np.random.default_rng(1).permutation(entities)[:SAMPLED].tolist()
    items: dict[int, dict[str, Any]] = {}
    for low in range(0, len(sample), READ):
        keys = [{"k": {"S": str(row)}} for row in sample[low : low + READ]]
        answer = api.batch_get_item(RequestItems={table: {"Keys": keys, "ConsistentRead": True}})
        items |= {int(item["k"]["S"]): item for item in answer["Responses"][table]}
    for row in sample:
        item = items.get(row)
        if item is None:
            raise WrongResult(f"entity {row} is not in {table}")
        held = (int(item["e"]["N"]), int(item["c"]["N"]), bytes(item["r"]["B"]))
        record = struct.pack(
            f"<BBH{features}d", 1, 0, clients.SCHEMA_ID, *(column[row] for column in rows.features.values())
        )
        expected = (int(rows.event_us[row]), int(rows.created_us[row]), record)
        if held != expected:
            raise WrongResult(f"{table}: entity {row}: found {held}, expected {expected}")


def one_round(number: int, endpoints: dict[str, str], chosen: list[str], sizes: dict[str, int]) -> Round:
    """Each client on each server. Every second round goes backwards, so that no client gains by what the machine does meanwhile."""
    found: Round = {}
    for server, endpoint in endpoints.items():
        loads = {}
        for client in chosen if number % 2 else reversed(chosen):
            prefix = f"round{number}_{client}"
            loads[client] = load(client, endpoint, prefix, **sizes)
            if server == LOCAL:
                check(client, endpoint, prefix, **sizes)
            progress(f"{server}, {client}: {loads[client].cpu_us:.1f} us/item, {loads[client].per_second:,.0f} items/s")
        found[server] = loads
    return found


# --- figures -----------------------------------------------------------------------------------------------------------


def markdown(setting: dict[str, Any], sizes: dict[str, int], rounds: list[Round]) -> str:
    """The figures as Markdown: where, what, what an item costs and how fast it goes, and the ratios."""
    chosen = list(rounds[0][NULL])

    def row(client: str) -> str:
        cpu = [spread([each[server][client].cpu_us for each in rounds], tenth) for server in (NULL, LOCAL)]
        speed = [spread([each[server][client].per_second for each in rounds], count) for server in (NULL, LOCAL)]
        return f"| {' | '.join([NAMES[client], *cpu, *speed])} |"

    def ratio(figure: str, of: str, to: str) -> str:
        pairs = [[(each[server][of], each[server][to]) for each in rounds] for server in (NULL, LOCAL)]
        cells = [spread([getattr(a, figure) / getattr(b, figure) for a, b in of_one], hundredth) for of_one in pairs]
        return f"| {' | '.join([f'{FIGURES[figure]}, {of} / {to}', *cells])} |"

    lines = [
        *where(setting),
        f"{sizes['entities']:,} entities x {sizes['features']} float64, into empty tables; rounds: {len(rounds)}, median (min-max).",
        "",
        f"| client | CPU us/item, {NULL} | CPU us/item, {LOCAL} | items/s, {NULL} | items/s, {LOCAL} |",
        "|---|---|---|---|---|",
        *map(row, chosen),
        "",
        f"| ratio, within each round | {NULL} | {LOCAL} |",
        "|---|---|---|",
        *(ratio("cpu_us", peer, "ours") for peer in chosen if peer in PEERS),
        ratio("cpu_us", "ours", "bare"),
        ratio("per_second", "ours", "bare"),
    ]
    return "\n".join(lines) + "\n"


def tenth(value: float) -> str:
    return f"{value:.1f}"


def hundredth(value: float) -> str:
    return f"{value:.2f}"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Start both servers, measure round by round, print."""
    parser = argparse.ArgumentParser(description="Measure the client CPU and the throughput of loading DynamoDB.")
    parser.add_argument("--entities", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-feast", action="store_true", help="leave Feast out")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    given = parser.parse_args()
    if given.entities < 1 or given.features < 1 or given.rounds < 1:
        parser.error("expected at least one entity, feature and round")
    os.environ.update(ENVIRONMENT)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_DYNAMODB"):
        os.environ.pop(name, None)
    sizes = {"entities": given.entities, "features": given.features}
    chosen = [name for name in clients.CLIENTS if name != "feast" or not given.no_feast]
    setting = environment(LOCAL)
    setting["packages"] = {name: version(name) for name in ("boto3", "botocore", "polars", "pyarrow")}
    if setting["load_at_start"] > BUSY * setting["cores"]:
        progress(f"warning: the machine is busy, load {setting['load_at_start']}: the figures will say little")
    subprocess.run([sys.executable, *SCRIPTS[LOCAL], "--fetch"], check=True)
    with running(NULL) as null, running(LOCAL) as local:
        for client in chosen:
            load(client, local, f"heat_{client}", HEAT, given.features)
            check(client, local, f"heat_{client}", HEAT, given.features)
        rounds = []
        for number in range(1, given.rounds + 1):
            progress(f"round {number} of {given.rounds}")
            rounds.append(one_round(number, {NULL: null, LOCAL: local}, chosen, sizes))
    if "feast" in chosen:
        setting["packages"]["Feast"] = f"{feast_materialize.FEAST} with boto3 {rounds[0][NULL]['feast'].boto3}"
    print(text := markdown(setting, sizes, rounds), end="")
    if given.json:
        plain = [
            {server: {name: asdict(one) for name, one in loads.items()} for server, loads in each.items()}
            for each in rounds
        ]
        figures = {"environment": setting, "sizes": sizes, "rounds": plain, "markdown": text}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
