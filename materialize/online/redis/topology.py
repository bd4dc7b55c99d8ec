"""Who owns which hash slot of a cluster, as its servers tell it; and the connections to each server.

redis-py's own cluster client is not used for this: it follows ASK only to servers that own slots already, touches the network when it
is made, and needs one call of its own per key where a batch has ten thousand.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import redis
from redis import exceptions as driver

from materialize.online.redis.answers import REFUSED
from materialize.online.redis.slots import SLOTS

if TYPE_CHECKING:
    import numpy.typing as npt

    from materialize.online.redis.address import Address

__all__ = ["ClusterServers", "Node", "Topology", "topology_of"]

#: A server's host and port.
Node = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Topology:
    """``primaries``: the servers that own slots. ``owner``: for each slot the place of its owner there, -1 for none.

    ``replicas``: those of each primary, as far as they are known.
    """

    primaries: tuple[Node, ...]
    owner: npt.NDArray[np.int64]
    replicas: tuple[tuple[Node, ...], ...] = ()

    def owner_of(self, slot: int) -> Node | None:
        place = int(self.owner[slot])
        return self.primaries[place] if place >= 0 else None

    def differing(self, other: Topology) -> list[int]:
        """The slots that have another owner in *other*."""
        if self.primaries == other.primaries:
            return [int(slot) for slot in np.flatnonzero(self.owner != other.owner)]
        return [slot for slot in range(SLOTS) if self.owner_of(slot) != other.owner_of(slot)]


class ClusterServers:
    """The newest topology that was heard of, and a client of each server. Safe to use from several threads."""

    def __init__(self, address: Address) -> None:
        self.hosts = address.hosts
        self._options = {name: value for name, value in address.driver.items() if name not in {"host", "port", "db"}}
        self._clients: dict[Node, redis.Redis] = {}
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._topology: Topology | None = None

    def client(self, node: Node) -> redis.Redis:
        with self._lock:
            if node not in self._clients:
                pool = redis.ConnectionPool(host=node[0], port=node[1], **self._options)
                self._clients[node] = redis.Redis(connection_pool=pool)
            return self._clients[node]

    def topology(self) -> Topology:
        return self._topology or self.refreshed(None)

    def refreshed(self, seen: Topology | None) -> Topology:
        """The topology as a server tells it now, unless another thread has asked since *seen* was read.

        Servers are asked in random order, so that one with an old view does not answer each time. Raises the driver's error of the
        last one when none answers.
        """
        with self._asking:
            if self._topology is not None and self._topology is not seen:
                return self._topology
            known = list({*self.hosts, *(self._topology.primaries if self._topology else ())})
            told: Exception = driver.ConnectionError("no server of the cluster answers")
            for node in random.sample(known, len(known)):
                try:
                    ranges: Any = self.client(node).execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
                except REFUSED:
                    raise
                except (driver.RedisError, OSError) as error:
                    told = error
                    continue
                if ranges:
                    self._topology = topology_of(ranges, node)
                    return self._topology
                told = driver.ClusterDownError("no server owns a slot")
            raise told

    def claimed(self) -> tuple[Topology, dict[int, tuple[Node, Node]]]:
        """Who owns what now, by each server's own word: others may not have heard of it yet.

        And the slots that are between two servers: from where, to where.
        """
        primaries = list(self.refreshed(self._topology).primaries)
        owner, moves = np.full(SLOTS, -1, dtype=np.int64), dict[int, tuple[Node, Node]]()
        for place, node in enumerate(primaries):
            lines: dict[str, Any] = self.client(node).execute_command("CLUSTER NODES")  # type: ignore[no-untyped-call]
            names = {line["node_id"]: _node(address, node) for address, line in lines.items()}
            own = next(line for line in lines.values() if "myself" in line["flags"])
            for low, *high in own["slots"]:
                slots = slice(int(low), int(high[0] if high else low) + 1)
                for slot in np.flatnonzero(owner[slots] >= 0) + slots.start:
                    moves[int(slot)] = (primaries[owner[slot]], node)  # both say so: it has just moved
                owner[slots] = place
            for move in own["migrations"]:
                if move["state"] == "migrating":
                    moves[int(move["slot"])] = (node, names[move["node_id"]])
            # One that this one knows and the others did not. The loop comes to it.
            primaries += {names[line["node_id"]] for line in lines.values() if line["slots"]} - set(primaries)
        return Topology(tuple(primaries), owner), moves

    def close(self) -> None:
        with self._lock:
            for client in self._clients.values():
                client.connection_pool.disconnect()


def topology_of(ranges: list[Any], asked: Node) -> Topology:
    """The reply to CLUSTER SLOTS: ranges of slots, each with its owner and then its replicas as [host, port, ...]."""
    owner = np.full(SLOTS, -1, dtype=np.int64)
    replicas = dict[Node, tuple[Node, ...]]()
    for low, high, *servers in ranges:
        first, *others = (_told(host, port, asked) for host, port, *_ in servers)
        replicas.setdefault(first, tuple(others))
        owner[low : high + 1] = list(replicas).index(first)
    return Topology(tuple(replicas), owner, tuple(replicas.values()))


def _told(host: bytes | None, port: int, asked: Node) -> Node:
    # A server that does not know its own address gives none: it is the one that was asked.
    name = (host or b"").decode()
    return name if name and name != "?" else asked[0], int(port)


def _node(place: str, asked: Node) -> Node:
    host, _, port = place.rpartition(":")
    return host or asked[0], int(port)
