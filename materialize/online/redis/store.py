"""Redis and Valkey, one server: guarded writes by one script per hundred rows, requests built by columns."""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import redis
from redis.sentinel import Sentinel, SentinelConnectionPool

from materialize.online.redis.answers import Patience, translated
from materialize.online.redis.evidence import ask_position
from materialize.online.redis.framing import (
    bulk,
    lua,
    outcomes_of,
    read_reply,
    weigh_script,
    write_options,
    write_script,
)
from materialize.online.redis.probe import RedisProbe
from materialize.online.redis.shared import CURSORS, RedisServers, apart, held, scanned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from redis.connection import Connection

    from materialize.model import Retention
    from materialize.online.base import EncodedBatch, Outcomes
    from materialize.online.reading import ReadTerms
    from materialize.online.redis.address import Address

__all__ = ["BYTES_IN_FLIGHT", "RedisStore"]

#: Bytes sent and not yet answered, per connection: enough to keep the server busy, small enough to stop quickly.
BYTES_IN_FLIGHT = 2 * 2**20


class RedisStore(RedisServers):
    """Records as strings, of views in ``hashed`` in hashes, on one Redis (6.2 or newer) or Valkey, or on the primary that sentinels name.

    *url*: see `materialize.online.redis.address`. What passes by itself (a server that starts, is failed over or runs a long script) is
    waited for until the deadline of the URL, in reads for its timeout; so is a lost connection where sentinels will name another
    server. One server that does not answer is told at once.
    """

    #: A second connection keeps the server busy while the first one's request is built.
    parallel_writes = 2

    def __init__(self, url: str, terms: ReadTerms | None = None) -> None:
        super().__init__(url, terms)
        self.taken_over = self.address.kind == "sentinel"
        self.pool = _pool(self.address)
        self.client = redis.Redis(connection_pool=self.pool)
        self.write_script = self.client.register_script(write_script("vector"))
        self.hash_script = self.client.register_script(write_script("hash"))
        self.cell_script = self.client.register_script(lua("compare_and_set"))

    def _clients(self) -> dict[str, redis.Redis]:
        return {"server": self.client}

    def _client_of(self, name: bytes) -> redis.Redis:  # noqa: ARG002 - one server has all keys
        return self.client

    def _renew(self) -> None:
        # What stands before the server may lead to another one now.
        self.pool.disconnect(inuse_connections=False)

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._write(view, batch, "merge_tie" if tie_wins else "merge", retention)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:  # noqa: ARG002 - in the records
        return self._write(view, batch, "replace", retention)

    def _write(self, view: str, batch: EncodedBatch, mode: str, retention: Retention) -> Outcomes:
        """Without a script where no key of a call is there, else by it."""
        import numpy as np

        from materialize.online.redis.columns import absent_requests, columns_of, in_turn

        subject, name = f"write {len(batch.keys):,} rows of feature view {view!r} to", f"{self.prefix}:{view}"
        hashed, options = view in self.hashed, write_options(mode, retention)
        script = self.hash_script if hashed else self.write_script
        may_be_absent = retention.ttl_us is None and not batch.tombstone and not hashed
        patience, told = Patience(self.address.deadline), b""
        while len(told) < len(batch.keys):
            with self._waiting(subject, patience):
                self.client.script_load(script.script)
                with held(self.pool) as connection:
                    outcomes = np.zeros(len(batch.keys), dtype=np.uint8)
                    for calls in in_turn(batch) if may_be_absent else ():
                        stored = self._pipeline(connection, absent_requests(batch, name, calls))
                        for (low, high), done in zip(calls, stored, strict=True):
                            outcomes[low:high] = ord("1") * done
                        if not stored[0]:
                            break
                    if len(left := np.flatnonzero(outcomes == 0)):
                        some = batch if len(left) == len(outcomes) else batch.take(left)
                        columns = columns_of(name, some, hashed=hashed)
                        replies = self._pipeline(connection, columns.requests(bulk(script.sha.encode()), options))
                        outcomes[left] = np.frombuffer(b"".join(replies), dtype=np.uint8)
                    # Asked on the same connection, so it is the same server that took them.
                    self._wrote(*ask_position(connection))
                    told = outcomes.tobytes()
        return outcomes_of(told, subject, self.location, name)

    def _pipeline(self, connection: Connection, requests: Iterable[bytes | memoryview]) -> list[Any]:
        """Send all requests with bounded bytes in flight, one by one while the brake is on, and read every reply, in order."""
        replies: list[Any] = []
        in_flight: deque[int] = deque()
        sent = self.brake.clock()
        for request in requests:
            window = BYTES_IN_FLIGHT if self.brake.free else 0
            while in_flight and sum(in_flight) + len(request) > window:
                in_flight.popleft()
                replies.append(read_reply(connection))
            if not in_flight:
                self.brake.rest(self.brake.clock() - sent)
                sent = self.brake.clock()
            connection.send_packed_command([request], check_health=False)  # type: ignore[no-untyped-call]
            in_flight.append(len(request))
        replies += [read_reply(connection) for _ in in_flight]
        return replies

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        head, tail = f"{self.prefix}:{view}:{{".encode(), b"}"
        with translated(f"scan feature view {view!r} in", self.address):
            for names in scanned(self.pool, head + b"*}", int(start * CURSORS)):
                records = self.read_names(view, names)
                there = [
                    (name[len(head) : -len(tail)], record)
                    for name, record in zip(names, records, strict=True)
                    if record
                ]
                if there:
                    found, values = zip(*there, strict=True)
                    yield list(found), list(values)

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        arguments = [new] if expected is None else [new, expected]

        def written() -> bool:
            done = bool(self.cell_script(keys=[self._cell(view, name)], args=arguments))
            with held(self.pool) as connection:
                self._wrote(*ask_position(connection))
            return done

        # Once a connection is lost nobody knows whether the cell was written: asking again could take our own write for another's.
        return self._patiently(f"write the {name} of feature view {view!r} to", written, lost=False)

    def record_bytes(self, view: str, keys: Sequence[bytes]) -> float | None:
        sizes: list[Any] = self._patiently(
            f"ask for the size of records of feature view {view!r} in",
            # All fields of a hash are weighed, not a few: one is much longer than the others.
            lambda: [self.client.memory_usage(self._key(view, key), samples=0) for key in keys],
        )
        there = [size for size in sizes if size]
        return sum(there) / len(there) if there else None

    def _weigh(self, name: str, sample: EncodedBatch, subject: str, *, expires: bool, hashed: bool) -> list[list[int]]:
        from materialize.online.redis.columns import BYTES_PER_CALL, WORDS_PER_CALL
        from materialize.online.redis.hashes import weigh_words
        from materialize.online.redis.sizing import EXPIRY_MS, ROWS

        script, expiry = self.client.register_script(weigh_script()), EXPIRY_MS if expires else ""
        keys = [self._key(name, key) for key in sample.keys.to_pylist()]
        (rows, shared), replies = weigh_words(sample, hashed=hashed), list[list[int]]()
        longest = max(sum(map(len, words)) for words in rows)
        most = max(1, min(ROWS, WORDS_PER_CALL // len(rows[0]), BYTES_PER_CALL // longest))
        for low in range(0, len(keys), most):
            values = chain.from_iterable(rows[low : low + most])
            call = partial(script, keys=keys[low : low + most], args=[expiry, *shared, *values])
            replies += [self._patiently(subject, call)]
        return replies

    def open_probe(self, view: str) -> RedisProbe:
        return RedisProbe(apart(self.pool), self._cell(view, "watermark"), self.address)

    def close(self) -> None:
        self.reading.close()
        self.pool.disconnect()


def _pool(address: Address) -> redis.ConnectionPool:
    """Connections to the server, or to the primary that the sentinels name each time one is opened."""
    if address.kind == "single":
        return redis.ConnectionPool(**address.driver)
    sentinels: Any = Sentinel(list(address.hosts), sentinel_kwargs=address.sentinel)  # type: ignore[no-untyped-call]
    options = {
        name: value for name, value in address.driver.items() if name not in {"host", "port", "connection_class"}
    }
    pool: redis.ConnectionPool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
        address.service, sentinels, ssl=bool(address.sentinel["ssl"]), **options
    )
    return pool
