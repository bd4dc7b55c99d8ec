"""What one Redis server and a cluster have in common: names of keys, waiting for what passes, and what the servers say of themselves.

Keys: ``<prefix>:<view>:{<entity key>}`` holds a record, ``<prefix>:<view>:<cell>`` a cell. A cell never has an expiry.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from redis import exceptions as driver

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.base import OnlineStore
from materialize.online.redis.address import parse
from materialize.online.redis.answers import Patience, passes, translated
from materialize.online.redis.evidence import evidence_of, settle
from materialize.online.redis.framing import read_reply
from materialize.online.redis.routes import KEYS_PER_READ
from materialize.online.redis.serving import reading_of, under
from materialize.online.redis.wire import ThreadWire, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import redis
    from redis.connection import Connection

    from materialize.evidence import Facts
    from materialize.model import FeatureView
    from materialize.online.base import EncodedBatch
    from materialize.online.demand import Demand
    from materialize.online.reading import ReadTerms

__all__ = ["CURSORS", "RedisServers", "apart", "held", "scanned"]

Result = TypeVar("Result")

#: Cursors of SCAN among which a scan may begin; more than the buckets of any server's table, of which the low bits count.
CURSORS = 2**40
#: Seconds that a run waits for replicas which nobody asked it to wait for.
UNASKED_SECONDS = 1.0


class RedisServers(OnlineStore):
    """A store on Redis or Valkey servers; *url*: see `materialize.online.redis.address`. *terms*: for a model server, instead of the URL's.

    Safe to use in the children of a process that has opened it, too: connections are of the process that made them.
    """

    #: Whether a lost connection is waited for, because another server may take over.
    taken_over = False

    def __init__(self, url: str, terms: ReadTerms | None = None) -> None:
        self.address = parse(url) if terms is None else under(terms, parse(url))
        self.reading = reading_of(self.address, ThreadWire, terms)
        self.location, self.prefix = self.address.location, self.address.prefix
        self.eviction_allowed = self.address.eviction_allowed
        self.written: dict[str, int] = {}
        self.lock = threading.Lock()

    @abstractmethod
    def _clients(self) -> dict[str, redis.Redis]:
        """A client of each server that takes writes, by the name of its node. Raises the driver's errors."""

    @abstractmethod
    def _client_of(self, name: bytes) -> Any:
        """A client of the server that has the key *name*. Raises the driver's errors."""

    @abstractmethod
    def _renew(self) -> None:
        """Before something is tried again: forget connections and servers that may be gone."""

    def _settle_cell(self, view: str, node: str) -> bytes:  # noqa: ARG002 - one server has all keys
        """A key on *node* that may be written when waiting for replicas."""
        return self._cell(view, "settled")

    def evidence(self) -> Facts | None:
        return self._patiently(
            "ask what happened to",
            lambda: {node: evidence_of(client.info()) for node, client in self._clients().items()},
        )

    def positions(self) -> dict[str, int]:
        with self.lock:
            written, self.written = self.written, {}
        return written

    def settle(self, view: str) -> str:
        lacking = self._patiently(
            f"wait for replicas with feature view {view!r} of", lambda: self._settled(view), lost=False
        )
        if not lacking:
            return ""
        told = f"{', '.join(lacking)} have it after {self._replica_seconds():g} s"
        if self.address.replicas is not None:
            raise UnavailableError(
                f"could not wait for replicas with feature view {view!r} of {self.location}: found that {told}, "
                f"expected {self.address.replicas}"
            )
        return f"{told}: a failover now would take this run back, with its watermark"

    def _settled(self, view: str) -> list[str]:
        """How many replicas of how many have all, for each server where some lack it."""
        until = time.monotonic() + self._replica_seconds()
        lacking, clients = [], self._clients()
        for node, client in clients.items():
            with held(client.connection_pool) as connection:
                have, wanted = settle(
                    connection,
                    self._settle_cell(view, node),
                    replicas=self.address.replicas,
                    seconds=max(until - time.monotonic(), 0.001),
                    step=self.address.timeout / 2,
                )
            if have < wanted:
                lacking.append(f"{have} of {wanted} replicas" + (f" of {node}" if len(clients) > 1 else ""))
        return lacking

    def _replica_seconds(self) -> float:
        return UNASKED_SECONDS if self.address.replicas is None else self.address.replicas_timeout

    def _wrote(self, history: str, offset: int) -> None:
        """Remember where writes ended."""
        with self.lock:
            self.written[history] = max(offset, self.written.get(history, 0))

    def now_us(self, view: str) -> int:
        """The time of a server's own clock, of the one that has the view's lease, in microseconds since 1970 UTC."""
        seconds, microseconds = self._patiently(
            f"ask the time for feature view {view!r} of", lambda: self._client_of(self._cell(view, "lease")).time()
        )
        return int(seconds) * 1_000_000 + int(microseconds)

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.read_views({view: keys})[view]

    def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        """As `read`, for several views in one round trip to each server that has some of them."""
        return run(self.reading.views(keys, self.hashed))

    def read_names(self, view: str, names: Sequence[bytes]) -> list[bytes | None]:
        """The records of *view* under whole keys."""
        fields = set(range(len(names))) if view in self.hashed else set()
        doing = f"read {len(names):,} entities of feature view {view!r} from"
        return run(self.reading.get(names, lambda: doing, fields=fields))

    def read_cell(self, view: str, name: str) -> bytes | None:
        return run(self.reading.cell(view, name))

    def size(self, view: FeatureView, sample: EncodedBatch, demand: Demand) -> dict[str, Any]:
        """The *sample* is written under names that no view has, and removed by the call that writes it. Its rights are those of runs; where
        they lack, or the server is full, the facts say so and are estimated.
        """
        from materialize.online.redis.sizing import estimated, scratch, sizing, weights

        told, info = dict[str, dict[str, Any]](), dict[str, Any]()
        expires, head, hashed = view.ttl is not None, f"{self.prefix}:{view.name}:", view.name in self.hashed
        subject = f"weigh records of feature view {view.name!r} in"
        try:
            told = self._patiently(subject, lambda: {node: one.info() for node, one in self._clients().items()})
            info = next(iter(told.values()), {})
            replies = self._weigh(scratch(view.name), sample, subject, expires=expires, hashed=hashed)
            weighed = weights(replies, info, expires=expires, hashed=hashed)
        except UnavailableError:
            raise
        except OnlineStoreError as refused:
            weighed = estimated(sample, head, str(refused), info)
        facts = sizing(weighed, told, demand, expires=expires, slots=self._most_slots(subject))
        try:
            online = self.record_bytes(view.name, sample.keys.to_pylist())
        except UnavailableError:
            raise
        except OnlineStoreError:
            online = None
        return facts | {"online_record_bytes": None if online is None else round(online, 1)}

    @abstractmethod
    def _weigh(self, name: str, sample: EncodedBatch, subject: str, *, expires: bool, hashed: bool) -> list[list[int]]:
        """What weigh.lua told of the records of *sample* under the view *name*, in one or several calls."""

    def _most_slots(self, subject: str) -> int | None:  # noqa: ARG002 - one server has all keys
        """The slots of the server of a cluster that has most of them, None for no cluster."""
        return None

    def purge(self, view: str, now_us: int) -> None:
        """Nothing to do: keys carry their own expiry."""

    def describe(self) -> dict[str, str]:
        with translated("ask", self.address):
            told: list[dict[str, Any]] = [client.info() for client in self._clients().values()]
        kinds = {
            f"{'valkey' if info.get('server_name') == 'valkey' else 'redis'} {info.get('valkey_version') or info['redis_version']}"
            for info in told
        }
        return {
            "kind": ", ".join(sorted(kinds)),
            "memory": " + ".join(info["used_memory_human"] for info in told),
            "maxmemory": " + ".join(str(info.get("maxmemory_human", "?")) for info in told),
            "maxmemory_policy": ", ".join(sorted({str(info.get("maxmemory_policy", "?")) for info in told})),
            "role": told[0]["role"] if len(told) == 1 else f"cluster of {len(told)} primaries",
        }

    def _figures(self) -> str:
        """The memory that the servers have and use, for a message."""
        with suppress(driver.RedisError, OSError):
            told: list[dict[str, Any]] = [client.info("memory") for client in self._clients().values()]
            used, most = (sum(int(info[name]) for info in told) for name in ("used_memory", "maxmemory"))
            return f"It uses {used:,} of {most:,} bytes, {max(most - used, 0):,} are free. "
        return ""

    def _patiently(
        self, doing: str, call: Callable[[], Result], *, seconds: float | None = None, lost: bool | None = None
    ) -> Result:
        """What *call* returns, which may be called again while what hinders it passes by itself, until the deadline.

        *seconds*: another deadline. *lost*: whether a lost connection is worth waiting for; not where nobody could tell then whether
        the call took effect.
        """
        patience, results = Patience(self.address.deadline if seconds is None else seconds), list[Result]()
        while not results:
            with self._waiting(doing, patience, lost=lost):
                results.append(call())
        return results[0]

    @contextmanager
    def _waiting(self, doing: str, patience: Patience, *, lost: bool | None = None) -> Iterator[None]:
        """Let what passes by itself pass, a while each time, until *patience* is over; then, and for other errors, raise ours."""
        with translated(doing, self.address, patience, self._figures):
            try:
                yield
            except (driver.RedisError, OSError) as error:
                lost = self.taken_over if lost is None else lost
                if not passes(error, lost=lost) or not patience.wait():
                    raise
                self._renew()

    def _key(self, view: str, entity_key: bytes) -> bytes:
        return b"%b:%b:{%b}" % (self.prefix.encode(), view.encode(), entity_key)

    def _cell(self, view: str, name: str) -> bytes:
        return f"{self.prefix}:{view}:{name}".encode()


def apart(pool: redis.ConnectionPool) -> Connection:
    """A connection as *pool* makes them, beside it: one that the pool made would count among its hundred for ever."""
    connection: Connection = pool.connection_class(**pool.connection_kwargs)
    return connection


@contextmanager
def held(pool: redis.ConnectionPool) -> Iterator[Connection]:
    """A connection of *pool*; given up where a reply may be unread, which must never answer a later request."""
    connection = pool.get_connection()
    try:
        yield connection
    except BaseException:
        connection.disconnect()  # type: ignore[no-untyped-call]
        raise
    finally:
        pool.release(connection)


def scanned(pool: redis.ConnectionPool, pattern: bytes, cursor: int) -> Iterator[list[bytes]]:
    """The names of a server's keys like *pattern*, some at a time, from the bucket *cursor* around.

    All on one connection: after it is lost the server may be another, to which the cursor means another place, so that keys would be
    missed. Raises the driver's error then.
    """
    # A cursor is a bucket of the server's hash table. It takes any number, and a scan from any but 0 ends before it saw all.
    rounds = 2 if cursor else 1
    connection, unread = pool.get_connection(), True
    words = ("MATCH", pattern, "COUNT", KEYS_PER_READ)
    try:
        connection.send_command("SCAN", cursor, *words, check_health=False)  # type: ignore[no-untyped-call]
        while rounds:
            told, names = read_reply(connection)
            cursor = int(told)
            rounds -= not cursor
            unread = rounds > 0
            if unread:  # the server looks for these while the others are used
                connection.send_command("SCAN", cursor, *words, check_health=False)  # type: ignore[no-untyped-call]
            yield names
    finally:
        if unread:
            connection.disconnect()  # type: ignore[no-untyped-call]
        pool.release(connection)
