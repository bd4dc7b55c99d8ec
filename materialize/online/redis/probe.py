"""What a reader of a Redis or Valkey feels: a GET, timed by the server's clock, and how far its replicas are behind."""

from __future__ import annotations

import re
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from redis import exceptions as driver

from materialize.errors import UnavailableError
from materialize.online.pace import Probe
from materialize.online.redis.answers import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from redis.connection import ConnectionInterface

    from materialize.online.redis.address import Address

__all__ = ["RedisProbe", "SlowestProbe"]

#: Seconds after which a clock's offset may have changed, and the shortest way is looked for anew.
EPOCH = 10.0
#: A replica tells its offset each second, so one that keeps up knows what the primary had so many calls of `behind` ago.
TOLD = 2
#: What INFO says of a replica that is connected: its state and the offset that it acknowledged.
REPLICA = re.compile(rb"^slave\d+:.*state=online,offset=(\d+)", re.MULTILINE)
PRIMARY = re.compile(rb"^master_repl_offset:(\d+)", re.MULTILINE)


class RedisProbe(Probe):
    """A GET on a connection of its own, to one server.

    This process is busy encoding: it may notice an answer many milliseconds after it came (measured: a p99 of 16 ms where another
    process had 3 ms). So the server says when it was at the GET (TIME, in the same request); the smallest difference between
    its clock and ours is that of a GET that did not wait, and any other waited by as much longer. The clocks need not agree.
    *connection*: for this probe alone. *key*: one that the server of a cluster has, as far as is known: its redirect takes as long.
    """

    def __init__(self, connection: ConnectionInterface, key: bytes, address: Address) -> None:
        self.connection: Any = connection
        self.address, self.closed = address, False
        self.request = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n*1\r\n$4\r\nTIME\r\n" % (len(key), key)
        self.way, self.trip = _Least(), _Least()
        self.offsets: deque[int] = deque(maxlen=TOLD + 1)

    def read(self) -> float:
        with self._talking("measure the reads of"):
            self.connection.connect()
            sent = time.perf_counter()
            self.connection.send_packed_command([self.request], check_health=False)
            with suppress(driver.AskError):  # or the MovedError, which is one
                self._answer()
            seconds, us = self._answer()
            took = time.perf_counter() - sent
        way = int(seconds) + int(us) / 1e6 - sent
        waited = way - self.way.of(way, sent)
        return min(took, self.trip.of(took, sent) + waited)

    def behind(self) -> int:
        with self._talking("ask for the replicas of"):
            self.connection.send_command("INFO", "replication", check_health=False)
            info = self._answer()
        self.offsets.append(max(map(int, PRIMARY.findall(info)), default=0))
        acknowledged = [int(offset) for offset in REPLICA.findall(info)]
        if not acknowledged or len(self.offsets) <= TOLD:
            return 0
        return max(0, self.offsets[0] - min(acknowledged))

    def close(self) -> None:
        self.closed = True
        self.connection.disconnect()

    def _answer(self) -> Any:
        return self.connection.read_response(disable_decoding=True)

    @contextmanager
    def _talking(self, doing: str) -> Iterator[None]:
        with translated(doing, self.address):
            try:
                yield
            except Exception:
                self.connection.disconnect()  # an answer that was not read must never be that of a later request
                if self.closed:  # the driver stumbles over what it lost meanwhile
                    raise UnavailableError(f"could not {doing} the store: the probe was closed") from None
                raise


class SlowestProbe(Probe):
    """The slowest of several servers, found by *opened* when it is first read."""

    def __init__(self, opened: Callable[[], Sequence[Probe]]) -> None:
        self.opened = opened
        self.probes: Sequence[Probe] = ()

    def read(self) -> float:
        self.probes = self.probes or self.opened()
        return max(probe.read() for probe in self.probes)

    def behind(self) -> int:
        return max(probe.behind() for probe in self.probes)

    def close(self) -> None:
        for probe in self.probes:
            probe.close()


class _Least:
    """The least of the numbers of the last ten to twenty seconds."""

    def __init__(self) -> None:
        self.since, self.before, self.now = float("-inf"), float("inf"), float("inf")

    def of(self, number: float, at: float) -> float:
        """The least, *number* included, which was found at *at*."""
        if at - self.since > EPOCH:
            self.since, self.before, self.now = at, self.now, float("inf")
        self.now = min(self.now, number)
        return min(self.before, self.now)
