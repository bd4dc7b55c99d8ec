"""Watermark and request in, the way of a run and its pieces of work out. Pure: no I/O, no clock."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from materialize.errors import RebuildNeeded
from materialize.memory import rows_compared
from materialize.model import Interval, Watermark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.model import FeatureView, Layout, Mode

__all__ = ["Path", "Plan", "changed_layout", "changed_view", "choose_path", "cut", "instead_of_changes", "piece_count"]

Item = TypeVar("Item")

#: Rows of one piece. How many of them are in memory at once, the view's memory limit says (`Plan.shares`).
ROWS_PER_PIECE = 10_000_000
#: Airflow maps one task per piece; its own limit is 1,024.
MAX_PIECES = 64
FIRST_GENERATION = 1
#: A snapshot is read instead of the changes when these are so many times its bytes, and more than takes a second or two:
#: comparing rewritten files reads more, but writes only what differs, and the store's time is worth more than ours.
CHANGES_PER_SNAPSHOT, CHANGES_READ = 4, 64 * 2**20


@dataclass(frozen=True, slots=True)
class Path:
    """Which way a run goes. ``snapshot``: the whole pinned version, as each entity's full state; else what changed."""

    snapshot: bool
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do for one view and one store; small, and JSON through `to_dict` and `from_dict`.

    ``pieces`` may be done in any order, at the same time and more than once, by processes with the same ``engine``.
    ``watermark``: the cell's text that the commit expects. ``sweep``: the commit removes entities that the snapshot has
    no row of. ``fenced``: a snapshot run gives a floor to every entity that lost its rows after this version.
    ``schema_id`` and ``sweep`` are set by `pipeline.begin`; so are ``evidence`` (what the store's servers said then), ``positions``
    (where its own writes ended), and ``repaired`` and ``removed``, entities that it found damaged. ``moved``: the
    commit writes the watermark anew although no version came, because the store is another one. ``force``: do it although a check says no.
    ``rows_held``: how many rows' keys and order a piece may have in memory at a time, the smaller the more often it reads them.
    ``live_rows``: of the planned version, None where the log does not tell. ``seconds``: that planning and `pipeline.begin` took.
    """

    view: str
    store: str
    mode: Mode
    run_id: str
    table_id: str
    from_version: int | None
    to_version: int
    generation: int
    snapshot: bool
    pieces: int
    rows: int
    reason: str
    engine: str
    interval: Interval | None = None
    watermark: str | None = None
    fenced: int | None = None
    live_rows: int | None = None
    schema_id: int = 0
    sweep: bool = False
    force: bool = False
    evidence: dict[str, Any] | None = None
    positions: dict[str, int] = field(default_factory=dict)
    repaired: int = 0
    removed: int = 0
    moved: bool = False
    seconds: float = 0.0
    rows_held: int = ROWS_PER_PIECE

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.interval is not None:
            values["interval"] = [self.interval.start.isoformat(), self.interval.end.isoformat()]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        interval = values["interval"]
        return cls(
            **{
                **values,
                "interval": None if interval is None else Interval(*(datetime.fromisoformat(end) for end in interval)),
            }
        )

    @property
    def shares(self) -> int:
        """The parts that the entities of a piece are cut into, so that the keys and order of about ``rows_held`` rows are in memory at once."""
        return max(1, -(-self.rows // (max(1, self.pieces) * self.rows_held)))

    @property
    def reads_changes(self) -> bool:
        """Whether the run reads what commits changed; else it reads the live files of a snapshot."""
        return self.mode == "incremental" and not self.snapshot

    @property
    def piece_labels(self) -> tuple[str, ...]:
        """A few words per piece, for people."""
        what = "changes" if self.reads_changes else "entities"
        return tuple(f"{what}, part {piece + 1} of {self.pieces}" for piece in range(self.pieces))


def choose_path(
    view: FeatureView, mode: Mode, watermark: Watermark | None, table_id: str, layout: Layout = "vector"
) -> Path:
    """How a run of *mode* goes. *layout*: how the store keeps records of the view.

    Raises RebuildNeeded for a run that would mix layouts in the store, where the view does not say ``on_rebuild_needed: auto``.
    """
    generation = FIRST_GENERATION if watermark is None else watermark.generation
    moved = None if watermark is None else changed_layout(watermark, layout)
    if moved and mode != "rebuild" and (mode == "backfill" or view.on_rebuild_needed != "auto"):
        raise RebuildNeeded(
            f"feature view {view.name!r}: could not plan the {mode} run: found that {moved} since the last run. "
            f"Nothing was written: readers see what they saw, and the watermark stays. Run: materialize rebuild {view.name}",
            moved,
        )
    if mode == "backfill":
        return Path(snapshot=False, generation=generation, reason="backfill of an event-time interval")
    if mode == "rebuild":
        return Path(snapshot=True, generation=generation + (watermark is not None), reason="rebuild was asked for")
    if watermark is None:
        return Path(
            snapshot=True,
            generation=generation,
            reason="first run: the view has no watermark in this store, which is new to it or was wiped",
        )
    changed = changed_view(view, watermark) or moved
    if watermark.version is None:
        new = watermark.table_id != table_id or changed is not None
        return Path(
            snapshot=True, generation=generation + new, reason=f"the snapshot run {watermark.run_id} did not finish"
        )
    if changed is not None:
        return Path(
            snapshot=True,
            generation=generation + 1,
            reason=f"{changed} since version {watermark.version}: every entity is written again",
        )
    return Path(snapshot=False, generation=generation, reason=f"from the watermark at version {watermark.version}")


def changed_view(view: FeatureView, watermark: Watermark) -> str | None:
    """What changed in the view so that records online are not what it says; a feature that is only gone does not count."""
    if watermark.order != view.order_text:
        return "the join keys or time columns changed"
    before = dict(json.loads(watermark.schema))
    after = {name: str(kind) for name, kind in view.features.items()}
    added = [name for name in after if name not in before]
    retyped = [name for name in after if name in before and before[name] != after[name]]
    told = [f"{what} {', '.join(names)}" for what, names in (("added", added), ("changed type of", retyped)) if names]
    return f"features: {'; '.join(told)}" if told else None


def changed_layout(watermark: Watermark, layout: Layout) -> str | None:
    """What is to be said where the records are not all in *layout*, as the store keeps the view now."""
    return None if watermark.layout == layout else f"the layout changed from {watermark.layout} to {layout}"


def instead_of_changes(
    generation: int, *, changed_bytes: int, largest_rows: int, snapshot_bytes: int, rows_held: int = ROWS_PER_PIECE
) -> Path | None:
    """The snapshot's path when the changes cost more: all of them *changed_bytes*, the largest rewriting commit *largest_rows*; or need
    more memory than that of *rows_held* rows.
    """
    if largest_rows > (most := rows_compared(rows_held)):
        reason = f"a commit rewrote about {largest_rows:,} rows, and within the memory limit of the view no more than {most:,} are compared at once"
    elif changed_bytes > max(CHANGES_PER_SNAPSHOT * snapshot_bytes, CHANGES_READ):
        reason = f"the changes have {changed_bytes:,} bytes, the snapshot {snapshot_bytes:,}"
    else:
        return None
    return Path(snapshot=True, generation=generation, reason=reason)


def cut(items: Sequence[Item], sizes: Sequence[int], pieces: int) -> list[list[Item]]:
    """*items* in order, cut into *pieces* runs of about equal size; one may be empty. Depends on nothing but the arguments."""
    parts: list[list[Item]] = [[] for _ in range(pieces)]
    total, taken = sum(sizes), 0
    for item, size in zip(items, sizes, strict=True):
        parts[min(taken * pieces // max(total, 1), pieces - 1)].append(item)
        taken += size
    return parts


def piece_count(rows: int, *, items: int | None, most: int = ROWS_PER_PIECE) -> int:
    """How many pieces *rows* are worth, of at most *most* rows; with *items*, the changes that pieces are cut between, not more than these."""
    pieces = min(MAX_PIECES, max(1, -(-rows // min(most, ROWS_PER_PIECE))))
    return pieces if items is None else min(pieces, items)
