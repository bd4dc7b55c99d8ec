"""What a run costs that has little or nothing to do, in counts and not in seconds: modules that it loads, round trips, requests."""

from __future__ import annotations

import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pyarrow as pa
from deltalake import write_deltalake

from materialize import pipeline
from materialize.online.redis import RedisStore
from tests.object_store import BUCKET
from tests.projects import PAST, Project
from tests.properties.storage import Bucket
from tests.stepping import run
from tests.tables import SCHEMA, Table, row
from tests.test_object_store import view_of

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.online.base import OnlineStore
    from tests import servers
    from tests.object_store import ObjectStore

#: The command line, and at its end every module that it loaded.
LOADED = """\
import sys
from materialize.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
#: The command line, and at its end how often Python looked for cycles of objects in it.
COLLECTED = """\
import gc, sys
from materialize.cli import main
before = gc.get_stats()[0]["collections"]
try:
    main()
finally:
    print(gc.get_stats()[0]["collections"] - before, file=sys.stderr)
"""
#: Libraries that a run over SQLite with nothing new has no use for; each takes 20 to 300 ms.
HEAVY = frozenset(
    {
        *("asyncio", "boto3", "botocore", "hiredis", "numpy", "opentelemetry", "polars", "prometheus_client"),
        *("pyarrow", "pyroaring", "redis", "rich"),
    }
)
#: What redis-py itself loads.
OF_REDIS = frozenset({"asyncio", "hiredis", "opentelemetry", "redis"})
#: Modules in all: 480 over SQLite when this was written, of which the interpreter has 60.
MOST_MODULES = 560
#: Collections of the newest objects: 0 or 1 when this was written, 47 with Python's own threshold.
MOST_COLLECTIONS = 5
#: Commands in all: 20 when this was written, 4 of them by the two scripts.
MOST_COMMANDS = 22
#: Requests to an object store: 4 when this was written, all of them by deltalake, which opens the table once.
MOST_REQUESTS = 4
#: Commands of a connection itself, which do not grow with what a run asks.
HANDSHAKE = ("auth", "client", "config", "hello", "select")


def modules(project: Project, *arguments: str) -> set[str]:
    """What the command line loads for *arguments*, which it has to do well."""
    command = [sys.executable, "-c", LOADED, *arguments, "--config", str(project.config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return set(ended.stderr.split())


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def project(folder: Path, url: str) -> Project:
    made = Project(folder, url)
    made.table.append(*(row(f"u{index}", PAST) for index in range(10)))
    assert made.run("incremental").returncode == 0
    return made


def test_run_with_nothing_new_loads_nothing_that_rows_need(tmp_path: Path) -> None:
    loaded = modules(project(tmp_path, f"sqlite:///{tmp_path}/online.db"), "incremental")

    assert top(loaded) & HEAVY == set()
    assert len(loaded) <= MOST_MODULES


def test_run_with_nothing_new_over_redis_loads_the_driver_beside(tmp_path: Path, valkey: servers.Server) -> None:
    loaded = modules(project(tmp_path, valkey.url), "incremental")

    assert "redis" in loaded
    assert top(loaded) & HEAVY <= OF_REDIS
    assert {
        name for name in loaded if name.startswith(("pyarrow.dataset", "pyarrow.fs", "redis.commands.search"))
    } == set()


def test_run_with_nothing_new_hardly_looks_for_garbage(tmp_path: Path) -> None:
    made = project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    command = [sys.executable, "-c", COLLECTED, "incremental", "--config", str(made.config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert int(ended.stderr.split()[-1]) <= MOST_COLLECTIONS


def test_run_with_few_rows_loads_no_other_store_and_no_datasets(tmp_path: Path) -> None:
    project_ = project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project_.table.append(row("u1", PAST + 1))

    loaded = modules(project_, "incremental")

    assert "polars" in loaded
    assert top(loaded) & {"boto3", "botocore", "redis", "rich", "prometheus_client", "opentelemetry"} == set()
    assert "pyarrow.dataset" not in loaded


def test_help_loads_no_config_and_no_store() -> None:
    command = [sys.executable, "-c", LOADED, "incremental", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert top(set(ended.stderr.split())) & {"deltalake", "numpy", "polars", "pyarrow", "redis", "yaml"} == set()


def test_run_with_nothing_new_takes_few_round_trips(table: Table, valkey: servers.Server) -> None:
    table.append(*(row(f"u{index}", 1) for index in range(10)))
    with RedisStore(valkey.url) as store:
        pipeline.incremental(table.view, store, run())
        pipeline.incremental(table.view, store, run())
        valkey.client.config_resetstat()

        report = pipeline.incremental(table.view, store, run())

        calls = {
            name.removeprefix("cmdstat_"): stats["calls"]
            for name, stats in valkey.client.info("commandstats").items()
            if not name.removeprefix("cmdstat_").startswith(HANDSHAKE)
        }
    assert report.written == 0
    # One look at each thing: the watermark before and after, the lease when it is taken and given back (by a script, whose GET and SET
    # are counted too), the remembered entities, the store's clock, and what the server says of itself.
    assert set(calls) <= {"evalsha", "get", "set", "mget", "time", "info"}
    assert sum(calls.values()) <= MOST_COMMANDS


def test_run_with_nothing_new_reads_the_log_once(object_store: ObjectStore, store: OnlineStore) -> None:
    lake = Bucket(object_store.client, BUCKET, f"table-{uuid.uuid4()}", object_store.options)
    rows = pa.Table.from_pylist([row("a", 1)], schema=SCHEMA)
    write_deltalake(lake.uri, rows, mode="append", storage_options=lake.options)
    view = view_of(lake, lake.options)
    pipeline.incremental(view, store, run())
    before = len(object_store.log.read_text().splitlines())

    pipeline.incremental(view, store, run())

    asked = [line for line in object_store.log.read_text().splitlines()[before:] if lake.prefix in line]
    assert len(asked) <= MOST_REQUESTS
    assert not [line for line in asked if ".parquet" in line]
