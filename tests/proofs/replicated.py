"""A primary and its replica behind one address, which a failover moves to the replica: what was not replicated then is lost."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests import servers
from tests.valve import Valve

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import redis
    from typing_extensions import Self

__all__ = ["Pair"]

#: No PING of the primary's own: every byte of its history is a write.
OPTIONS = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "3600")
SECONDS = 60.0


class Pair:
    """``primary`` and ``replica`` are real servers of *kind*; clients use ``door``, the replica copies through ``link``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.primary, self.replica = self._start(), self._start()
        self.door = self.stack.enter_context(Valve(self.primary.port))
        self.link = self.stack.enter_context(Valve(self.primary.port))
        self.replica.client.replicaof("127.0.0.1", self.link.port)
        self.attached()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def _start(self) -> servers.Server:
        return self.stack.enter_context(servers.running(self.kind, *OPTIONS))

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.door.port}/0"

    def asked(self) -> redis.Redis:
        """A client of the primary, past the door."""
        return self.primary.client

    def attached(self) -> None:
        """Wait until the replica follows the primary and has all that it has."""
        self.poll(lambda: self.replica.client.info("replication")["master_link_status"] == "up")
        self.in_step()

    def offset(self, server: servers.Server) -> int:
        return int(server.client.info("replication")["master_repl_offset"])

    def in_step(self) -> None:
        """Wait until the replica has all that the primary has."""
        self.poll(lambda: self.offset(self.replica) == self.offset(self.primary))

    def hold(self) -> None:
        """Nothing reaches the replica from now on, and neither server can tell: the connection stands still."""
        self.link.answering.clear()

    def fail_over(self) -> int:
        """Make the replica a primary, give it to clients, kill the old one with SIGKILL and begin to attach a new replica.

        Returns: the bytes of the common history that survive.
        """
        self.replica.client.replicaof("NO", "ONE")
        survived = int(self.replica.client.info("replication")["second_repl_offset"]) - 1
        self.door.target = self.link.target = self.replica.port
        self.primary.process.kill()
        self.primary.process.wait()
        self.link.answering.set()
        self.primary, self.replica = self.replica, self._start()
        self.replica.client.replicaof("127.0.0.1", self.link.port)
        return survived

    @staticmethod
    def poll(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)
