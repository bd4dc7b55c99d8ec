"""Watermark and request in, pieces of work out. Pure: no I/O, no clock."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from materialize.errors import RebuildNeeded
from materialize.model import Interval, Watermark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.model import FeatureView, Mode

__all__ = ["Path", "Plan", "choose_path", "cut", "piece_count"]

Item = TypeVar("Item")

#: Rows of one piece. Keys and order columns of a piece are in memory at once, about 40 bytes a row.
ROWS_PER_PIECE = 10_000_000
#: Airflow maps one task per piece; its own limit is 1,024.
MAX_PIECES = 64
FIRST_GENERATION = 1


@dataclass(frozen=True, slots=True)
class Path:
    """Which way a run goes. ``snapshot``: the whole pinned version, as each entity's full state; else added rows, merged."""

    snapshot: bool
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do for one view and one store; small, and JSON through `to_dict` and `from_dict`.

    ``pieces`` may be done in any order, at the same time and more than once, by processes with the same ``engine``.
    ``watermark``: the cell's text that the commit expects. ``sweep``: the commit removes entities that the snapshot has
    no row of. ``schema_id`` and ``sweep`` are set by `pipeline.begin`.
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
    schema_id: int = 0
    sweep: bool = False

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
    def merges_commits(self) -> bool:
        """Whether the run reads what commits added; else it reads the live files of a snapshot."""
        return self.mode == "incremental" and not self.snapshot

    @property
    def piece_labels(self) -> tuple[str, ...]:
        """A few words per piece, for people."""
        what = "entities" if self.snapshot else "files"
        return tuple(f"{what}, part {piece + 1} of {self.pieces}" for piece in range(self.pieces))


def choose_path(view: FeatureView, mode: Mode, watermark: Watermark | None, table_id: str) -> Path:
    """How a run of *mode* has to go. Raises RebuildNeeded when an incremental run cannot be exact."""
    generation = FIRST_GENERATION if watermark is None else watermark.generation
    if mode == "backfill":
        return Path(snapshot=False, generation=generation, reason="backfill of an event-time interval")
    if mode == "rebuild":
        return Path(snapshot=True, generation=generation + (watermark is not None), reason="rebuild was asked for")
    if watermark is None:
        return Path(snapshot=True, generation=generation, reason="first run: the view has no watermark in this store")
    if watermark.version is None:
        new = watermark.table_id != table_id or watermark.schema != view.schema_text
        return Path(
            snapshot=True, generation=generation + new, reason=f"the snapshot run {watermark.run_id} did not finish"
        )
    if watermark.schema != view.schema_text:
        raise RebuildNeeded(
            f"feature view {view.name!r}: could not continue from the watermark: its features or their types changed since version {watermark.version}. "
            f"Nothing was written; readers still get the old features. Run: materialize rebuild {view.name}"
        )
    return Path(snapshot=False, generation=generation, reason=f"from the watermark at version {watermark.version}")


def cut(files: Sequence[Item], sizes: Sequence[int], pieces: int) -> list[list[Item]]:
    """*files* in order, cut into *pieces* runs of about equal size; one may be empty. Depends on nothing but the arguments."""
    parts: list[list[Item]] = [[] for _ in range(pieces)]
    total, taken = sum(sizes), 0
    for file, size in zip(files, sizes, strict=True):
        parts[min(taken * pieces // max(total, 1), pieces - 1)].append(file)
        taken += size
    return parts


def piece_count(rows: int, *, files: int | None) -> int:
    """How many pieces *rows* are worth; with *files*, when pieces are cut between files, not more than these."""
    pieces = min(MAX_PIECES, max(1, -(-rows // ROWS_PER_PIECE)))
    return pieces if files is None else min(pieces, files)
