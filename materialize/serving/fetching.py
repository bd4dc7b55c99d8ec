"""Reads through a cache: what one lacks is fetched by one of those who want it, and the others wait for that. No I/O in here."""

from __future__ import annotations

import asyncio
import copy
import time
from concurrent.futures import Future, TimeoutError as Late
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

from materialize.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from materialize.serving.cache import RecordCache

__all__ = ["Call", "Flight", "Place"]

#: A view and an entity key.
Place: TypeAlias = tuple[str, bytes]


class Flight:
    """A fetch under way, of one reader, and who waits for it. ``records`` and ``error`` both None at the end: it was given up."""

    __slots__ = ("began", "done", "error", "late", "over", "places", "records")

    def __init__(self, began: float, late: float) -> None:
        self.began, self.late = began, late
        self.places: list[Place] = []
        self.over = False
        #: Made by the first who waits.
        self.done: Future[None] | None = None
        self.records: dict[Place, bytes | None] | None = None
        self.error: Exception | None = None

    def join(self) -> None:
        """Somebody will wait. Called with the cache's lock, while it is among the cache's flights."""
        self.done = self.done or Future()

    def end(self) -> None:
        """It is over: tell those who wait. Called when it is not among the cache's flights any more."""
        self.over = True
        if self.done is not None:
            self.done.set_result(None)

    def wait(self, seconds: float) -> None:
        """Block until it is over, or so long."""
        with suppress(Late):
            if self.done is not None:
                self.done.result(seconds)

    async def awaited(self, seconds: float) -> None:
        """The same for a task; cancelling it leaves the fetch alone."""
        if self.done is not None:
            await asyncio.wait([asyncio.wrap_future(self.done)], timeout=seconds)


class Call:
    """One read through a cache. While `claim`: fetch what is ``mine``, then wait for ``others``; then `records` has all.

    What is fetched comes before what is awaited, so that two readers never wait for each other.
    """

    def __init__(self, cache: RecordCache, keys: Mapping[str, Sequence[bytes]]) -> None:
        self.cache, self.keys = cache, keys
        self.until = time.monotonic() + cache.deadline
        #: The records of views that are never cached; None: not fetched yet.
        self.direct: dict[str, list[bytes | None]] | None = None
        self.found: dict[Place, bytes | None] = {}
        self.others: set[Flight] = set()
        self.flight: Flight | None = None

    def lacking(self) -> Iterator[Place]:
        seen = set[Place]()
        for view, keys in self.keys.items():
            if view in self.cache.counts:
                for key in keys:
                    place = (view, key)
                    if place not in self.found and place not in seen:
                        seen.add(place)
                        yield place

    def left(self) -> float:
        """Seconds that may still be waited."""
        return max(self.until - time.monotonic(), 0.0)

    def claim(self) -> bool:
        """Take what others brought, and find out what is still to be done; False: nothing.

        Raises what a fetch of another reader was ended with, and UnavailableError when the time for waiting is over.
        """
        if self.flight is not None and not self.others:
            return False  # all that was lacking was to be fetched here
        for flight in self.others:
            if flight.error is not None:
                raise copy.copy(flight.error) from flight.error
            if flight.records is None and not self.left():
                raise UnavailableError(
                    f"could not read feature views {', '.join(map(repr, self.keys))}: another read of the same entities was not answered "
                    f"in {self.cache.deadline:g} s"
                )
            self.found.update(flight.records or {})
        self.others = set()
        self.cache.claim(self)
        return bool(self.mine or self.others)

    @property
    def mine(self) -> dict[str, list[bytes]]:
        """The entity keys to fetch, by view."""
        wanted: dict[str, list[bytes]] = {}
        if self.direct is None:
            wanted = {view: list(keys) for view, keys in self.keys.items() if view not in self.cache.counts}
        for view, key in self.flight.places if self.flight else ():
            wanted.setdefault(view, []).append(key)
        return wanted

    @contextmanager
    def fetching(self) -> Iterator[dict[str, list[bytes]]]:
        """Within it ``mine`` is fetched and given to `take`. Whatever ends it, those who wait for it are told."""
        try:
            yield self.mine
        except Exception as error:
            self._give_up(error)
            raise
        finally:
            self._give_up(None)

    def _give_up(self, error: Exception | None) -> None:
        if self.flight is not None and not self.flight.over:
            self.cache.give_up(self.flight, error)

    def take(self, fetched: Mapping[str, list[bytes | None]]) -> None:
        """What the store had for ``mine``."""
        if self.direct is None:
            self.direct = {view: fetched[view] for view in self.keys if view not in self.cache.counts}
        if self.flight is not None:
            rows = {view: iter(records) for view, records in fetched.items()}
            brought = {place: next(rows[place[0]]) for place in self.flight.places}
            self.found.update(brought)
            self.cache.land(self.flight, brought)

    def records(self) -> dict[str, list[bytes | None]]:
        """As `OnlineStore.read_views` gives them."""
        direct = self.direct or {}
        return {
            view: direct[view] if view in direct else [self.found[view, key] for key in keys]
            for view, keys in self.keys.items()
        }
