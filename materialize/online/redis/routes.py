"""Which server to ask for which keys: the one of a URL, or those that sentinels name. Learned over a `Wire`."""

from __future__ import annotations

import math
import random
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from redis import exceptions as driver

from materialize.online.redis.answers import REFUSED
from materialize.online.redis.framing import command
from materialize.online.redis.wire import HERE, Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from materialize.online.redis.address import Address
    from materialize.online.redis.topology import Node
    from materialize.online.redis.wire import Wire

    #: Who to ask, None for nobody, and rows that go into one request.
    Groups = Iterator[tuple[Node | None, Sequence[int]]]

__all__ = ["KEYS_PER_READ", "ByOne", "BySentinels", "News", "Routes", "chunks"]

#: Keys per MGET when reading and per step of SCAN: about 0.5 ms of the server's time.
KEYS_PER_READ = 1_000
#: Seconds after which replicas that came are heard of; and how much of a call's time asking may take while there is something to go by.
NEWS_EVERY, NEWS_SHARE = 30.0, 0.5
#: Seconds for which a replica that did not answer is left alone.
SHUNNED = 1.0
#: What sentinels say of a replica that serves nothing, or old values.
UNFIT = (b"s_down", b"o_down", b"disconnected")


class Routes(ABC):
    """``replicas``: whether there are any that may be read from; there is a second server then for what the first does not answer."""

    replicas = False
    #: Whether to follow a server that says who has a key.
    redirected = False

    @property
    def taken_over(self) -> bool:
        """Whether another server may take over, so that a lost one is worth asking for again."""
        return True

    async def learn(self, wire: Wire, until: float) -> None:  # noqa: B027 - one server is known
        """Find out who serves, where that is not known, or `forget` was called. Raises the driver's errors."""

    @abstractmethod
    def groups(self, rows: Sequence[int], names: Sequence[bytes], *, replicas: bool, single: bool) -> Groups:
        """Who is to be asked for which rows of *names*, those of one MGET together; *single*: each row alone. None: nobody has them."""

    def shun(self, nodes: Iterable[Node]) -> None:  # noqa: B027 - there is nobody else
        """Leave these replicas alone for a while: they did not answer, and whoever is asked for replicas need not know it yet."""

    def forget(self) -> None:  # noqa: B027 - one server stays the same
        """Who serves has to be learned anew."""

    def close(self) -> None:  # noqa: B027 - most have nothing of their own
        """Close connections."""


class ByOne(Routes):
    """The one server of the URL."""

    @property
    def taken_over(self) -> bool:
        return False

    def groups(self, rows: Sequence[int], names: Sequence[bytes], *, replicas: bool, single: bool) -> Groups:  # noqa: ARG002
        yield from chunks(HERE, rows, single=single)


class BySentinels(Routes):
    """The primary that sentinels name, or one of its replicas."""

    def __init__(self, address: Address, sentinels: Wire, *, replicas: bool) -> None:
        self.service, self.replicas = address.service, replicas
        self.hosts, self.sentinels = list(address.hosts), sentinels
        name = address.service.encode()
        self.question = command(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name)
        self.question += command(b"SENTINEL", b"REPLICAS", name) if replicas else b""
        self.news = News(wanted=replicas)
        self.stale = True
        self.primary: Node | None = None
        self.others: tuple[Node, ...] = ()

    async def learn(self, wire: Wire, until: float) -> None:  # noqa: ARG002 - sentinels have another
        if not (self.stale or self.news.due):
            return
        until = self.news.asked(until, known=self.primary is not None)
        told: Exception = driver.ConnectionError("no sentinel answers")
        hosts = list(self.hosts)
        for number, host in enumerate(hosts):
            call = Call(host, self.question, 2 if self.replicas else 1)
            # Each gets its part of the time, so that one which is gone does not take that of the others.
            now = time.monotonic()
            (lane,) = await self.sentinels.exchange([call], now + (until - now) / (len(hosts) - number))
            primary, *others = lane.replies
            error = next((one for one in lane.replies if isinstance(one, Exception)), None)
            if isinstance(error, REFUSED):
                raise error
            if error is not None or not primary:
                told = error or driver.ConnectionError(f"no primary is known for {self.service!r}")
                continue
            self.others = tuple(_fit(others[0])) if others else ()
            self.primary, self.stale = (primary[0].decode(), int(primary[1])), False
            if number:
                self.hosts = [host, *(other for other in hosts if other != host)]
            return
        if self.primary is None:  # else the old knowledge has to do until the next time
            raise told

    def groups(self, rows: Sequence[int], names: Sequence[bytes], *, replicas: bool, single: bool) -> Groups:  # noqa: ARG002
        yield from chunks(self.news.one_of(self.others if replicas else ()) or self.primary, rows, single=single)

    def shun(self, nodes: Iterable[Node]) -> None:
        self.news.shun(nodes)

    def forget(self) -> None:
        self.stale = True

    def close(self) -> None:
        self.sentinels.forget()


class News:
    """What is known of replicas: which to leave alone; and when to ask again who they are, though nothing went wrong: one that came does not say so."""

    def __init__(self, *, wanted: bool) -> None:
        self.next = 0.0 if wanted else math.inf
        self.shunned: dict[Node, float] = {}

    def shun(self, nodes: Iterable[Node]) -> None:
        self.shunned |= dict.fromkeys(nodes, time.monotonic() + SHUNNED)

    def one_of(self, replicas: Sequence[Node]) -> Node | None:
        """One that may be asked, at random; None where there is none."""
        if self.shunned:
            now = time.monotonic()
            replicas = [node for node in replicas if self.shunned.get(node, now) <= now]
        return random.choice(replicas) if replicas else None  # noqa: S311 - a load is spread

    @property
    def due(self) -> bool:
        return time.monotonic() >= self.next

    def asked(self, until: float, *, known: bool) -> float:
        """It is being asked now. Returns: until when that may take: a part of the time where servers are *known*."""
        now = time.monotonic()
        if self.next < math.inf:
            self.next = now + NEWS_EVERY
        return now + (until - now) * NEWS_SHARE if known else until


def chunks(node: Node | None, rows: Sequence[int], *, single: bool) -> Groups:
    size = 1 if single else KEYS_PER_READ
    for low in range(0, len(rows), size):
        yield node, rows[low : low + size]


def _fit(told: Sequence[Sequence[Any]]) -> Iterator[Node]:
    """Those of the reply to SENTINEL REPLICAS, names and values in turn, that serve what their primary tells them."""
    for one in told:
        facts = dict(zip(one[::2], one[1::2], strict=True))
        down = any(word in facts[b"flags"].split(b",") for word in UNFIT)
        if not down and facts.get(b"master-link-status") == b"ok":
            yield facts[b"ip"].decode(), int(facts[b"port"])
