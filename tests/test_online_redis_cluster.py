"""A cluster keeps the contract, also while slots move, servers fail and a batch meets what passes by itself."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from redis import exceptions as driver
from redis.crc import key_slot

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.evidence import Verdict, during_run, position
from materialize.online.base import HEADER
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.online.redis.slots import entity_slots, slot_tags
from materialize.order import STALE, UNCHANGED, WRITTEN
from materialize.testing import FOREVER, OnlineStoreContract, Row, content, make_batch
from tests import cluster as clusters
from tests.cluster import SLOTS, Cluster, wait_until
from tests.stepping import amounts, expected_amounts, incremental, vectors
from tests.tables import Table, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.server

KEYS = [b"%d" % number for number in range(3_000)]


def write(store: RedisClusterStore, *rows: Row, tie_wins: bool = True) -> list[int]:
    outcomes: list[int] = store.merge("view", make_batch(rows), tie_wins=tie_wins, retention=FOREVER).tolist()
    return outcomes


def slot_of(key: bytes) -> int:
    return int(key_slot(b"fs:view:{%b}" % key))


@contextmanager
def after(seconds: float, happening: Callable[[], object]) -> Iterator[None]:
    """*happening* takes place in that time, in a thread that has ended when the block has."""
    timer = threading.Timer(seconds, happening)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.fixture(scope="module")
def larger_cluster() -> Iterator[Cluster]:
    """A cluster of its own, with a server that has no slots yet."""
    with clusters.running(spare=1) as cluster:
        yield cluster


class TestRedisClusterStore(OnlineStoreContract):
    @pytest.fixture
    def store(self, cluster: Cluster) -> Iterator[RedisClusterStore]:
        with RedisClusterStore(cluster.url) as store:
            yield store

    def test_records_and_cells_have_the_documented_keys(self, store: RedisClusterStore, cluster: Cluster) -> None:
        write(store, Row(b"a|b"))
        store.compare_and_set_cell("view", "watermark", None, b"{}")

        assert cluster.names() == {b"fs:view:watermark", b"fs:view:{a|b}"}

    def test_a_batch_of_50_000_rows_maps_every_reply_to_its_row(self, store: RedisClusterStore) -> None:
        rows = [Row(b"%d" % number, 10, payload=b"%d" % number) for number in range(50_000)]
        write(store, *rows[::3])

        outcomes = write(store, *(row._replace(event_us=9 + number % 3) for number, row in enumerate(rows)))

        assert outcomes == [WRITTEN if number % 3 else STALE for number in range(50_000)]
        records = store.read("view", [row.key for row in rows])
        assert [record[HEADER.size :] for record in records if record] == [row.payload for row in rows]
        assert sum(len(keys) for keys, _ in store.scan("view")) == 50_000

    def test_several_views_are_read_at_once(self, store: RedisClusterStore) -> None:
        for view in ("one", "two"):
            store.merge(view, make_batch([Row(b"a", payload=view.encode())]), tie_wins=True, retention=FOREVER)

        found = store.read_views({"one": [b"a", b"b"], "two": [b"b", b"a"]})

        assert [record and record[HEADER.size :] for record in found["one"]] == [b"one", None]
        assert [record and record[HEADER.size :] for record in found["two"]] == [None, b"two"]

    def test_what_is_no_record_is_left_alone_and_told(self, store: RedisClusterStore, cluster: Cluster) -> None:
        cluster.owner_of(slot_of(b"b")).client.hset("fs:view:{b}", "field", "theirs")
        cluster.owner_of(slot_of(b"c")).client.set("fs:view:{c}", "theirs")

        with pytest.raises(OnlineStoreError, match="found 2 keys below fs:view:"):
            write(store, *map(Row, (b"a", b"b", b"c", b"d")))

        assert store.read("view", [b"b"]) == [None]
        assert {b"a", b"d"} <= set(content(store))

    def test_every_primary_tells_where_writes_ended(self, store: RedisClusterStore, cluster: Cluster) -> None:
        write(store, *map(Row, KEYS))

        ended = store.positions()

        facts = store.evidence() or {}
        assert set(ended) == {position(one.run_id, one.replid) for one in facts.values()}
        assert set(facts) == {f"127.0.0.1:{one.port}" for one in cluster.servers}
        assert during_run(facts, facts, ended) == Verdict()
        assert during_run(
            facts, {node: replace(one, run_id="other", replid="") for node, one in facts.items()}, ended
        ).lost
        assert store.positions() == {}

    def test_copies_are_on_every_primary(self, store: RedisClusterStore, cluster: Cluster) -> None:
        assert set(store.read_copies("view", "watermark")) == {None}

        store.compare_and_set_cell("view", "watermark", None, b"1")
        store.write_copies("view", "watermark", b"1")

        assert store.read_copies("view", "watermark") == [b"1"] * (1 + SLOTS // 128)
        assert all(one.client.dbsize() > 40 for one in cluster.servers)
        cluster.servers[2].client.flushall()
        assert set(store.read_copies("view", "watermark")) == {b"1", None}


def test_slots_are_those_of_the_driver() -> None:
    keys = [b"", b"a", b"}", b"a}b", b"a{b", b"x" * 2_048, *(b"key%d" % number for number in range(3_000))]

    assert entity_slots(pa.array(keys, pa.binary()), "fs:v").tolist() == [key_slot(b"fs:v:{%b}" % key) for key in keys]
    assert [key_slot(b"any:{%b}" % tag) for tag in slot_tags()] == list(range(SLOTS))


# --- slots on their way ---


def test_a_half_moved_slot_takes_and_gives_all_rows(larger_cluster: Cluster) -> None:
    cluster = larger_cluster
    target = cluster.servers[3]
    slots = sorted({slot_of(key) for key in KEYS[:40]})
    slots += [int(key_slot(b"fs:view:watermark")), 128]
    cluster.flush()
    with RedisClusterStore(cluster.url) as store:
        write(store, *map(Row, KEYS[:1_000]))
        opened = [(slot, cluster.open_slot(slot, target)) for slot in slots]
        for slot, source in opened[::2]:
            cluster.move_keys(slot, source, target)

        outcomes = write(store, *(Row(key, 2) for key in KEYS))
        assert outcomes == [WRITTEN] * len(KEYS)
        assert None not in store.read("view", KEYS)
        assert set(content(store)) == set(KEYS)
        assert store.compare_and_set_cell("view", "watermark", None, b"1")
        assert not store.compare_and_set_cell("view", "watermark", None, b"2")
        store.write_copies("view", "watermark", b"1")
        assert set(store.read_copies("view", "watermark")) == {b"1"}
        assert target.client.info("commandstats")["cmdstat_asking"]["calls"] > 0

        for slot, source in opened:
            while cluster.move_keys(slot, source, target):
                pass
            cluster.close_slot(slot, source, target)
        cluster.agree()
        assert write(store, *(Row(key, 2) for key in KEYS)) == [UNCHANGED] * len(KEYS)
        assert set(content(store)) == set(KEYS)
        assert set(store.read_copies("view", "watermark")) == {b"1"}
        assert len(store.evidence() or {}) == 4


def test_keys_of_half_moved_slots_become_hashes_and_strings_again(larger_cluster: Cluster) -> None:
    cluster = larger_cluster
    target = cluster.servers[3]
    cluster.flush()
    slots = sorted({slot_of(key) for key in KEYS[100:140]})
    with RedisClusterStore(cluster.url) as store:
        write(store, *map(Row, KEYS[:1_000]))
        opened = [(slot, cluster.open_slot(slot, target)) for slot in slots if cluster.owner_of(slot) is not target]
        for slot, source in opened[::2]:
            cluster.move_keys(slot, source, target)

        for event, hashed in ((2, {"view"}), (3, set[str]()), (4, {"view"})):
            store.hashed = frozenset(hashed)
            assert write(store, *(Row(key, event) for key in KEYS)) == [WRITTEN] * len(KEYS)
            assert None not in store.read("view", KEYS)
            assert set(content(store)) == set(KEYS)

        for slot, source in opened:
            while cluster.move_keys(slot, source, target):
                pass
            cluster.close_slot(slot, source, target)
        cluster.agree()
        assert set(content(store)) == set(KEYS)
        kinds = {one.client.type(name) for one in cluster.primaries() for name in one.client.scan_iter("*:view:{*")}
        assert kinds == {b"hash"}


def test_a_scan_that_slots_overtake_meets_every_key(larger_cluster: Cluster) -> None:
    cluster = larger_cluster
    cluster.flush()
    cluster.agree()
    with RedisClusterStore(cluster.url) as store:
        write(store, *map(Row, KEYS))
        scan, found, owners = store.scan("view"), set[bytes](), list[clusters.servers.Server]()
        for keys, _ in scan:
            found |= set(keys)
            if (owner := cluster.owner_of(slot_of(keys[0]))) not in owners:
                owners.append(owner)
            if len(owners) == 2:
                break  # the first server is done
        first = owners[0]
        last = next(one for one in cluster.primaries() if one not in owners and one.client.dbsize() > 500)
        mine = [slot for slot in sorted({slot_of(key) for key in KEYS}) if cluster.owns(last, slot)]
        for slot in mine[:60]:
            cluster.open_slot(slot, first)
            while cluster.move_keys(slot, last, first):
                pass
            cluster.close_slot(slot, last, first)

        assert found | {key for keys, _ in scan for key in keys} == set(KEYS)


# --- what passes by itself ---


def test_a_cluster_that_is_down_is_waited_for(cluster: Cluster) -> None:
    slot, owner = slot_of(b"k"), cluster.owner_of(slot_of(b"k"))
    with RedisClusterStore(cluster.url) as store, RedisClusterStore(f"{cluster.url}?deadline=0.2&timeout=0.2") as hasty:
        for one in cluster.servers:
            clusters.call(one, "DELSLOTS", slot)
        try:
            with pytest.raises(UnavailableError, match=r"cluster is down|slot .*still so after 0\.\d s"):
                write(hasty, *map(Row, KEYS))
            with pytest.raises(UnavailableError, match="still so after"):
                hasty.read("view", [b"k"])
        finally:
            with after(0.5, lambda: clusters.call(owner, "ADDSLOTS", slot)):
                outcomes = write(store, *map(Row, [*KEYS, b"k"]))
        cluster.agree()

        assert set(outcomes) <= {WRITTEN, UNCHANGED}
        assert set(content(store)) == {*KEYS, b"k"}


def test_a_long_script_is_waited_for(cluster: Cluster) -> None:
    owner = cluster.owner_of(slot_of(b"k"))
    owner.client.config_set("busy-reply-threshold", 20)
    script = "local t = redis.call('TIME')[1]; while redis.call('TIME')[1] - t < 30 do end"
    blocker = threading.Thread(target=lambda: _ignoring(lambda: owner.client.eval(script, 0)))
    with RedisClusterStore(cluster.url) as store, RedisClusterStore(f"{cluster.url}?deadline=0.2") as hasty:
        write(store, Row(b"k"))
        write(hasty, Row(b"k"))
        blocker.start()
        wait_until(lambda: _busy(owner), "the server is busy")
        with pytest.raises(UnavailableError, match="BUSY"):
            write(hasty, Row(b"k", 2))

        with after(0.4, owner.client.script_kill):
            assert write(store, Row(b"k", 2)) == [WRITTEN]
    blocker.join()


def _ignoring(call: Callable[[], object]) -> None:
    with suppress(driver.RedisError):  # the script is killed
        call()


def _busy(server: clusters.servers.Server) -> bool:
    try:
        server.client.get("fs:view:{k}")
    except driver.ResponseError as error:
        return "BUSY" in str(error)
    return False


def test_flushed_scripts_and_killed_connections_are_made_again(cluster: Cluster) -> None:
    with RedisClusterStore(cluster.url) as store:
        write(store, *map(Row, KEYS))
        for one in cluster.servers:
            one.client.script_flush()
            one.client.client_kill_filter(_type="normal", skipme=True)

        assert set(write(store, *(Row(key, 2) for key in KEYS))) == {WRITTEN}
        for one in cluster.servers:
            one.client.client_kill_filter(_type="normal", skipme=True)
        assert None not in store.read("view", KEYS)


def test_no_server_is_unavailable_at_once() -> None:
    ports = [clusters.servers.free_port() for _ in range(2)]
    started = time.monotonic()
    with RedisClusterStore(f"redis+cluster://user:pw@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}") as store:
        for call in (
            lambda: write(store, Row(b"k")),
            lambda: store.read("view", [b"k"]),
            lambda: list(store.scan("view")),
            lambda: store.read_cell("view", "watermark"),
            lambda: store.compare_and_set_cell("view", "watermark", None, b"1"),
            store.describe,
        ):
            with pytest.raises(UnavailableError, match=r"redis\+cluster://\*\*\*@127\.0\.0\.1"):
                call()
    assert time.monotonic() - started < 10


def test_a_server_of_a_cluster_is_told_to_whom_takes_it_for_a_single_one(cluster: Cluster) -> None:
    with RedisStore(cluster.servers[0].url) as store:
        for call in (
            lambda: store.merge("view", make_batch([*map(Row, KEYS)]), tie_wins=True, retention=FOREVER),
            lambda: store.read("view", KEYS),
            lambda: [store.read_cell("view", f"cell{number}") for number in range(20)],
        ):
            with pytest.raises(OnlineStoreError, match=r"Use redis\+cluster://") as caught:
                call()
            assert not isinstance(caught.value, UnavailableError)


def test_a_server_that_is_no_cluster_is_told(valkey: clusters.servers.Server) -> None:
    with RedisClusterStore(f"redis+cluster://127.0.0.1:{valkey.port}") as store:
        with pytest.raises(OnlineStoreError, match="cluster support disabled") as caught:
            write(store, Row(b"k"))
        assert not isinstance(caught.value, UnavailableError)


# --- servers that fail ---


@pytest.mark.e2e
def test_a_primary_that_dies_is_replaced_and_nothing_of_the_batch_is_missing(table: Table) -> None:
    with (
        clusters.running(replicas=1) as cluster,
        RedisClusterStore(f"{cluster.url}?replicas=0") as store,
    ):
        table.append(*(row(f"user{user}", user / 100, user) for user in range(2_000)))
        incremental(table, store, "first")
        table.append(*(row(f"user{user}", 50 + user / 100, user + 1) for user in range(2_000)))
        primary, replica = cluster.servers[0], cluster.servers[3]
        clusters.wait_until(lambda: replica.client.dbsize() == primary.client.dbsize(), "the replica has all")
        primary.process.kill()

        report = incremental(table, store, "second")

        assert report.to_version == table.version
        assert "failed over" in report.reason
        assert replica.client.info("replication")["role"] == "master"
        assert amounts(table, store) == expected_amounts(table)
        assert incremental(table, store, "third").written == 0


def test_one_primary_that_is_wiped_is_noticed_and_repaired(cluster: Cluster, table: Table) -> None:
    with RedisClusterStore(cluster.url) as store:
        table.append(*(row(f"user{user}", user / 100, user) for user in range(900)))
        incremental(table, store, "first")
        before = incremental(table, store, "nothing new")
        assert (before.written, before.reason) == (0, f"from the watermark at version {table.version}")
        for number, one in enumerate(cluster.servers):
            table.append(row("new", 100 + number, number))
            one.client.flushall()

            report = incremental(table, store, f"after {number}")

            assert "wiped" in report.reason, report.reason
            assert report.written >= 250
            assert amounts(table, store) == expected_amounts(table)
            assert incremental(table, store, f"again {number}").written == 0


def test_features_are_served_from_a_cluster(cluster: Cluster, table: Table) -> None:
    table.append(*(row(f"user{user}", user / 100, user) for user in range(200)))
    with RedisClusterStore(cluster.url) as store:
        incremental(table, store)

        found = vectors(table.view, store, [f"user{user}" for user in (0, 7, 199)] + ["nobody"], ["amount"])

    assert [vector.features for vector in found[:3]] == [{"amount": 0.0}, {"amount": 7.0}, {"amount": 199.0}]
    assert found[3].status == "missing"
