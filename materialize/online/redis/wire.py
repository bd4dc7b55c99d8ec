"""Requests to several servers in, their replies out, within a time: on connections that no two calls share, and that never hold an unread reply.

What is here once is used twice, by threads and by asyncio: a `Wire` says how to open, send, read and drop, and the rest awaits that. The
wire of threads never waits for an event loop, so `run` gets its result without one.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from redis import exceptions as driver
from redis.connection import Connection, SSLConnection

from materialize.online.redis.framing import command, read_reply

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence

    from materialize.online.redis.address import Address
    from materialize.online.redis.topology import Node

__all__ = ["HERE", "Call", "Lane", "ThreadWire", "Wire", "dials", "run"]

Result = TypeVar("Result")

#: Stands for the one server of a URL.
HERE: Node = ("", 0)
#: A socket waits for ever when it is told 0 seconds, and not at all when it is told less.
SHORTEST = 0.001
READONLY = command(b"READONLY")


@dataclass(frozen=True, slots=True)
class Call:
    """Whole requests to *node*, one after the other, that get so many *replies*."""

    node: Node
    request: bytes
    replies: int = 1


@dataclass(slots=True)
class Lane:
    """One call under way. ``replies``: what came, or in the place of a reply the driver's error.

    ``reused``: the connection had served before, so its loss says nothing about the server.
    """

    call: Call
    connection: Any = None
    reused: bool = False
    replies: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Dials:
    """How connections are opened. ``options``: keyword arguments of the driver's connections. ``kind``: the driver's class.

    ``here``: the options know the server. ``readonly``: a replica in a cluster shall answer by itself. ``moving``: behind the name of
    a server may be another one the next time, so that whoever closes a connection has to be told. Seconds as in `ReadTerms`.
    """

    kind: Any
    options: dict[str, Any] = field(repr=False)
    connect: float
    read: float
    here: bool = False
    readonly: bool = False
    moving: bool = False


def dials(address: Address, *, readonly: bool = False, sentinels: bool = False) -> Dials:
    """How to reach the servers of *address*, or its sentinels."""
    options = dict(address.sentinel if sentinels else address.driver)
    kind = options.pop("connection_class", SSLConnection if options.pop("ssl", False) else Connection)
    if here := address.kind == "single":
        return Dials(kind, options, options["socket_connect_timeout"], address.timeout, here=here)
    lacking = {"host", "port", "db"} if address.kind == "cluster" or sentinels else {"host", "port"}
    options = {name: value for name, value in options.items() if name not in lacking}
    readonly = readonly and address.kind == "cluster"
    return Dials(
        kind,
        options,
        options["socket_connect_timeout"],
        address.timeout,
        readonly=readonly,
        moving=address.kind == "sentinel",
    )


class Wire(ABC):
    """Connections to servers that nobody uses at the moment, and calls on them.

    As many are open as calls were under way at once; none waits for another. A connection goes back only when each reply was read: after
    an error, a timeout, an interrupt or a cancelled task it is closed. After a fork the child opens its own.
    """

    def __init__(self, dials: Dials) -> None:
        self.dials = dials
        self.pid = os.getpid()
        self._idle: dict[Node, list[Any]] = {}

    @abstractmethod
    async def _open(self, node: Node, seconds: float, read: float) -> Any:
        """A new connection; *seconds* until it is open, *read* for each answer of its greeting. Raises the driver's errors."""

    @abstractmethod
    async def _send(self, connection: Any, request: bytes, seconds: float) -> None:
        """Raises the driver's errors."""

    @abstractmethod
    async def _reply(self, connection: Any, seconds: float) -> Any:
        """The next reply, bytes where it is text. Raises the driver's errors, and that which is the reply."""

    @abstractmethod
    async def _quiet(self, connection: Any) -> bool:
        """Whether the connection is open and has nothing to be read. Raises the driver's errors."""

    @abstractmethod
    def _drop(self, connection: Any) -> None:
        """Close the connection, at once."""

    @abstractmethod
    async def pause(self, seconds: float) -> None:
        """Wait."""

    async def exchange(
        self, calls: Iterable[Call], until: float, *, fresh: bool = False, share: float = 1.0
    ) -> list[Lane]:
        """Send all calls, then read all replies: the servers work at the same time. Nothing is awaited after *until*, of `time.monotonic`.

        *fresh*: on new connections. *share*: how much of the time that is left opening one may take. Raises nothing but what interrupts:
        errors stand in the place of replies.
        """
        lanes = [Lane(call) for call in calls]
        try:
            for lane in lanes:
                await self._begin(lane, until, fresh=fresh, share=share)
            for lane in lanes:
                await self._finish(lane, until)
        finally:
            for lane in lanes:
                if lane.connection is not None:  # with replies that were not read
                    self._drop(lane.connection)
        return lanes

    async def _begin(self, lane: Lane, until: float, *, fresh: bool, share: float) -> None:
        try:
            if not (fresh or await self._take(lane)):
                fresh = True
            if fresh:
                left = (until - time.monotonic()) * share
                lane.connection = await self._open(
                    lane.call.node,
                    max(min(self.dials.connect, left), SHORTEST),
                    max(min(self.dials.read, left), SHORTEST),
                )
            await self._send(lane.connection, lane.call.request, self._seconds(until))
        except (driver.RedisError, OSError) as error:
            self._lose(lane, error)

    async def _take(self, lane: Lane) -> bool:
        """Give the lane a connection that is open already; whether there was one."""
        if self.pid != os.getpid():
            # The parent's: to close them here takes nothing from it, but nothing may be sent. The driver closes them without a word.
            self.pid, self._idle = os.getpid(), {}
        idle = self._idle.get(lane.call.node)
        while idle:
            try:
                connection = idle.pop()
            except IndexError:  # another thread was faster
                return False
            try:
                if await self._quiet(connection):
                    lane.connection, lane.reused = connection, True
                    return True
            except (driver.RedisError, OSError):
                pass
            self._drop(connection)
            if self.dials.moving:
                lane.reused = True
                raise driver.ConnectionError("the server closed the connection")
        return False

    async def _finish(self, lane: Lane, until: float) -> None:
        try:
            while len(lane.replies) < lane.call.replies:
                try:
                    lane.replies.append(await self._reply(lane.connection, self._seconds(until)))
                except driver.ResponseError as error:  # noqa: PERF203 - a handful of replies
                    lane.replies.append(error)
        except (driver.RedisError, OSError) as error:
            self._lose(lane, error)
        if lane.connection is not None:
            connection, lane.connection = lane.connection, None
            self._idle.setdefault(lane.call.node, []).append(connection)

    def _seconds(self, until: float) -> float:
        return max(min(self.dials.read, until - time.monotonic()), SHORTEST)

    def _lose(self, lane: Lane, error: Exception) -> None:
        """A lost connection answers all that is left with its error."""
        if lane.connection is not None:
            self._drop(lane.connection)
            lane.connection = None
        lane.replies += [error] * (lane.call.replies - len(lane.replies))

    def forget(self, nodes: Sequence[Node] | None = None) -> None:
        """Close the connections to *nodes*, or all, that nobody uses."""
        for node in list(self._idle) if nodes is None else nodes:
            idle = self._idle.pop(node, [])
            while idle:
                self._drop(idle.pop())


class ThreadWire(Wire):
    """For threads: blocks the one that calls."""

    async def _open(self, node: Node, seconds: float, read: float) -> Any:
        where = {} if self.dials.here else {"host": node[0], "port": node[1]}
        connection = self.dials.kind(**self.dials.options, **where)
        connection.socket_connect_timeout, connection.socket_timeout = seconds, read
        connection.connect()
        if self.dials.readonly:
            connection.send_packed_command([READONLY], check_health=False)
            read_reply(connection)
        connection.update_current_socket_timeout(self.dials.read)  # for what will be sent
        return connection

    async def _send(self, connection: Any, request: bytes, seconds: float) -> None:  # noqa: ARG002 - its own, since it was opened
        connection.send_packed_command([request], check_health=False)

    async def _reply(self, connection: Any, seconds: float) -> Any:
        return connection.read_response(disable_decoding=True, timeout=seconds)

    async def _quiet(self, connection: Any) -> bool:
        return not connection.can_read()

    def _drop(self, connection: Any) -> None:
        connection.disconnect()

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - a thread's own


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """What *coroutine* returns, which never waits for an event loop because its wire is a `ThreadWire`."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: Result = done.value
        return result
    raise AssertionError("a wire of threads waited for an event loop")
