"""A model server reads in one round trip and within its deadline, whatever happens to connections, servers, threads and processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from materialize.errors import ConfigError, OnlineStoreError, UnavailableError
from materialize.model import OnlineStoreConfig
from materialize.online import open_reader
from materialize.online.reading import ReadTerms
from materialize.online.redis import RedisStore
from tests import servers
from tests.certificates import Authority
from tests.fault_proxy import Fault, FaultProxy
from tests.test_online_redis_secure import secure
from tests.valve import Valve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.online.base import OnlineStore

TERMS = ReadTerms(read=0.1, deadline=0.25)
PATIENT = ReadTerms(connect=5, read=5, deadline=10)
#: Seconds that a call may be late on a machine that does other things too; alone it was 0.005.
LATE = 0.4
KEYS = [b"%d" % number for number in range(2_500)]


def opened(url: str, terms: ReadTerms = TERMS) -> OnlineStore:
    return open_reader(OnlineStoreConfig("default", url), terms)


def fill(server: servers.Server, *views: str) -> None:
    """Each key of each view holds what no other does."""
    for view in views:
        server.client.mset({b"fs:%b:{%b}" % (view.encode(), key): record(view, key) for key in KEYS})


def record(view: str, key: bytes) -> bytes:
    return b"%b of %b" % (key, view.encode())


def calls(server: servers.Server) -> dict[str, int]:
    """How often the server was asked to read, by command."""
    stats = server.client.info("commandstats")
    return {name: stats[f"cmdstat_{name}"]["calls"] for name in ("get", "hget", "mget") if f"cmdstat_{name}" in stats}


@contextmanager
def takes_at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds + LATE


# --- round trips ---


def test_several_views_are_one_request(server: servers.Server) -> None:
    fill(server, "one", "two")
    server.client.hset("fs:two:{hash}", "a", "b")
    with opened(server.url) as store:
        server.client.config_resetstat()

        found = store.read_views({"one": KEYS[:60], "two": KEYS[:40]})

        assert calls(server) == {"mget": 1}
        lacking = store.read_views({"one": KEYS[:1], "two": [b"hash", b"absent"]})
        assert calls(server) == {"mget": 2, "hget": 2}  # they might be hashes, of which MGET says nothing
    assert found["one"] == [record("one", key) for key in KEYS[:60]]
    assert found["two"] == [record("two", key) for key in KEYS[:40]]
    assert lacking == {"one": [record("one", KEYS[0])], "two": [None, None]}


def test_many_keys_are_not_one_wait_for_each_thousand(valkey: servers.Server) -> None:
    fill(valkey, "view")
    with (
        Valve(valkey.port) as valve,
        opened(f"redis://127.0.0.1:{valve.port}", ReadTerms(read=5, deadline=10)) as store,
    ):
        store.read("view", KEYS[:1])
        valkey.client.config_resetstat()
        valve.answering.clear()  # so that no request can have waited for an answer
        reading = threading.Thread(target=lambda: found.extend(store.read("view", KEYS)))
        found: list[bytes | None] = []

        reading.start()
        deadline = time.monotonic() + 5
        while calls(valkey) != {"mget": 3}:
            assert time.monotonic() < deadline
        valve.answering.set()
        reading.join()

    assert found == [record("view", key) for key in KEYS]


def test_cells_are_read_too_and_no_string_is_an_error(valkey: servers.Server) -> None:
    valkey.client.set("fs:view:schemas", b"{}")
    valkey.client.hset("fs:view:other", "a", "b")
    with opened(valkey.url) as store:
        assert (store.read_cell("view", "schemas"), store.read_cell("view", "nothing")) == (b"{}", None)
        with pytest.raises(OnlineStoreError, match="WRONGTYPE"):
            store.read_cell("view", "other")
        assert store.read_cell("view", "schemas") == b"{}"


# --- servers that stand still, and connections that end ---


def test_a_server_that_stands_still_is_told_within_the_deadline_and_used_again_at_once(server: servers.Server) -> None:
    fill(server, "view")
    with opened(server.url) as store:
        store.read("view", KEYS[:1])
        for _ in range(2):
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                for call in (lambda: store.read("view", KEYS[:1]), lambda: store.read_cell("view", "schemas")):
                    with (
                        takes_at_most(TERMS.deadline),
                        pytest.raises(UnavailableError, match=r"still so after 0\.[23] s"),
                    ):
                        call()
            finally:
                os.kill(server.process.pid, signal.SIGCONT)

            # What it answers now to those who are gone must not reach others.
            for key in KEYS[:50]:
                assert store.read("view", [key]) == [record("view", key)]


def test_an_answer_that_comes_late_is_never_that_of_another_read(valkey: servers.Server) -> None:
    fill(valkey, "view")
    late = [Fault("down", 5_000 * number, "late") for number in range(1, 8)]
    with FaultProxy(valkey.port, late) as proxy, opened(f"redis://127.0.0.1:{proxy.port}") as store:
        for key in KEYS[:2_000]:
            assert store.read("view", [key]) == [record("view", key)]

        assert len(proxy.fired) == len(late)


def test_bytes_that_nobody_asked_for_are_never_an_answer(valkey: servers.Server) -> None:
    fill(valkey, "view")
    valkey.client.set("fs:view:schemas", b"{}")
    with FaultProxy(valkey.port) as proxy, opened(f"redis://127.0.0.1:{proxy.port}", PATIENT) as store:
        for _ in range(3):
            assert store.read_cell("view", "schemas") == b"{}"
            proxy.links[-1].client.sendall(b"$5\r\nstale\r\n")

        assert store.read_cell("view", "schemas") == b"{}"
        assert len(proxy.links) == 4


@pytest.mark.parametrize("kind", ["cut", "reset", "swallow"])
def test_a_connection_that_ends_anywhere_is_replaced_at_once(valkey: servers.Server, kind: str) -> None:
    fill(valkey, "view")
    faults = [Fault(way, 3_001 * number, kind) for number in range(1, 7) for way in ("up", "down")]
    with FaultProxy(valkey.port, faults) as proxy, opened(f"redis://127.0.0.1:{proxy.port}") as store:
        for key in KEYS[:600]:
            with takes_at_most(TERMS.deadline):
                assert store.read("view", [key]) == [record("view", key)]

        assert proxy.fired


def test_a_connection_that_the_server_closed_between_reads_is_never_noticed(server: servers.Server) -> None:
    fill(server, "view")
    with opened(server.url) as store:
        for key in KEYS[:30]:
            assert store.read("view", [key]) == [record("view", key)]
            server.client.client_kill_filter(_type="normal", skipme=True)


def test_no_server_is_told_within_the_deadline(tmp_path: Path) -> None:
    for url in (f"redis://:s3cret@127.0.0.1:{servers.free_port()}", f"unix://{tmp_path}/socket"):
        with opened(url) as store, takes_at_most(TERMS.deadline), pytest.raises(UnavailableError) as caught:
            store.read("view", KEYS)
        assert "s3cret" not in str(caught.value)


def test_a_unix_socket_is_read(tmp_path: Path) -> None:
    with servers.running("valkey", "--unixsocket", str(tmp_path / "socket")) as server:
        fill(server, "view")
        with opened(f"unix://{tmp_path}/socket?db=0") as store:
            assert store.read("view", KEYS) == [record("view", key) for key in KEYS]


def test_an_ordinary_store_tells_of_one_lost_server_at_once() -> None:
    with (
        RedisStore(f"redis://127.0.0.1:{servers.free_port()}") as store,
        takes_at_most(0.1),
        pytest.raises(UnavailableError),
    ):
        store.read("view", KEYS)


def test_a_wrong_password_is_told_at_once(valkey: servers.Server) -> None:
    with opened(f"redis://nobody:s3cret@127.0.0.1:{valkey.port}") as store, pytest.raises(OnlineStoreError) as caught:
        store.read("view", KEYS[:1])

    assert not isinstance(caught.value, UnavailableError)


def test_a_connection_with_tls_is_used_again(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with secure(authority) as port, opened(f"rediss://127.0.0.1:{port}?ca={authority.file}", PATIENT) as store:
        for key in KEYS[:20]:
            assert store.read("view", [key]) == [None]
        with redis.Redis("127.0.0.1", port, ssl=True, ssl_ca_certs=str(authority.file)) as client:
            names = [one["name"] for one in client.client_list()]
            assert client.info("commandstats")["cmdstat_client|setname"]["calls"] == names.count("materialize") == 1


# --- threads and processes ---


def test_threads_get_their_own_answers(valkey: servers.Server) -> None:
    fill(valkey, "view")
    wrong: list[object] = []

    def reads(first: int) -> None:
        for number in range(500):
            key = KEYS[(first * 300 + number) % len(KEYS)]
            if (found := store.read("view", [key])) != [record("view", key)]:
                wrong.append(found)

    with opened(valkey.url, PATIENT) as store:
        threads = [threading.Thread(target=reads, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_more_threads_than_the_driver_has_connections_read_at_the_same_time(valkey: servers.Server) -> None:
    """redis-py's pools end at 100 connections, by an error."""
    fill(valkey, "view")
    found: list[object] = []
    with opened(valkey.url, ReadTerms(connect=10, read=10, deadline=20)) as store:
        os.kill(valkey.process.pid, signal.SIGSTOP)
        try:
            threads = [threading.Thread(target=lambda: found.append(store.read("view", KEYS[:1]))) for _ in range(120)]
            for thread in threads:
                thread.start()
        finally:
            os.kill(valkey.process.pid, signal.SIGCONT)
        for thread in threads:
            thread.join()

    assert found == [[record("view", KEYS[0])]] * 120


FORKS = """
import os, sys
from materialize.model import OnlineStoreConfig
from materialize.online import open_reader
from materialize.online.reading import ReadTerms

store = open_reader(OnlineStoreConfig("default", sys.argv[1]), ReadTerms(read=5, deadline=10))
keys = [b"%d" % number for number in range(500)]
right = lambda: all(store.read("view", [key]) == [b"%b of view" % key] for key in keys)
assert right()  # a connection is open when the children are made
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        os._exit(0 if right() else 1)
    children.append(child)
assert right()
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
assert right()
"""


def test_children_of_a_process_that_has_read_do_not_share_its_connections(valkey: servers.Server) -> None:
    fill(valkey, "view")

    done = subprocess.run(
        [sys.executable, "-c", FORKS, valkey.url], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 0, done.stderr


# --- other stores ---


@pytest.mark.parametrize("url", ["redis://h:1", "rediss://h", "unix:///s", "sqlite:///x.db", "memory://"])
def test_a_store_without_replicas_says_so(url: str) -> None:
    with pytest.raises(ConfigError, match=r"replicas.*redis\+sentinel.*dynamodb"):
        opened(url, ReadTerms(replicas=True))


@pytest.mark.parametrize("name", ["connect", "read", "deadline"])
def test_seconds_are_above_zero(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0, expected seconds above 0"):
        ReadTerms(**{name: 0})


def test_opening_touches_no_network() -> None:
    for place in (
        "redis://192.0.2.1",
        "redis+cluster://192.0.2.1",
        "redis+sentinel://192.0.2.1?service=a",
        "dynamodb://eu-central-1",
    ):
        with takes_at_most(5), opened(place, ReadTerms(connect=30, deadline=60)):
            pass


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="found the scheme 'postgres'"):
        opened("postgres://h")


def test_a_locked_sqlite_file_is_told_within_the_deadline(tmp_path: Path) -> None:
    url, path = f"sqlite:///{tmp_path}/online.db", tmp_path / "online.db"
    with opened(url) as store:
        store.compare_and_set_cell("view", "schemas", None, b"{}")
    other = sqlite3.connect(path)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    try:
        with (
            opened(url) as store,
            takes_at_most(TERMS.deadline),
            pytest.raises(UnavailableError, match="another process"),
        ):
            store.read("view", KEYS[:1])
    finally:
        other.close()
    with opened(url) as store:
        assert store.read_cell("view", "schemas") == b"{}"
