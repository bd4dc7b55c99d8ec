"""Caches that the server tells what changes: a change is seen at once, and while it cannot be told nothing is served from memory."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import redis

from materialize.errors import ConfigError
from materialize.model import OnlineStoreConfig
from materialize.online.following import open_follower
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.online.redis.acl import PLACEHOLDER, acl_line
from materialize.online.redis.following import HEARTBEAT
from materialize.online.redis.slots import slot_of
from materialize.serving import CacheSettings, OnlineFeatures, ReadTerms
from materialize.serving.cache import RecordCache
from materialize.serving.core import Core
from tests import cluster as clusters, servers
from tests.projects import Project
from tests.stepping import PATIENT
from tests.test_online_redis_secure import sentinel_of
from tests.test_serving import NOW, put, view
from tests.test_serving_cache import LONG, SECOND, in_threads, joined, until
from tests.valve import Valve

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

pytestmark = pytest.mark.server

#: A ttl that no test waits for: what is seen earlier was told.
TOLD = CacheSettings(ttl=3600 * SECOND, tracking=True)
MINE = view(a="int64")


@contextmanager
def following(
    store: OnlineStore, url: str, views: Sequence[FeatureView] = (MINE,), *, wait: bool = True
) -> Iterator[OnlineFeatures]:
    """A reader of *store* whose cache listens to the servers at *url*."""
    cache = RecordCache(views, TOLD, deadline=LONG)
    follower = open_follower(OnlineStoreConfig("default", url), list(cache.lifetimes), cache)
    cache.helpers.append(follower)
    follower.begin()
    try:
        if wait:
            until(lambda: cache.live)
        yield OnlineFeatures(Core(views, "default", store.location), store, cache)
    finally:
        cache.close()


def through(valve: Valve) -> str:
    return f"redis://127.0.0.1:{valve.port}/0?timeout=20"


def is_live(features: OnlineFeatures) -> bool:
    assert features.cache is not None
    return features.cache.live


def stats(features: OnlineFeatures) -> Any:
    assert features.cache is not None
    return features.cache.stats()["v"]


def reads(server: servers.Server) -> int:
    """Reads that the server was asked for since it began."""
    found = server.client.info("commandstats")
    return sum(int(found.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("get", "mget"))


def listening(server: servers.Server) -> list[str]:
    """The ids of the connections in broadcast mode."""
    with suppress(redis.ConnectionError):  # a failover ends connections
        return [one["id"] for one in server.client.client_list() if "B" in one["flags"]]
    return []


def synced(store: OnlineStore, features: OnlineFeatures, at: int) -> None:
    """Wait until what was written before has been told: a server tells in order."""
    features.read_features("v", "marker")
    before = stats(features).invalidated
    put(store, MINE, b"marker", NOW, at, at=at)
    until(lambda: stats(features).invalidated > before)


def test_a_change_is_told_and_what_did_not_change_stays(server: servers.Server) -> None:
    with RedisStore(server.url) as store:
        for key in (b"1", b"2"):
            put(store, MINE, key, NOW, 1, at=1)
    with RedisStore(server.url) as store, following(store, server.url) as features:
        features.batch_read("v", [1, 2, 3])

        put(store, MINE, b"1", NOW, 2, at=2)  # a change
        put(store, MINE, b"3", NOW, 3, at=2)  # an entity that was not there

        until(lambda: features.read_features("v", 1)["a"] == 2)
        until(lambda: features.read_features("v", 3)["a"] == 3)
        assert features.read_features("v", 2)["a"] == 1
        assert (stats(features).misses, stats(features).invalidated) == (5, 2)


class Noting:
    """A listener that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes]] = []
        self.listening = threading.Event()

    def ready(self) -> None:
        self.listening.set()

    def changed(self, view: str, keys: Iterable[bytes]) -> None:
        self.told += [(view, key) for key in keys]

    def lost(self) -> None:
        self.listening.clear()


def test_leases_and_other_views_are_not_told(valkey: servers.Server) -> None:
    noting = Noting()
    follower = open_follower(OnlineStoreConfig("default", valkey.url), ["v", "w"], noting)
    follower.begin()
    try:
        assert noting.listening.wait(LONG)
        for name in ("fs:v:lease", "fs:v:watermark:{06S}", "fs:v2:{1}", "session:1", "fs:v:{a:b|%7B}", "fs:w:{2}"):
            valkey.client.set(name, "x")

        until(lambda: ("w", b"2") in noting.told)
    finally:
        follower.close()

    assert noting.told == [("v", b"a:b|%7B"), ("w", b"2")]


def test_after_a_change_was_told_every_reader_sees_it(valkey: servers.Server) -> None:
    rng, stop = random.Random(11), threading.Event()
    with RedisStore(valkey.url) as store, following(store, valkey.url) as features:

        def reading() -> None:
            while not stop.is_set():
                features.batch_read("v", [0, 1, 2, 3])
                for _ in range(20):
                    features.read_features("v", 1)
                time.sleep(0.001)

        threads, failed = in_threads(2, reading)
        truth: dict[int, int] = {}
        for step in range(1, 30):
            for _ in range(rng.randrange(1, 4)):
                key = rng.randrange(4)
                truth[key] = truth.get(key, 0) + 1
                put(store, MINE, b"%d" % key, NOW, truth[key], at=1_000 * step + truth[key])
            synced(store, features, step)
            found = features.batch_read("v", [0, 1, 2, 3]).to_dicts()
            assert [one["a"] for one in found] == [truth.get(key) for key in range(4)], step
        stop.set()
        joined(threads)
        assert failed == [None] * 2
        assert stats(features).hits > 100


@pytest.mark.parametrize("readers", [0, 1])
def test_what_changes_while_it_is_fetched_is_not_remembered(server: servers.Server, readers: int) -> None:
    with (
        Valve(server.port) as valve,
        RedisStore(through(valve)) as slow,
        RedisStore(server.url) as store,
        following(slow, server.url) as features,
    ):
        for key in (b"1", b"2"):
            put(store, MINE, key, NOW, 1, at=1)
        features.read_features("v", 2)
        before = reads(server)
        valve.answering.clear()
        threads, results = in_threads(1, lambda: features.read_features("v", 1)["a"])
        until(lambda: reads(server) > before)  # the server has read what it will give
        put(store, MINE, b"1", NOW, 2, at=2)
        until(lambda: stats(features).invalidated or (features.cache and not features.cache.flights))
        late, later = in_threads(readers, lambda: features.read_features("v", 1)["a"])

        valve.answering.set()
        joined(threads + late)

        assert results == [1]  # its read began before the change
        assert later == [2] * readers  # they do not share the fetch of one that is known to be old
        assert features.read_features("v", 1)["a"] == 2


def test_nothing_is_served_while_the_connection_is_lost_and_the_cache_is_empty_afterwards(
    server: servers.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisStore(server.url) as store:
        put(store, MINE, b"1", NOW, 1, at=1)
        put(store, MINE, b"2", NOW, 1, at=1)
    with (
        Valve(server.port) as valve,
        RedisStore(server.url) as store,
        following(store, through(valve)) as features,
        caplog.at_level(logging.WARNING),
    ):
        features.batch_read("v", [1, 2])
        assert stats(features).entries == 2
        valve.limit(0)  # who connects anew gets no answer
        (connection,) = listening(server)
        server.client.execute_command("CLIENT", "KILL", "ID", connection)
        until(lambda: not is_live(features))
        put(store, MINE, b"1", NOW, 2, at=2)

        assert [features.read_features("v", 1)["a"] for _ in range(3)] == [2] * 3
        assert features.batch_read("v", [1, 2]).to_dicts() == [{"a": 2}, {"a": 1}]
        assert (stats(features).hits, stats(features).misses, stats(features).entries) == (0, 2 + 5, 0)

        put(store, MINE, b"1", NOW, 3, at=3)
        valve.open()
        until(lambda: is_live(features))
        assert [features.read_features("v", 1)["a"] for _ in range(3)] == [3] * 3
        assert stats(features).entries == 1
    assert "could not follow changes" in caplog.text
    assert "Nothing is served from the cache" in caplog.text


def test_a_server_that_falls_silent_is_noticed(valkey: servers.Server) -> None:
    with RedisStore(valkey.url) as store:
        put(store, MINE, b"1", NOW, 1, at=1)
    with (
        Valve(valkey.port) as valve,
        RedisStore(valkey.url) as store,
        following(store, through(valve)) as features,
    ):
        features.read_features("v", 1)
        valve.answering.clear()  # no end of a connection is told either

        put(store, MINE, b"1", NOW, 2, at=2)
        began = time.monotonic()

        until(lambda: features.read_features("v", 1)["a"] == 2)
        assert not is_live(features)
        assert time.monotonic() - began < 2 * HEARTBEAT + 1
        assert stats(features).hits > 0


def test_a_server_that_restarts_empty_leaves_nothing_behind() -> None:
    with (
        servers.running("valkey") as first,
        servers.running("valkey") as second,
        Valve(first.port) as valve,
        RedisStore(through(valve)) as store,
        following(store, through(valve)) as features,
    ):
        put(store, MINE, b"1", NOW, 1)
        assert [features.read_features("v", 1)["a"] for _ in range(2)] == [1, 1]
        valve.target = second.port

        first.process.kill()

        until(lambda: not is_live(features) or listening(second))
        until(lambda: is_live(features))
        store.pool.disconnect()
        assert features.read_features("v", 1).status == "missing"


def test_a_flushed_server_empties_the_cache(server: servers.Server) -> None:
    with RedisStore(server.url) as store:
        put(store, MINE, b"1", NOW, 1)
    with RedisStore(server.url) as store, following(store, server.url) as features:
        features.batch_read("v", [1, 2])

        server.client.flushall()

        until(lambda: features.read_features("v", 1).status == "missing")
        assert stats(features).invalidated == 2
        assert is_live(features)


def test_every_primary_of_a_cluster_is_listened_to(cluster: clusters.Cluster) -> None:
    keys = list(range(30))
    with RedisClusterStore(cluster.url) as store:
        for key in keys:
            put(store, MINE, b"%d" % key, NOW, 1, at=1)
    with RedisClusterStore(cluster.url) as store, following(store, cluster.url) as features:
        features.batch_read("v", keys)
        assert all(len(listening(one)) == 1 for one in cluster.servers)

        for key in keys[::2]:
            put(store, MINE, b"%d" % key, NOW, 2, at=2)

        until(lambda: features.batch_read("v", keys).to_dicts() == [{"a": 2}, {"a": 1}] * 15)
        assert stats(features).invalidated == 15
        assert stats(features).hits >= 15
        server = cluster.servers[1]
        (connection,) = listening(server)
        server.client.execute_command("CLIENT", "KILL", "ID", connection)
        until(lambda: stats(features).invalidated == 45)
        until(lambda: is_live(features) and all(len(listening(one)) == 1 for one in cluster.servers))


def test_slots_that_go_to_another_server_are_followed() -> None:
    moved = next(key for key in range(100_000) if slot_of(b"fs:v:{%d}" % key) < 50)
    with clusters.running(spare=1) as cluster, RedisClusterStore(cluster.url) as store:
        put(store, MINE, b"%d" % moved, NOW, 1, at=1)
        with following(store, cluster.url) as features:
            assert [features.read_features("v", moved)["a"] for _ in range(2)] == [1, 1]
            cluster.migrate(0, 50, cluster.servers[0], cluster.servers[3])
            features.read_features("v", moved)

            put(store, MINE, b"%d" % moved, NOW, 2, at=2)  # at a server that nobody listens to, unless it was quick
            began = time.monotonic()

            until(lambda: features.read_features("v", moved)["a"] == 2)
            assert time.monotonic() - began < 2 * HEARTBEAT + 1
            until(lambda: listening(cluster.servers[3]) and is_live(features))
            put(store, MINE, b"%d" % moved, NOW, 3, at=3)
            until(lambda: features.read_features("v", moved)["a"] == 3)


def test_after_a_failover_the_new_primary_is_listened_to(tmp_path: Path) -> None:
    with (
        servers.running("valkey") as primary,
        servers.running("valkey", "--replicaof", f"127.0.0.1 {primary.port}") as replica,
    ):
        clusters.wait_until(
            lambda: replica.client.info("replication").get("master_link_status") == "up", "the replica is up"
        )
        with sentinel_of("valkey", primary, tmp_path) as port:
            url = f"redis+sentinel://127.0.0.1:{port}/0?service=cache"
            with RedisStore(url) as store, following(store, url) as features:
                put(store, MINE, b"1", NOW, 1, at=1)
                assert store.settle("v") == ""
                assert [features.read_features("v", 1)["a"] for _ in range(2)] == [1, 1]

                primary.process.kill()
                until(lambda: listening(replica) and is_live(features))

                assert replica.client.info("replication")["role"] == "master"
                put(store, MINE, b"1", NOW, 2, at=2)
                until(lambda: features.read_features("v", 1)["a"] == 2)
                assert is_live(features)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of forks beside threads
def test_a_child_of_a_fork_listens_for_itself(valkey: servers.Server) -> None:
    with RedisStore(valkey.url) as store, following(store, valkey.url) as features:
        put(store, MINE, b"1", NOW, 1, at=1)
        features.read_features("v", 1)
        child = os.fork()
        if child == 0:
            signal.alarm(int(LONG))
            code = 1
            try:
                with RedisStore(valkey.url) as own:
                    assert features.cache is not None
                    mine = OnlineFeatures(Core([MINE], "default", own.location), own, features.cache)
                    until(lambda: is_live(mine))
                    assert mine.read_features("v", 1)["a"] == 1
                    put(own, MINE, b"1", NOW, 2, at=2)
                    until(lambda: mine.read_features("v", 1)["a"] == 2)
                    code = 0
            finally:
                os._exit(code)

        assert os.waitpid(child, 0)[1] == 0
        until(lambda: features.read_features("v", 1)["a"] == 2)
        assert is_live(features)


def test_without_the_right_nothing_is_cached_and_it_is_told_once(
    valkey: servers.Server, caplog: pytest.LogCaptureFixture
) -> None:
    line = acl_line(valkey.url, "read").replace(PLACEHOLDER, ">s3cret")
    valkey.client.execute_command(*line.split())
    url = valkey.url.replace("redis://", "redis://materialize-read:s3cret@")
    with (
        caplog.at_level(logging.WARNING),
        RedisStore(valkey.url) as store,
        following(store, url, wait=False) as features,
    ):
        put(store, MINE, b"1", NOW, 1, at=1)
        until(lambda: len(valkey.client.acl_log()) and valkey.client.acl_log()[0]["count"] > 2)
        for at in (2, 3):
            put(store, MINE, b"1", NOW, at, at=at)
            assert features.read_features("v", 1)["a"] == at

    told = [record.getMessage() for record in caplog.records if "could not follow" in record.getMessage()]
    assert len(told) == 1
    assert "NoPermissionError" in told[0]
    assert "materialize acl --role cache" in told[0]
    assert "s3cret" not in told[0]
    valkey.client.execute_command("ACL", "DELUSER", "materialize-read")
    valkey.client.acl_log_reset()


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    with pytest.raises(ConfigError, match=r"could not follow changes in sqlite.*Leave out tracking=True"):
        OnlineFeatures.connect(project.config, cache=TOLD, terms=PATIENT)
    OnlineFeatures.connect(
        project.config, cache=CacheSettings(tracking=True), terms=PATIENT
    ).close()  # no view is cached
    project.configure(url="redis+sentinel://a/0?service=s")
    with pytest.raises(ConfigError, match="found reads from replicas, expected none"):
        OnlineFeatures.connect(project.config, cache=TOLD, terms=ReadTerms(replicas=True))


def test_a_reader_from_a_config_folder_follows(valkey: servers.Server, tmp_path: Path) -> None:
    project = Project(tmp_path, valkey.url)
    project.configure(features={"a": "int64"})
    with RedisStore(valkey.url) as store, OnlineFeatures.connect(project.config, cache=TOLD, terms=PATIENT) as features:
        until(lambda: is_live(features))
        mine = view(name="spending", a="int64")
        put(store, mine, b"1", NOW, 1, at=1)
        assert [features.read_features("spending", 1)["a"] for _ in range(2)] == [1, 1]
        put(store, mine, b"1", NOW, 2, at=2)
        until(lambda: features.read_features("spending", 1)["a"] == 2)
    until(lambda: not listening(valkey))
