"""Delta to online stores: a first load, a merge over every entity, and rows that all lose; beside each store's limit and what others use."""

from __future__ import annotations

import os
import shutil
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dynamodb
import dynamodb_clients
import feast_materialize
import lake
import records
import render
import servers
from measure import HERE, Measured, Missing, Sample, Setting, Suite, WrongResult, materialize, measured, progress, turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lake import Lake

FIRST, GUARDED, STALE = "first load", "guarded, over every entity", "all stale"
TEXTBOOK = "redis-py pipeline, textbook"
SAFE, UNSAFE = (f"Feast {feast_materialize.FEAST}, {mode} mode" for mode in ("safe", "unsafe"))
EMPTY, OVER = "ready bytes, empty store", "ready bytes, over every entity"
READY_ROWS, READY_ITEMS = "ready rows, one executemany", "ready requests through boto3"
#: Entities beyond which a peer is measured with a table of so many, and its rate is carried over.
PEER_MOST = 100_000
#: Bytes that an entity takes beside its features in a store, generously; of a server's memory per byte stored; kept free.
BESIDE, OVERHEAD, SPARE = 200, 1.4, 2 * 2**30


@dataclass(frozen=True, slots=True)
class Point:
    """One table into one store. ``feast``, ``boto3``: entities that Feast and boto3's batch_writer are measured with, 0 for not at all."""

    store: str
    entities: int
    features: int = 50
    kind: str = "float64"
    rows_per_entity: int = 3
    rounds: int = 3
    feast: int = 0
    batch_writer: int = 0
    ttl: str | None = None

    @property
    def case(self) -> str:
        rows = self.entities * self.rows_per_entity
        return f"{self.store}, {self.entities:,} x {self.features} {self.kind}, {rows:,} rows read"

    @property
    def stored_bytes(self) -> int:
        return self.entities * (8 * self.features + BESIDE)

    def sizes(self, setting: Setting) -> dict[str, int | str]:
        """Of its table."""
        sizes = {"entities": self.entities, "rows_per_entity": self.rows_per_entity, "features": self.features}
        return {**sizes, "kind": self.kind, "seed": setting.seed}

    def lake(self, setting: Setting, *, most: int | None = None) -> Lake:
        """Its table, or one of the same shape with at most *most* entities."""
        sizes = self.sizes(setting) | {"entities": min(self.entities, most or self.entities)}
        return lake.generated(setting.work, **sizes)


POINTS = {
    "tiny": (
        Point("valkey", 1_000, 10, rounds=1),
        Point("sqlite", 1_000, 10, "mixed", rounds=1),
    ),
    "bench": (
        Point("redis", 1_000_000, rounds=2, feast=20_000),  # first, because it says most
        *(Point(store, 10_000, kind=kind, rounds=2) for store in ("redis", "sqlite") for kind in ("float64", "mixed")),
        *(Point(store, 100_000, rounds=2) for store in ("redis", "sqlite", "valkey")),
        *(Point(store, 100_000, kind="mixed", rounds=1) for store in ("redis", "sqlite")),
        Point("dynamodb", 5_000, rounds=1, feast=2_000, batch_writer=2_000),
    ),
    "large": (
        *(
            Point(store, entities, features, kind, rounds=3)
            for entities in (10_000, 100_000)
            for features in (10, 50, 200)
            for kind in ("float64", "mixed")
            for store in ("redis", "valkey", "sqlite")
        ),
        *(
            Point("dynamodb", entities, features, kind, rounds=2, feast=2_000, batch_writer=2_000)
            for entities in (10_000, 100_000)
            for features, kind in ((10, "float64"), (50, "float64"), (50, "mixed"))
        ),
        *(
            Point(
                store, 1_000_000, features, kind, rounds=3, feast=100_000 if kind == "float64" and features == 50 else 0
            )
            for features, kind in ((10, "float64"), (50, "float64"), (50, "mixed"), (200, "float64"))
            for store in ("redis", "valkey", "sqlite")
        ),
        *(
            Point(store, 5_000_000, features, kind, rows_per_entity=1, rounds=2)
            for features, kind in ((10, "float64"), (50, "float64"), (50, "mixed"), (200, "float64"))
            for store in ("redis", "valkey", "sqlite")
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Target:
    """An empty online store: what the product is told, and what it holds, looked up past the product."""

    url: str
    read: Callable[[Sequence[str]], list[records.Stored | None]]
    count: Callable[[], int]
    dataset: Callable[[], int]
    cpu_seconds: Callable[[], float]


# --- stores ------------------------------------------------------------------------------------------------------------


@contextmanager
def redis_target(kind: str) -> Iterator[tuple[Target, servers.Server]]:
    with servers.running_server(kind) as server:
        client = server.client

        def cpu() -> float:
            used = client.info("cpu")
            return float(used["used_cpu_user"] + used["used_cpu_sys"])

        def count() -> int:  # the cells have no braces
            return sum(1 for _ in client.scan_iter(match=f"fs:{lake.VIEW}:{{*", count=servers.SCAN_KEYS))

        read = partial(records.in_redis, client)
        yield Target(server.url, read, count, lambda: server.memory()["dataset"], cpu), server


@contextmanager
def sqlite_target(folder: Path) -> Iterator[tuple[Target, Path]]:
    with tempfile.TemporaryDirectory(prefix="sqlite-", dir=folder) as made:
        file = Path(made) / "online.db"

        def count() -> int:
            connection = sqlite3.connect(file)
            try:
                return int(connection.execute("SELECT count(*) FROM records").fetchone()[0])
            finally:
                connection.close()

        def size() -> int:
            return sum(part.stat().st_size for part in Path(made).iterdir())

        yield Target(f"sqlite:///{file}", partial(records.in_sqlite, file), count, size, lambda: 0.0), file


@contextmanager
def dynamodb_target(endpoint: str, prefix: str) -> Iterator[Target]:
    import boto3

    api: Any = boto3.client("dynamodb", endpoint_url=endpoint)
    table = f"{prefix}.{lake.VIEW}"

    def count() -> int:
        pages = api.get_paginator("scan").paginate(
            TableName=table,
            Select="COUNT",
            ConsistentRead=True,
            FilterExpression="NOT begins_with(k, :brace)",  # the cells' keys do, an entity's never does
            ExpressionAttributeValues={":brace": {"S": "{"}},
        )
        return sum(page["Count"] for page in pages)

    url = f"dynamodb://{dynamodb_clients.KEY}:{dynamodb_clients.SECRET}@{dynamodb_clients.REGION}/{prefix}"
    options = f"endpoint_url={endpoint}&write_units={dynamodb_clients.UNITS}"
    yield Target(f"{url}?{options}", partial(records.in_dynamodb, api, table), count, lambda: 0, lambda: 0.0)
    for name in api.list_tables()["TableNames"]:
        if name.startswith(f"{prefix}."):
            api.delete_table(TableName=name)


# --- the product -------------------------------------------------------------------------------------------------------


def ours(point: Point, table: Lake, target: Target, number: int, limits: dict[str, str]) -> Iterator[Sample]:
    """First load, guarded merge and all stale backfill in *target*; counts and sampled values are checked after each."""
    clean = {"rows_read": table.rows_per_day, "quarantined": 0, "deleted": 0, "expired": 0, "unchanged": 0}
    wins = {**clean, "entities": table.entities, "written": table.entities, "stale": 0}
    newer = {**wins, "from_version": lake.FIRST_DAY_VERSION, "to_version": 2 * lake.HOURS - 1}
    past = ["--start", lake.FIRST_DAY.isoformat(), "--end", (lake.FIRST_DAY + lake.DAY).isoformat()]
    with tempfile.TemporaryDirectory(prefix="config-", dir=table.folder.parent) as made:
        config = Path(made)
        table.write_config(config, target.url, ttl=point.ttl)
        if point.store == "dynamodb":
            materialize("setup", lake.VIEW, "--config", config)
        before, empty = target.cpu_seconds(), target.dataset()
        for what, command, counts, day in (
            (FIRST, ["incremental", lake.VIEW], wins, 0),
            (GUARDED, ["incremental", lake.VIEW], newer, 1),
            (STALE, ["backfill", lake.VIEW, *past], {**clean, "written": 0}, 1),
        ):
            (lake.hide_second_day if day == 0 else lake.show_second_day)(table)
            done = materialize(*command, "--config", config, "--max-speed")
            used = target.cpu_seconds() - before
            records.agree(f"{point.case}: {what}", counts, done.found)
            records.check(f"{point.case}: {what}", table, day, target.read)
            progress(f"  {what}: {done.seconds:.2f} s, {done.peak_bytes / 1e6:,.0f} MB")
            yield product_sample(
                point, what, number, done, limits[what], used, (target.dataset() - empty) / table.entities
            )
            before = target.cpu_seconds()
        if (held := target.count()) != table.entities:
            raise WrongResult(f"{point.case}: the store holds {held:,} records, expected {table.entities:,}")


def product_sample(
    point: Point, what: str, number: int, done: Measured, limit: str, server_cpu: float, bytes_per_entity: float
) -> Sample:
    keep = ("seconds", "entities", "written", "stale", "rows_read", "held_back", "timings")
    report = {name: done.found[name] for name in keep if name in done.found}
    more = {"run_seconds": done.found["seconds"], "report": report}
    more |= {"server_cpu_seconds": server_cpu} if server_cpu else {}
    more |= {"bytes_per_entity": bytes_per_entity} if bytes_per_entity else {}
    return Sample(
        case=point.case,
        what=what,
        round=number,
        rows=point.entities,
        seconds=done.seconds,
        limit=limit,
        cpu_seconds=done.cpu_seconds,
        peak_bytes=done.peak_bytes,
        more=more,
    )


# --- Redis and Valkey --------------------------------------------------------------------------------------------------


def measure_redis(point: Point, setting: Setting) -> Iterator[Sample | Missing]:
    table, small = point.lake(setting), point.lake(setting, most=PEER_MOST)
    ready = (setting.work / "ready.resp", setting.work / "ready_again.resp")
    for path in ready:
        path.unlink(missing_ok=True)
    steps = (
        partial(in_redis, point, table, ready),
        partial(pipe, point, table, ready),
        partial(textbook, point, small),
    )
    for number in range(1, setting.rounds_or(point.rounds) + 1):
        progress(f"{point.case}: round {number}")
        for step in turns(number, steps):
            yield from step(number)
    for path in ready:
        path.unlink()
    if point.feast:
        yield from measure_feast(point)


def in_redis(point: Point, table: Lake, ready: Sequence[Path], number: int) -> Iterator[Sample]:
    """The product; the first time its records are kept as ready bytes, each file in another order."""
    limits = {FIRST: EMPTY, GUARDED: OVER, STALE: OVER}
    with redis_target(point.store) as (target, server):
        yield from ours(point, table, target, number, limits)
        if not ready[0].exists():
            for seed, path in enumerate(ready):
                servers.write_ready_bytes_apart(server, f"fs:{lake.VIEW}:{{*", path, seed=seed)


def pipe(point: Point, table: Lake, ready: Sequence[Path], number: int) -> Iterator[Sample]:
    """The limits: the ready bytes into an empty server, and again, in another order, over every entity."""
    with redis_target(point.store) as (target, server):
        for what, path in zip((EMPTY, OVER), ready, strict=True):
            before = target.cpu_seconds()
            done = servers.pipe_load(server, path, point.entities)
            used = target.cpu_seconds() - before
            records.check(f"{point.case}: {what}", table, 1, target.read)
            progress(f"  {done.writer}, {what}: {done.seconds:.2f} s")
            yield Sample(
                case=point.case,
                what=what,
                round=number,
                rows=point.entities,
                seconds=done.seconds,
                limit=what,
                cpu_seconds=done.cpu_seconds,
                note=done.writer,
                more={"server_cpu_seconds": used},
            )


def textbook(point: Point, table: Lake, number: int) -> Iterator[Sample]:
    lake.hide_second_day(table)
    with redis_target(point.store) as (target, server):
        empty = target.dataset()
        done = measured(
            [sys.executable, HERE / "textbook.py", "redis", "--table", table.table, "--port", str(server.port)]
        )
        check_textbook(point, table, server)
        progress(f"  {TEXTBOOK}: {done.found['seconds']:.2f} s")
        yield Sample(
            case=point.case,
            what=TEXTBOOK,
            round=number,
            rows=table.entities,
            seconds=done.found["seconds"],
            limit=EMPTY,
            ours=FIRST,
            cpu_seconds=done.cpu_seconds,
            peak_bytes=done.peak_bytes,
            note=carried(table.entities, point.entities),
            more={"bytes_per_entity": (target.dataset() - empty) / table.entities},
        )


def carried(measured_with: int, entities: int) -> str:
    return "" if measured_with == entities else f"measured with {measured_with:,} entities, the rate carried over"


def check_textbook(point: Point, table: Lake, server: servers.Server) -> None:
    """The hashes of the sampled entities hold the latest rows of the first day."""
    codes = {"float64": "<d", "int64": "<q", "timestamp": "<q", "bool": "<?"}
    for key, (_, _, expected) in table.expected(0).items():
        held = server.client.hgetall(f"features:{key}")
        found = [
            None
            if (value := held.get(name.encode())) is None
            else value.decode()
            if kind == "string"
            else struct.unpack(codes[kind], value)[0]
            for name, kind in table.feature_types.items()
        ]
        if tuple(found) != expected:
            raise WrongResult(
                f"{point.case}: {TEXTBOOK}: an entity of the sample holds other values than its latest row"
            )


def measure_feast(point: Point) -> Iterator[Sample | Missing]:
    """Feast's materialize into an empty server in both modes, once: it takes long."""
    sizes = {"entities": point.feast, "rows_per_entity": point.rows_per_entity, "features": point.features}
    try:
        feast_materialize.feast_python()
    except (OSError, subprocess.CalledProcessError) as error:
        yield Missing(f"{point.case}: Feast", f"its environment could not be made: {error}")
        return
    with ExitStack() as stack:
        servers_of = {what: stack.enter_context(servers.running_server(point.store)) for what in (SAFE, UNSAFE)}
        work = stack.enter_context(feast_materialize.prepared(servers_of[SAFE], sizes))
        for what, server in servers_of.items():
            done = feast_materialize.materialized(server, sizes, work, skip_dedup=what == UNSAFE)
            progress(f"  {what}, {point.feast:,} entities: {done['seconds']:.2f} s")
            yield Sample(
                case=point.case,
                what=what,
                round=1,
                rows=point.feast,
                seconds=done["seconds"],
                limit=EMPTY,
                ours=FIRST,
                cpu_seconds=done["cpu_seconds"],
                peak_bytes=done["peak_bytes"],
                note=carried(point.feast, point.entities),
                more={"bytes_per_entity": done["bytes_per_entity"]["dataset"]},
            )


# --- sqlite and DynamoDB Local -----------------------------------------------------------------------------------------


def measure_sqlite(point: Point, setting: Setting) -> Iterator[Sample | Missing]:
    table = point.lake(setting)
    ready = setting.work / "ready.db"
    ready.unlink(missing_ok=True)
    limits = {FIRST: READY_ROWS, GUARDED: READY_ROWS, STALE: READY_ROWS}

    def product(number: int) -> Iterator[Sample]:
        with sqlite_target(setting.work) as (target, file):
            yield from ours(point, table, target, number, limits)
            if not ready.exists():
                shutil.copyfile(file, ready)

    def limit(number: int) -> Iterator[Sample]:
        with tempfile.TemporaryDirectory(prefix="sqlite-", dir=setting.work) as made:
            target = Path(made) / "ready.db"
            done = measured([sys.executable, HERE / "textbook.py", "sqlite", "--ready", ready, "--target", target])
        if done.found["rows"] != point.entities:
            raise WrongResult(
                f"{point.case}: {READY_ROWS}: found {done.found['rows']:,} rows, expected {point.entities:,}"
            )
        progress(f"  {READY_ROWS}: {done.found['seconds']:.2f} s")
        seconds = done.found["seconds"]
        yield Sample(point.case, READY_ROWS, number, point.entities, seconds, limit=READY_ROWS)

    for number in range(1, setting.rounds_or(point.rounds) + 1):
        progress(f"{point.case}: round {number}")
        for step in turns(number, (product, limit)):
            yield from step(number)
    ready.unlink()


def measure_dynamodb(point: Point, setting: Setting) -> Iterator[Sample | Missing]:
    os.environ.update(dynamodb.ENVIRONMENT)
    fetched = subprocess.run(
        [sys.executable, *dynamodb.SCRIPTS[dynamodb.LOCAL], "--fetch"], capture_output=True, text=True, check=False
    )
    if fetched.returncode:
        yield Missing(point.case, fetched.stderr.strip()[-300:])
        return
    table = point.lake(setting)
    limits = dict.fromkeys((FIRST, GUARDED, STALE), READY_ITEMS)
    peers = {"bare": (READY_ITEMS, point.entities)}
    if point.batch_writer:
        peers["batch_writer"] = ("boto3's batch_writer, an attribute per feature", point.batch_writer)
    if point.feast:
        peers["feast"] = (f"Feast {feast_materialize.FEAST}, write_to_online_store", point.feast)
    floats = "" if point.kind == "float64" else "float64 only"  # `dynamodb_clients.py` makes no others
    with dynamodb.running(dynamodb.LOCAL) as endpoint:
        for client in ("bare", "batch_writer"):  # its JVM compiles what it runs often
            dynamodb.load(client, endpoint, f"heat_{client}", dynamodb.HEAT, point.features)

        def product(number: int) -> Iterator[Sample]:
            with dynamodb_target(endpoint, f"round{number}") as target:
                yield from ours(point, table, target, number, limits)

        def peer(client: str, number: int) -> Iterator[Sample]:
            what, entities = peers[client]
            done = dynamodb.load(client, endpoint, f"round{number}_{client}", entities, point.features)
            dynamodb.check(client, endpoint, f"round{number}_{client}", entities, point.features)
            progress(f"  {what}: {done.per_second:,.0f} items/s")
            yield Sample(
                case=point.case,
                what=what,
                round=number,
                rows=entities,
                seconds=entities / done.per_second,
                limit=READY_ITEMS,
                ours=None if client == "bare" else FIRST,
                cpu_seconds=done.cpu_us * entities / 1e6,
                note="; ".join(filter(None, (carried(entities, point.entities), floats))),
            )

        for number in range(1, setting.rounds_or(point.rounds) + 1):
            progress(f"{point.case}: round {number}")
            for step in turns(number, (product, *(partial(peer, client) for client in peers))):
                yield from step(number)


# --- the suite ---------------------------------------------------------------------------------------------------------

MEASURES = {"redis": measure_redis, "valkey": measure_redis, "sqlite": measure_sqlite, "dynamodb": measure_dynamodb}


def lacking(point: Point, setting: Setting) -> str | None:
    """Why the point cannot be measured on this machine."""
    if point.store in servers.KINDS:
        try:
            servers.server_binary(point.store)
        except SystemExit as missing:
            return str(missing)
    day = point.entities * point.rows_per_entity * 8 * point.features
    disk = int(2 * day + 2 * point.stored_bytes)  # two days, and the ready bytes twice
    if (free := shutil.disk_usage(setting.work).free) < disk + SPARE:
        return f"needs about {disk / 1e9:.0f} GB of disk, found {free / 1e9:.0f} GB free"
    memory = int(OVERHEAD * point.stored_bytes) if point.store != "sqlite" else 0
    free = render.free_memory()
    if free is not None and free < memory + SPARE:
        return f"needs about {memory / 1e9:.0f} GB of memory for the server, found {free / 1e9:.0f} GB available"
    return None


def measure(setting: Setting) -> Iterator[Sample | Missing]:
    points = POINTS[setting.scale]
    stores = {point.store for point in points}
    for store in MEASURES.keys() - stores:
        yield Missing(store, f"not at the size {setting.scale!r}")
    if shutil.which("redis-cli") is None:
        yield Missing("redis-cli --pipe", "no redis-cli on PATH; a writer in Python sends the ready bytes instead")
    for number, point in enumerate(points, 1):
        if why := lacking(point, setting):
            yield Missing(point.case, why)
            continue
        begin = time.monotonic()
        yield from MEASURES[point.store](point, setting)
        progress(f"{point.case}: {time.monotonic() - begin:.0f} s in all")
        if not setting.keep and all(point.sizes(setting) != later.sizes(setting) for later in points[number:]):
            shutil.rmtree(point.lake(setting).folder)  # the next table may need the room


def headlines(samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    """Of the largest table of floats in Redis, or in Valkey."""
    named = [each.case for each in samples if each.what == EMPTY and "float64" in each.case]
    cases = [case for case in named if case.startswith("redis")] or named
    if not cases:
        return []
    case = max(cases, key=lambda name: max(each.rows for each in samples if each.case == name))
    some = [each for each in samples if each.case == case]

    def of(what: str, limit: str) -> str:
        process = render.ratios(some, what, limit)
        runs = render.ratios(some, what, limit, run_alone=True)
        return f"{render.spread(process, render.share)}; run alone {render.spread(runs, render.share)}"

    lines = [
        (f"{FIRST}, of the pipe's speed ({case})", of(FIRST, EMPTY), "85 %"),
        (f"{GUARDED}, of the pipe's speed into an empty store", of(GUARDED, EMPTY), "70 %"),
        (f"{GUARDED}, of the pipe's speed over every entity", of(GUARDED, OVER), "-"),
        (f"{STALE}, of the pipe's speed over every entity", of(STALE, OVER), "-"),
    ]
    for run, what, aim in (
        *((FIRST, TEXTBOOK, "-"), (FIRST, SAFE, "-"), (FIRST, UNSAFE, "-")),
        (GUARDED, SAFE, "75 times"),  # which is measured into an empty store, a gift to it
    ):
        if found := render.ratios(some, run, what):
            alone = render.spread(render.ratios(some, run, what, run_alone=True), render.times)
            told = f"{render.spread(found, render.times)}; run alone {alone}"
            lines.append((f"{run}, times the speed of {what}", told, aim))
    peak = [each.peak_bytes for each in some if each.what in {FIRST, GUARDED} and each.peak_bytes]
    if peak:
        lines.append(("peak memory of these loads", f"{statistics.median(peak) / 1e9:.2f} GB", "0.7 GB"))
    return lines


def plots(samples: Sequence[Sample]) -> list[tuple[str, Callable[[Path], None]]]:
    """Entities a second and peak memory over the number of entities, for tables of the most common width."""
    speed: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    for (store, shape, what), some in grouped(samples).items():
        if shape != "50 float64" and any("50 float64" in each.case for each in samples):
            continue
        shown = {FIRST: FIRST, GUARDED: GUARDED, EMPTY: "ready bytes", READY_ROWS: "ready rows", TEXTBOOK: "redis-py"}
        own = [each for each in some if not each.note.startswith("measured with")]
        if what in shown:
            for rows in sorted({each.rows for each in own}):
                of_size = [each for each in own if each.rows == rows]
                name = f"{store}, {shown[what]}"
                speed.setdefault(name, []).append((rows, statistics.median(each.rate for each in of_size)))
                peaks = [each.peak_bytes for each in of_size if each.peak_bytes]
                if peaks and what in {FIRST, GUARDED}:
                    memory.setdefault(name, []).append((rows, statistics.median(peaks) / 1e9))
    axes = {"xlabel": "entities", "log_x": True}
    return [
        ("entities a second, by store and size", partial(render.lines, speed, ylabel="entities/s", log_y=True, **axes)),
        ("peak memory of a load, by size", partial(render.lines, memory, ylabel="peak memory, GB", **axes)),
    ]


def grouped(samples: Sequence[Sample]) -> dict[tuple[str, str, str], list[Sample]]:
    """The samples by store, shape of the table, and what."""
    found: dict[tuple[str, str, str], list[Sample]] = {}
    for each in samples:
        store, table, _ = each.case.split(", ", 2)[0], each.case.split(" x ")[1].split(",")[0], None
        found.setdefault((store, table, each.what), []).append(each)
    return found


SUITE = Suite(
    name="load",
    title="Delta to online stores",
    about="""\
*First load*: the table's first day into an empty store. *Guarded*: the second day, with newer rows of every entity, merged over it. *All stale*:
a backfill of the first day, which must lose everywhere. Each is one `materialize` process from start to exit, with `--max-speed`; *run* is the
time in its own report, without the start of Python. The limit is a blind write of the very records that it left, in random order: of Redis and
Valkey by `redis-cli --pipe`, of sqlite by one `executemany`, of DynamoDB Local as ready requests. Peers are timed without their imports.
Server and client share the cores. After each load the counts must add up and sampled entities must hold their latest rows, by a decoder of its own.""",
    columns=(
        "rows",
        "seconds",
        "rate",
        "cpu",
        "server_cpu",
        "peak",
        "bytes",
        "of_limit",
        "run_of_limit",
        "ours",
        "run_ours",
    ),
    seconds={"tiny": 240, "bench": 900, "large": 8 * 3600},
    measure=measure,
    headlines=headlines,
    plots=plots,
)
