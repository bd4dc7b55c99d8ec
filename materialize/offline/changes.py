"""What commits did to the rows of a table since a watermark, or why that cannot be told exactly any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from materialize.errors import OfflineStoreError, RebuildNeeded
from materialize.offline.deletion_vector import vector_id, vector_path
from materialize.offline.log import CommitGone, rows_of, total_rows
from materialize.offline.schema import columns_of, same_values
from materialize.offline.table import open_table, reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from materialize.model import Watermark
    from materialize.offline.log import Commit
    from materialize.offline.table import OfflineTable

__all__ = ["Change", "changes_since", "removed_since"]


@dataclass(frozen=True, slots=True)
class Change:
    """Add and remove actions of one commit. Rows of removed files are gone unless added files have the same rows again."""

    version: int
    removes: tuple[dict[str, Any], ...]
    adds: tuple[dict[str, Any], ...]

    @property
    def size(self) -> int:
        """Bytes of the files that it wrote or removed, as far as the log tells."""
        return sum(action.get("size") or 0 for action in self._whole_files())

    @property
    def rows(self) -> int:
        """Rows of the files that it wrote or removed, about."""
        return total_rows((rows_of(action), action.get("size") or 0) for action in self._whole_files())

    def _whole_files(self) -> list[dict[str, Any]]:
        """Without the files that only got another deletion vector: of these just the rows that differ count."""
        kept = {remove["path"] for remove in self.removes} & {add["path"] for add in self.adds}
        return [action for action in (*self.removes, *self.adds) if action["path"] not in kept]


def changes_since(table: OfflineTable, watermark: Watermark) -> list[Change]:
    """What the commits after *watermark* up to the pinned version did, oldest first; a commit that only added has one per file.

    Raises RebuildNeeded, naming the reason, when their rows cannot be told exactly from the log and the files that are left.
    """
    after = watermark.version
    assert after is not None  # noqa: S101 - the planner asks only for finished watermarks
    if watermark.table_id != table.table_id:
        raise _rebuild(
            table, f"the table was dropped and created again (id {watermark.table_id}, now {table.table_id})", after
        )
    if table.version < after:
        raise _rebuild(table, f"the table's head is version {table.version}, behind the watermark", after)
    try:
        with reading(table.view):
            commits = table.log.commits(after + 1, table.version)
    except CommitGone as gone:
        oldest = "no commit file is left" if gone.oldest is None else f"the oldest is {gone.oldest}"
        raise _rebuild(table, f"commit {gone.version} is gone from the log ({oldest})", after) from None
    _check_metadata(table, commits, after, table.view.columns)
    changes = [change for commit in commits for change in _changes(commit)]
    _check_files(table, changes, commits, after)
    return changes


def removed_since(table: OfflineTable, version: int) -> list[dict[str, Any]]:
    """The files that commits after *version* removed, as remove actions: as far as commits and files are left and have today's keys."""
    with reading(table.view):
        commits = table.log.commits_left(table.version, first=version + 1)
    try:
        _check_metadata(table, commits, version, table.view.order_columns)
    except RebuildNeeded:
        return []
    with reading(table.view):
        removes = {remove["path"]: remove for commit in commits for remove in _changed(commit.removes)}
        gone = table.log.missing(removes)
    return [remove for path, remove in removes.items() if path not in gone and _typed(table, remove)]


def _changes(commit: Commit) -> Iterator[Change]:
    removes = {remove["path"]: remove for remove in _changed(commit.removes)}
    adds = {add["path"]: add for add in _changed(commit.adds)}
    # The same file with the same rows, added again with other statistics or tags.
    for path in [path for path in removes.keys() & adds.keys() if _vector(removes[path]) == _vector(adds[path])]:
        del removes[path], adds[path]
    if removes:
        yield Change(commit.version, tuple(removes.values()), tuple(adds.values()))
    else:
        yield from (Change(commit.version, (), (add,)) for add in adds.values())


def _changed(actions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that change data; OPTIMIZE and the like only move rows from file to file."""
    return [action for action in actions if action["dataChange"]]


def _vector(action: dict[str, Any]) -> tuple[Any, ...] | None:
    return vector_id(action.get("deletionVector"))


def _check_metadata(table: OfflineTable, commits: list[Commit], after: int, names: Sequence[str]) -> None:
    """Raise RebuildNeeded when one of the columns *names* has other values now, without any file being written."""
    written = [(commit.version, commit.metadata) for commit in commits if commit.metadata is not None]
    if not written:
        return
    try:
        before = open_table(table.view, written[0][0] - 1, check=False)
    except OfflineStoreError:
        raise _rebuild(table, f"the schema before version {written[0][0]} cannot be read any more", after) from None
    schemas = [(after, before.columns, before.partition_columns)]
    schemas += [(at, columns_of(meta["schemaString"]), meta["partitionColumns"]) for at, meta in written]
    for version, columns, partition_columns in schemas:
        if list(partition_columns) != list(table.partition_columns):
            raise _rebuild(table, f"the partition columns changed since version {version}", after)
        for name in names:
            if name in columns and not same_values(columns[name], table.columns[name]):
                was, now = columns[name], table.columns[name]
                how = f"was {was.type}, is {now.type}" if was.stored == now.stored else "was dropped or renamed"
                raise _rebuild(table, f"column {name!r} is another one since version {version} ({how})", after)


def _check_files(table: OfflineTable, changes: list[Change], commits: list[Commit], after: int) -> None:
    """Raise RebuildNeeded when a file that has to be read was vacuumed, or is not described well enough."""
    removed = {remove["path"] for commit in commits for remove in commit.removes}
    needed = [action for change in changes for action in (*change.removes, *change.adds) if action["path"] in removed]
    vectors = [action["deletionVector"] for action in needed if action.get("deletionVector")]
    with reading(table.view):
        paths = {action["path"] for action in needed} | {path for path in map(vector_path, vectors) if path}
        gone = table.log.missing(paths)
    if gone:
        raise _rebuild(table, f"{len(gone)} data files that were removed since are vacuumed", after)
    if not all(_typed(table, action) for action in needed):
        raise _rebuild(table, "files were removed without their partition values", after)


def _typed(table: OfflineTable, action: dict[str, Any]) -> bool:
    """Whether the log tells the partition values of the file, which a remove action may leave out."""
    return action.get("partitionValues") is not None or not table.partition_columns


def _rebuild(table: OfflineTable, reason: str, after: int) -> RebuildNeeded:
    return RebuildNeeded(
        f"{table.subject}: could not read what changed: {reason}; the watermark stays at version {after}. "
        f"Run: materialize rebuild {table.view.name}",
        reason,
    )
