"""How many rows a table has, by the statistics of its log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from materialize.offline.log import rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from materialize.offline.changes import Change
    from materialize.offline.log import DataFile
    from materialize.offline.table import OfflineTable

__all__ = ["live_rows", "live_rows_after"]


def live_rows(files: Iterable[DataFile]) -> int | None:
    """The rows of *files* of a snapshot, without the deleted ones; None where the log does not have the rows of every file."""
    total = 0
    for file in files:
        if file.rows is None:
            return None
        total += file.rows - (0 if file.selection is None else len(file.selection.positions))
    return total


def live_rows_after(table: OfflineTable, before: int | None, changes: Sequence[Change]) -> int | None:
    """The live rows of the pinned version, where there were *before* (None: unknown) and *changes* is all that happened since.

    Looks at the table's whole file list only where rows were removed, which is read then anyway, or where *before* is unknown.
    """
    added = [_added_rows(add) for change in changes for add in change.adds]
    if before is None or None in added or any(change.removes for change in changes):
        return live_rows(table.snapshot_files())
    return before + sum(rows for rows in added if rows is not None)


def _added_rows(add: dict[str, Any]) -> int | None:
    rows = rows_of(add)
    return None if rows is None else rows - (add.get("deletionVector") or {}).get("cardinality", 0)
