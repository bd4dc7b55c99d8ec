"""Reads of replicas: spread over them, never denied by one that lacks a record, and answered by the primary where none answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.model import OnlineStoreConfig
from materialize.online import open_async_reader, open_reader
from materialize.online.reading import ReadTerms
from materialize.online.redis.acl import PLACEHOLDER, acl_line
from materialize.online.redis.slots import slot_of
from tests import cluster as clusters, servers
from tests.cluster import Cluster, wait_until
from tests.test_online_redis_secure import sentinel_of
from tests.test_reading import LATE, calls, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from materialize.online.base import OnlineStore
    from materialize.online.reading import AsyncReader

    Opened = Callable[[str, ReadTerms], AbstractContextManager[OnlineStore | "Waited"]]

pytestmark = pytest.mark.server

TERMS = ReadTerms(read=0.1, deadline=0.25, replicas=True)
PRIMARY = ReadTerms(read=0.1, deadline=0.25)
KEYS = [b"%d" % number for number in range(300)]
PASSWORD = "s3cret-p4ss"


class Waited:
    """A reader for asyncio, waited for."""

    def __init__(self, reader: AsyncReader) -> None:
        self.reader, self.loop = reader, asyncio.new_event_loop()

    def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        return self.loop.run_until_complete(self.reader.read_views(keys))

    def read_cell(self, view: str, name: str) -> bytes | None:
        return self.loop.run_until_complete(self.reader.read_cell(view, name))

    def close(self) -> None:
        self.loop.run_until_complete(self.reader.close())
        self.loop.close()


@pytest.fixture(params=["threads", "asyncio"])
def opened(request: pytest.FixtureRequest) -> Opened:
    """What opens a reader, of either kind."""

    @contextmanager
    def reader(url: str, terms: ReadTerms) -> Iterator[OnlineStore | Waited]:
        config = OnlineStoreConfig("default", url)
        found = open_reader(config, terms) if request.param == "threads" else Waited(open_async_reader(config, terms))
        try:
            yield found
        finally:
            found.close()

    return reader


def read(reader: OnlineStore | Waited, *keys: bytes, within: float = TERMS.deadline) -> list[bytes | None]:
    began = time.monotonic()
    found = reader.read_views({"view": keys})["view"]
    assert time.monotonic() - began < within + LATE
    return found


def answers(reader: OnlineStore | Waited, key: bytes) -> bool:
    try:
        return reader.read_views({"view": [key]}) == {"view": [record("view", key)]}
    except UnavailableError:
        return False


def fill(client: redis.Redis, keys: Sequence[bytes]) -> None:
    for key in keys:
        client.set(b"fs:view:{%b}" % key, record("view", key))


@contextmanager
def standing_still(server: servers.Server) -> Iterator[None]:
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


# --- Sentinel ---


@contextmanager
def watched(kind: str, folder: Path) -> Iterator[tuple[servers.Server, servers.Server, str]]:
    """A primary with records, its replica, and the URL of their sentinels, of which one is gone."""
    if servers.binary(kind) is None:
        pytest.skip(f"no {kind}")
    with (
        servers.running(kind, "--repl-diskless-sync-delay", "0") as primary,
        servers.running(kind, "--replicaof", f"127.0.0.1 {primary.port}") as replica,
    ):
        wait_until(lambda: replica.client.info("replication").get("master_link_status") == "up", "the replica is up")
        fill(primary.client, KEYS)
        primary.client.wait(1, 5_000)
        with sentinel_of(kind, primary, folder) as port:
            sentinel = redis.Redis(port=port, protocol=2)
            sentinel.execute_command("SENTINEL", "DEBUG", "info-period", "100")  # ms; it asks each 10 s otherwise
            wait_until(
                lambda: [one["master-link-status"] for one in sentinel.sentinel_slaves("cache")] == ["ok"],
                "the sentinel knows that the replica is well",
            )
            sentinel.close()
            yield primary, replica, f"redis+sentinel://127.0.0.1:{servers.free_port()},127.0.0.1:{port}?service=cache"


@pytest.mark.parametrize("kind", servers.KINDS)
def test_a_replica_is_read_and_what_it_lacks_is_asked_of_the_primary(kind: str, tmp_path: Path, opened: Opened) -> None:
    with watched(kind, tmp_path) as (primary, replica, url):
        with opened(url, TERMS) as reader:
            primary.client.config_resetstat()
            replica.client.config_resetstat()
            for key in KEYS[:20]:
                assert read(reader, key) == [record("view", key)]
            assert (calls(primary), calls(replica)) == ({}, {"get": 20})

            assert read(reader, *KEYS, b"absent") == [*(record("view", key) for key in KEYS), None]
            assert (calls(primary), calls(replica)) == ({"hget": 1}, {"get": 20, "mget": 1})

            reader.read_cell("view", "schemas")
            assert calls(primary) == {"get": 1, "hget": 1}

            with standing_still(replica):
                began = time.monotonic()
                for key in KEYS[:20]:
                    assert read(reader, key) == [record("view", key)]
                assert time.monotonic() - began < 5 * TERMS.read  # it is left alone then
            replica.process.kill()
            replica.process.wait()
            for key in KEYS[:5]:
                assert read(reader, key) == [record("view", key)]

        with opened(url, PRIMARY) as reader:
            assert read(reader, *KEYS) == [record("view", key) for key in KEYS]


def test_a_failover_by_sentinels_is_followed(tmp_path: Path, opened: Opened) -> None:
    with watched("valkey", tmp_path) as (primary, replica, url), opened(url, PRIMARY) as reader:
        assert read(reader, KEYS[0]) == [record("view", KEYS[0])]
        with opened(url, TERMS) as reader_of_replicas:
            assert read(reader_of_replicas, KEYS[0]) == [record("view", KEYS[0])]
            primary.process.kill()
            primary.process.wait()

            for key in KEYS[:20]:  # while there is no primary
                assert read(reader_of_replicas, key) == [record("view", key)]
            assert read(reader_of_replicas, KEYS[0], b"absent") == [record("view", KEYS[0]), None]
            with pytest.raises(UnavailableError):
                read(reader, KEYS[0])
            wait_until(lambda: replica.client.info("replication")["role"] == "master", "the replica is the primary")
            wait_until(lambda: answers(reader, KEYS[0]), "the new primary is found", 2)

            for key in KEYS:
                assert read(reader, key) == [record("view", key)]


def test_a_primary_that_is_made_a_replica_is_left(tmp_path: Path, opened: Opened) -> None:
    """It goes on to answer reads, with what it had. It closes its connections, and so is asked for anew."""
    with watched("valkey", tmp_path) as (primary, replica, url), opened(url, PRIMARY) as reader:
        assert read(reader, KEYS[0]) == [record("view", KEYS[0])]
        sentinel = redis.Redis(port=int(url.partition("?")[0].rpartition(":")[2]), protocol=2)
        sentinel.execute_command("SENTINEL", "FAILOVER", "cache")
        wait_until(
            lambda: sentinel.sentinel_get_master_addr_by_name("cache")[1] == replica.port, "the other is the primary"
        )
        sentinel.close()
        # As the sentinel does it, which waits for eight seconds before.
        primary.client.execute_command("REPLICAOF", "127.0.0.1", replica.port)
        primary.client.client_kill_filter(_type="normal", skipme=True)
        primary.client.config_resetstat()

        for key in KEYS:
            assert answers(reader, key)

        assert calls(primary) == {}


def test_no_sentinel_is_told_within_the_deadline(opened: Opened) -> None:
    url = f"redis+sentinel://127.0.0.1:{servers.free_port()},127.0.0.1:{servers.free_port()}?service=cache"
    with opened(url, TERMS) as reader, pytest.raises(UnavailableError, match="still so after 0"):
        read(reader, KEYS[0])


# --- a cluster ---


@pytest.fixture(scope="module")
def mirrored() -> Iterator[Cluster]:
    """A cluster whose first primary has a replica, the fourth server."""
    with clusters.running(replicas=1) as cluster:
        # They hear of each other by and by that a replica has something.
        wait_until(
            lambda: all(any(len(line) > 3 for line in clusters.call(one, "SLOTS")) for one in cluster.servers),
            "all servers tell of the replica",
        )
        yield cluster


@pytest.fixture
def first(mirrored: Cluster) -> Iterator[list[bytes]]:
    """The keys that the first primary and its replica have. All keys are there."""
    mirrored.flush()
    own: list[bytes] = []
    for key in KEYS:
        server = mirrored.owner_of(slot_of(b"fs:view:{%b}" % key))
        fill(server.client, [key])
        own += [key] if server is mirrored.servers[0] else []
    mirrored.servers[0].client.wait(1, 5_000)
    for one in mirrored.servers:
        one.client.config_resetstat()
    yield own
    mirrored.agree()


def test_replicas_of_a_cluster_are_read(mirrored: Cluster, first: list[bytes], opened: Opened) -> None:
    primary, replica = mirrored.servers[0], mirrored.servers[3]
    with opened(mirrored.url, TERMS) as reader:
        assert read(reader, *KEYS) == [record("view", key) for key in KEYS]
        assert calls(primary) == {}
        assert calls(replica) == {"get": len({slot_of(b"fs:view:{%b}" % key) for key in first})}

        fill(primary.client, first[:1])
        replica.client.config_resetstat()
        primary.client.delete(b"fs:view:{%b}" % first[0])
        assert read(reader, *first) == [None, *(record("view", key) for key in first[1:])]
        assert calls(primary) == {"get": 1}

        with standing_still(replica):
            assert read(reader, *KEYS[:100]) == [None if key == first[0] else record("view", key) for key in KEYS[:100]]
    replica.client.config_resetstat()
    with opened(mirrored.url, PRIMARY) as reader:
        assert read(reader, *first[1:]) == [record("view", key) for key in first[1:]]
    assert calls(replica) == {}


def test_a_slot_that_is_half_moved_hides_no_record_behind_a_replica(
    mirrored: Cluster, first: list[bytes], opened: Opened
) -> None:
    """The replica of the server that a slot leaves says of a record that has gone already that there is none."""
    key, source, target = first[0], mirrored.servers[0], mirrored.servers[1]
    slot = slot_of(b"fs:view:{%b}" % key)
    mirrored.open_slot(slot, target)
    try:
        assert mirrored.move_keys(slot, source, target)
        source.client.wait(1, 5_000)
        with opened(mirrored.url, TERMS) as reader:
            assert read(reader, key, *first[:20]) == [record("view", one) for one in [key, *first[:20]]]
    finally:
        mirrored.close_slot(slot, source, target)

    with opened(mirrored.url, TERMS) as reader:
        assert read(reader, key) == [record("view", key)]
    mirrored.open_slot(slot, source)
    mirrored.move_keys(slot, target, source)
    mirrored.close_slot(slot, target, source)


@pytest.mark.parametrize("replicas", [False, True])
def test_a_slot_that_moved_is_followed(mirrored: Cluster, first: list[bytes], opened: Opened, replicas: object) -> None:
    key, source, target = first[1], mirrored.servers[0], mirrored.servers[2]
    slot = slot_of(b"fs:view:{%b}" % key)
    with opened(mirrored.url, ReadTerms(replicas=bool(replicas))) as reader:
        assert read(reader, *KEYS) == [record("view", key) for key in KEYS]
        for one, other in ((source, target), (target, source)):
            mirrored.open_slot(slot, other)
            mirrored.move_keys(slot, one, other)
            mirrored.close_slot(slot, one, other)
            assert read(reader, *KEYS) == [record("view", key) for key in KEYS]


def test_views_of_an_entity_are_one_request_in_a_cluster(mirrored: Cluster, first: list[bytes], opened: Opened) -> None:
    key = first[2]
    primary = mirrored.servers[0]
    primary.client.set(b"fs:other:{%b}" % key, b"other")
    with opened(mirrored.url, PRIMARY) as reader:
        assert reader.read_views({"view": [key], "other": [key]}) == {
            "view": [record("view", key)],
            "other": [b"other"],
        }

    assert calls(primary) == {"mget": 1}


def test_a_reader_with_the_printed_rights_may_read_replicas(
    mirrored: Cluster, first: list[bytes], opened: Opened
) -> None:
    words = acl_line(mirrored.url, "read").replace(PLACEHOLDER, f">{PASSWORD}").split()
    url = mirrored.url.replace("//", f"//materialize-read:{PASSWORD}@")
    try:
        for one in mirrored.servers:
            one.client.execute_command(*words)
        with opened(url, TERMS) as reader:
            assert read(reader, *first) == [record("view", key) for key in first]
        assert calls(mirrored.servers[0]) == {}

        for one in mirrored.servers:
            one.client.execute_command(*(word for word in words if word != "+readonly"))
        with opened(url, TERMS) as reader, pytest.raises(OnlineStoreError, match="ACL") as caught:
            read(reader, *first)
        assert not isinstance(caught.value, UnavailableError)
    finally:
        for one in mirrored.servers:
            one.client.execute_command("ACL", "DELUSER", "materialize-read")


def test_a_primary_that_dies_is_replaced_and_read_from_its_replica_meanwhile(
    mirrored: Cluster, first: list[bytes]
) -> None:
    """The last test of the cluster, which is another one then."""
    config = OnlineStoreConfig("default", mirrored.url)
    primary, replica = mirrored.servers[0], mirrored.servers[3]
    readers = [
        (kind(config, PRIMARY), kind(config, TERMS))
        for kind in (open_reader, lambda *of: Waited(open_async_reader(*of)))
    ]
    try:
        for reader in (one for both in readers for one in both):
            assert read(reader, *KEYS) == [record("view", key) for key in KEYS]
        primary.process.kill()
        primary.process.wait()

        for reader, of_replicas in readers:
            with pytest.raises(UnavailableError):
                read(reader, *first)
            for _ in range(5):
                assert read(of_replicas, *first) == [record("view", key) for key in first]
        wait_until(lambda: replica.client.info("replication")["role"] == "master", "the replica is the primary")

        for reader in (one for both in readers for one in both):
            wait_until(lambda reader=reader: answers(reader, first[0]), "the new primary is found", 5)
            for key in first[:50]:
                assert read(reader, key) == [record("view", key)]
    finally:
        for reader in (one for both in readers for one in both):
            reader.close()
