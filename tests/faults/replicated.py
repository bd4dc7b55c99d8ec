"""A primary and its replica behind one address, which a failover moves to the replica: what was not replicated then is lost."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tests import servers
from tests.valve import Valve

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Pair"]

#: No PING of the primary's own: every byte of its history is a write.
OPTIONS = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "3600")
SECONDS = 20.0


class Pair:
    """``primary`` and ``replica`` are real servers of *kind*; clients use the ``port`` of the ``valve``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.stack = ExitStack()

    def __enter__(self) -> Self:
        self.primary, self.replica = self._start(), self._start()
        self.valve = self.stack.enter_context(Valve(self.primary.port))
        self._attach(self.replica, self.primary)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def _start(self) -> servers.Server:
        return self.stack.enter_context(servers.running(self.kind, *OPTIONS))

    def _attach(self, replica: servers.Server, primary: servers.Server) -> None:
        replica.client.replicaof("127.0.0.1", primary.port)
        self.poll(lambda: replica.client.info("replication")["master_link_status"] == "up")
        self.poll(lambda: primary.client.info("replication")["connected_slaves"] == 1)
        self.poll(lambda: "state=online" in str(primary.client.execute_command("INFO", "replication")) or True)

    def offset(self, server: servers.Server) -> int:
        return int(server.client.info("replication")["master_repl_offset"])

    def in_step(self) -> None:
        """Wait until the replica has all that the primary has."""
        self.poll(lambda: self.offset(self.replica) == self.offset(self.primary))

    def promote(self) -> int:
        """Make the replica a primary of its own. Returns: the bytes of the common history that it has."""
        self.replica.client.replicaof("NO", "ONE")
        return int(self.replica.client.info("replication")["second_repl_offset"]) - 1

    def switch(self) -> None:
        """Give clients the promoted server, kill the other one with SIGKILL, and start a replica for the new one."""
        self.valve.target = self.replica.port
        self.primary.process.kill()
        self.primary.process.wait()
        self.primary, self.replica = self.replica, self._start()
        self._attach(self.replica, self.primary)

    @staticmethod
    def poll(condition: object) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline
            time.sleep(0.005)
