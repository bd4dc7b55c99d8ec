"""Redis and Valkey, one server: guarded writes by one script per hundred rows, requests built by columns.

Keys: ``<prefix>:<view>:{<entity key>}`` holds a record, ``<prefix>:<view>:<cell>`` a cell. A cell never has an expiry.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from contextlib import contextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import redis
from redis import exceptions as driver
from redis.backoff import NoBackoff
from redis.retry import Retry

from materialize.errors import ConfigError, OnlineStoreError, StoreFullError, UnavailableError
from materialize.model import mask_credentials
from materialize.online.base import EncodedBatch, OnlineStore
from materialize.online.redis.evidence import ask_position, evidence_of, settle
from materialize.online.redis.probe import RedisProbe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from redis.connection import Connection

    from materialize.evidence import Facts
    from materialize.model import Retention
    from materialize.online.base import Outcomes

__all__ = ["RedisStore"]

#: Rows per script call: at 1.5 us a row a call keeps readers waiting 0.15 ms; 4,000 rows raised their median to 7 ms.
ROWS_PER_CALL = 100
#: Bytes per script call, for long values: one call stays below what a reader should wait for.
BYTES_PER_CALL = 256 * 2**10
#: Bytes sent and not yet answered, per connection: enough to keep the server busy, small enough to stop quickly.
BYTES_IN_FLIGHT = 2 * 2**20
#: Keys per MGET when reading and per step of SCAN: about 0.5 ms of the server's time.
KEYS_PER_READ = 1_000
#: Cursors of SCAN among which a scan may begin; more than the buckets of any server's table, of which the low bits count.
CURSORS = 2**40
#: A prefix takes part in patterns of SCAN, so it has no character that means something there.
PREFIX = r"[A-Za-z0-9_.:-]+"
#: Seconds that a run waits for replicas which nobody asked it to wait for.
UNASKED_SECONDS = 1.0
#: Our options in a URL that have a pattern: name, default, pattern, what is expected.
CHECKED = (
    ("replicas", None, r"\d", "how many replicas to wait for, 0 to 9"),
    ("replicas_timeout", "10", r"\d{1,4}(\.\d+)?", "seconds such as 10"),
    ("patience", "30", r"\d{1,4}(\.\d+)?", "seconds such as 30"),
    ("eviction", None, "allow", "'allow', or nothing"),
)
OPTIONS = {"prefix", "timeout", *(name for name, *_ in CHECKED)}
#: What write.lua returns for a key that holds something that is no record.
FOREIGN = ord("3") - ord("0")
#: Driver errors that pass by themselves. Asked in order after `REFUSED`: AuthenticationError is a ConnectionError.
REFUSED = (
    driver.AuthenticationError,
    driver.AuthenticationWrongNumberOfArgsError,
    driver.AuthorizationError,
    driver.NoPermissionError,
)
#: The server has no memory and evicts nothing.
FULL = (driver.OutOfMemoryError,)
TRANSIENT = (
    driver.ConnectionError,
    driver.TimeoutError,
    driver.BusyLoadingError,
    driver.ReadOnlyError,
    driver.TryAgainError,
    driver.ClusterDownError,
    driver.NoScriptError,
    OSError,
)


class RedisStore(OnlineStore):
    """Records as plain string values on one Redis (6.2 or newer) or Valkey server.

    *url*: ``redis://``, ``rediss://`` or ``unix://`` as redis-py reads it; of the query, these are ours: ``prefix`` (default ``fs``),
    ``timeout`` (seconds to connect and to wait for an answer, default 5), ``replicas`` (how many must have what a run wrote before it
    is done), ``replicas_timeout`` (seconds to wait for them, default 10), ``patience`` (seconds to wait while the server has no
    memory, default 30), ``eviction=allow`` (load a server that may evict keys).
    """

    #: A second connection keeps the server busy while the first one's request is built.
    parallel_writes = 2

    def __init__(self, url: str) -> None:
        address, options = _split(url)
        self.location = mask_credentials(address)
        self.prefix, self.timeout = options["prefix"], float(options["timeout"])
        self.replicas = int(options["replicas"]) if "replicas" in options else None
        self.replicas_timeout, self.patience = float(options["replicas_timeout"]), float(options["patience"])
        self.eviction_allowed = options.get("eviction") == "allow"
        self.written: dict[str, int] = {}
        self.lock = threading.Lock()
        self.pool = redis.ConnectionPool.from_url(
            address,
            protocol=2,
            socket_timeout=self.timeout,
            socket_connect_timeout=self.timeout,
            # Every error reaches our caller: the driver would send a whole batch again behind its back.
            retry=Retry(NoBackoff(), 0),
            client_name="materialize",
            driver_info=None,  # CLIENT SETINFO: a right that Redis 7.0 cannot give, and two round trips
        )
        self.client = redis.Redis(connection_pool=self.pool)
        self.write_script = self.client.register_script(_lua("write"))
        self.cell_script = self.client.register_script(_lua("compare_and_set"))

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._write(view, batch, "merge_tie" if tie_wins else "merge", retention)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:  # noqa: ARG002 - in the records
        return self._write(view, batch, "replace", retention)

    def _write(self, view: str, batch: EncodedBatch, mode: str, retention: Retention) -> Outcomes:
        if not len(batch.keys):
            return np.empty(0, dtype=np.uint8)
        subject = f"write {len(batch.keys):,} rows of feature view {view!r} to"
        with self._translated(subject):
            self.client.script_load(self.write_script.script)
            with self._connection() as connection:
                replies = self._pipeline(connection, self._requests(view, batch, mode, retention))
                self._wrote(connection)
        outcomes: Outcomes = np.frombuffer(replies, dtype=np.uint8) - ord("0")
        if foreign := int((outcomes == FOREIGN).sum()):
            raise OnlineStoreError(
                f"could not {subject} {self.location}: found {foreign:,} keys below {self.prefix}:{view}: that hold something else than a record "
                "of format version 1. They were left alone. Give the store a prefix of its own (?prefix=...) or delete these keys."
            )
        return outcomes

    def _requests(self, view: str, batch: EncodedBatch, mode: str, retention: Retention) -> Iterator[bytes]:
        """One RESP request per script call. Keys and values are framed by columns; a request is five slices of the two buffers."""
        keys, key_ends = _framed(batch.keys, before=f"{self.prefix}:{view}:{{".encode(), after=b"}")
        values, value_ends = _framed(batch.values)
        ttl = b"" if retention.ttl_us is None else b"%d" % retention.ttl_us
        options = b"".join(_bulk(part) for part in (mode.encode(), ttl, b"%d" % -(-retention.keep_until_us // 1000)))
        head = b"*%d\r\n$7\r\nEVALSHA\r\n" + _bulk(self.write_script.sha.encode()) + b"$%d\r\n%b\r\n"
        return (
            b"".join(
                (
                    head % (2 * (high - low) + 6, len(str(high - low)), b"%d" % (high - low)),
                    keys[key_ends[low] : key_ends[high]],
                    options,
                    values[value_ends[low] : value_ends[high]],
                )
            )
            for low, high in list(_calls(value_ends))
        )

    def _pipeline(self, connection: Connection, requests: Iterator[bytes]) -> bytes:
        """Send all requests with bounded bytes in flight, one by one while the brake is on, and read every reply, in order."""
        replies: list[bytes] = []
        in_flight: deque[int] = deque()
        sent = self.brake.clock()
        for request in requests:
            window = BYTES_IN_FLIGHT if self.brake.free else 0
            while in_flight and sum(in_flight) + len(request) > window:
                in_flight.popleft()
                replies.append(_read(connection))
            if not in_flight:
                self.brake.rest(self.brake.clock() - sent)
                sent = self.brake.clock()
            connection.send_packed_command([request], check_health=False)  # type: ignore[no-untyped-call]
            in_flight.append(len(request))
        replies += [_read(connection) for _ in in_flight]
        return b"".join(replies)

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        names = [self._key(view, key) for key in keys]
        with self._translated(f"read {len(keys):,} entities of feature view {view!r} from"):
            chunks = (names[low : low + KEYS_PER_READ] for low in range(0, len(names), KEYS_PER_READ))
            replies: list[list[Any]] = [self.client.mget(chunk) for chunk in chunks]
        return [record for reply in replies for record in reply]

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        head, tail = f"{self.prefix}:{view}:{{".encode(), b"}"
        # A cursor is a bucket of the server's hash table. It takes any number, and a scan from any but 0 ends before it saw all.
        cursor, found, records = int(start * CURSORS), [], []  # type: tuple[int, list[Any], list[Any]]
        rounds = 2 if cursor else 1
        while rounds:
            with self._translated(f"scan feature view {view!r} in"):
                cursor, found = self.client.scan(cursor, match=head + b"*}", count=KEYS_PER_READ)
                records = list(self.client.mget(found)) if found else []
            there = [
                (name[len(head) : -len(tail)], record) for name, record in zip(found, records, strict=True) if record
            ]
            if there:
                keys, values = zip(*there, strict=True)
                yield list(keys), list(values)
            rounds -= not cursor

    def read_cell(self, view: str, name: str) -> bytes | None:
        with self._translated(f"read the {name} of feature view {view!r} from"):
            content: Any = self.client.get(self._cell(view, name))
        return None if content is None else bytes(content)

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        with self._translated(f"write the {name} of feature view {view!r} to"):
            done = bool(
                self.cell_script(keys=[self._cell(view, name)], args=[new] if expected is None else [new, expected])
            )
            with self._connection() as connection:
                self._wrote(connection)
            return done

    def evidence(self) -> Facts | None:
        with self._translated("ask what happened to"):
            return {"server": evidence_of(self.client.info())}

    def positions(self) -> dict[str, int]:
        with self.lock:
            written, self.written = self.written, {}
        return written

    def settle(self, view: str) -> str:
        seconds = UNASKED_SECONDS if self.replicas is None else self.replicas_timeout
        with self._translated(f"wait for replicas with feature view {view!r} of"), self._connection() as connection:
            cell, step = self._cell(view, "settled"), self.timeout / 2
            have, wanted = settle(connection, cell, replicas=self.replicas, seconds=seconds, step=step)
        if have >= wanted:
            return ""
        told = f"{have} of {wanted} replicas have it after {seconds:g} s"
        if self.replicas is not None:
            raise UnavailableError(
                f"could not wait for replicas with feature view {view!r} of {self.location}: found that {told}, expected {wanted}"
            )
        return f"{told}: a failover now would take this run back, with its watermark"

    def record_bytes(self, view: str, keys: Sequence[bytes]) -> float | None:
        with self._translated(f"ask for the size of records of feature view {view!r} in"):
            told: list[Any] = [self.client.memory_usage(self._key(view, key)) for key in keys]
        sizes = [size for size in told if size]
        return sum(sizes) / len(sizes) if sizes else None

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection of the pool; given up where a reply may be unread, which must never answer a later request."""
        connection = self.pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        finally:
            self.pool.release(connection)

    def _wrote(self, connection: Connection) -> None:
        """Remember where the writes of *connection* ended."""
        history, offset = ask_position(connection)
        with self.lock:
            self.written[history] = max(offset, self.written.get(history, 0))

    def now_us(self, view: str) -> int:
        with self._translated(f"ask the time for feature view {view!r} of"):
            seconds, microseconds = self.client.time()
        return int(seconds) * 1_000_000 + int(microseconds)

    def open_probe(self, view: str) -> RedisProbe:
        return RedisProbe(self.pool.make_connection(), self._cell(view, "watermark"), self._translated)

    def purge(self, view: str, now_us: int) -> None:
        """Nothing to do: keys carry their own expiry."""

    def describe(self) -> dict[str, str]:
        with self._translated("ask"):
            info = self.client.info()
        kind = "valkey" if info.get("server_name") == "valkey" else "redis"
        version = info.get("valkey_version") or info["redis_version"]
        return {
            "kind": f"{kind} {version}",
            "memory": info["used_memory_human"],
            "maxmemory": info.get("maxmemory_human", "?"),
            "maxmemory_policy": info.get("maxmemory_policy", "?"),
            "role": info["role"],
        }

    def close(self) -> None:
        self.pool.disconnect()

    def _figures(self) -> str:
        """The server's memory and what to do, for a message."""
        try:
            info: dict[str, Any] = self.client.info("memory")
            used, maxmemory = info["used_memory"], info["maxmemory"]
            figures = f"It uses {used:,} of {maxmemory:,} bytes, {max(maxmemory - used, 0):,} are free. "
        except driver.RedisError:
            figures = ""
        return (
            f"{figures}Any part of the batch may be written; the watermark stays. Give the store more memory and run again: "
            "the next run goes on from what is there."
        )

    def _key(self, view: str, entity_key: bytes) -> bytes:
        return b"%b:%b:{%b}" % (self.prefix.encode(), view.encode(), entity_key)

    def _cell(self, view: str, name: str) -> bytes:
        return f"{self.prefix}:{view}:{name}".encode()

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Turn the driver's errors into ours, once, naming what was done and where."""
        try:
            yield
        except REFUSED as error:
            raise OnlineStoreError(
                f"could not {doing} {self.location}: {_first_line(error)}. "
                "Nothing was written. Check the user, the password and the ACL in the store's URL or connection."
            ) from None
        except FULL as error:
            raise StoreFullError(
                f"could not {doing} {self.location}: {_first_line(error)}. {self._figures()}"
            ) from None
        except TRANSIENT as error:
            raise UnavailableError(
                f"could not {doing} {self.location}: {_first_line(error)} (waited at most {self.timeout:g} s)"
            ) from None
        except driver.RedisError as error:
            raise OnlineStoreError(
                f"could not {doing} {self.location}: {_first_line(error)}. Ask the store's operator; running again is harmless."
            ) from None


def _split(url: str) -> tuple[str, dict[str, str]]:
    """The URL without our options, and our options."""
    parts = urlsplit(url)
    query = parse_qsl(parts.query)
    ours = {name: value for name, value in query if name in OPTIONS}
    address = urlunsplit(parts._replace(query=urlencode([item for item in query if item[0] not in ours])))
    subject = f"online store {mask_credentials(address)}"
    prefix, timeout = ours.setdefault("prefix", "fs"), ours.setdefault("timeout", "5")
    if not re.fullmatch(PREFIX, prefix):
        raise ConfigError(f"{subject}: found the prefix {prefix!r}, expected letters, digits, '_', '-', '.' and ':'")
    if not re.fullmatch(r"\d{1,4}(\.\d+)?", timeout) or not float(timeout):
        raise ConfigError(f"{subject}: found the timeout {timeout!r}, expected seconds above 0 such as 5 or 0.5")
    for name, default, pattern, wanted in CHECKED:
        if (found := ours.get(name, default)) is not None:
            if not re.fullmatch(pattern, found):
                raise ConfigError(f"{subject}: found {name}={found!r}, expected {wanted}")
            ours[name] = found
    return address, ours


def _lua(name: str) -> str:
    return (files("materialize.online.redis") / "lua" / f"{name}.lua").read_text()


def _bulk(data: bytes) -> bytes:
    """*data* as a RESP bulk string."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def _framed(
    column: pa.BinaryArray, before: bytes = b"", after: bytes = b""
) -> tuple[memoryview, npt.NDArray[np.int64]]:
    """Every value as a RESP bulk string, one after the other, and the n + 1 positions where they begin and end."""
    sizes = pc.add(pc.binary_length(column), len(before) + len(after))
    parts = (b"$", pc.cast(pc.cast(sizes, pa.string()), pa.binary()), b"\r\n" + before, column, after + b"\r\n", b"")
    framed = pc.binary_join_element_wise(
        *(pa.scalar(part, pa.binary()) if isinstance(part, bytes) else part for part in parts)
    )
    _, offsets, data = framed.buffers()
    return memoryview(data), np.frombuffer(offsets, dtype=np.int32, count=len(framed) + 1).astype(np.int64)


def _calls(ends: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rows into script calls of bounded rows and bytes; a longer value has a call of its own."""
    rows, low = len(ends) - 1, 0
    while low < rows:
        fitting = int(np.searchsorted(ends, ends[low] + BYTES_PER_CALL, side="right")) - 1
        high = min(max(fitting, low + 1), low + ROWS_PER_CALL, rows)
        yield low, high
        low = high


def _read(connection: Connection) -> bytes:
    reply: Any = connection.read_response(disable_decoding=True)
    return bytes(reply)


def _first_line(error: BaseException) -> str:
    return mask_credentials(str(error).partition("\n")[0]) or type(error).__name__
