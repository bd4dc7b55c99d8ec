"""A TCP valve in front of a real server: each connection passes as many bytes as the test lets it, and then stands still."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Valve", "hears"]

CHUNK = 64 * 2**10


class Valve:
    """Listens on a free ``port`` and passes what comes to the server at *target*. Open at first.

    `limit` lets every connection send that many bytes in all, those that stand still too; `open` lets everything pass.
    While ``answering`` is clear, nothing that the server sends passes either.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.allowed = math.inf
        self.sent: list[int] = []
        self.turn = threading.Condition()
        self.answering = threading.Event()
        self.answering.set()
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])

    def limit(self, nbytes: float) -> None:
        with self.turn:
            self.allowed = nbytes
            self.turn.notify_all()

    def open(self) -> None:
        self.limit(math.inf)

    def stuck(self) -> int:
        """How many connections have sent all that they may. Those that were beyond a new limit already do not count."""
        with self.turn:
            return sum(sent == self.allowed for sent in self.sent)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()
        self.answering.set()
        for one in (self.listener, *self.sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.sockets.append(client)
                server = socket.create_connection(("127.0.0.1", self.target))
                self.sockets.append(server)
                self.sent.append(0)
                for way in ((client, server, len(self.sent) - 1), (server, client, None)):
                    threading.Thread(target=self._pass, args=way, daemon=True).start()

    def _pass(self, source: socket.socket, drain: socket.socket, number: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if number is None:
                    self.answering.wait()
                while data:
                    now = len(data) if number is None else self._may(number, len(data))
                    drain.sendall(data[:now])
                    data = data[now:]
        with contextlib.suppress(OSError):
            drain.shutdown(socket.SHUT_WR)

    def _may(self, number: int, wanted: int) -> int:
        """How many of *wanted* bytes a connection may send now; waits until it is one at least."""
        with self.turn:
            self.turn.wait_for(lambda: self.sent[number] < self.allowed)
            now = int(min(wanted, self.allowed - self.sent[number]))
            self.sent[number] += now
            return now


def hears(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal, as Linux sees it."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)
