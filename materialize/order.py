"""The order rule: which of two records of one entity a store keeps. The one definition in Python.

Every store applies this rule atomically per entity; the Lua scripts, the SQL and this file are tested against each
other on random histories. Stores pass bytes; here a record is its order fields and an opaque payload.
"""

from __future__ import annotations

from dataclasses import dataclass, replace as altered

__all__ = [
    "ERASED",
    "GENERATION",
    "NO_CREATED",
    "NO_FLOOR",
    "STALE",
    "UNCHANGED",
    "WRITTEN",
    "Record",
    "merge",
    "replace",
    "stamp",
]

#: Outcomes of one row, as stores report them.
STALE, WRITTEN, UNCHANGED = 0, 1, 2

#: A stored version is ``generation * GENERATION + table version``. With generations below 2**13 it stays below 2**53,
#: which Lua's doubles and JSON hold exactly.
GENERATION = 2**40
#: The floor of a record that was never part of a full-state write; every stamped version is greater (generations start at 1).
NO_FLOOR = 0
#: Version and floor of an erased entity: no version is greater, so nothing replaces it. Generations end one before it would be reached.
ERASED = 2**53 - 1
#: The created time of a row without one: older than any other.
NO_CREATED = -(2**53)


def stamp(generation: int, table_version: int) -> int:
    """The version and floor number of *table_version* in *generation*."""
    return generation * GENERATION + table_version


@dataclass(frozen=True, slots=True)
class Record:
    """What a store holds for an entity: its order fields and payload. A tombstone has ``event_us`` None."""

    event_us: int | None
    created_us: int
    version: int
    floor: int
    payload: bytes = b""

    def newer_than(self, other: Record) -> bool:
        """Whether this record is live and greater in (event, created) than *other*; a tombstone has no order."""
        if self.event_us is None:
            return False
        return other.event_us is None or (self.event_us, self.created_us) > (other.event_us, other.created_us)

    def same_order(self, other: Record) -> bool:
        return (self.event_us, self.created_us) == (other.event_us, other.created_us)


def merge(stored: Record | None, new: Record, *, tie_wins: bool) -> tuple[int, Record]:
    """A row that was added: the outcome and the record that the store holds afterwards.

    *tie_wins* is True in incremental runs, where an equal order with a greater version is the later commit.
    """
    if stored is None:
        return WRITTEN, new
    newer = new.newer_than(stored) or (tie_wins and new.same_order(stored) and new.version > stored.version)
    if new.version > stored.floor and newer:
        return WRITTEN, altered(new, floor=stored.floor)
    return (UNCHANGED if new.same_order(stored) else STALE), stored


def replace(stored: Record | None, new: Record, *, at: int) -> tuple[int, Record]:
    """The entity's full state in snapshot *at* (a live record or a tombstone): the outcome and what the store holds afterwards."""
    new = altered(new, version=at, floor=at)
    if stored is None:
        return WRITTEN, new
    if at <= stored.floor:
        return (UNCHANGED if at == stored.floor else STALE), stored
    if stored.version <= at:
        return WRITTEN, new
    if new.newer_than(stored):
        return WRITTEN, altered(new, version=stored.version)
    return STALE, altered(stored, floor=at)
