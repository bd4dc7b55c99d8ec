"""Rows of a table's data files: keys and order of all of them, features of some, each row known by its place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from pyroaring import BitMap

from materialize.errors import OfflineStoreError
from materialize.offline.data_files import brought, check_field_ids, counted, groups
from materialize.offline.dtypes import polars_type
from materialize.offline.table import reading
from materialize.order import NO_CREATED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from materialize.offline.log import DataFile
    from materialize.offline.table import OfflineTable

__all__ = [
    "ORDER_ROWS",
    "OrderRows",
    "RowCounts",
    "may_hold",
    "read_features",
    "read_order",
    "read_parts",
    "read_whole",
    "versions_are_exact",
    "with_versions",
]

#: Physical rows per file: int64, shape (files,).
RowCounts = npt.NDArray[np.int64]

#: Rows whose keys and order are read at once, unless somebody wants less; while they are read they take about 100 bytes each.
ORDER_ROWS = 500_000
#: Bytes of wide columns decoded at once, before only the winning rows are kept.
READ_BYTES = 64 * 2**20
#: Of these, bytes decoded at a time: columns of a few rows cost more calls, columns of many rows more memory.
COLUMN_BYTES = 32 * 2**20
#: Bytes of a row beside its features: keys and order where they are read too, and where the row is.
BESIDE = 96
#: Assumed width of a value of variable size, when the rows per read are chosen.
VARIABLE_WIDTH = 32
#: What data files may hold of a column: what it was before it was widened, times of other units. Nothing else loses nothing.
CAST = pl.ScanCastOptions(
    integer_cast=("upcast", "allow-float"),
    float_cast="upcast",
    datetime_cast=("nanosecond-downcast", "millisecond-upcast"),
)


@dataclass(frozen=True, slots=True)
class OrderRows:
    """Keys and order of rows in data files.

    ``counts``: physical rows per file, int64, shape (files,). ``frame``: the join keys (their own types), event_us Int64 (null
    for a null event time), created_us Int64 (NO_CREATED for none), version Int64, position UInt32 (row number over all
    physical rows of ``files``).
    """

    files: list[DataFile]
    counts: RowCounts
    frame: pl.DataFrame

    def having(self, frame: pl.DataFrame) -> OrderRows:
        """The same files with other rows of them."""
        return OrderRows(self.files, self.counts, frame)

    @classmethod
    def concat(cls, parts: Sequence[OrderRows]) -> OrderRows:
        """The rows of all *parts*, at least one."""
        bases = np.cumsum([0, *(part.counts.sum() for part in parts)])
        frames = [
            part.frame.with_columns(pl.col("position") + pl.lit(base, pl.UInt32))
            for part, base in zip(parts, bases, strict=False)
        ]
        files = [file for part in parts for file in part.files]
        return cls(files, np.concatenate([part.counts for part in parts]), pl.concat(frames))


def read_order(
    table: OfflineTable,
    files: Sequence[DataFile],
    *,
    of: pl.DataFrame | None = None,
    keep: Callable[[pl.DataFrame], pl.DataFrame] | None = None,
) -> OrderRows:
    """The key and order columns of every selected row of *files*; with *of*, only rows whose join keys are in it; with *keep*, those it leaves.

    Returns: one row per table row, in the order of *files*; with *of*, of those that may have such rows.
    """
    if of is not None:
        files = may_hold(table, files, of)
        keep = partial(pl.DataFrame.join, other=of, on=table.view.join_keys, how="semi")
    parts = read_parts(table, files)
    return OrderRows.concat([part.having(keep(part.frame)) if keep else part for part in parts])


def read_parts(table: OfflineTable, files: Sequence[DataFile], *, rows: int = ORDER_ROWS) -> Iterator[OrderRows]:
    """`read_order` in parts of at most about *rows* rows, so that each can be let go before the next one is read.

    Yields: at least one part; joined by `OrderRows.concat` they are what `read_order` returns. A file that is larger than a part
    is one of the files of its last part, and its positions count from the same row in all of them.
    """
    known = counted(table, files, rows)
    for group in groups(known, rows) if known else [[]]:
        many = group[0].rows or 0 if len(group) == 1 else 0
        if many <= rows:
            yield _read_order(table, group)
        else:
            for low in range(0, many, rows):
                yield _read_order_slice(table, group[0], low, min(low + rows, many))


def _read_order(table: OfflineTable, files: list[DataFile]) -> OrderRows:
    with reading(table.view):
        check_field_ids(table, files)
        frame = _scan(table, files, table.view.order_columns).with_row_index("__position").collect()
    counts = _rows_per_file(table, frame["__path"], files)
    of_file = np.repeat(np.arange(len(files)), counts)
    frame = _with_partition_values(table, frame.drop("__path"), files, of_file, table.view.order_columns)
    rows = _ordered(table, frame, files, of_file)
    return OrderRows(files, counts, _selected_rows(rows, files, counts))


def _read_order_slice(table: OfflineTable, file: DataFile, low: int, high: int) -> OrderRows:
    """Rows ``[low, high)`` of *file*, by their positions in it; with the file itself only where they are its last ones."""
    with reading(table.view):
        check_field_ids(table, [file])
        lazy = _scan(table, [file], table.view.order_columns).drop("__path")
        frame = lazy[low:high].with_row_index("__position", offset=low).collect()
    if frame.height != high - low:
        raise OfflineStoreError(
            f"{table.subject}: could not read exactly: found {frame.height:,} rows in a part of a data file, expected {high - low:,}. "
            "Nothing was written by this step; the watermark stays."
        )
    of_file = np.zeros(high - low, dtype=np.int64)
    frame = _with_partition_values(table, frame, [file], of_file, table.view.order_columns)
    rows = _ordered(table, frame, [file], of_file)
    if file.selection is not None:
        rows = rows.filter(pl.Series(file.selection.mask(file.rows or high)[low:high]))
    last = high == file.rows
    return OrderRows([file] * last, np.array([high] * last, dtype=np.int64), rows)


def _ordered(
    table: OfflineTable, frame: pl.DataFrame, files: Sequence[DataFile], of_file: npt.NDArray[np.int64]
) -> pl.DataFrame:
    """The order columns of *frame*, each row from the file that *of_file* tells, as `OrderRows` has them."""
    view = table.view
    created = (
        pl.lit(NO_CREATED)
        if view.created_timestamp is None
        else pl.col(view.created_timestamp).to_physical().fill_null(NO_CREATED)
    )
    versions = np.array([file.version for file in files], dtype=np.int64)
    return frame.select(
        *view.join_keys,
        event_us=pl.col(view.event_timestamp).to_physical(),
        created_us=created.cast(pl.Int64),
        version=pl.Series(versions[of_file]),
        position="__position",
    )


def with_versions(table: OfflineTable, rows: OrderRows) -> OrderRows:
    """*rows* of a snapshot with the commit that brought each, as far as the log tells: the later of two equal ones wins."""
    files = brought(table, rows.files)
    versions = _per_row([file.version for file in files], rows.counts)
    return OrderRows(files, rows.counts, rows.frame.with_columns(version=versions[rows.frame["position"]]))


def versions_are_exact(table: OfflineTable, rows: OrderRows) -> pl.Series:
    """Whether the version that `with_versions` gives a row is the commit that brought it; else it may be an earlier one. Boolean."""
    with reading(table.view):
        appended = table.log.appended_files(table.version)
    exact = np.repeat(np.array([file.path in appended for file in rows.files], dtype=np.bool_), rows.counts)
    return pl.Series(exact)[rows.frame["position"]]


def read_features(table: OfflineTable, rows: OrderRows, positions: pl.Series) -> Iterator[tuple[int, pl.DataFrame]]:
    """The feature columns of the rows at *positions* (UInt32, ascending) of *rows*, in blocks of bounded size.

    Yields: (index into *positions* of the block's first row, the view's features in order, in their column types).
    """
    names, wanted = list(table.view.features), positions.to_numpy()
    for block in _blocks(rows, _block_rows(table)):
        begin, stop = np.searchsorted(wanted, (block.low, block.high))
        if begin < stop:
            scans = [_scan(table, block.files, some) for some in _column_groups(table, names, block)]
            frame = _picked(table, scans, block, wanted[begin:stop])
            of_file = block.of_file(wanted[begin:stop])
            yield int(begin), _with_partition_values(table, frame, block.files, of_file, names).select(names)


def read_whole(table: OfflineTable, rows: OrderRows, positions: BitMap) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """The rows at *positions* of *rows*, whose own frame may be empty, in blocks of bounded size.

    Yields: (keys and order, as `OrderRows` has them; the view's features in order, in their column types).
    """
    names = [*table.view.order_columns, *table.view.features]
    for block in _blocks(rows, _block_rows(table)):
        wanted = np.array((positions & BitMap(range(block.low, block.high))).to_array(), dtype=np.uint32)
        if len(wanted):
            scans = [_scan(table, block.files, some) for some in _column_groups(table, names, block)]
            frame = _picked(table, scans, block, wanted).with_columns(__position=pl.Series(wanted))
            of_file = block.of_file(wanted)
            frame = _with_partition_values(table, frame, block.files, of_file, names)
            yield _ordered(table, frame, block.files, of_file), frame.select(list(table.view.features))


def _picked(
    table: OfflineTable, scans: Sequence[pl.LazyFrame], block: _Block, wanted: npt.NDArray[Any]
) -> pl.DataFrame:
    """The columns of *scans*, each of a part of the columns of the files of *block*, for the rows at the positions *wanted*."""
    places, parts = wanted - block.low, list[pl.DataFrame]()
    with reading(table.view):
        for one in scans:
            parts.append(one.drop("__path")[block.low - block.base : block.high - block.base].collect()[places])
    return pl.concat(parts, how="horizontal") if parts else pl.DataFrame(height=len(wanted))


def _column_groups(table: OfflineTable, names: Sequence[str], block: _Block) -> Iterator[list[str]]:
    """Those of *names* that data files have, some together while those of *block* are `COLUMN_BYTES` at most."""
    group, taken, rows = list[str](), 0, block.high - block.low
    for name in (name for name in names if name not in table.partition_columns):
        kind = table.view.features.get(name)
        width = rows * (VARIABLE_WIDTH if kind is None else kind.width or VARIABLE_WIDTH)
        if group and taken + width > COLUMN_BYTES:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += width
    if group:
        yield group


def _block_rows(table: OfflineTable) -> int:
    widths = (kind.width or VARIABLE_WIDTH for kind in table.view.features.values())
    return max(1_024, READ_BYTES // (BESIDE + sum(widths)))


def _scan(table: OfflineTable, files: Sequence[DataFile], names: Sequence[str]) -> pl.LazyFrame:
    """The columns *names* that are stored in the files, with the file's address as ``__path``."""
    stored = {name: table.columns[name] for name in names if name not in table.partition_columns}
    if not files:
        types = {name: polars_type(column.type) for name, column in stored.items()}
        return pl.LazyFrame(schema={**types, "__path": pl.String})
    return pl.scan_parquet(
        [file.uri for file in files],
        schema={column.stored: polars_type(column.type) for column in stored.values()},
        hive_partitioning=False,
        glob=False,
        missing_columns="insert",
        extra_columns="ignore",
        cast_options=CAST,
        include_file_paths="__path",
        storage_options=table.view.storage_options or None,
    ).rename({column.stored: name for name, column in stored.items()})


def _with_partition_values(
    table: OfflineTable,
    frame: pl.DataFrame,
    files: Sequence[DataFile],
    of_file: npt.NDArray[np.int64],
    names: Sequence[str],
) -> pl.DataFrame:
    """Add those of *names* that are partition columns, with the values that the log has for the file of each row."""
    partitioned = [name for name in names if name in table.partition_columns]
    return frame.with_columns(
        pl.Series(
            name, [file.partition_values.get(name) for file in files], dtype=polars_type(table.columns[name].type)
        )[of_file]
        for name in partitioned
    )


def _rows_per_file(table: OfflineTable, paths: pl.Series, files: Sequence[DataFile]) -> RowCounts:
    """How many consecutive rows of *paths* belong to each of different *files*; a file may have none."""
    runs = paths.rle().struct.unnest()
    rows = dict(zip(runs["value"], runs["len"], strict=True))
    counts = np.array([rows.get(file.uri, 0) for file in files], dtype=np.int64)
    if counts.sum() != len(paths):
        raise OfflineStoreError(
            f"{table.subject}: could not read exactly: found {len(paths):,} rows, expected {counts.sum():,} by the files' addresses. "
            "Nothing was written by this step; the watermark stays."
        )
    return counts


def may_hold(table: OfflineTable, files: Sequence[DataFile], of: pl.DataFrame) -> list[DataFile]:
    """Those of *files* that may have rows of the entities whose join keys are in *of*."""
    wanted = {name: of[name].sort().to_numpy() for name in table.view.join_keys if of.schema[name].is_integer()}
    return [file for file in files if _may_hold(file, wanted)]


def _may_hold(file: DataFile, wanted: dict[str, npt.NDArray[Any]]) -> bool:
    """Whether the bounds of *file* leave room for one of the *wanted* join keys (ascending, by name)."""
    for name, values in wanted.items():
        least, most = file.bounds.get(name, (None, None))
        if least is not None and most is not None:
            first = np.searchsorted(values, least)
            if first == len(values) or values[first] > most:
                return False
    return True


def _per_row(versions: Sequence[int], counts: RowCounts) -> pl.Series:
    """The version of each file, once for each of its physical rows. Returns: Int64."""
    return pl.Series(np.repeat(np.array(versions, dtype=np.int64), counts))


def _selected_rows(frame: pl.DataFrame, files: Sequence[DataFile], counts: RowCounts) -> pl.DataFrame:
    if all(file.selection is None for file in files):
        return frame
    selected = np.ones(int(counts.sum()), dtype=np.bool_)
    for start, count, file in zip(np.cumsum(counts) - counts, counts, files, strict=True):
        if file.selection is not None:
            selected[start : start + count] = file.selection.mask(count)
    return frame.filter(pl.Series(selected))


@dataclass(frozen=True, slots=True)
class _Block:
    """Physical rows ``[low, high)``, all in *files*; the first of these begins at row ``base``, the others after it. ``counts``: rows of each."""

    low: int
    high: int
    base: int
    files: list[DataFile]
    counts: RowCounts

    def of_file(self, positions: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Which of the files each of *positions* is in."""
        return np.searchsorted(self.base + np.cumsum(self.counts), positions, side="right")


def _blocks(rows: OrderRows, most: int) -> Iterator[_Block]:
    """Cut the files of *rows* into blocks of about *most* rows: small files together, a large file by itself in slices."""
    first, start, end = 0, 0, 0
    for index, count in enumerate([*rows.counts.tolist(), most + 1]):  # the last one is no file: it ends the last block
        if end > start and end + count - start > most:
            for low in range(start, end, most):
                some, counts = rows.files[first:index], rows.counts[first:index]
                yield _Block(low, min(low + most, end), start, some, counts)
            first, start = index, end
        end += count
