"""Records by view and entity key in, the same records out for a while; and one fetch at a time of each. No I/O in here.

What a reader gets is what the store said at most a view's ttl ago. Whether a vector has expired is decided by each read, from its event time.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from sys import getsizeof
from typing import TYPE_CHECKING, Protocol

from materialize.decoder import FORMAT_VERSION
from materialize.errors import ConfigError
from materialize.online.base import HEADER, TOMBSTONE
from materialize.serving.decoding import NEVER
from materialize.serving.fetching import Flight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from materialize.model import FeatureView
    from materialize.serving.decoding import Selection
    from materialize.serving.fetching import Call, Place
    from materialize.serving.vectors import FeatureVector

__all__ = ["CacheSettings", "CacheStats", "Helper", "RecordCache"]

#: What an entry takes beside its key and record, in bytes: the places of both, the entry, and its node in the order of use (measured).
ENTRY_BYTES = 400
#: What a decoded vector takes beside its dict of features, and a feature beside its place there (measured: 24 for a float64).
VECTOR_BYTES, VALUE_BYTES = 300, 24
#: Of how many selections of features an entry remembers what it decoded.
SELECTIONS = 4
NOTHING = timedelta(0)


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What a reader remembers. Raises ConfigError for limits and durations that are not above 0.

    ``entries``, ``max_bytes``: the most records, and about the most memory, of all views together; the ones longest not read go first.
    ``ttl``: how long a record is served, of views without a ``cache_ttl``; None: only views with one are cached. ``missing_ttl``:
    how long it is remembered that an entity is not there, where that is shorter. ``tracking``: the store tells what changes
    (Redis and Valkey only), so that a change is seen at once, and nothing is served from the cache while it cannot be told.
    """

    entries: int = 100_000
    ttl: timedelta | None = None
    missing_ttl: timedelta | None = None
    max_bytes: int = 256 * 2**20
    tracking: bool = False

    def __post_init__(self) -> None:
        for name in ("entries", "max_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"could not cache: found {name}={getattr(self, name)}, expected a number above 0")
        for name in ("ttl", "missing_ttl"):
            value = getattr(self, name)
            if value is not None and value <= NOTHING:
                raise ConfigError(f"could not cache: found {name}={value!r}, expected a duration above 0, or None")


@dataclass(slots=True)
class CacheStats:
    """What became of the reads of one view, entity by entity, since the cache was made; ``entries``: how many are in it now.

    ``waits``: reads that waited for the fetch of another one. ``evicted``: entries that made room. ``invalidated``: entries that went
    because the store said that they changed.
    """

    hits: int = 0
    misses: int = 0
    waits: int = 0
    evicted: int = 0
    invalidated: int = 0
    entries: int = 0

    @property
    def hit_rate(self) -> float:
        """From 0 to 1; 0 before the first read."""
        return self.hits / (self.hits + self.misses + self.waits or 1)


class Helper(Protocol):
    """What works for a cache in threads of its own."""

    def begin(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Lifetimes:
    """Seconds for which a view's records, and what it does not have, are served."""

    there: float
    missing: float


class Entry:
    """A record, or that there is none, until a moment of the cache's clock; ``vectors``: what was decoded of it, never given away."""

    __slots__ = ("decoded", "nbytes", "record", "until", "vectors")

    def __init__(self, record: bytes | None, until: float, nbytes: int) -> None:
        self.record, self.until = record, until
        #: About what all of it takes, and its vectors alone.
        self.nbytes, self.decoded = nbytes, 0
        self.vectors: dict[Selection, FeatureVector] = {}


class RecordCache:
    """Remembers records of the views that are not ``realtime`` and have a ttl. Safe to use from several threads, and after a fork.

    *deadline*: seconds after which nobody waits for the fetch of another reader. *clock*: seconds that never go back.
    """

    def __init__(
        self,
        views: Iterable[FeatureView],
        settings: CacheSettings,
        *,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.deadline, self.clock = settings, deadline, clock
        self.lifetimes = {view.name: found for view in views if (found := _lifetimes(view, settings))}
        self.counts = {view: CacheStats() for view in self.lifetimes}
        self.entries: OrderedDict[Place, Entry] = OrderedDict()
        self.flights: dict[Place, Flight] = {}
        self.nbytes = 0
        #: What works for this cache in threads of its own: begun anew in the child of a fork, and closed with it.
        self.helpers: list[Helper] = []
        #: Whether there may be entries: always, or while the store tells what changes.
        self.live = not settings.tracking
        self.lock = threading.Lock()
        _CACHES.add(self)

    def stats(self) -> dict[str, CacheStats]:
        """What became of reads, by view; views that are never cached are not in it."""
        with self.lock:
            return {view: copy.copy(counts) for view, counts in self.counts.items()}

    def recall(self, selection: Selection, key: bytes) -> FeatureVector | None:
        """What is remembered of one entity, decoded without regard to its age, to be copied; None: it has to be read."""
        view = selection.schemas.view.name
        counts = self.counts.get(view)
        if counts is None:
            return None
        place = (view, key)
        with self.lock:
            entry = self.entries.get(place)
            if entry is None or entry.until <= self.clock():
                return None
            vector = entry.vectors.get(selection)
            if vector is not None:
                counts.hits += 1
                self.entries.move_to_end(place)
                return vector
        if selection.schemas.unknown((entry.record,)):
            return None
        vector = selection.vector(entry.record, 0, NEVER)
        if vector.status == "missing":
            vector = selection.missing
        with self.lock:
            counts.hits += 1
            if self.entries.get(place) is entry:
                self.entries.move_to_end(place)
                if selection.frozen and selection not in entry.vectors:
                    self._remember(entry, selection, vector)
        return vector

    def _remember(self, entry: Entry, selection: Selection, vector: FeatureVector) -> None:
        added = VECTOR_BYTES
        if vector.status != "missing":
            added += getsizeof(vector.features) + VALUE_BYTES * len(vector.features)
            added += len(entry.record or b"") if selection.variable else 0
        if len(entry.vectors) == SELECTIONS:
            entry.nbytes, self.nbytes = entry.nbytes - entry.decoded, self.nbytes - entry.decoded
            entry.decoded, entry.vectors = 0, {}
        entry.vectors[selection] = vector
        entry.decoded, entry.nbytes, self.nbytes = entry.decoded + added, entry.nbytes + added, self.nbytes + added
        self._make_room()

    # --- fetches, called by Call ---

    def claim(self, call: Call) -> None:
        """Sort what *call* lacks into what is there, what others fetch, and what it has to fetch itself."""
        now, moment = self.clock(), time.monotonic()
        call.flight = None
        with self.lock:
            for place in call.lacking():
                entry = self.entries.get(place)
                counts = self.counts[place[0]]
                if entry is not None and entry.until > now:
                    counts.hits += 1
                    self.entries.move_to_end(place)
                    call.found[place] = entry.record
                    continue
                flight = self.flights.get(place)
                if flight is not None and moment < flight.late:  # else who began it is gone
                    counts.waits += 1
                    flight.join()
                    call.others.add(flight)
                    continue
                counts.misses += 1
                call.flight = call.flight or Flight(now, moment + self.deadline)
                self.flights[place] = call.flight
                call.flight.places.append(place)

    def land(self, flight: Flight, records: dict[Place, bytes | None]) -> None:
        """*flight* brought *records*: they are kept, but for those that changed meanwhile, and given to those who wait."""
        with self.lock:
            for place in flight.places:
                if self.flights.get(place) is flight:
                    del self.flights[place]
                    if self.live:
                        self._put(place, records[place], flight.began)
            self._make_room()
        flight.records = records
        flight.end()

    def give_up(self, flight: Flight, error: Exception | None) -> None:
        """*flight* brought nothing: who waits gets *error*, or without one fetches for itself."""
        with self.lock:
            for place in flight.places:
                if self.flights.get(place) is flight:
                    del self.flights[place]
        flight.error = error
        flight.end()

    # --- what the store tells ---

    def ready(self) -> None:
        """From now on the store tells what changes: what was remembered and is being fetched may have changed untold, so it goes."""
        self._empty(live=True)

    def lost(self) -> None:
        """From now on it does not. Nothing is served from the cache until `ready`."""
        self._empty(live=False)

    def changed(self, view: str, keys: Iterable[bytes]) -> None:
        """These records changed. Who reads now reads anew; what was being fetched is given to those who wait, and not kept."""
        with self.lock:
            for key in keys:
                place = (view, key)
                self.flights.pop(place, None)
                if place in self.entries:
                    self._drop(place)
                    self.counts[view].invalidated += 1

    def _empty(self, *, live: bool) -> None:
        with self.lock:
            self.live = live
            self.flights.clear()
            for place in self.entries:
                self.counts[place[0]].invalidated += 1
            self._clear()

    def _clear(self) -> None:
        self.entries.clear()
        self.nbytes = 0
        for counts in self.counts.values():
            counts.entries = 0

    def forked(self) -> None:
        """Begin anew in the child of a fork: other threads of the parent, with what they held and fetched, are not there."""
        self.lock = threading.Lock()
        self.flights.clear()
        self._clear()
        self.counts = {view: CacheStats() for view in self.lifetimes}
        self.live = not self.settings.tracking
        for helper in self.helpers:
            helper.begin()

    def close(self) -> None:
        """End what works for it. Calling it twice is harmless."""
        helpers, self.helpers = self.helpers, []
        for helper in helpers:
            helper.close()

    # --- entries; the lock is held ---

    def _put(self, place: Place, record: bytes | None, began: float) -> None:
        if record is not None and (len(record) < HEADER.size or record[0] != FORMAT_VERSION):
            return  # each read tells it anew, until somebody repairs it
        lifetimes = self.lifetimes[place[0]]
        missing = record is None or record[1] & TOMBSTONE
        if place in self.entries:
            self._drop(place)
        nbytes = ENTRY_BYTES + len(place[1]) + len(record or b"")
        until = began + (lifetimes.missing if missing else lifetimes.there)
        self.entries[place] = Entry(record, until, nbytes)
        self.nbytes += nbytes
        self.counts[place[0]].entries += 1

    def _drop(self, place: Place) -> None:
        self.nbytes -= self.entries.pop(place).nbytes
        self.counts[place[0]].entries -= 1

    def _make_room(self) -> None:
        while len(self.entries) > self.settings.entries or self.nbytes > self.settings.max_bytes:
            place = next(iter(self.entries))
            self._drop(place)
            self.counts[place[0]].evicted += 1


def _lifetimes(view: FeatureView, settings: CacheSettings) -> Lifetimes | None:
    there = view.cache_ttl or settings.ttl
    if view.realtime or there is None:
        return None
    return Lifetimes(there.total_seconds(), min(there, settings.missing_ttl or there).total_seconds())


_CACHES: weakref.WeakSet[RecordCache] = weakref.WeakSet()


def _forked() -> None:
    for cache in list(_CACHES):
        cache.forked()


os.register_at_fork(after_in_child=_forked)
