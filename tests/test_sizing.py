"""What `plan --sizing` projects is what a load really takes; and weighing leaves nothing behind."""

from __future__ import annotations

import json
import time
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from materialize import pipeline, watermark
from materialize.errors import OfflineStoreError, UnavailableError
from materialize.model import Prices, to_us
from materialize.offline import newest_commits, open_table
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.dynamodb.sizing import Items, item_sizes
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.online.redis.acl import PLACEHOLDER, acl_line
from materialize.online.redis.sizing import table_bytes
from materialize.online.sqlite import SqliteStore
from materialize.sizing import Ask, SizingReport, rule_of_thumb, size
from tests import dynamodb_local as dynamodb, servers
from tests.projects import PAST, Project
from tests.stepping import run
from tests.tables import NOW, T0, UTC_TIME, Table, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from materialize.model import Layout
    from materialize.online.base import EncodedBatch, OnlineStore
    from materialize.online.demand import Demand
    from tests import cluster as clusters

LAYOUTS: tuple[Layout, ...] = ("vector", "hash")
MANY = 20_000
MONTH = timedelta(days=30)
NEAR = 0.05
PRICES = Prices(date(2026, 11, 1), "USD", million_write_units=1.0, million_read_units=0.5, gigabyte_month=0.25)


def columns(rows: int, seed: int) -> dict[str, pa.Array]:
    random = np.random.default_rng(seed)
    times = pa.array(to_us(T0) + random.integers(0, 86_400_000_000, rows)).cast(UTC_TIME)
    return {
        "user_id": pa.array([f"user-{number}" for number in range(rows)]),
        "event_timestamp": times,
        "created": times,
    }


def floats(rows: int) -> tuple[pa.Table, dict[str, str]]:
    random = np.random.default_rng(1)
    values = {f"f{number}": pa.array(random.random(rows)) for number in range(50)}
    return pa.table(columns(rows, 1) | values), dict.fromkeys(values, "float64")


def strings(rows: int) -> tuple[pa.Table, dict[str, str]]:
    random = np.random.default_rng(2)
    lengths = random.integers(0, 60, (rows, 4))
    values = {
        f"s{number}": pa.array([None if length < 20 else "x" * int(length) for length in lengths[:, number]])
        for number in range(4)
    }
    return pa.table(columns(rows, 2) | values), dict.fromkeys(values, "string")


def lists(rows: int) -> tuple[pa.Table, dict[str, str]]:
    random = np.random.default_rng(3)
    values = {
        "fixed": pa.array(list(random.random((rows, 32)).astype(np.float32)), pa.list_(pa.float32())),
        "loose": pa.array([list(range(length)) for length in random.integers(0, 30, rows)], pa.list_(pa.int64())),
    }
    return pa.table(columns(rows, 3) | values), {"fixed": "list<float32,32>", "loose": "list<int64>"}


def counts(rows: int) -> tuple[pa.Table, dict[str, str]]:
    """Few and short: a hash of them is packed by default."""
    random = np.random.default_rng(4)
    values = {name: pa.array(random.integers(0, 1_000, rows)) for name in ("orders", "days")}
    return pa.table(columns(rows, 4) | values), dict.fromkeys(values, "int64")


SHAPES: dict[str, Callable[[int], tuple[pa.Table, dict[str, str]]]] = {
    "floats": floats,
    "strings": strings,
    "lists": lists,
    "counts": counts,
}


def filled(table: Table, shape: str, rows: int, ttl: timedelta | None = None) -> Table:
    content, features = SHAPES[shape](rows)
    table.append_table(content)
    table.change_view(features=features, ttl=ttl)
    return table


def laid_out(table: Table, store: OnlineStore, layout: Layout) -> None:
    table.change_view(layout=layout)
    store.hashed = frozenset({table.view.name} if layout == "hash" else ())


def sized(table: Table, store: OnlineStore, **asked: Any) -> SizingReport:
    return size(table.view, store, "default", Ask(**asked), now=NOW)


@pytest.fixture
def server(server: servers.Server) -> Iterator[servers.Server]:
    """A server of each kind; of Redis one of the test's own, because it gives back what others left while memory is weighed."""
    if server.kind != "redis":
        yield server
        return
    with servers.running("redis") as own:
        yield own


def settled_memory(server: servers.Server) -> int:
    """What a server uses when it has moved its tables, without the buffers of its clients."""
    seen = [0, -1_000_000]
    deadline = time.monotonic() + 20
    while abs(seen[-1] - seen[-2]) > 256:
        assert time.monotonic() < deadline, seen
        time.sleep(0.3)
        told = server.client.info("memory")
        seen.append(told["used_memory"] - told["mem_clients_normal"])
    return seen[-1]


LOADS: list[tuple[str, timedelta | None, Layout]] = [
    ("floats", None, "vector"),
    ("strings", MONTH, "vector"),
    ("lists", None, "vector"),
    ("floats", None, "hash"),
    ("strings", None, "hash"),
    ("counts", MONTH, "hash"),
]


@pytest.mark.parametrize(("shape", "ttl", "layout"), LOADS)
def test_projected_memory_is_what_a_load_takes(
    table: Table, server: servers.Server, shape: str, ttl: timedelta | None, layout: Layout
) -> None:
    filled(table, shape, MANY, ttl)
    with RedisStore(server.url) as store:
        laid_out(table, store, layout)
        report = sized(table, store)
        before = settled_memory(server)

        assert pipeline.incremental(table.view, store, run()).written == MANY

        grown = settled_memory(server) - before
    assert report.entities == MANY
    assert report.measured["memory"] == pytest.approx(grown, rel=NEAR)
    assert report.of_rule_of_thumb == round(
        report.measured["memory"] / rule_of_thumb(MANY, len(table.view.features)), 3
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_projected_memory_is_that_of_each_server_of_a_cluster(
    table: Table, cluster: clusters.Cluster, layout: Layout
) -> None:
    filled(table, "floats", MANY)
    with RedisClusterStore(cluster.url) as store:
        laid_out(table, store, layout)
        report = sized(table, store)
        before = [settled_memory(one) for one in cluster.servers]
        pipeline.incremental(table.view, store, run())
        grown = [settled_memory(one) - had for one, had in zip(cluster.servers, before, strict=True)]

    each = report.measured["per_server"]
    assert report.measured["servers"] == 3
    assert each["entities"] == pytest.approx(MANY / 3, rel=0.001)
    assert [each["memory"]] * 3 == pytest.approx(grown, rel=NEAR)
    assert each["maxmemory"] > each["memory"]
    assert each["ram"] * 0.75 > each["maxmemory"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighing_touches_nothing_of_the_view_and_leaves_nothing(
    table: Table, any_store: OnlineStore, layout: Layout
) -> None:
    filled(table, "strings", 300)
    laid_out(table, any_store, layout)
    pipeline.incremental(table.view, any_store, run())
    held = dict(zip_all(any_store, table.view.name))
    mark = watermark.read_text(any_store, table.view.name)

    report = sized(table, any_store)

    assert dict(zip_all(any_store, table.view.name)) == held
    assert watermark.read_text(any_store, table.view.name) == mark
    assert list(any_store.scan(f"~{table.view.name[1:]}")) == []
    assert report.sample == 300


def zip_all(store: OnlineStore, view: str) -> list[tuple[bytes, bytes]]:
    return [pair for keys, records in store.scan(view) for pair in zip(keys, records, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_that_are_online_are_measured_too(table: Table, server: servers.Server, layout: Layout) -> None:
    filled(table, "floats", 200)
    with RedisStore(server.url) as store:
        laid_out(table, store, layout)
        assert sized(table, store).measured["online_record_bytes"] is None
        pipeline.incremental(table.view, store, run())
        report = sized(table, store)

    keys = server.client.keys("fs:spending:{*")
    truth = sum(server.client.memory_usage(key, samples=0) for key in keys) / len(keys)
    assert report.measured["online_record_bytes"] == pytest.approx(truth, abs=0.1)
    assert report.measured["memory_usage_bytes"] == pytest.approx(truth, rel=NEAR)
    assert {key.split(b":")[1] for key in server.client.keys("*")} == {b"spending"}


def test_hashes_are_packed_or_not_as_the_server_is_set(table: Table, server: servers.Server) -> None:
    filled(table, "floats", 200)
    usual = server.client.config_get("hash-max-listpack-value")["hash-max-listpack-value"]
    with RedisStore(server.url) as store:
        laid_out(table, store, "hash")
        loose = sized(table, store).measured
        server.client.config_set("hash-max-listpack-value", 1_024)
        try:
            pipeline.incremental(table.view, store, run())
            packed = sized(table, store).measured
        finally:
            server.client.config_set("hash-max-listpack-value", usual)

    assert packed["memory_usage_bytes"] == pytest.approx(packed["online_record_bytes"], rel=0.01)
    assert packed["record_bytes"] < 0.7 * loose["record_bytes"]
    assert ("51.0 fields" in loose["how"], " 0.0 fields" in packed["how"]) == (True, True)


def user_of(server: servers.Server, role: str, *, without: str = "") -> str:
    line = acl_line(server.url, role).replace(PLACEHOLDER, ">secret")
    server.client.execute_command(*(word for word in line.split() if word != f"+{without}"))
    return server.url.replace("redis://", f"redis://materialize-{role}:secret@")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_user_of_runs_may_weigh(table: Table, server: servers.Server, layout: Layout) -> None:
    filled(table, "floats", 100, MONTH)
    with RedisStore(user_of(server, "run")) as store:
        laid_out(table, store, layout)
        report = sized(table, store)

    assert report.measured["memory_usage_bytes"] > 400
    assert server.client.keys() == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_user_of_runs_may_weigh_in_a_cluster(table: Table, cluster: clusters.Cluster, layout: Layout) -> None:
    filled(table, "floats", 100, MONTH)
    line = acl_line(cluster.url, "run").replace(PLACEHOLDER, ">secret")
    for one in cluster.servers:
        one.client.execute_command(*line.split())
    url = cluster.url.replace("redis+cluster://", "redis+cluster://materialize-run:secret@")

    with RedisClusterStore(url) as store:
        laid_out(table, store, layout)
        report = sized(table, store)

    for one in cluster.servers:
        one.client.execute_command("ACL", "DELUSER", "materialize-run")
    assert report.measured["how"].startswith("MEMORY USAGE")
    assert report.measured["memory_usage_bytes"] > 400
    assert cluster.names() == set()


def test_large_records_are_weighed_few_at_a_time(table: Table, valkey: servers.Server) -> None:
    table.append(*(row(f"u{number}", number, country="x" * 100_000) for number in range(9)))
    with RedisStore(valkey.url) as store:
        valkey.client.config_resetstat()
        report = sized(table, store)

    assert report.measured["memory_usage_bytes"] > 100_000
    assert valkey.client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 5


@pytest.mark.parametrize("role", ["read", "verify"])
def test_who_may_not_weigh_gets_an_estimate_that_says_so(table: Table, server: servers.Server, role: str) -> None:
    filled(table, "floats", 100)
    with RedisStore(server.url) as store:
        truth = sized(table, store).measured["record_bytes"]
    with RedisStore(user_of(server, role)) as store:
        report = sized(table, store)

    assert "not measured" in report.measured["how"]
    assert "secret" not in report.measured["how"]
    assert report.measured["record_bytes"] == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("shape", ["floats", "strings", "counts"])
def test_an_estimate_of_hashes_counts_their_texts_and_names(table: Table, server: servers.Server, shape: str) -> None:
    filled(table, shape, 200)
    with RedisStore(server.url) as store:
        laid_out(table, store, "hash")
        truth = sized(table, store).measured["record_bytes"]
    with RedisStore(user_of(server, "run", without="memory|usage")) as store:
        laid_out(table, store, "hash")
        near = sized(table, store).measured
    with RedisStore(user_of(server, "read")) as store:
        laid_out(table, store, "hash")
        blind = sized(table, store).measured

    assert ("not measured" in near["how"], "not measured" in blind["how"]) == (True, True)
    assert near["record_bytes"] == pytest.approx(truth, rel=0.25)
    assert blind["record_bytes"] > 0.85 * truth


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_server_gets_an_estimate_and_no_keys(table: Table, server: servers.Server, layout: Layout) -> None:
    filled(table, "floats", 100)
    server.client.config_set("maxmemory", 1)
    try:
        with RedisStore(server.url) as store:
            laid_out(table, store, layout)
            report = sized(table, store)
    finally:
        server.client.config_set("maxmemory", 0)

    assert "not measured" in report.measured["how"]
    assert server.client.keys() == []


@pytest.mark.parametrize(
    ("layout", "without"),
    [("vector", "memory|usage"), *(("hash", one) for one in ("memory|usage", "object|encoding", "pexpireat", "set"))],
)
def test_a_script_that_fails_half_way_removes_what_it_wrote(
    table: Table, server: servers.Server, layout: Layout, without: str
) -> None:
    """The user may store, and lacks a right of what comes after."""
    filled(table, "floats", 100, MONTH)
    with RedisStore(user_of(server, "run", without=without)) as store:
        laid_out(table, store, layout)
        report = sized(table, store)

    assert "not measured" in report.measured["how"]
    assert server.client.keys() == []


def test_a_store_that_is_down_is_told(table: Table) -> None:
    filled(table, "floats", 10)
    with RedisStore("redis://127.0.0.1:1/0?timeout=0.2&deadline=0.2") as store, pytest.raises(UnavailableError):
        sized(table, store)


def test_a_table_without_a_row_to_weigh_is_told(table: Table, store: OnlineStore) -> None:
    table.append(row(None, 1))
    with pytest.raises(OfflineStoreError, match="found no row at version 0"):
        sized(table, store)
    table.append(row("a", 1))
    table.change_view(ttl=timedelta(minutes=1))
    with pytest.raises(OfflineStoreError, match="not expired"):
        sized(table, store)


def test_tables_grow_by_doubling() -> None:
    redis, valkey = {"redis_version": "7.0.15"}, {"server_name": "valkey", "valkey_version": "9.1.2"}

    assert [table_bytes(redis, keys, expires=False) for keys in (4, 5, 20_000, 32_768, 32_769)] == [
        32,
        64,
        262_144,
        262_144,
        524_288,
    ]
    assert table_bytes(redis, 20_000, expires=True) == 524_288
    # MEMORY STATS of a Valkey 9.1.2 with 20,000 keys: 295,072
    assert table_bytes(valkey, 20_000, expires=False) == pytest.approx(295_072, rel=0.01)


def test_sqlite_tells_the_bytes_of_its_file(table: Table, tmp_path: Path) -> None:
    filled(table, "floats", 5_000)
    path = tmp_path / "online.db"
    with SqliteStore(f"sqlite:///{path}") as store:
        report = sized(table, store, entities=5_000)
        pipeline.incremental(table.view, store, run())

    assert report.measured["file"] == pytest.approx(path.stat().st_size, rel=NEAR)


def test_memory_store_has_no_size(table: Table, store: OnlineStore) -> None:
    filled(table, "floats", 10)
    report = sized(table, store)
    assert (report.measured["sizing"][:13], report.of_rule_of_thumb) == ("not available", None)


# --- DynamoDB ----------------------------------------------------------------------------------------------------------


class Catching(MemoryStore):
    """Keeps the sample that it is given."""

    sample: EncodedBatch | None = None

    def size(self, view: Any, sample: EncodedBatch, demand: Demand) -> dict[str, Any]:  # noqa: ARG002
        self.sample = sample
        return {}


@pytest.mark.parametrize("shared", [False, True])
def test_item_sizes_are_those_that_dynamodb_bills(
    table: Table, dynamodb_local: dynamodb.DynamoDbLocal, *, shared: bool
) -> None:
    """Items around the limit of one write unit: only a rule that is right to the byte or two tells all of them."""
    dynamodb_local.drop_tables()
    table.append(*(row(f"u{number}", number, 0.5, country="x" * (860 + number)) for number in range(130)))
    table.change_view(ttl=timedelta(days=10_000))
    caught = Catching()
    sized(table, caught)
    assert caught.sample is not None
    expected = dict(
        zip(
            caught.sample.keys.to_pylist(),
            item_sizes(caught.sample, shared_view="spending" if shared else None, expires=True).tolist(),
            strict=True,
        )
    )
    query = f"endpoint_url={dynamodb_local.endpoint}&table={'shared' if shared else 'per_view'}"
    with DynamoDbStore(f"dynamodb://{dynamodb.KEY}:{dynamodb.SECRET}@{dynamodb.REGION}/fs?{query}") as store:
        store.setup("spending")
        pipeline.rebuild(table.view, store, run())
        name = store.address.table("spending")

    told = {}
    for item in dynamodb_local.items(name):
        if not item["k"]["S"].startswith("{"):
            answer = dynamodb_local.client.put_item(TableName=name, Item=item, ReturnConsumedCapacity="TOTAL")
            told[item["k"]["S"].encode()] = answer["ConsumedCapacity"]["CapacityUnits"]

    assert set(told.values()) == {1.0, 2.0}
    wrong = [expected[key] for key, units in told.items() if units != -(-expected[key] // 1024)]
    assert all(abs(size - 1024) <= 2 for size in wrong), wrong


def test_dynamodb_without_prices_tells_units_only(table: Table) -> None:
    filled(table, "floats", 100)
    with DynamoDbStore("dynamodb://a:b@eu-central-1/fs") as store:
        report = sized(table, store, entities=100_000_000, changes_per_day=1_000_000, reads_per_second=10.0)

    measured = report.measured
    assert measured["first_load_write_units"] == 100_000_000
    assert measured["day_write_units"] == 1_000_000
    assert measured["month_read_units"] == {"eventual": 13_140_000, "strong": 26_280_000}
    assert measured["storage_gigabytes"] == pytest.approx(0.1 * (measured["item_bytes"] + 100), rel=0.001)
    assert measured["cost"].startswith("units only")
    assert report.compared["comparison"].startswith("none")


def test_dynamodb_with_prices_tells_money_and_where_redis_is_cheaper(table: Table) -> None:
    filled(table, "floats", 100)
    with DynamoDbStore("dynamodb://a:b@eu-central-1/fs", prices=PRICES) as store:
        report = sized(table, store, entities=1_000_000, changes_per_day=1_000_000, node_price=100.0, prices=PRICES)

    cost, compared = report.measured["cost"], report.compared
    assert (cost["first_load"], cost["day_of_writes"]) == (1.0, 1.0)
    assert cost["month_of_reads"] == {"eventual": 65.7, "strong": 131.4}  # 100 reads/s x 2,628,000 s
    assert "not measured" in compared["server_memory_is"]
    fixed = 730 / 24 + cost["month_of_storage"]
    assert compared["break_even_reads_per_second"] == pytest.approx((100 - fixed) / 0.657, abs=0.2)
    assert {line["reads_per_second"]: line["cheaper"] for line in compared["dynamodb_month"]} == {
        10: "dynamodb",
        100: "dynamodb",
        1_000: "redis",
        10_000: "redis",
    }


def test_items_are_rounded_up_one_by_one() -> None:
    items = Items.of(np.array([100, 1_024, 1_025, 4_097]))
    assert (items.write_units, items.read_units) == (9 / 4, 5 / 4)


# --- how many ----------------------------------------------------------------------------------------------------------


def test_changes_of_a_day_are_measured_from_the_log(table: Table, store: OnlineStore) -> None:
    now_us = to_us(NOW)
    for number, hours in enumerate((240, 48, 24, 12)):
        table.append(*(row(f"u{user}", number) for user in range(4)))
        path = table.log_file(number)
        actions = table.actions(number)
        for action in actions:
            if "commitInfo" in action:
                action["commitInfo"] |= {"timestamp": (now_us - hours * 3_600_000_000) // 1_000, "who": "nightly"}
        path.write_text("".join(json.dumps(action) + "\n" for action in actions))

    report = sized(table, store)

    # 8 rows after the oldest commit of the last seven days, in two days
    assert (report.changes_per_day, report.entities) == (4, 4)
    told = list(newest_commits(open_table(table.view), since_us=0, most=3))
    assert [(one.version, one.operation, one.rows) for one in told] == [
        (3, "WRITE", 4),
        (2, "WRITE", 4),
        (1, "WRITE", 4),
    ]
    assert told[0].noted == {"who": "nightly"}


def test_changes_are_unknown_where_the_log_is_young(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    report = size(table.view, store, "default", Ask(), now=NOW)
    assert (report.changes_per_day, report.changes_are[:7]) == (None, "unknown")


def test_a_sample_from_several_blocks_of_a_file(table: Table, store: OnlineStore) -> None:
    """A block has 1,024 rows of features that are so wide."""
    nothing = pa.nulls(2_500, pa.list_(pa.float64()))
    numbers = pa.array(np.arange(2_500.0))
    table.append_table(pa.table(columns(2_500, 4) | {"wide": nothing, "number": numbers}))
    table.change_view(features={"wide": "list<float64,8192>", "number": "float64"})

    assert sized(table, store).sample == 1_000


def test_only_the_latest_rows_are_weighed(table: Table) -> None:
    table.append(row("a", 1, country="x" * 500), row("b", 1))
    table.append(row("a", 2, country=""))
    caught = Catching()

    report = sized(table, caught)

    assert (report.sample, report.entities) == (2, 2)
    assert caught.sample is not None
    assert max(len(value) for value in caught.sample.values.to_pylist()) < 100


# --- the command -------------------------------------------------------------------------------------------------------


def test_command_prints_facts_for_people_and_json(tmp_path: Path, valkey: servers.Server) -> None:
    project = Project(tmp_path, valkey.url)
    project.table.append(*(row(f"u{number}", PAST + number) for number in range(200)))

    (found,) = project.json("plan", "--sizing", "--entities", "100000000")
    told = project.run("plan", "--sizing", "--entities", "100000000")

    assert (found["view"], found["store"], found["entities"]) == ("spending", "default", 100_000_000)
    assert found["rule_of_thumb"] == 100_000_000 * 3 * 24
    assert "entities: 100,000,000 (given)" in told.stdout
    assert "maxmemory:" in told.stdout
    assert "6.71 GiB for 3 features x 16 B x 1.5; measured is" in told.stdout
    assert valkey.client.keys() == []


def test_options_of_sizing_alone_are_a_usage_error(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    ended = project.run("plan", "--entities", "5")
    assert (ended.returncode, "--sizing" in ended.stderr) == (2, True)
