"""Tasks of an event loop read as threads do: one round trip, within the deadline, and a cancelled one leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from materialize.errors import ConfigError, OnlineStoreError, UnavailableError
from materialize.model import OnlineStoreConfig
from materialize.online import open_async_reader, open_store
from materialize.online.memory import MemoryStore
from materialize.online.reading import THREADS, ReadTerms, ThreadedReader
from materialize.testing import FOREVER, Row, make_batch
from tests import servers
from tests.certificates import Authority
from tests.cluster import Cluster, wait_until
from tests.fault_proxy import Fault, FaultProxy
from tests.test_online_redis_secure import secure
from tests.test_reading import KEYS, LATE, PATIENT, TERMS, calls, fill, record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from materialize.online.reading import AsyncReader


@asynccontextmanager
async def opened(url: str, terms: ReadTerms = TERMS) -> AsyncIterator[AsyncReader]:
    reader = open_async_reader(OnlineStoreConfig("default", url), terms)
    try:
        yield reader
    finally:
        await reader.close()
        await reader.close()


async def read(reader: AsyncReader, *keys: bytes) -> list[bytes | None]:
    return (await reader.read_views({"view": keys}))["view"]


async def unavailable(reader: AsyncReader) -> None:
    """A read that is told in time."""
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        await read(reader, KEYS[0])
    assert time.monotonic() - began < TERMS.deadline + LATE


def test_several_views_are_one_request(server: servers.Server) -> None:
    fill(server, "one", "two")
    server.client.set("fs:one:schemas", b"{}")

    async def main() -> None:
        async with opened(server.url) as reader:
            server.client.config_resetstat()
            found = await reader.read_views({"one": KEYS[:60], "two": KEYS[:40]})
            assert calls(server) == {"mget": 1}
            assert found["one"] == [record("one", key) for key in KEYS[:60]]
            assert found["two"] == [record("two", key) for key in KEYS[:40]]
            assert await reader.read_views({"one": KEYS}) == {"one": [record("one", key) for key in KEYS]}
            assert (await reader.read_cell("one", "schemas"), await reader.read_cell("one", "other")) == (b"{}", None)

    asyncio.run(main())


def test_tasks_get_their_own_answers(valkey: servers.Server) -> None:
    fill(valkey, "view")

    async def main() -> None:
        async with opened(valkey.url, PATIENT) as reader:

            async def reads(first: int) -> None:
                for number in range(100):
                    key = KEYS[(first * 40 + number) % len(KEYS)]
                    assert await read(reader, key) == [record("view", key)]

            await asyncio.gather(*map(reads, range(40)))

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["single", "cluster"])
def test_a_cancelled_read_leaves_no_answer_for_another(
    kind: str, valkey: servers.Server, request: pytest.FixtureRequest
) -> None:
    rng, url = random.Random(7), valkey.url
    if kind == "cluster":
        cluster: Cluster = request.getfixturevalue("cluster")
        url = cluster.url
        with open_store(OnlineStoreConfig("default", url)) as store:
            batch = make_batch([Row(key, payload=key) for key in KEYS])
            store.merge("view", batch, tie_wins=True, retention=FOREVER)
            expected = dict(zip(KEYS, store.read("view", KEYS), strict=True))
    else:
        fill(valkey, "view")
        expected = {key: record("view", key) for key in KEYS}

    async def main() -> None:
        cancelled = 0
        async with opened(url, PATIENT) as reader:
            while cancelled < 150:
                some = rng.sample(KEYS, 20)
                task = asyncio.create_task(read(reader, *some))
                for _ in range(rng.randrange(12)):
                    await asyncio.sleep(0)
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.001)
                cancelled += task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                other = rng.choice(KEYS)
                assert await read(reader, other) == [expected[other]]
            for key in rng.sample(KEYS, 1_000):
                assert await read(reader, key) == [expected[key]]

    asyncio.run(main())


def test_a_server_that_stands_still_is_told_within_the_deadline_and_used_again_at_once(server: servers.Server) -> None:
    fill(server, "view")

    async def main() -> None:
        async with opened(server.url) as reader:
            assert await read(reader, KEYS[0]) == [record("view", KEYS[0])]
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                for _ in range(2):
                    await unavailable(reader)
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
            for key in KEYS[:50]:
                assert await read(reader, key) == [record("view", key)]

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["cut", "reset", "swallow", "late"])
def test_a_connection_that_ends_anywhere_is_replaced_at_once(valkey: servers.Server, kind: str) -> None:
    fill(valkey, "view")
    faults = [Fault(way, 3_001 * number, kind) for number in range(1, 6) for way in ("up", "down")]

    async def main(port: int) -> None:
        async with opened(f"redis://127.0.0.1:{port}") as reader:
            for key in KEYS[:500]:
                assert await read(reader, key) == [record("view", key)]

    with FaultProxy(valkey.port, faults) as proxy:
        asyncio.run(main(proxy.port))
        assert proxy.fired


def test_a_connection_that_the_server_closed_between_reads_is_never_noticed(server: servers.Server) -> None:
    fill(server, "view")

    async def main() -> None:
        async with opened(server.url) as reader:
            for key in KEYS[:30]:
                assert await read(reader, key) == [record("view", key)]
                server.client.client_kill_filter(_type="normal", skipme=True)

    asyncio.run(main())


def test_no_server_and_a_wrong_password_are_told(valkey: servers.Server) -> None:
    async def main() -> None:
        async with opened(f"redis://127.0.0.1:{servers.free_port()}") as reader:
            await unavailable(reader)
        async with opened(f"redis://nobody:s3cret@127.0.0.1:{valkey.port}") as reader:
            with pytest.raises(OnlineStoreError, match="user, the password") as caught:
                await read(reader, KEYS[0])
            assert not isinstance(caught.value, UnavailableError)
            assert "s3cret" not in str(caught.value) + reader.location

    asyncio.run(main())


def test_a_connection_with_tls_and_a_unix_socket_are_used_again(tmp_path: Path) -> None:
    authority = Authority(tmp_path)

    async def main(url: str) -> None:
        async with opened(url, PATIENT) as reader:
            for key in KEYS[:20]:
                assert await read(reader, key) == [None]

    with secure(authority) as port:
        asyncio.run(main(f"rediss://127.0.0.1:{port}?ca={authority.file}"))
        with redis.Redis("127.0.0.1", port, ssl=True, ssl_ca_certs=str(authority.file)) as client:
            assert client.info("commandstats")["cmdstat_client|setname"]["calls"] == 1
    with servers.running("valkey", "--unixsocket", str(tmp_path / "socket")) as server:
        before = server.client.info("stats")["total_connections_received"]
        asyncio.run(main(f"unix://{tmp_path}/socket"))
        assert server.client.info("stats")["total_connections_received"] == before + 1


# --- stores whose driver knows no asyncio ---


class StuckStore(MemoryStore):
    """Reads wait until they are told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.under_way, self.most, self.lock = threading.Event(), 0, 0, threading.Lock()

    def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        with self.lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        self.go.wait()
        with self.lock:
            self.under_way -= 1
        return super().read_views(keys)


@pytest.mark.parametrize("scheme", ["memory", "sqlite"])
def test_other_stores_are_read_in_threads(scheme: str, tmp_path: Path) -> None:
    url = "memory://in-threads" if scheme == "memory" else f"sqlite:///{tmp_path}/online.db"
    with open_store(OnlineStoreConfig("default", url)) as store:
        store.merge("view", make_batch([Row(key) for key in KEYS]), tie_wins=True, retention=FOREVER)
        store.compare_and_set_cell("view", "schemas", None, b"{}")
        expected = store.read("view", KEYS)

    async def main() -> None:
        async with opened(url, PATIENT) as reader:
            assert await read(reader, *KEYS) == expected
            assert await reader.read_cell("view", "schemas") == b"{}"

    asyncio.run(main())


def test_threads_are_bounded_and_who_waits_for_one_is_told_within_the_deadline() -> None:
    store = StuckStore()

    async def main() -> None:
        reader = ThreadedReader(store, TERMS.deadline)
        try:
            began = time.monotonic()
            found = await asyncio.gather(*(read(reader, b"k") for _ in range(60)), return_exceptions=True)
            assert time.monotonic() - began < TERMS.deadline + 2 * LATE
            assert {type(one) for one in found} == {UnavailableError}
            assert store.most == THREADS
            store.go.set()
            wait_until(lambda: not store.under_way, "the threads go on")
            assert await read(reader, b"k") == [None]
        finally:
            store.go.set()
            await reader.close()

    asyncio.run(main())


def test_what_the_first_call_prepares_does_not_count() -> None:
    async def main() -> None:
        reader = ThreadedReader(MemoryStore(), 0.05, lambda: time.sleep(0.2))
        try:
            assert await asyncio.gather(read(reader, b"k"), read(reader, b"l")) == [[None], [None]]
        finally:
            await reader.close()

    asyncio.run(main())


def test_a_store_without_replicas_says_so() -> None:
    for url in ("redis://h", "sqlite:///x.db", "memory://"):
        with pytest.raises(ConfigError, match="replicas"):
            open_async_reader(OnlineStoreConfig("default", url), ReadTerms(replicas=True))
