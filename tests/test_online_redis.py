"""Redis and Valkey keep the contract, and what can go wrong with a server is told as what it is, without a password."""

from __future__ import annotations

import inspect
import logging
import pickle
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest
import redis
from redis import exceptions as driver

from materialize.errors import ConfigError, OnlineStoreError, StoreFullError, UnavailableError
from materialize.model import Retention, to_us
from materialize.online.base import HEADER, TOMBSTONE
from materialize.online.redis import columns, store as module
from materialize.online.redis.answers import FULL, REFUSED, TRANSIENT, translated
from materialize.online.redis.framing import bulk, write_options
from materialize.online.redis.store import RedisStore
from materialize.order import STALE, UNCHANGED, WRITTEN
from materialize.testing import AT, FOREVER, OnlineStoreContract, Row, content, make_batch
from tests import servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from materialize.online.base import EncodedBatch

PASSWORD = "s3cret-p4ss"
HOUR_US = 3_600_000_000

#: Driver errors that mean neither "not allowed" nor "wait": a wrong answer, a wrong use, or a cluster's and lock's matters.
OTHER = {
    "AskError",
    "ChildDeadlockedError",
    "ClusterCrossSlotError",
    "ClusterError",
    "CrossSlotTransactionError",
    "DataError",
    "ExecAbortError",
    "IncorrectPolicyType",
    "InvalidPipelineStack",
    "InvalidResponse",
    "LockError",
    "LockNotOwnedError",
    "ModuleError",
    "MovedError",
    "NoSuchFieldsetError",
    "PubSubError",
    "RedisClusterException",
    "RedisError",
    "ResponseError",
    "SlotNotCoveredError",
    "WatchError",
}
#: Further names for classes of the lists in the store, by inheritance.
REFUSED_NAMES = {
    "AuthenticationError",
    "AuthenticationWrongNumberOfArgsError",
    "AuthorizationError",
    "NoPermissionError",
}
FULL_NAMES = {"OutOfMemoryError"}
TRANSIENT_NAMES = {
    "BusyLoadingError",
    "ClusterDownError",
    "ConnectionError",
    "ExternalAuthProviderError",
    "MasterDownError",
    "MaxConnectionsError",
    "NoScriptError",
    "ReadOnlyError",
    "TimeoutError",
    "TryAgainError",
}


def server_now_us() -> int:
    return to_us(datetime.now(timezone.utc))


def write(store: RedisStore, *rows: Row, tie_wins: bool = True, retention: Retention = FOREVER) -> list[int]:
    outcomes: list[int] = store.merge("view", make_batch(rows), tie_wins=tie_wins, retention=retention).tolist()
    return outcomes


class TestRedisStore(OnlineStoreContract):
    @pytest.fixture
    def store(self, server: servers.Server) -> Iterator[RedisStore]:
        with RedisStore(server.url) as store:
            yield store

    def test_records_and_cells_have_the_documented_keys(self, store: RedisStore, server: servers.Server) -> None:
        write(store, Row(b"a|b"))
        store.compare_and_set_cell("view", "watermark", None, b"{}")

        assert sorted(server.client.keys()) == [b"fs:view:watermark", b"fs:view:{a|b}"]

    def test_prefix_keeps_stores_on_one_server_apart(self, store: RedisStore, server: servers.Server) -> None:
        with RedisStore(f"{server.url}?prefix=other:x") as other:
            write(other, Row(b"k", payload=b"other"))
            write(store, Row(b"k", payload=b"ours"))

            assert [record[HEADER.size :] for record in content(other).values()] == [b"other"]
            assert [record[HEADER.size :] for record in content(store).values()] == [b"ours"]

    def test_a_batch_of_50_000_rows_maps_every_reply_to_its_row(self, store: RedisStore) -> None:
        rows = [Row(b"%d" % number, 10, 0, AT, b"%d" % number) for number in range(50_000)]
        write(store, *rows[::3])

        outcomes = write(store, *(row._replace(event_us=9 + number % 3) for number, row in enumerate(rows)))

        wanted = [WRITTEN if number % 3 else STALE for number in range(50_000)]
        assert outcomes == wanted
        assert sum(len(keys) for keys, _ in store.scan("view")) >= 50_000

    def test_bytes_in_flight_stay_bounded(self, store: RedisStore) -> None:
        unanswered, most = 0, 0

        class Watched:
            """A connection that counts what is sent and not yet answered."""

            def __init__(self, connection: redis.connection.Connection) -> None:
                self.connection, self.sizes = connection, list[int]()

            def send_packed_command(self, command: list[bytes], *, check_health: bool) -> None:
                nonlocal unanswered, most
                self.sizes.append(sum(map(len, command)))
                unanswered += self.sizes[-1]
                most = max(most, unanswered)
                self.connection.send_packed_command(command, check_health=check_health)

            def read_response(self, *, disable_decoding: bool) -> object:
                nonlocal unanswered
                unanswered -= self.sizes.pop(0)
                return self.connection.read_response(disable_decoding=disable_decoding)

        batch = make_batch([Row(b"%d" % n, payload=b"x" * 3_000) for n in range(5_000)])
        requests = requests_of(store, batch)
        store.client.script_load(store.write_script.script)
        connection = store.pool.get_connection()
        replies = store._pipeline(Watched(connection), requests)
        store.pool.release(connection)

        assert b"".join(replies) == b"1" * 5_000
        assert unanswered == 0
        assert module.BYTES_IN_FLIGHT / 2 < most <= module.BYTES_IN_FLIGHT + 2 * columns.BYTES_PER_CALL

    def test_rows_of_absent_keys_need_no_script(self, store: RedisStore, server: servers.Server) -> None:
        rows = [Row(b"%d" % number) for number in range(5_000)]
        before = calls(server)

        assert write(store, *rows) == [WRITTEN] * 5_000

        assert calls(server) - before == {"msetnx": 50}
        assert content(store) == records(*rows)

    @pytest.mark.parametrize(("there", "scripts"), [(7, 50), (4_950, 1), (250, 1)])
    def test_a_key_that_is_there_keeps_the_order_rule(
        self, store: RedisStore, server: servers.Server, there: int, scripts: int
    ) -> None:
        newer = Row(b"%d" % there, 20)
        write(store, newer)
        rows = [Row(b"%d" % number, 10) for number in range(5_000)]
        before = calls(server)

        outcomes = write(store, *rows)

        assert outcomes == [STALE if number == there else WRITTEN for number in range(5_000)]
        assert content(store) == records(*rows) | records(newer)
        assert (calls(server) - before)["evalsha"] == scripts

    def test_what_is_no_record_is_left_alone_among_absent_keys(self, store: RedisStore, server: servers.Server) -> None:
        server.client.rpush("fs:view:{4000}", "theirs")

        with pytest.raises(OnlineStoreError, match="found 1 keys below fs:view:"):
            write(store, *(Row(b"%d" % number) for number in range(5_000)))

        assert server.client.lrange("fs:view:{4000}", 0, -1) == [b"theirs"]

    def test_values_larger_than_a_call_are_sent_alone(self, store: RedisStore) -> None:
        sizes = [1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 700_000, 3_000_000, 10, 5_000_000, 0]
        rows = [Row(b"%d" % number, payload=bytes([65 + number]) * size) for number, size in enumerate(sizes)]

        assert write(store, *rows) == [WRITTEN] * len(rows)
        assert {key: record[HEADER.size :] for key, record in content(store).items()} == {
            row.key: row.payload for row in rows
        }

    def test_calls_are_bounded_in_rows_and_bytes(self, store: RedisStore) -> None:
        rows = [Row(b"%d" % number, payload=b"x" * (number % 7) * 20_000) for number in range(500)]

        for request in requests_of(store, make_batch(rows)):
            count = int(request.split(b"\r\n", 7)[6])
            assert count <= columns.ROWS_PER_CALL
            assert count == 1 or len(request) <= columns.BYTES_PER_CALL + 20_000

    # --- expiry ---

    def test_without_a_ttl_a_record_never_expires(self, store: RedisStore, server: servers.Server) -> None:
        write(store, Row(b"k"))
        write(store, Row(b"k", 2))

        assert server.client.pttl("fs:view:{k}") == -1

    def test_a_ttl_counts_from_the_event_time(self, store: RedisStore, server: servers.Server) -> None:
        event = server_now_us() - 2 * HOUR_US
        retention = Retention(ttl_us=3 * HOUR_US, keep_until_us=event + 100 * HOUR_US)

        write(store, Row(b"k", event), retention=retention)

        assert server.client.pexpiretime("fs:view:{k}") == -(-(event + 3 * HOUR_US) // 1000)
        assert 0 < server.client.pttl("fs:view:{k}") <= HOUR_US // 1000
        write(store, Row(b"k", event + 60_000_000), retention=retention)
        assert server.client.pexpiretime("fs:view:{k}") == -(-(event + 60_000_000 + 3 * HOUR_US) // 1000)

    def test_a_tombstone_stays_for_its_own_time(self, store: RedisStore, server: servers.Server) -> None:
        keep = server_now_us() + 5 * HOUR_US
        batch = make_batch([Row(b"k", None, payload=b"")], floor=AT)

        store.replace("view", batch, at=AT, retention=Retention(ttl_us=None, keep_until_us=keep))

        assert server.client.pexpiretime("fs:view:{k}") == -(-keep // 1000)

    @pytest.mark.parametrize("ttl_hours", [1, 9, None])
    def test_a_record_with_a_floor_stays_at_least_as_long_as_a_tombstone(
        self, store: RedisStore, server: servers.Server, ttl_hours: int | None
    ) -> None:
        now = server_now_us()
        retention = Retention(None if ttl_hours is None else ttl_hours * HOUR_US, keep_until_us=now + 5 * HOUR_US)
        store.replace("view", make_batch([Row(b"k", now, version=AT)], floor=AT), at=AT, retention=retention)
        expected = -1 if ttl_hours is None else -(-(now + max(ttl_hours, 5) * HOUR_US) // 1000)
        assert server.client.pexpiretime("fs:view:{k}") == expected

        write(store, Row(b"k", now + 1_000, version=AT + 1), retention=retention)

        expected = (
            -1
            if ttl_hours is None
            else max(-(-(now + 1_000 + ttl_hours * HOUR_US) // 1000), -(-(now + 5 * HOUR_US) // 1000))
        )
        assert server.client.pexpiretime("fs:view:{k}") == expected

    def test_a_newer_row_than_the_replacing_snapshot_keeps_its_floor_and_time(
        self, store: RedisStore, server: servers.Server
    ) -> None:
        now = server_now_us()
        retention = Retention(HOUR_US, keep_until_us=now + 5 * HOUR_US)
        write(store, Row(b"k", now, version=AT + 9), retention=retention)

        store.replace("view", make_batch([Row(b"k", now - 9, version=AT)], floor=AT), at=AT, retention=retention)

        assert server.client.pexpiretime("fs:view:{k}") == -(-(now + 5 * HOUR_US) // 1000)

    @pytest.mark.parametrize("event", [1_000, 0, -1, -(2**52)])
    def test_a_row_that_expired_long_ago_is_no_error(self, store: RedisStore, event: int) -> None:
        retention = Retention(ttl_us=1_000_000, keep_until_us=server_now_us() + HOUR_US)

        assert write(store, Row(b"k", event), Row(b"new", server_now_us()), retention=retention) == [WRITTEN] * 2

        assert set(content(store)) == {b"new"}

    # --- what others left in our keys ---

    @pytest.mark.parametrize("value", [b"", b"short", b"\x02" + b"x" * 60, b"x" * 36])
    @pytest.mark.parametrize("ttl", [None, HOUR_US])
    def test_a_value_that_is_no_record_is_left_alone_and_told(
        self, store: RedisStore, server: servers.Server, value: bytes, ttl: int | None
    ) -> None:
        server.client.set("fs:view:{b}", value)
        now = server_now_us()

        with pytest.raises(OnlineStoreError, match=r"found 1 keys below fs:view: .* left alone") as caught:
            write(store, Row(b"a", now), Row(b"b", now), Row(b"c", now), retention=Retention(ttl, now + HOUR_US))

        assert not isinstance(caught.value, UnavailableError)
        assert server.client.get("fs:view:{b}") == value
        assert server.client.exists("fs:view:{a}", "fs:view:{c}") == 2

    @pytest.mark.parametrize("ttl", [None, HOUR_US])
    def test_a_hash_and_a_list_are_left_alone_and_told(
        self, store: RedisStore, server: servers.Server, ttl: int | None
    ) -> None:
        server.client.hset("fs:view:{b}", "field", "theirs")
        server.client.rpush("fs:view:{c}", "theirs")
        now = server_now_us()

        with pytest.raises(OnlineStoreError, match="found 2 keys below fs:view:"):
            write(store, *(Row(key, now) for key in (b"a", b"b", b"c", b"d")), retention=Retention(ttl, now + HOUR_US))

        assert server.client.hgetall("fs:view:{b}") == {b"field": b"theirs"}
        assert server.client.lrange("fs:view:{c}", 0, -1) == [b"theirs"]
        assert set(content(store)) == {b"a", b"d"}

    def test_a_cell_that_holds_a_hash_is_told(self, store: RedisStore, server: servers.Server) -> None:
        server.client.hset("fs:view:watermark", "field", "theirs")

        for call in (
            lambda: store.read_cell("view", "watermark"),
            lambda: store.compare_and_set_cell("view", "watermark", None, b"1"),
        ):
            with pytest.raises(OnlineStoreError, match="WRONGTYPE") as caught:
                call()
            assert not isinstance(caught.value, UnavailableError)

    # --- scripts ---

    def test_flushed_scripts_are_loaded_again_between_calls(self, store: RedisStore, server: servers.Server) -> None:
        write(store, Row(b"a"))
        store.compare_and_set_cell("view", "watermark", None, b"1")
        server.client.script_flush()

        assert write(store, Row(b"b")) == [WRITTEN]
        assert store.compare_and_set_cell("view", "watermark", b"1", b"2")

    def test_scripts_flushed_within_a_batch_are_loaded_again(self, store: RedisStore, server: servers.Server) -> None:
        batch = make_batch([Row(b"%d" % number) for number in range(5_000)])
        write(store, Row(b"0"))  # with a key of the first call there, all calls are of the script

        with _after_some_requests(store, server.client.script_flush):
            outcomes = store.merge("view", batch, tie_wins=True, retention=FOREVER).tolist()

        assert set(outcomes) == {WRITTEN, UNCHANGED}
        assert len(content(store)) == 5_000

    def test_a_connection_with_unread_replies_is_never_used_again(self, server: servers.Server) -> None:
        batch = make_batch([Row(b"%d" % number) for number in range(5_000)])
        with RedisStore(f"{server.url}?deadline=0.2") as store:
            write(store, Row(b"0"))
            flushed = _after_some_requests(store, server.client.script_flush, always=True)
            with pytest.raises(UnavailableError, match=r"No matching script|NOSCRIPT"), flushed:
                store.merge("view", batch, tie_wins=True, retention=FOREVER)

            assert store.read_cell("view", "nothing") is None
            assert store.read("view", [b"nothing"]) == [None]

    def test_a_killed_connection_is_told_and_the_next_call_makes_a_new_one(
        self, store: RedisStore, server: servers.Server
    ) -> None:
        batch = make_batch([Row(b"%d" % number) for number in range(5_000)])

        def kill() -> None:
            server.client.client_kill_filter(_type="normal", skipme=True)

        with pytest.raises(UnavailableError), _after_some_requests(store, kill):
            store.merge("view", batch, tie_wins=True, retention=FOREVER)

        assert len(store.merge("view", batch, tie_wins=True, retention=FOREVER)) == 5_000


def records(*rows: Row) -> dict[bytes, bytes]:
    """What is stored of *rows* where nothing was."""
    batch = make_batch(rows)
    return dict(zip(batch.keys.to_pylist(), batch.values.to_pylist(), strict=True))


def calls(server: servers.Server) -> Counter[str]:
    """How often the server was sent each command that stores rows."""
    told = {name: server.client.info("commandstats").get(f"cmdstat_{name}", {}) for name in ("msetnx", "evalsha")}
    return Counter({name: one["calls"] for name, one in told.items() if one})


def requests_of(store: RedisStore, batch: EncodedBatch) -> Iterator[bytes]:
    """The calls of the script that merge *batch*."""
    sha = bulk(store.write_script.sha.encode())
    return columns.columns_of("fs:view", batch, hashed=False).requests(sha, write_options("merge", FOREVER))


@contextmanager
def _after_some_requests(
    store: RedisStore, happening: Callable[[], object], requests: int = 10, *, always: bool = False
) -> Iterator[None]:
    """While open, *happening* is called once some requests of the next write were sent; *always*: of each attempt at it."""
    original = store._pipeline
    happened = 0

    def interrupted(several: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal happened
        for number, request in enumerate(several):
            if number == requests and (always or not happened):
                happened += 1
                happening()
            yield request

    store._pipeline = lambda connection, several: original(connection, interrupted(several))
    try:
        yield
    finally:
        del store._pipeline


# --- what can go wrong with a server -----------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """Everything that a log, a repr, a pickle or a chained traceback could show of *error*."""
    shown = None if error.__suppress_context__ else error.__context__
    return "\n".join([str(error), *map(repr, (error, pickle.loads(pickle.dumps(error)), error.__cause__, shown))])


def test_no_server_is_unavailable_and_the_url_is_masked() -> None:
    with RedisStore(f"redis://user:{PASSWORD}@127.0.0.1:{servers.free_port()}/0?timeout=1") as store:
        for call in (
            lambda: write(store, Row(b"k")),
            lambda: store.read("view", [b"k"]),
            lambda: list(store.scan("view")),
            lambda: store.read_cell("view", "watermark"),
            lambda: store.compare_and_set_cell("view", "watermark", None, b"1"),
            store.describe,
        ):
            with pytest.raises(UnavailableError, match=r"redis://\*\*\*@127\.0\.0\.1") as caught:
                call()
            assert PASSWORD not in told(caught.value)


def test_a_server_that_does_not_answer_is_unavailable_after_the_timeout(valkey: servers.Server) -> None:
    with RedisStore(f"{valkey.url}?timeout=0.3") as store:
        write(store, Row(b"k"))
        valkey.client.client_pause(1_500)
        started = time.monotonic()

        with pytest.raises(UnavailableError, match=r"waited at most 0\.3 s"):
            store.read("view", [b"k"])

        assert time.monotonic() - started < 1.4
        valkey.client.client_unpause()
        assert store.read("view", [b"k"]) != [None]


@pytest.mark.server
@pytest.mark.parametrize("kind", servers.KINDS)
def test_a_wrong_password_is_refused_and_never_shown(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    if servers.binary(kind) is None:
        pytest.skip(f"no {kind}")
    caplog.set_level(logging.DEBUG)
    with servers.running(kind, password=PASSWORD) as server:
        wrong = f"redis://:wrong-{PASSWORD}@127.0.0.1:{server.port}/0"
        for url in (wrong, server.url, f"redis://nobody:wrong-{PASSWORD}@127.0.0.1:{server.port}/0"):
            with RedisStore(url) as store, pytest.raises(OnlineStoreError, match="user, the password") as caught:
                write(store, Row(b"k"))
            assert not isinstance(caught.value, UnavailableError)
            assert PASSWORD not in told(caught.value)
            assert PASSWORD not in repr(store) + str(store) + store.location
        with RedisStore(f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0") as store:
            assert write(store, Row(b"k")) == [WRITTEN]
            assert PASSWORD not in repr(store) + store.location
    assert PASSWORD not in caplog.text


def test_a_user_who_may_not_write_is_refused(valkey: servers.Server) -> None:
    valkey.client.execute_command("ACL", "SETUSER", "reader", "on", f">{PASSWORD}", "~*", "+@read", "+@connection")
    try:
        with RedisStore(f"redis://reader:{PASSWORD}@127.0.0.1:{valkey.port}/0") as store:
            assert store.read("view", [b"k"]) == [None]
            with pytest.raises(OnlineStoreError, match="ACL") as caught:
                write(store, Row(b"k"))
            assert not isinstance(caught.value, UnavailableError)
            assert PASSWORD not in told(caught.value)
    finally:
        valkey.client.execute_command("ACL", "DELUSER", "reader")


def test_a_full_server_refuses_and_says_so(server: servers.Server) -> None:
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 3_000_000)
    rows = [Row(b"%d" % number, payload=b"x" * 10_000) for number in range(2_000)]
    try:
        with RedisStore(server.url) as store:
            with pytest.raises(OnlineStoreError, match="more memory and run again") as caught:
                write(store, *rows)
            assert not isinstance(caught.value, UnavailableError)
            server.client.config_set("maxmemory", 0)
            outcomes = write(store, *rows)
            assert set(outcomes) == {WRITTEN, UNCHANGED}
            assert len(content(store)) == 2_000
    finally:
        server.client.config_set("maxmemory", 0)


def test_a_read_only_replica_is_unavailable_for_writes(server: servers.Server) -> None:
    server.client.config_set("repl-diskless-sync-delay", 0)
    with servers.running(server.kind, "--replicaof", f"127.0.0.1 {server.port}") as replica:
        deadline = time.monotonic() + 20
        while replica.client.info("replication")["master_link_status"] != "up":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with RedisStore(f"{replica.url}?deadline=0.3") as store:
            with pytest.raises(UnavailableError, match=r"read only replica.*still so after 0\.\d s"):
                write(store, Row(b"k"))
            with pytest.raises(UnavailableError, match="read only replica"):
                store.compare_and_set_cell("view", "watermark", None, b"1")
            assert store.read("view", [b"k"]) == [None]


@pytest.mark.server
@pytest.mark.parametrize("kind", servers.KINDS)
def test_a_server_killed_within_a_batch_is_unavailable(kind: str) -> None:
    if servers.binary(kind) is None:
        pytest.skip(f"no {kind}")
    batch = make_batch([Row(b"%d" % number, payload=b"x" * 500) for number in range(40_000)])
    with servers.running(kind) as server, RedisStore(server.url) as store:
        with (
            pytest.raises(UnavailableError, match="could not write 40,000 rows"),
            _after_some_requests(store, server.process.kill, 50),
        ):
            store.merge("view", batch, tie_wins=True, retention=FOREVER)
        server.process.wait()
        with pytest.raises(UnavailableError):
            store.read("view", [b"0"])


def test_writers_and_readers_share_a_store(server: servers.Server) -> None:
    with RedisStore(server.url) as store:
        done = threading.Event()
        missing: list[int] = []
        write(store, *(Row(b"%d" % number) for number in range(1_000)))

        def reads() -> None:
            while not done.is_set():
                missing.append(store.read("view", [b"%d" % number for number in range(1_000)]).count(None))

        reader = threading.Thread(target=reads)
        reader.start()
        for event in range(2, 12):
            write(store, *(Row(b"%d" % number, event) for number in range(1_000)))
        done.set()
        reader.join()

        assert missing
        assert set(missing) == {0}


# --- the driver's errors -----------------------------------------------------------------------------------------------


def driver_errors() -> dict[str, type[Exception]]:
    return {
        name: found
        for name, found in vars(driver).items()
        if inspect.isclass(found) and issubclass(found, Exception) and not name.startswith("_")
    }


def test_every_public_error_of_the_driver_is_on_exactly_one_list() -> None:
    lists = (REFUSED_NAMES, FULL_NAMES, TRANSIENT_NAMES, OTHER)

    # A class that one version of the driver lacks is no harm; a new one has to be put on a list.
    assert set(driver_errors()) <= set.union(*lists)
    assert sum(map(len, lists)) == len(set.union(*lists))


@pytest.mark.parametrize("name", sorted(driver_errors()))
def test_every_public_error_of_the_driver_is_translated_as_its_list_says(name: str) -> None:
    store = RedisStore(f"redis://:{PASSWORD}@127.0.0.1:1/0")
    found = driver_errors()[name]
    expected = UnavailableError if name in TRANSIENT_NAMES else OnlineStoreError
    expected = StoreFullError if name in FULL_NAMES else expected
    assert issubclass(found, FULL) == (name in FULL_NAMES)
    assert issubclass(found, REFUSED) == (name in REFUSED_NAMES)
    assert issubclass(found, TRANSIENT) == (name in TRANSIENT_NAMES) or name in REFUSED_NAMES

    if not issubclass(found, driver.RedisError):
        pytest.skip("raised by a cluster client or a child process only, which are not used")
    with pytest.raises(OnlineStoreError) as caught, translated("test", store.address):
        raise found("1 127.0.0.1:1" if issubclass(found, driver.AskError) else "it went wrong")
    assert type(caught.value) is expected
    assert "redis://***@127.0.0.1:1/0" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1/0?prefix=a*b",
        "redis://127.0.0.1/0?prefix=a{b}",
        "redis://127.0.0.1/0?timeout=0",
        "redis://127.0.0.1/0?timeout=soon",
        f"redis://:{PASSWORD}@127.0.0.1/0?prefix=a b",
    ],
)
def test_wrong_options_are_told_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match="expected") as caught:
        RedisStore(url)

    assert PASSWORD not in told(caught.value)


def test_opening_and_closing_touch_no_network() -> None:
    store = RedisStore("redis://192.0.2.1:1/0")
    store.close()
    store.close()


def test_tombstones_survive_the_way_there_and_back(valkey: servers.Server) -> None:
    with RedisStore(valkey.url) as store:
        store.replace("view", make_batch([Row(b"k", None, payload=b"")], floor=AT), at=AT, retention=FOREVER)

        (record,) = store.read("view", [b"k"])

        assert record is not None
        assert record[1] & TOMBSTONE


@pytest.mark.server
@pytest.mark.parametrize("kind", servers.KINDS)
def test_a_scan_does_not_go_on_after_the_server_restarted(kind: str) -> None:
    """Another process has another hash: its cursors mean other places, and keys would be missed."""
    if servers.binary(kind) is None:
        pytest.skip(f"no {kind}")
    rows = [Row(b"%d" % number) for number in range(10_000)]
    with servers.running(kind, "--enable-debug-command", "yes") as server, RedisStore(server.url) as store:
        write(store, *rows)
        scan = store.scan("view")
        next(scan)
        with suppress(redis.ConnectionError):
            server.client.execute_command("DEBUG", "RESTART")
        assert servers._ready(server.process, server.client)
        assert server.client.dbsize() == 0
        with RedisStore(server.url) as another:
            write(another, *rows)

        with pytest.raises(UnavailableError, match="scan feature view 'view'"):
            for _ in scan:
                pass
        assert len(content(store)) == len(rows)


def test_a_store_that_outlives_many_runs_has_a_probe_for_each(server: servers.Server) -> None:
    """A pool of the driver's makes a hundred connections at most, and one that is not given back counts for ever."""
    with RedisStore(server.url) as store:
        for _ in range(150):
            probe = store.open_probe("view")
            probe.close()

        assert store.read("view", [b"a"]) == [None]
        assert store.read_cell("view", "watermark") is None
        assert store.compare_and_set_cell("view", "watermark", None, b"{}")
