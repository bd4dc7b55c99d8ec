"""Who owns which hash slot of a cluster, as its servers tell it; and the connections to each server.

The driver's own cluster client is not used for this: it touches the network when it is made, keeps a list for each of 16,384 slots
where a batch needs a column, and marks every connection for reconnection when it asks again.
"""

from __future__ import annotations

import random
import re
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import redis
from redis import exceptions as driver

from materialize.online.redis.answers import LOST, PASSING, REFUSED
from materialize.online.redis.framing import command, read_reply
from materialize.online.redis.slots import SLOTS

if TYPE_CHECKING:
    import numpy.typing as npt

    from materialize.online.redis.address import Address

__all__ = ["Node", "Topology", "TopologyKeeper"]

#: A server's host and port.
Node = tuple[str, int]
#: A slot on its way to another server, in the owner's own line of CLUSTER NODES: ``[93->-9f8e...]``.
LEAVING = re.compile(rb"\[(\d+)->-(\w+)\]")


@dataclass(frozen=True, slots=True)
class Topology:
    """``primaries``: the servers that own slots. ``owner``: for each slot the place of its owner there, -1 for none.

    ``replicas``: how many servers follow them. ``names``: server by its id in the cluster.
    """

    primaries: tuple[Node, ...]
    owner: npt.NDArray[np.int64]
    replicas: int = 0
    names: dict[str, Node] = field(default_factory=dict)

    def moved(self, slot: int, node: Node) -> Topology:
        """The same with *slot* owned by *node*."""
        primaries = self.primaries if node in self.primaries else (*self.primaries, node)
        owner = self.owner.copy()
        owner[slot] = primaries.index(node)
        return Topology(primaries, owner, self.replicas, self.names)

    def owner_of(self, slot: int) -> Node | None:
        place = int(self.owner[slot])
        return self.primaries[place] if place >= 0 else None


class TopologyKeeper:
    """The newest topology that was heard of, and a pool of connections to each server. Safe to use from several threads."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._options = {name: value for name, value in address.driver.items() if name not in {"host", "port", "db"}}
        self._pools: dict[Node, redis.ConnectionPool] = {}
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self._topology: Topology | None = None

    def pool(self, node: Node) -> redis.ConnectionPool:
        with self._lock:
            if node not in self._pools:
                self._pools[node] = redis.ConnectionPool(host=node[0], port=node[1], **self._options)
            return self._pools[node]

    def ask(self, node: Node, *words: bytes) -> Any:
        """What *node* answers to one command, as it is. Raises the driver's errors."""
        pool = self.pool(node)
        connection = pool.get_connection()
        try:
            connection.send_packed_command([command(*words)], check_health=False)  # type: ignore[no-untyped-call]
            return read_reply(connection)
        except LOST:
            connection.disconnect()  # type: ignore[no-untyped-call]
            raise
        finally:
            pool.release(connection)

    def info(self, node: Node) -> dict[str, Any]:
        return redis.Redis(connection_pool=self.pool(node)).info()

    def topology(self) -> Topology:
        return self._topology or self.refreshed(None)

    def learn(self, slot: int, node: Node) -> None:
        """A server said that *node* owns *slot*."""
        with self._lock:
            if self._topology is not None:
                self._topology = self._topology.moved(slot, node)

    def refreshed(self, seen: Topology | None) -> Topology:
        """The topology as a server tells it now, unless another thread has asked since *seen* was read.

        Servers are asked in random order, so that one with an old view does not answer each time. Raises the driver's error of the
        last one when none answers.
        """
        with self._asking:
            if self._topology is not None and self._topology is not seen:
                return self._topology
            known = (
                set(self.address.hosts) | set(seen.primaries if seen else ()) | set(seen.names.values() if seen else ())
            )
            told: Exception = driver.ConnectionError("no server of the cluster is known")
            for node in random.sample(sorted(known), len(known)):
                try:
                    topology = _topology(self.ask(node, b"CLUSTER", b"SLOTS"), node)
                except REFUSED:
                    raise
                except (*LOST, *PASSING) as error:
                    told = error
                    continue
                if topology.primaries:
                    with self._lock:
                        self._topology = topology
                    return topology
                told = driver.ClusterDownError("no server owns a slot")
            raise told

    def moving(self, topology: Topology) -> dict[int, tuple[Node, Node]]:
        """The slots that move key by key now: from where, to where."""
        found = dict[int, tuple[Node, Node]]()
        for node in topology.primaries:
            text = self.ask(node, b"CLUSTER", b"NODES")
            # A server without slots yet is in none of the ranges that CLUSTER SLOTS told.
            names = {line[0]: _place(line[1]) for line in map(bytes.split, text.splitlines())}
            names |= {name.encode(): place for name, place in topology.names.items()}
            own = next((line for line in text.splitlines() if b"myself" in line), b"")
            for slot, other in LEAVING.findall(own):
                if other in names:
                    found[int(slot)] = (node, names[other])
        return found

    def forget(self) -> None:
        """Have the next call ask again who owns what."""
        with self._lock:
            self._topology = None

    def close(self) -> None:
        with self._lock:
            for pool in self._pools.values():
                pool.disconnect()


def _topology(told: Any, asked: Node) -> Topology:
    """What CLUSTER SLOTS says: ranges of slots, each with its owner and its replicas as [host, port, id]."""
    owner = np.full(SLOTS, -1, dtype=np.int64)
    primaries, names, replicas = list[Node](), dict[str, Node](), set[Node]()
    for low, high, *nodes in told:
        # A server that does not know its own address gives none: it is the one that was asked.
        places = [(_text(node[0]) if node[0] not in {None, b"", b"?"} else asked[0], int(node[1])) for node in nodes]
        names |= {_text(node[2]): place for node, place in zip(nodes, places, strict=True)}
        if places[0] not in primaries:
            primaries.append(places[0])
        owner[int(low) : int(high) + 1] = primaries.index(places[0])
        replicas |= set(places[1:])
    return Topology(tuple(primaries), owner, len(replicas), names)


def _place(told: bytes) -> Node:
    """``host:port@bus,hostname`` of CLUSTER NODES."""
    host, _, port = told.partition(b"@")[0].rpartition(b":")
    return host.decode(), int(port)


def _text(told: Any) -> str:
    return told.decode() if isinstance(told, bytes) else str(told)
