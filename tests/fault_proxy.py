"""A TCP proxy in front of a real server that does harm at given bytes: cuts, swallows, delays, or calls somebody (who kills).

Positions are bytes, not times, so a seed that gives the positions gives the same harm again, as far as one connection goes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["KINDS", "Fault", "FaultProxy"]

Way = Literal["up", "down"]
Kind = Literal["cut", "reset", "swallow", "late", "delay", "trickle", "call"]

KINDS: tuple[Kind, ...] = ("cut", "reset", "swallow", "late", "delay", "trickle")
CHUNK = 64 * 2**10
#: Seconds of a delay, far below any timeout; bytes that trickle one by one.
DELAY, TRICKLE = 0.02, 40


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens before the byte number *at* of all bytes *way* (up: to the server) passes; or, with *seen*, these bytes.

    cut, reset: the connection ends, orderly or not. swallow: it stays open, but nothing passes this way any more. late: what
    comes waits until more comes the other way, as a reply does that arrives after its reader has given up. delay: it waits a
    little. trickle: bytes pass one by one. call: *call* is called, then all goes on.
    """

    way: Way
    at: int
    kind: Kind
    seen: bytes = b""
    call: Callable[[], None] = lambda: None


class Link:
    """One client's connection and ours to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        #: Bytes that came, by way, and who waits for more of them.
        self.came = {"up": 0, "down": 0}
        self.more = threading.Condition()
        self.over = False

    def end(self, *, reset: bool = False) -> None:
        with self.more:
            self.over = True
            self.more.notify_all()
        for one in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    one.shutdown(socket.SHUT_RDWR)
            one.close()


class FaultProxy:
    """Listens on a free ``port`` and passes what comes to the server at *target*, until a fault is due.

    ``fired``: the faults that happened. ``passed``: bytes by way, of all connections. ``links``: all connections there were.
    """

    def __init__(self, target: int, faults: Iterable[Fault] = ()) -> None:
        self.target = target
        self.faults, self.fired = sorted(faults, key=lambda fault: fault.at), list[Fault]()
        self.passed: dict[Way, int] = {"up": 0, "down": 0}
        self.turn = threading.Lock()
        self.links: list[Link] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for link in self.links:
            link.end()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target))
                for one in (client, server):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.links.append(link := Link(client, server))
                for way in ("up", "down"):
                    threading.Thread(target=self._pass, args=(link, way), daemon=True).start()

    def _pass(self, link: Link, way: Way) -> None:
        source, drain = (link.client, link.server) if way == "up" else (link.server, link.client)
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                with link.more:
                    link.came[way] += len(data)
                    link.more.notify_all()
                while data:
                    now, fault = self._due(way, data)
                    drain.sendall(data[:now])
                    data = data[now:]
                    if fault is not None:
                        data = self._happens(fault, link, data, drain)
        link.end()

    def _due(self, way: Way, data: bytes) -> tuple[int, Fault | None]:
        """How many bytes of *data* pass before the next fault, and that fault."""
        with self.turn:
            for fault in self.faults:
                if fault.way != way:
                    continue
                now = data.find(fault.seen) if fault.seen else max(0, fault.at - self.passed[way])
                if 0 <= now < len(data):
                    self.faults.remove(fault)
                    self.fired.append(fault)
                    self.passed[way] += now
                    return now, fault
            self.passed[way] += len(data)
            return len(data), None

    def _happens(self, fault: Fault, link: Link, data: bytes, drain: socket.socket) -> bytes:
        """Do it. Returns: what of *data* goes on."""
        if fault.kind in ("cut", "reset"):
            link.end(reset=fault.kind == "reset")
        elif fault.kind == "swallow":
            with link.more:  # until the client gives up
                link.more.wait_for(lambda: link.over)
        elif fault.kind == "late":
            other: Way = "down" if fault.way == "up" else "up"
            with link.more:
                seen = link.came[other]
                link.more.wait_for(lambda: link.over or link.came[other] > seen)
        elif fault.kind == "delay":
            time.sleep(DELAY)
        elif fault.kind == "trickle":
            for low in range(min(TRICKLE, len(data))):
                drain.sendall(data[low : low + 1])
            return data[TRICKLE:]
        else:
            fault.call()
        return data
