"""Which server of a cluster to ask for which keys, learned over a `Wire`. Apart from the other routes, because it needs numpy."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from redis import exceptions as driver

from materialize.online.redis.answers import REFUSED
from materialize.online.redis.framing import command
from materialize.online.redis.routes import News, Routes, chunks
from materialize.online.redis.slots import slot_of
from materialize.online.redis.topology import topology_of
from materialize.online.redis.wire import Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from materialize.online.redis.address import Address
    from materialize.online.redis.routes import Groups
    from materialize.online.redis.topology import Node, Topology
    from materialize.online.redis.wire import Wire

__all__ = ["BySlots"]

CLUSTER_SLOTS = command(b"CLUSTER", b"SLOTS")


class BySlots(Routes):
    """The servers of a cluster."""

    redirected = True

    def __init__(self, address: Address, *, replicas: bool) -> None:
        self.hosts, self.replicas = address.hosts, replicas
        self.topology: Topology | None = None
        self.stale, self.news = True, News(wanted=replicas)

    @property
    def taken_over(self) -> bool:
        """Not before the first server has told of others."""
        return self.topology is not None

    async def learn(self, wire: Wire, until: float) -> None:
        if not (self.stale or self.news.due):
            return
        until = self.news.asked(until, known=self.topology is not None)
        known = list({*self.hosts, *(self.topology.primaries if self.topology else ())})
        told: Exception = driver.ConnectionError("no server of the cluster answers")
        # In random order, so that one with an old view does not answer each time.
        for number, node in enumerate(random.sample(known, len(known))):
            now = time.monotonic()
            (lane,) = await wire.exchange([Call(node, CLUSTER_SLOTS)], now + (until - now) / (len(known) - number))
            (reply,) = lane.replies
            if isinstance(reply, REFUSED):
                raise reply
            if isinstance(reply, Exception) or not reply:
                told = reply or driver.ClusterDownError("no server owns a slot")
                continue
            self.topology, self.stale = topology_of(reply, node), False
            return
        if self.topology is None:  # else the old knowledge has to do until the next time
            raise told

    def groups(self, rows: Sequence[int], names: Sequence[bytes], *, replicas: bool, single: bool) -> Groups:
        if self.topology is None:
            raise AssertionError("asked for a route before it was learned")
        by_slot: dict[int, list[int]] = {}
        for row in rows:
            by_slot.setdefault(slot_of(names[row]), []).append(row)
        for slot, some in by_slot.items():
            yield from chunks(self._server(self.topology, slot, replicas=replicas), some, single=single)

    def _server(self, topology: Topology, slot: int, *, replicas: bool) -> Node | None:
        place = int(topology.owner[slot])
        if place < 0:
            return None
        others = topology.replicas[place] if replicas else ()
        return self.news.one_of(others) or topology.primaries[place]

    def shun(self, nodes: Iterable[Node]) -> None:
        self.news.shun(nodes)

    def forget(self) -> None:
        self.stale = True
