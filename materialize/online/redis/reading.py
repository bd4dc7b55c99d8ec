"""Keys in, the commands that read their records out, and the records once the replies are there. No I/O.

A record is a string or, in the layout `hash`, the field ``_`` of a hash. While a rebuild turns one into the other a key may be either,
so where one kind of command finds nothing of its own the other is sent: MGET gives nothing for a hash, HGET fails for a string.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis import exceptions as driver

from materialize.model import RECORD_FIELD

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = ["KEYS_PER_READ", "Reading", "wrong_type"]

#: Keys per MGET when reading and per step of SCAN: about 0.5 ms of the server's time.
KEYS_PER_READ = 1_000
#: Round trips in which a key may turn out to be of the other type before it is taken for something else than a record.
TURNS = 12
FIELD = RECORD_FIELD.encode()


def wrong_type(reply: Any) -> bool:
    """Whether *reply* says that the key holds something else than the command is for."""
    return isinstance(reply, driver.ResponseError) and str(reply).startswith("WRONGTYPE")


class Reading:
    """The records of *names*, whole keys in order, of which those at the places *hashed* belong to views with the layout `hash`.

    Most often one round trip does. Keys that a vector view lacks cost another one, because MGET gives nothing for a hash either::

        while reading.pending:
            reading.take(send(reading.commands()))
        reading.records

    *at_once*: keys of one command. Replies may be errors of which `wrong_type` is true; any other the caller raises.
    """

    def __init__(self, names: Sequence[bytes], hashed: Collection[int] = (), *, at_once: int = KEYS_PER_READ) -> None:
        self.names, self.at_once = names, at_once
        #: What was found; None for a key that is absent, or holds no record.
        self.records: list[bytes | None] = [None] * len(names)
        every = range(len(names))
        #: The places that are asked for next: by MGET, by HGET, and by EXISTS, which tells of many at once whether HGET is worth it.
        self._strings: Sequence[int] = [place for place in every if place not in hashed] if hashed else every
        self._hashes: Sequence[int] = sorted(hashed)
        self._doubtful: Sequence[int] = ()
        self._turns = 0

    @property
    def pending(self) -> bool:
        return bool(self._strings or self._hashes or self._doubtful)

    def commands(self) -> list[tuple[bytes, ...]]:
        """What to send next, in one round trip; each has one key where ``at_once`` is 1, as a cluster wants it."""
        names = self.names
        gets = [(b"MGET", *(names[place] for place in places)) for places in self._chunks(self._strings)]
        asks = [(b"EXISTS", *(names[place] for place in places)) for places in self._chunks(self._doubtful)]
        return [*gets, *asks, *((b"HGET", names[place], FIELD) for place in self._hashes)]

    def take(self, replies: Sequence[Any]) -> None:
        """The replies to all `commands`, in order."""
        coming = iter(replies)
        absent: list[int] = []
        hashes: list[int] = []
        strings: list[int] = []
        for places in self._chunks(self._strings):
            for place, record in zip(places, next(coming), strict=True):
                self.records[place] = record
                if record is None:
                    absent.append(place)
        for places in self._chunks(self._doubtful):
            hashes += places if next(coming) else ()
        for place in self._hashes:
            record = next(coming)
            if wrong_type(record):
                strings.append(place)
            else:
                self.records[place] = record
        self._turns += 1
        if self._turns >= TURNS:
            strings, hashes, absent = [], [], []
        if self.at_once == 1 or len(absent) == 1:
            hashes, absent = hashes + absent, []
        self._strings, self._hashes, self._doubtful = strings, hashes, absent

    def _chunks(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        for low in range(0, len(places), self.at_once):
            yield places[low : low + self.at_once]
