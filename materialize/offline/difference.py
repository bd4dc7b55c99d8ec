"""Changes in, rows out: which rows the commits brought, and which entities lost one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import polars as pl
import pyarrow as pa
from pyroaring import BitMap64

from materialize.offline.deletion_vector import Selection, deleted_rows, positions
from materialize.offline.log import READERS
from materialize.offline.rows import OrderRows, read_features, read_order, read_parts
from materialize.offline.table import reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from materialize.offline.changes import Change
    from materialize.offline.log import DataFile
    from materialize.offline.table import OfflineTable

__all__ = ["Difference", "appended_files", "read_difference", "read_entities", "read_rewritten"]

#: Float columns are compared by their bits: NaN equals itself, and 0.0 is not -0.0.
BITS = {
    pl.Float32(): pa.uint32(),
    pl.Float64(): pa.uint64(),
    pl.List(pl.Float32()): pa.large_list(pa.uint32()),
    pl.List(pl.Float64()): pa.large_list(pa.uint64()),
}


#: Rows to those of one share of all entities; and the shares in which so many rows are compared.
Keep = Callable[[pl.DataFrame], pl.DataFrame]
InShares = Callable[[int], Sequence[Keep]]


def _whole(rows: int) -> Sequence[Keep]:  # noqa: ARG001 - however many
    return [lambda frame: frame]


@dataclass(frozen=True, slots=True)
class Difference:
    """``added``: the rows that some commits brought, each with its commit. ``lost``: the join keys of every entity that
    lost a row in one of them, each once; also when the row came in another of these commits.
    """

    added: OrderRows
    lost: pl.DataFrame


def read_difference(table: OfflineTable, changes: Sequence[Change], in_shares: InShares = _whole) -> Difference:
    """Read what *changes* did: the rows of `appended_files` and what `read_rewritten` finds."""
    rewritten = read_rewritten(table, changes, in_shares)
    return Difference(
        OrderRows.concat([read_order(table, appended_files(table, changes)), rewritten.added]), rewritten.lost
    )


def appended_files(table: OfflineTable, changes: Sequence[Change]) -> list[DataFile]:
    """The files of those of *changes* that removed nothing."""
    changes = [change for change in changes if not change.removes]
    vectors = _vectors(table, changes)
    appended = [file for change in changes for file in _added(table, change, vectors)]
    # A file that was deleted and restored was added twice: its rows count as brought by the later commit.
    return list({file.uri: file for file in appended}.values())


def read_rewritten(table: OfflineTable, changes: Sequence[Change], in_shares: InShares = _whole) -> Difference:
    """Read what those of *changes* did that removed something: all columns of the view are compared.

    The rows of one share of *in_shares* are in memory at once, and all that were brought. Each share reads all columns once.
    """
    changes = [change for change in changes if change.removes]
    vectors, parts = _vectors(table, changes), [read_order(table, [])]
    lost = [parts[0].frame.select(table.view.join_keys)]
    for change in changes:
        sides = _removed(table, change, vectors), _added(table, change, vectors)
        each = [
            _compared(table, *(read_order(table, files, keep=keep) for files in sides))
            for keep in in_shares(change.rows)
        ]
        parts.append(each[0][0].having(pl.concat([added.frame for added, _ in each])))
        lost += [gone for _, gone in each]
    return Difference(OrderRows.concat(parts), pl.concat(lost).unique())


def read_entities(table: OfflineTable, actions: Sequence[dict[str, Any]], keep: Keep) -> pl.DataFrame:
    """The join keys in the data files of *actions*, deleted rows included, each once. *keep*: rows to those that are wanted."""
    found: pl.DataFrame | None = None
    for part in read_parts(table, [table.data_file(action, version=0) for action in actions]):
        some = keep(part.frame.select(table.view.join_keys)).unique()
        found = some if found is None else pl.concat([found, some]).unique()
    assert found is not None  # noqa: S101 - there is one part at least
    return found


def _compared(table: OfflineTable, removed: OrderRows, added: OrderRows) -> tuple[OrderRows, pl.DataFrame]:
    """The rows that one commit brought, and the join keys of the entities that lost one in it: all of both, or of a share of entities.

    Most rows of a rewritten file are in a new file again. A row is the same if its join keys and times are equal and a 64-bit
    hash of its features is.
    """
    keys = list(table.view.join_keys)
    times = [*keys, "event_us", "created_us"]
    again, anew = _paired(removed, added, times), _paired(added, removed, times)
    again = again.with_columns(hash=_hash(read_features(table, removed, again["position"])))
    anew = anew.with_columns(hash=_hash(read_features(table, added, anew["position"])))
    row = [*times, "hash"]
    signed = [again.select(*row, sign=pl.lit(-1)), anew.select(*row, sign=pl.lit(1))]
    more = pl.concat(signed).group_by(row).agg(pl.col("sign").sum())
    lost = pl.concat(
        [
            removed.frame.join(added.frame, on=times, how="anti", nulls_equal=True).select(keys),
            more.filter(pl.col("sign") < 0).select(keys),
        ]
    )
    brought = pl.concat(
        [
            added.frame.join(removed.frame, on=times, how="anti", nulls_equal=True),
            anew.join(more.filter(pl.col("sign") > 0), on=row, how="semi", nulls_equal=True).drop("hash"),
        ]
    )
    return added.having(brought), lost.unique()


def _paired(rows: OrderRows, others: OrderRows, times: list[str]) -> pl.DataFrame:
    """Those of *rows* whose key and *times* some of *others* have too, ascending by position."""
    twins = others.frame.select(times).unique()
    return rows.frame.join(twins, on=times, how="semi", nulls_equal=True).sort("position")


def _hash(blocks: Iterator[tuple[int, pl.DataFrame]]) -> pl.Series:
    """One number for the features of each row. Returns: UInt64."""
    hashes = [_bits(features).hash_rows() for _, features in blocks]
    return pl.concat(hashes) if hashes else pl.Series([], dtype=pl.UInt64)


def _bits(features: pl.DataFrame) -> pl.DataFrame:
    exact = (
        pl.Series(column.name, pl.from_arrow(column.rechunk().to_arrow().view(BITS[column.dtype])))
        if column.dtype in BITS
        else column
        for column in features
    )
    return pl.DataFrame(list(exact))


# --- files -------------------------------------------------------------------------------------------------------------

#: Which end of a change: before the commit or after it.
Side = Literal["removes", "adds"]
#: The deleted rows of each file that has a deletion vector, by commit, side and path.
Vectors = dict[tuple[int, Side, str], BitMap64]


def _vectors(table: OfflineTable, changes: Sequence[Change]) -> Vectors:
    described = {
        (change.version, side, action["path"]): action["deletionVector"]
        for change in changes
        for side in get_args(Side)
        for action in getattr(change, side)
        if action.get("deletionVector")
    }
    with reading(table.view), ThreadPoolExecutor(READERS) as pool:
        found = pool.map(partial(deleted_rows, read=table.log.read), described.values())
        return dict(zip(described, found, strict=True))


def _removed(table: OfflineTable, change: Change, vectors: Vectors) -> list[DataFile]:
    """The files whose selected rows were there before the commit, and are not in the same file afterwards."""
    return _files(table, change, vectors, "removes", "adds")


def _added(table: OfflineTable, change: Change, vectors: Vectors) -> list[DataFile]:
    """The files whose selected rows are there after the commit, and were not in the same file before."""
    return _files(table, change, vectors, "adds", "removes")


def _files(table: OfflineTable, change: Change, vectors: Vectors, side: Side, other: Side) -> list[DataFile]:
    files, on_both = [], {action["path"] for action in getattr(change, other)}
    for action in getattr(change, side):
        path = action["path"]
        deleted = vectors.get((change.version, side, path), BitMap64())
        if path not in on_both:
            selection = Selection(positions(deleted)) if deleted else None
        else:
            rows = vectors.get((change.version, other, path), BitMap64()) - deleted
            if not rows:
                continue
            selection = Selection(positions(rows), only=True)
        files.append(table.data_file(action, version=change.version, selection=selection))
    return files
