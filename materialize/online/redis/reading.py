"""Names of keys in, what they hold out: one round trip to each server that has some, and within a deadline whatever hinders it.

A record is a string or, in the layout `hash`, the field ``_`` of a hash. While a rebuild turns one into the other a key may be either, so
what is not of the kind that was asked for is asked for again as the other. GET and HGET tell it by an error; MGET gives nothing for
a hash, so what several keys lack costs another round trip.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from redis import exceptions as driver

from materialize.model import RECORD_FIELD
from materialize.online.redis.answers import LOST, PASSING, Patience, passes, translated
from materialize.online.redis.framing import bulk, command
from materialize.online.redis.wire import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from materialize.online.redis.address import Address
    from materialize.online.redis.routes import Routes
    from materialize.online.redis.topology import Node
    from materialize.online.redis.wire import Lane, Wire

__all__ = ["ASKING", "NOT_LOCAL", "QUICK_ROUNDS", "Reading", "redirect"]

#: Keys asked for at once: their records wait in the memory of the server.
KEYS_IN_FLIGHT = 4_000
#: Rounds of redirects that are followed without a pause: MOVED may be followed by ASK.
QUICK_ROUNDS = 2
#: Rounds in which a key may turn out to be of the other kind before it is taken for something else than a record.
TURNS = 12
#: How much of the time that is left a connection to a replica may take to open, so that there is some left for its primary.
SHARE = 0.5
#: Before a request to a server that a slot is on its way to.
ASKING = command(b"ASKING")
#: What a server of a cluster says of keys that it does not have all, without a class of the driver's own.
NOT_LOCAL = "non local key"
#: What a server says of a key that holds something else than the command is for, without a class of the driver's own.
WRONG_TYPE = "WRONGTYPE"
FIELD = bulk(RECORD_FIELD.encode())


class Reading:
    """Reads of one store, for many threads or tasks at once.

    *hard*: nothing is awaited beyond the deadline of *address*, and a lost connection is worth another try. Else each answer may take
    its timeout, what passes by itself is waited for as long, and a lost connection is told where no other server takes over.
    """

    def __init__(self, address: Address, routes: Routes, wire: Wire, *, hard: bool) -> None:
        self.address, self.routes, self.wire, self.hard = address, routes, wire, hard
        self.seconds = address.deadline if hard else address.timeout
        self.prefix = address.prefix.encode()

    async def views(
        self, keys: Mapping[str, Sequence[bytes]], hashed: Collection[str]
    ) -> dict[str, list[bytes | None]]:
        """The records of entity keys by view; as `OnlineStore.read_views`. *hashed*: views with the layout `hash`."""
        names: list[bytes] = []
        fields: set[int] = set()
        for view, some in keys.items():
            head = b"%b:%b:{" % (self.prefix, view.encode())
            if view in hashed:
                fields.update(range(len(names), len(names) + len(some)))
            names += [b"%b%b}" % (head, key) for key in some]

        def doing() -> str:
            return f"read {len(names):,} entities of feature view {', '.join(map(repr, keys))} from"

        found = await self.get(names, doing, fields=fields)
        records, low = {}, 0
        for view, some in keys.items():
            records[view] = found[low : low + len(some)]
            low += len(some)
        return records

    async def cell(self, view: str, name: str) -> bytes | None:
        """As `OnlineStore.read_cell`."""
        cell = f"{self.address.prefix}:{view}:{name}".encode()
        return (await self.get([cell], lambda: f"read the {name} of feature view {view!r} from", records=False))[0]

    async def get(
        self, names: Sequence[bytes], doing: Callable[[], str], *, records: bool = True, fields: Collection[int] = ()
    ) -> list[bytes | None]:
        """What each key holds, None where it is absent; *fields*: the places of those that are hashes. Without *records* all are strings.

        What is neither a string nor a hash counts as absent among *records*, and is an error else.

        What a replica does not have, its primary is asked for: one that is being filled, or whose slots move, would deny records. Where no
        primary answers, the replica's word counts.
        """
        patience = Patience(self.seconds)
        found: list[Any] = [None] * len(names)
        try:
            for low in range(0, len(names), KEYS_IN_FLIGHT):
                rows: Sequence[int] = range(low, min(low + KEYS_IN_FLIGHT, len(names)))
                search = _Search(self, names, found, patience, records=records, fields=fields)
                await search.find(rows, replicas=self.routes.replicas)
                if search.denied:
                    await self._of_primary(search, names, found, patience)
        except (driver.RedisError, OSError):  # named only when there is one: a tenth of the time of a read
            with translated(doing(), self.address, patience):
                raise
        return found

    async def _of_primary(self, search: _Search, names: Sequence[bytes], found: list[Any], patience: Patience) -> None:
        """Ask for what a replica does not have."""
        again = _Search(self, names, found, patience, records=search.records, fields=search.fields)
        try:
            await again.find(search.denied, replicas=False)
        except (driver.RedisError, OSError) as error:
            if not (search.records and passes(error, lost=True)):
                raise

    def close(self) -> None:
        """Close the connections that nobody uses, at once."""
        self.routes.forget()
        self.routes.close()
        self.wire.forget()


class _Search:
    """The rounds of one call: who is asked, what came, and what is asked again."""

    def __init__(
        self,
        reading: Reading,
        names: Sequence[bytes],
        found: list[Any],
        patience: Patience,
        *,
        records: bool,
        fields: Collection[int],
    ) -> None:
        self.reading, self.names, self.found, self.patience, self.records = reading, names, found, patience, records
        self.routes, self.wire = reading.routes, reading.wire
        self.until = patience.until if reading.hard else math.inf
        self.rounds = 0
        #: Whether to open new connections, and where servers sent us: row -> server, and whether with ASKING.
        self.fresh = False
        self.redirects: dict[int, tuple[Node, bool]] = {}
        #: Rows to ask for as hashes, those that turned out to be of the other kind in this round, and in how many rounds some did.
        self.fields = set(fields)
        self.turned: list[int] = []
        self.turns = 0
        #: Rows that a replica does not have.
        self.denied: list[int] = []

    async def find(self, rows: Sequence[int], *, replicas: bool) -> None:
        """Fill in what *rows* hold. Raises the driver's last error when the time is over, and others at once."""
        while rows:
            self.rounds += 1
            try:
                await self.routes.learn(self.wire, self.until)
            except (driver.RedisError, OSError) as error:
                await self._settle([error], reused=False, replicas=False)
                continue
            # In turns: who does not answer has another beside it. Cells are asked of the primary first: few reads, and all depend on them.
            from_replicas = replicas and self.rounds % 2 == int(self.records)
            calls, groups, errors = self._calls(rows, replicas=from_replicas)
            lanes = await self.wire.exchange(calls, self.until, fresh=self.fresh, share=SHARE if from_replicas else 1.0)
            for lane, of in zip(lanes, groups, strict=True):
                self._take(lane, of, errors)
            if from_replicas:
                self.routes.shun(
                    lane.call.node for lane in lanes if _lost(lane.replies) and not (lane.reused and _closed(lane))
                )
                again = {*errors, *self.turned}
                self.denied += [row for row in rows if self.found[row] is None and row not in again]
            rows = sorted([*errors, *self._turn()])
            if not errors:
                continue
            self.wire.forget([lane.call.node for lane in lanes if _closed(lane)])
            reused = all(lane.reused for lane in lanes if _lost(lane.replies))
            await self._settle(list(errors.values()), reused=reused, replicas=replicas)

    def _calls(
        self, rows: Sequence[int], *, replicas: bool
    ) -> tuple[list[Call], list[tuple[list[Sequence[int]], bool]], dict[int, Exception]]:
        """The calls to make; for each of them the rows of its requests, and whether ASKING is before each; and what nobody can be asked for."""
        asked: dict[tuple[Node, bool], list[Sequence[int]]] = {}
        errors: dict[int, Exception] = {}
        left = rows
        if self.redirects:
            left = [row for row in rows if row not in self.redirects]
            for row in [row for row in rows if row in self.redirects]:
                asked.setdefault(self.redirects[row], []).append([row])
        # Keys of one slot that is on its way may be at two servers.
        single = not self.records or self.rounds > 1
        strings = [row for row in left if row not in self.fields] if self.fields else left
        hashes = [row for row in left if row in self.fields] if self.fields else []
        for some, alone in ((strings, single), (hashes, True)):
            for node, group in self.routes.groups(some, self.names, replicas=replicas, single=alone):
                if node is None:
                    errors |= dict.fromkeys(group, driver.ClusterDownError("no server owns the hash slot"))
                else:
                    asked.setdefault((node, False), []).append(group)
        self.redirects = {}
        calls = [
            Call(node, b"".join(self._requests(some, asking=asking)), len(some) * (1 + asking))
            for (node, asking), some in asked.items()
        ]
        return calls, [(some, asking) for (_, asking), some in asked.items()], errors

    def _requests(self, groups: Iterable[Sequence[int]], *, asking: bool) -> Iterable[bytes]:
        names = self.names
        for rows in groups:
            if asking:
                yield ASKING
            if len(rows) > 1:
                yield b"*%d\r\n$4\r\nMGET\r\n" % (len(rows) + 1)
                yield from [b"$%d\r\n%b\r\n" % (len(names[row]), names[row]) for row in rows]
            elif rows[0] in self.fields:
                yield b"*3\r\n$4\r\nHGET\r\n$%d\r\n%b\r\n%b" % (len(names[rows[0]]), names[rows[0]], FIELD)
            else:
                yield b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(names[rows[0]]), names[rows[0]])

    def _take(self, lane: Lane, of: tuple[list[Sequence[int]], bool], errors: dict[int, Exception]) -> None:
        """Put what came in its place, and errors into *errors*."""
        groups, asking = of
        for rows, reply in zip(groups, lane.replies[1::2] if asking else lane.replies, strict=True):
            if isinstance(reply, Exception):
                if self.records and str(reply).startswith(WRONG_TYPE):
                    self.turned += rows
                    continue
                errors |= dict.fromkeys(rows, reply)
                if isinstance(reply, driver.AskError):
                    self.redirects |= dict.fromkeys(rows, redirect(reply, lane.call.node))
            elif len(rows) == 1:
                self.found[rows[0]] = reply
            else:
                for row, value in zip(rows, reply, strict=True):
                    self.found[row] = value
                self.turned += [row for row in rows if self.found[row] is None]

    def _turn(self) -> list[int]:
        """The rows to ask for as the other kind, from now on."""
        turned, self.turned = self.turned, []
        if not turned:
            return turned
        self.turns += 1
        self.fields.symmetric_difference_update(turned)
        return turned if self.turns <= TURNS else []

    async def _settle(self, errors: Sequence[Exception], *, reused: bool, replicas: bool) -> None:
        """Wait where waiting helps. Raises the one that does not pass, or the last one when the time is over.

        *reused*: connections were lost, if any, that had served before: the server may be well. *replicas*: there is somebody else to ask.
        """
        others = [error for error in errors if not (self.routes.redirected and isinstance(error, driver.AskError))]
        told = others[-1] if others else driver.TryAgainError("servers disagree about who owns a hash slot")
        first = self.rounds == 1
        lost = self.reading.hard or self.routes.taken_over or (first and reused)
        for error in others:
            if not (passes(error, lost=lost) or NOT_LOCAL in str(error)):
                raise error
        if others or any(isinstance(error, driver.MovedError) for error in errors):
            self.routes.forget()
        self.fresh = _lost(others)
        if self.reading.hard and self.patience.over:
            raise told
        quick = self.rounds <= QUICK_ROUNDS if not others else first and (replicas or (reused and _lost(others)))
        if quick:
            self.patience.waits += self.reading.hard
            return
        pause = self.patience.pause()
        if pause is None:
            raise told
        await self.wire.pause(pause)


def redirect(error: driver.AskError, asked: Node) -> tuple[Node, bool]:
    """Where the server *asked* sends us by an AskError, or a MovedError, which is one; and whether with ASKING."""
    return (error.host or asked[0], int(error.port)), not isinstance(error, driver.MovedError)


def _lost(replies: Iterable[Any]) -> bool:
    return any(isinstance(reply, LOST) and not isinstance(reply, PASSING) for reply in replies)


def _closed(lane: Lane) -> bool:
    """Whether the server closed the connection, as it may have closed others; one that is slow has not."""
    return _lost(lane.replies) and not any(
        isinstance(reply, (driver.TimeoutError, TimeoutError)) for reply in lane.replies
    )
