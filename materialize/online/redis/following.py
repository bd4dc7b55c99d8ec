"""Views in, each change of their records out, as the servers tell it: CLIENT TRACKING in broadcast mode, over RESP3.

redis-py has a cache of its own for this (``cache_config``). It is not used: it refuses Valkey, and Redis before 7.4; it does not remember
that a key is absent; its entry is one command, so that a batch shares nothing with a single read; each hit asks the operating system
whether its connection has news; it has no asyncio.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import redis
from redis import exceptions as driver
from redis.sentinel import Sentinel

from materialize.online.redis.address import parse
from materialize.online.redis.answers import LOST
from materialize.online.redis.topology import ClusterServers, topology_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.online.following import Listener
    from materialize.online.redis.topology import Node

__all__ = ["RedisFollower"]

log = logging.getLogger(__name__)

#: Seconds between two questions to each server that only prove that it is there, still has its place, and that everything it had to
#: tell before was heard: a server answers in order. One that has not answered until the next one is lost.
HEARTBEAT = 1.0
#: Seconds of the first pause before listening is tried again, doubled up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
#: What a message of changes becomes where the driver gives replies.
PUSHED = object()


class RedisFollower:
    """Follows the servers at *url*: the one, the primary that sentinels name, or every primary of a cluster.

    `Listener.ready` is called when all of them tell, `Listener.lost` as soon as one does not: its connection ended, it did not answer for
    two `HEARTBEAT`s at most, another server took its place, or another one has slots. Then all is begun anew.
    """

    def __init__(self, url: str, views: Sequence[str], listener: Listener) -> None:
        self.address, self.listener = parse(url), listener
        prefix = self.address.prefix
        # Records alone: cells of a view, as its lease, change all the time.
        self.heads = [f"{prefix}:{view}:{{".encode() for view in views]
        self.start, self.cell = len(prefix) + 1, f"{prefix}:{views[0]}:watermark"
        self.options: dict[str, Any] = {
            **self.address.driver,
            "protocol": 3,
            "socket_timeout": HEARTBEAT,
            "socket_connect_timeout": min(self.address.timeout, HEARTBEAT),
        }
        seconds = {"socket_timeout": HEARTBEAT, "socket_connect_timeout": HEARTBEAT}
        self.sentinels: Any = None
        if self.address.kind == "sentinel":
            self.sentinels = Sentinel(list(self.address.hosts), sentinel_kwargs=self.address.sentinel | seconds)  # type: ignore[no-untyped-call]
        self.told = ""
        self.connections: dict[Node | None, Any] = {}
        self.changes: list[Any] = []
        self.stop: socket.socket | None = None

    def begin(self) -> None:
        for connection in self.connections.values():
            connection.disconnect()  # a parent's: the driver sends nothing, and closes what this process has of it
        self.connections, self.changes = {}, []
        self.stop, stopped = socket.socketpair()
        threading.Thread(target=self._follow, args=(stopped,), name="materialize-follower", daemon=True).start()

    def close(self) -> None:
        if self.stop is not None:
            self.stop.close()
            self.stop = None

    def _follow(self, stopped: socket.socket) -> None:
        pause = FIRST_PAUSE
        with closing(stopped), selectors.DefaultSelector() as stopping:
            stopping.register(stopped, selectors.EVENT_READ)
            while not stopping.select(0):
                try:
                    self._connect()
                    self.listener.ready()
                    self.told, pause = "", FIRST_PAUSE
                    self._listen(stopped)
                except (driver.RedisError, OSError) as error:
                    self._warn(error)
                finally:
                    self.listener.lost()
                    for connection in self.connections.values():
                        connection.disconnect()
                    self.connections = {}
                stopping.select(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _warn(self, error: Exception) -> None:
        """Tell once what goes wrong, until it goes well or something else goes wrong."""
        if type(error).__name__ != self.told:
            self.told = type(error).__name__
            log.warning(
                "could not follow changes in %s: %s. Nothing is served from the cache until it can be, which is tried again all the time. %s",
                self.address.location,
                self.told,
                "" if isinstance(error, LOST) else "The user needs the rights of: materialize acl --role cache",
            )

    def _connect(self) -> None:
        for node in self._servers():
            where = {} if node is None else {"host": node[0], "port": node[1]}
            connection: Any = redis.ConnectionPool(**self.options | where).make_connection()
            self.connections[node] = connection
            connection.connect()
            connection._get_parser().set_invalidation_push_handler(self._pushed)  # noqa: SLF001 - as the driver's own cache does
            prefixes = [word for head in self.heads for word in ("PREFIX", head)]
            connection.send_command("CLIENT", "TRACKING", "ON", "BCAST", *prefixes, check_health=False)
            connection.read_response()

    def _servers(self) -> list[Node | None]:
        """Who has to tell. None: the one server of the address."""
        if self.sentinels is not None:
            return [self.sentinels.discover_master(self.address.service)]
        if self.address.kind != "cluster":
            return [None]
        self.options.pop("db", None)
        with closing(ClusterServers(self.address)) as servers:
            return [*servers.refreshed(None).primaries]

    def _listen(self, stopped: socket.socket) -> None:
        """Tell what comes, until *stopped*. Raises the driver's errors when a server is lost, or is not the one to listen to."""
        with selectors.DefaultSelector() as sockets:
            sockets.register(stopped, selectors.EVENT_READ, self)
            for node, connection in self.connections.items():
                sockets.register(connection._sock, selectors.EVENT_READ, node)  # noqa: SLF001 - to wait for all at once
            silent: set[Node | None] = set()
            due = time.monotonic() + HEARTBEAT
            while True:
                if time.monotonic() >= due:
                    if silent:
                        raise driver.TimeoutError("no answer")
                    silent, due = self._ask(), time.monotonic() + HEARTBEAT
                for key, _ in sockets.select(max(due - time.monotonic(), 0)):
                    if key.data is self:
                        return
                    silent -= self._hear(key.data, due)

    def _ask(self) -> set[Node | None]:
        """Ask each server for a sign of life; their names."""
        if self.sentinels is not None and set(self._servers()) != set(self.connections):
            raise driver.ConnectionError("another server is the primary")
        words = ("CLUSTER", "SLOTS") if self.address.kind == "cluster" else ("GET", self.cell)
        for connection in self.connections.values():
            connection.send_command(*words, check_health=False)
        return set(self.connections)

    def _hear(self, node: Node | None, due: float) -> set[Node | None]:
        """Read what *node* sent, until the moment *due* at most. Returns: itself, if an answer was among it."""
        answered: set[Node | None] = set()
        connection = self.connections[node]
        while connection.can_read(0) and time.monotonic() < due:
            reply = connection.read_response(disable_decoding=True, push_request=True)
            if reply is not PUSHED:
                answered.add(node)
                if self.address.kind == "cluster" and node is not None:
                    self._check_primaries(reply, node)
            self._tell()
        return answered

    def _check_primaries(self, slots: Any, asked: Node) -> None:
        if set(topology_of(slots, asked).primaries) != set(self.connections):
            raise driver.ConnectionError("other servers have the slots")

    def _pushed(self, message: Any) -> object:
        # The driver swallows what is raised here, so nothing is done here.
        self.changes.append(message[1])
        return PUSHED

    def _tell(self) -> None:
        changes, self.changes = self.changes, []
        for names in changes:
            if names is None:  # everything was deleted
                self.listener.ready()
                continue
            found: dict[str, list[bytes]] = {}
            for name in names:
                view, _, key = name[self.start :].partition(b":")
                found.setdefault(view.decode(), []).append(key[1:-1])
            for view, keys in found.items():
                self.listener.changed(view, keys)
