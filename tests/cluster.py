"""A real cluster of three primaries on free loopback ports, its slots spread evenly; and ways to move slots. Ended by process id."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests import servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

__all__ = ["SLOTS", "Cluster", "call", "running", "wait_until"]

SLOTS = 16_384
#: Seconds in which a cluster of a few servers agrees, or a slot is moved.
SECONDS = 30.0
#: Milliseconds after which a server that does not answer is taken for dead: soon where a replica shall take over, else later than a
#: busy machine lets servers wait.
NODE_TIMEOUT, PATIENT_TIMEOUT = 2_000, 15_000


@dataclass(slots=True)
class Cluster:
    """Running servers of one cluster; the first three were given the slots."""

    servers: list[servers.Server]
    bus: dict[int, int]
    credentials: str = ""
    tls: list[int] = field(default_factory=list)
    ids: dict[int, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"redis+cluster://{self.credentials}{','.join(f'127.0.0.1:{one.port}' for one in self.servers[:3])}"

    def id_of(self, server: servers.Server) -> str:
        if server.port not in self.ids:
            self.ids[server.port] = call(server, "MYID").decode()
        return self.ids[server.port]

    def primaries(self) -> list[servers.Server]:
        return [
            one
            for one in self.servers
            if one.process.poll() is None and one.client.info("replication")["role"] == "master"
        ]

    def owner_of(self, slot: int) -> servers.Server:
        alive = next(one for one in self.servers if one.process.poll() is None)
        for low, high, owner, *_ in call(alive, "SLOTS"):
            if low <= slot <= high:
                return next(one for one in self.servers if one.port == owner[1])
        raise AssertionError(f"no server owns slot {slot}")

    def owns(self, server: servers.Server, slot: int) -> bool:
        return slot < SLOTS and self.owner_of(slot) is server

    def after(self, server: servers.Server) -> servers.Server:
        """The next one, round and round."""
        return self.servers[(self.servers.index(server) + 1) % len(self.servers)]

    def flush(self) -> None:
        for one in self.primaries():
            one.client.flushall()

    def names(self) -> set[bytes]:
        return {name for one in self.primaries() for name in one.client.keys()}  # noqa: SIM118 - the command

    def open_slot(self, slot: int, target: servers.Server) -> servers.Server:
        """Begin to move *slot* key by key. Returns: its owner."""
        source = self.owner_of(slot)
        call(target, "SETSLOT", slot, "IMPORTING", self.id_of(source))
        call(source, "SETSLOT", slot, "MIGRATING", self.id_of(target))
        return source

    def move_keys(self, slot: int, source: servers.Server, target: servers.Server, most: int = 1_000) -> int:
        """Move some keys of an open slot. Returns: how many."""
        names = call(source, "GETKEYSINSLOT", slot, most)
        if names:
            source.client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *names)
        return len(names)

    def close_slot(self, slot: int, source: servers.Server, target: servers.Server) -> None:
        for one in (target, source, *self.primaries()):
            call(one, "SETSLOT", slot, "NODE", self.id_of(target))

    def migrate(self, low: int, high: int, source: servers.Server, target: servers.Server) -> None:
        """Move slots at once, by Valkey 9's atomic migration."""
        call(source, "MIGRATESLOTS", "SLOTSRANGE", low, high, "NODE", self.id_of(target))
        wait_until(lambda: self.owner_of(low) is target and self.owner_of(high) is target, "slots have moved")

    def agree(self) -> None:
        """Wait until every server that runs says that all is well, with the same owners and epochs."""
        alive = [one for one in self.servers if one.process.poll() is None]

        def agreed() -> bool:
            states = [b"cluster_state:ok" in bytes(_raw(one, "CLUSTER", "INFO")) for one in alive]
            return all(states) and len({_owners(one) for one in alive}) == len({_epochs(one) for one in alive}) == 1

        wait_until(agreed, "the cluster agrees")


def wait_until(happened: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.02)


@contextmanager
def running(
    kind: str = "valkey",
    *options: str,
    replicas: int = 0,
    spare: int = 0,
    password: str | None = None,
    tls: Callable[[int], list[str]] | None = None,
) -> Iterator[Cluster]:
    """A fresh, empty cluster: three primaries, *replicas* of the first ones, and *spare* servers without slots.

    *tls*: the options of a server whose TLS port it is given.
    """
    timeout = NODE_TIMEOUT if replicas else PATIENT_TIMEOUT
    with ExitStack() as stack:
        found, bus, ports = list[servers.Server](), dict[int, int](), list[int]()
        for _ in range(3 + replicas + spare):
            port = servers.free_port()
            given = (
                "--cluster-enabled",
                "yes",
                "--cluster-port",
                str(port),
                "--cluster-node-timeout",
                str(timeout),
            )
            secure = servers.free_port()
            given += tuple(tls(secure)) if tls else ()
            one = stack.enter_context(servers.running(kind, *given, *options, password=password))
            ports.append(secure)
            found.append(one)
            bus[one.port] = port
        cluster = Cluster(found, bus, "" if password is None else f":{password}@", ports)
        for number, one in enumerate(found[:3]):
            call(one, "ADDSLOTSRANGE", SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1)
            call(one, "SET-CONFIG-EPOCH", number + 1)
        for one in found[1:]:
            call(found[0], "MEET", "127.0.0.1", ports[found.index(one)] if tls else one.port, bus[one.port])
        wait_until(lambda: all(_known(one) == len(found) for one in found), "all servers know each other")
        for primary, one in zip(found, found[3 : 3 + replicas], strict=False):
            call(one, "REPLICATE", cluster.id_of(primary))
            wait_until(
                lambda one=one: one.client.info("replication").get("master_link_status") == "up", "a replica is up"
            )
        cluster.agree()
        yield cluster


def _raw(server: servers.Server, *words: object) -> Any:
    """The reply as it is; the driver takes apart what CLUSTER says."""
    connection: redis.connection.Connection = server.client.connection_pool.get_connection()
    try:
        connection.send_command(*words)
        return connection.read_response(disable_decoding=True)
    finally:
        server.client.connection_pool.release(connection)


def call(server: servers.Server, *words: object) -> Any:
    return _raw(server, "CLUSTER", *words)


def _known(server: servers.Server) -> int:
    return sum(b"handshake" not in line and b"noaddr" not in line for line in call(server, "NODES").splitlines())


def _owners(server: servers.Server) -> tuple[Any, ...]:
    return tuple(sorted((low, high, owner[1]) for low, high, owner, *_ in call(server, "SLOTS")))


def _epochs(server: servers.Server) -> tuple[tuple[bytes, bytes], ...]:
    """The configuration epoch of each server, as *server* knows it."""
    lines = [line.split() for line in call(server, "NODES").splitlines()]
    return tuple(sorted((words[0], words[6]) for words in lines))
