"""Calls to the servers of a cluster in, their replies out: pipelined to all at once, redirected and repeated until a deadline."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis import exceptions as driver

from materialize.online.redis.answers import LOST, REFUSED, passes
from materialize.online.redis.framing import command, read_reply
from materialize.online.redis.store import BYTES_IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from materialize.online.redis.answers import Patience
    from materialize.online.redis.topology import Node, Topology, TopologyKeeper

__all__ = ["Call", "each", "exchange"]

#: Calls sent and not yet answered, per connection: their replies wait in the server's memory.
CALLS_IN_FLIGHT = 500
#: Bytes that are gathered for one write to the socket.
BYTES_PER_SEND = 64 * 2**10
#: Rounds of redirects that are followed without a pause: MOVED may be followed by ASK.
QUICK_ROUNDS = 2
#: What a script says when a key is not its server's any more; without a class of the driver's own.
NOT_LOCAL = "non local key"


@dataclass(frozen=True, slots=True)
class Call:
    """One request and the rows it is for; *asking*: the server takes it although the slot is still on its way there."""

    rows: Any
    request: bytes
    asking: bool = False


class Lane:
    """One connection to one server, with what was sent and not yet answered."""

    def __init__(self, keeper: TopologyKeeper, node: Node, calls: Iterator[Call], first: bytes) -> None:
        self.pool, self.node, self.calls, self.first = keeper.pool(node), node, calls, first
        self.sent: deque[tuple[Call, int]] = deque()
        self.waiting: Call | None = None
        self.in_flight = 0
        self.connection: Any = None
        self.done = False

    def step(self) -> Iterator[tuple[Call, Any]]:
        """Send some, or read one reply. A lost connection answers all that is left with its error."""
        try:
            if self.connection is None:
                self.connection = self.pool.get_connection()
                self._first()
            if self._send():
                return
            if not self.sent:
                self.done = True
                return
            call, size = self.sent[0]
            reply = self._reply(call)
            self.sent.popleft()
            self.in_flight -= size
            yield call, reply
        except REFUSED:
            raise
        except LOST as error:
            self.done = True
            left = [call for call, _ in self.sent] + ([self.waiting] if self.waiting else []) + list(self.calls)
            self.sent.clear()
            self.close(broken=True)
            for call in left:
                yield call, error

    def _first(self) -> None:
        if self.first:
            self.connection.send_packed_command([self.first], check_health=False)
            if isinstance(answer := self._answer(), REFUSED):
                raise answer

    def _send(self) -> int:
        """Send as much as may be in flight, in one write; how much it was."""
        gathered, size = [], 0
        while size < BYTES_PER_SEND and len(self.sent) < CALLS_IN_FLIGHT:
            call = self.waiting or next(self.calls, None)
            self.waiting = call
            if call is None or (self.sent and self.in_flight + len(call.request) > BYTES_IN_FLIGHT):
                break
            if call.asking:
                gathered.append(command(b"ASKING"))
            gathered.append(call.request)
            self.sent.append((call, len(call.request)))
            self.in_flight += len(call.request)
            size += len(call.request)
            self.waiting = None
        if gathered:
            self.connection.send_packed_command([b"".join(gathered)], check_health=False)
        return size

    def _reply(self, call: Call) -> Any:
        if call.asking:
            self._answer()
        return self._answer()

    def _answer(self) -> Any:
        try:
            return read_reply(self.connection)
        except driver.ResponseError as error:
            return error

    def close(self, *, broken: bool = False) -> None:
        if self.connection is None:
            return
        if broken or self.sent:
            self.connection.disconnect()  # unread replies must never answer a later request
        self.pool.release(self.connection)
        self.connection = None


def exchange(
    keeper: TopologyKeeper, calls: Mapping[Node, Iterator[Call]], first: bytes = b""
) -> Iterator[tuple[Node, Call, Any]]:
    """Every call with its reply or the error in its place, from all servers at once; *first* is sent to each before the others.

    Raises the driver's error when a server refuses us.
    """
    lanes = [Lane(keeper, node, some, first) for node, some in calls.items()]
    try:
        turns = deque(lanes)
        while turns:
            lane = turns.popleft()
            for call, reply in lane.step():
                yield lane.node, call, reply
            if not lane.done:
                turns.append(lane)
    finally:
        for lane in lanes:
            lane.close()


def each(
    keeper: TopologyKeeper,
    slots: npt.NDArray[Any],
    request: Callable[[int], bytes],
    patience: Patience,
    first: bytes = b"",
) -> list[Any]:
    """The reply to ``request(row)``, a command with one key, of every row, from whoever owns its slot in *slots*.

    Follows MOVED and ASK, and asks again, from a fresh topology, what passes by itself or got no answer, until *patience* is over.
    Raises the driver's last error then, and other errors at once.
    """
    replies: list[Any] = [None] * len(slots)
    asks: dict[int, Node] = {}
    pending: Sequence[int] = range(len(slots))
    rounds = 0
    while pending:
        topology = keeper.topology()
        errors: dict[int, tuple[Node | None, Exception]] = {}
        calls: dict[Node, list[Call]] = {}
        for row in pending:
            node = asks.get(row) or topology.owner_of(int(slots[row]))
            if node is None:
                errors[row] = (None, driver.ClusterDownError(f"no server owns the hash slot {int(slots[row])}"))
                continue
            calls.setdefault(node, []).append(Call(row, request(row), asking=row in asks))
        for node, call, reply in exchange(keeper, {node: iter(some) for node, some in calls.items()}, first):
            if isinstance(reply, Exception):
                errors[call.rows] = (node, reply)
            else:
                replies[call.rows] = reply
        pending, rounds = sorted(errors), rounds + 1
        asks = _settle(keeper, topology, errors, slots, patience, quick=rounds <= QUICK_ROUNDS)
    return replies


def _settle(
    keeper: TopologyKeeper,
    topology: Topology,
    errors: Mapping[int, tuple[Node | None, Exception]],
    slots: npt.NDArray[Any],
    patience: Patience,
    *,
    quick: bool,
) -> dict[int, Node]:
    """Learn from *errors*, and wait where waiting helps. Returns: where to ask for which row in spite of its slot's owner."""
    asks: dict[int, Node] = {}
    moved: dict[int, Node] = {}
    last, waits = None, not quick  # type: Exception | None, bool
    for row, (node, error) in errors.items():
        last = error
        if isinstance(error, driver.AskError):
            # MovedError is an AskError. An address without a host is the host that was asked.
            to = (error.host or (node[0] if node else ""), int(error.port))
            if isinstance(error, driver.MovedError):
                moved[int(slots[row])] = to
            else:
                asks[row] = to
        elif passes(error, lost=True) or NOT_LOCAL in str(error):
            waits = True
        else:
            raise error
    if last is not None and ((waits and not patience.wait()) or patience.over):
        raise last
    if len(asks) < len(errors):
        try:
            keeper.refreshed(topology)
        except REFUSED:
            raise
        except (driver.RedisError, OSError):
            pass
        for slot, to in moved.items():
            keeper.learn(slot, to)
    return asks
