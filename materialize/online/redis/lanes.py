"""Requests to several servers at once in, their replies out: bounded in flight, one connection to each server."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from redis import exceptions as driver

from materialize.online.pace import Brake
from materialize.online.redis.answers import LOST, REFUSED
from materialize.online.redis.framing import read_reply

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import redis
    from redis.connection import Connection

    from materialize.online.redis.topology import Node

__all__ = ["exchange"]

#: Bytes and requests sent and not yet answered, per connection: replies wait in the server's memory.
BYTES_IN_FLIGHT, REQUESTS_IN_FLIGHT = 2 * 2**20, 1_000


class Lane:
    """One connection to one server, with what was sent and not yet answered."""

    def __init__(self, pool: redis.ConnectionPool, requests: Sequence[bytes]) -> None:
        self.pool, self.requests = pool, requests
        self.replies: list[Any] = []
        self.sent = 0
        self.connection: Connection | None = None

    @property
    def done(self) -> bool:
        return len(self.replies) == len(self.requests)

    def send(self, at_most: int) -> None:
        """Send as much as may be in flight, *at_most* so many requests."""
        some, size = list[bytes](), 0
        for request in self.requests[self.sent : self.sent + at_most]:
            if some and size + len(request) > BYTES_IN_FLIGHT:
                break
            some.append(request)
            size += len(request)
        with self._lost_answers_all():
            if self.connection is None:
                self.connection = self.pool.get_connection()
            self.connection.send_packed_command([b"".join(some)], check_health=False)  # type: ignore[no-untyped-call]
            self.sent += len(some)

    def receive(self) -> None:
        """Read the replies to all that was sent; an error that a server gave in the place of one stands in its place."""
        with self._lost_answers_all():
            while self.connection is not None and len(self.replies) < self.sent:
                try:
                    self.replies.append(read_reply(self.connection))
                except driver.ResponseError as error:  # noqa: PERF203 - a call in the loop costs a hundred rows
                    self.replies.append(error)

    @contextmanager
    def _lost_answers_all(self) -> Iterator[None]:
        """A lost connection answers all that is left with its error."""
        try:
            yield
        except REFUSED:
            raise
        except LOST as error:
            self.close()
            self.replies += [error] * (len(self.requests) - len(self.replies))

    def close(self) -> None:
        if self.connection is None:
            return
        if not self.done:
            self.connection.disconnect()  # type: ignore[no-untyped-call]  # unread replies must never answer a later request
        self.pool.release(self.connection)
        self.connection = None


def exchange(
    pools: Mapping[Node, redis.ConnectionPool], requests: Mapping[Node, Sequence[bytes]], brake: Brake | None = None
) -> dict[Node, list[Any]]:
    """The replies to the *requests* of each server, or the driver's error in the place of one. All servers work at the same time.

    While the *brake* is on, each gets one request at a time, and all rest in between. Raises the driver's error when a server refuses us.
    """
    lanes = {node: Lane(pools[node], some) for node, some in requests.items()}
    brake, busy = brake or Brake(), 0.0
    try:
        while waiting := [lane for lane in lanes.values() if not lane.done]:
            brake.rest(busy)
            began = brake.clock()
            for lane in waiting:
                lane.send(REQUESTS_IN_FLIGHT if brake.free else 1)
            for lane in waiting:
                lane.receive()
            busy = brake.clock() - began
    finally:
        for lane in lanes.values():
            lane.close()
    return {node: lane.replies for node, lane in lanes.items()}
