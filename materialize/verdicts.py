"""What a store holds of an entity and the entity's rows in the table in, what became of each row out. Pure: no I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from materialize.order import ERASED, GENERATION, NO_FLOOR, stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SHOULD", "HeldRecord", "TableRow", "Times", "disagreement", "floor_words", "served_row", "verdicts"]

#: The verdict of a row that readers should get and do not.
SHOULD = "not online, and should be"
#: How far two clocks may differ: a row that expires within it may be there or not.
SKEW_US = 60_000_000


@dataclass(frozen=True, slots=True)
class HeldRecord:
    """What the store holds: order fields, and the features as readers see them; ``event_us`` None for a tombstone."""

    event_us: int | None
    created_us: int
    version: int
    floor: int
    features: dict[str, Any]

    @property
    def erased(self) -> bool:
        return self.event_us is None and self.floor >= ERASED


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of the table. ``commit``: which brought it, None where the log does not tell; ``exact``: else it may be an earlier one. ``removed_by``: the
    commit after which it is gone. ``unstorable``: why it cannot be stored. ``features``: as readers would see them.
    """

    event_us: int | None
    created_us: int
    commit: int | None
    exact: bool
    file: str
    removed_by: int | None
    unstorable: str | None
    features: dict[str, Any]

    @property
    def order(self) -> tuple[int, int]:
        return (self.event_us or 0, self.created_us)


@dataclass(frozen=True, slots=True)
class Times:
    """Where the watermark is (``version``, of ``generation``), the view's ttl and the clock, in microseconds."""

    version: int
    generation: int
    ttl_us: int | None
    now_us: int

    def expired(self, event_us: int | None, skew_us: int = 0) -> bool:
        return self.ttl_us is not None and event_us is not None and event_us + self.ttl_us <= self.now_us + skew_us


def floor_words(floor: int) -> str:
    """What a record's floor means, in a sentence."""
    if floor == NO_FLOOR:
        return "none: the entity was never written as a snapshot's whole state, so a row of any commit may replace this one"
    if floor >= ERASED:
        return "the greatest: the entity was erased for good, and no run brings it back"
    generation, version = divmod(floor, GENERATION)
    return f"generation {generation}, version {version}: what that snapshot has of the entity, or that it has nothing, was brought online, so rows of commits up to it are refused"


def served_row(rows: Sequence[TableRow], held: HeldRecord | None) -> int | None:
    """Which of *rows* (those that are there newest first, then those that are gone) the store holds; of several that are alike the first."""
    if held is None or held.event_us is None:
        return None
    order = (held.event_us, held.created_us)
    alike = (
        place
        for place, row in enumerate(rows)
        if row.unstorable is None and row.order == order and repr(row.features) == repr(held.features)
    )
    return next(alike, None)


def verdicts(rows: Sequence[TableRow], held: HeldRecord | None, times: Times) -> list[str]:
    """What became of each row, in a few words."""
    served = served_row(rows, held)
    return [_verdict(row, held, times, None if served is None else rows[served]) for row in rows]


def _verdict(row: TableRow, held: HeldRecord | None, times: Times, served: TableRow | None) -> str:
    if held is not None and held.erased:
        return "erased"
    gone = "" if row.removed_by is None else f"gone: commit {row.removed_by} removed it"
    if row is served:
        told = "expired by ttl" if times.expired(row.event_us) else "served"
        return f"{told}; {gone}, which is after watermark {times.version}" if gone else told
    return gone or _not_written(row, times) or _by_order(row, held, times, served)


def _not_written(row: TableRow, times: Times) -> str | None:
    """Why no run may have written the row yet, or may at all."""
    if row.unstorable is not None:
        return f"quarantined: {row.unstorable}"
    if row.commit is not None and row.commit > times.version:
        return f"not yet online: commit {row.commit} is after watermark {times.version}"
    if times.expired(row.event_us):
        return "expired by ttl"
    return None


def _by_order(row: TableRow, held: HeldRecord | None, times: Times, served: TableRow | None) -> str:
    refused = held is not None and row.commit is not None and stamp(times.generation, row.commit) <= held.floor
    lost = "refused: at or below the floor" if refused else SHOULD
    if held is None or held.event_us is None or row.order > (held.event_us, held.created_us):
        return lost
    later = served is not None and row.commit is not None and served.commit is not None and row.commit > served.commit
    if row.order < (held.event_us, held.created_us):
        return "late but newer wins" if later else "older"
    if later:
        return lost
    if served is not None and row.exact and served.exact and row.commit == served.commit:
        return "same order and commit: either may be served"
    return "same order, later commit wins"


def disagreement(rows: Sequence[TableRow], held: HeldRecord | None, times: Times) -> str | None:
    """How the store differs from *rows*, which the table has at the watermark's version; None where it does not.

    What a run wrote after the watermark is newer than both, and an erased entity is away whatever the table has.
    """
    if held is not None and (held.erased or held.version > stamp(times.generation, times.version)):
        return None
    possible = [row for row in rows if row.unstorable is None and not times.expired(row.event_us)]
    seen = held is not None and held.event_us is not None and not times.expired(held.event_us)
    if not possible:
        return "extra: readers see a row, the table has none that they should see" if seen else None
    order = max(row.order for row in possible)
    if not seen or held is None or held.event_us is None:
        soon = all(times.expired(row.event_us, SKEW_US) for row in possible)
        return None if soon else "missing: the table has a row, readers see nothing"
    if (held.event_us, held.created_us) < order:
        return "stale: readers see an older row than the table has"
    best = [row for row in possible if row.order == order]
    newest = max(row.commit or -1 for row in best)
    # Where the log does not tell exactly, a row may have come with a later commit than it seems.
    latest = [row for row in best if (row.commit or -1) == newest or not all(one.exact for one in best)]
    same = (held.event_us, held.created_us) == order and any(
        repr(row.features) == repr(held.features) for row in latest
    )
    return None if same else "wrong: readers see other values than those of the table's latest row"
