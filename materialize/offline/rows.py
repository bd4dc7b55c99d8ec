"""Rows of a table's data files: keys and order of all of them, features of some, each row known by its place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from materialize.errors import OfflineStoreError
from materialize.offline.dtypes import polars_type
from materialize.offline.log import OLDEST, READERS, total_rows
from materialize.offline.table import reading
from materialize.order import NO_CREATED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.offline.log import DataFile, LogReader
    from materialize.offline.table import OfflineTable

__all__ = ["OrderRows", "RowCounts", "read_features", "read_order", "versions_are_exact", "with_versions"]

#: Physical rows per file: int64, shape (files,).
RowCounts = npt.NDArray[np.int64]

#: Bytes of wide columns decoded at once, before only the winning rows are kept.
READ_BYTES = 64 * 2**20
#: Assumed width of a value of variable size, when the rows per read are chosen.
VARIABLE_WIDTH = 32
#: Rows whose keys are in memory at once when the rows of some entities are looked for.
ORDER_ROWS = 4_000_000
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


def read_order(table: OfflineTable, files: Sequence[DataFile], *, of: pl.DataFrame | None = None) -> OrderRows:
    """The key and order columns of every selected row of *files*; with *of*, only rows whose join keys are in it.

    Returns: one row per table row, in the order of *files*.
    """
    if of is None:
        return _read_order(table, list(files))
    parts = []
    wanted = {name: of[name].sort().to_numpy() for name in table.view.join_keys if of.schema[name].is_integer()}
    for group in _groups([file for file in files if _may_hold(file, wanted)], ORDER_ROWS):
        part = _read_order(table, group)
        parts.append(part.having(part.frame.join(of, on=table.view.join_keys, how="semi")))
    return OrderRows.concat(parts) if parts else _read_order(table, [])


def _read_order(table: OfflineTable, files: list[DataFile]) -> OrderRows:
    view = table.view
    names = view.order_columns
    with reading(view):
        _check_field_ids(table, files)
        frame = _scan(table, files, names).with_row_index("__position").collect()
    counts = _rows_per_file(table, frame["__path"], files)
    frame = _with_partition_values(table, frame, files, np.repeat(np.arange(len(files)), counts), names)
    created = (
        pl.lit(NO_CREATED)
        if view.created_timestamp is None
        else pl.col(view.created_timestamp).to_physical().fill_null(NO_CREATED)
    )
    ordered = frame.select(
        *view.join_keys,
        event_us=pl.col(view.event_timestamp).to_physical(),
        created_us=created.cast(pl.Int64),
        version=_per_row([file.version for file in files], counts),
        position="__position",
    )
    return OrderRows(files, counts, _selected_rows(ordered, files, counts))


def with_versions(table: OfflineTable, rows: OrderRows) -> OrderRows:
    """*rows* of a snapshot with the commit that brought each, as far as the log tells: the later of two equal ones wins."""
    with reading(table.view):
        versions = table.log.file_versions(table.version)
    brought = _per_row([versions.get(file.path, OLDEST) for file in rows.files], rows.counts)
    return rows.having(rows.frame.with_columns(version=brought[rows.frame["position"]]))


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
    for block in _blocks(rows.counts, _block_rows(table)):
        begin, stop = np.searchsorted(wanted, (block.low, block.high))
        if begin == stop:
            continue
        some, inside = rows.files[block.first : block.last], slice(block.low - block.base, block.high - block.base)
        with reading(table.view):
            frame = _scan(table, some, names)[inside].collect()
        of_file = np.repeat(np.arange(len(some)), rows.counts[block.first : block.last])[inside]
        frame = _with_partition_values(table, frame, some, of_file, names)
        yield int(begin), frame.select(names)[wanted[begin:stop] - block.low]


def _check_field_ids(table: OfflineTable, files: Sequence[DataFile]) -> None:
    """Raise ValueError for a data file of a table with column mapping by id whose columns have other names than the schema says."""
    if table.delta.metadata().configuration.get("delta.columnMapping.mode") != "id":
        return
    stored = {column.id: column.stored for name, column in table.columns.items() if name in table.view.columns}
    with ThreadPoolExecutor(READERS) as pool:
        schemas = pool.map(lambda file: _read_schema(table.log, file), files)
        for file, schema in zip(files, schemas, strict=True):
            for field in schema:
                number = int((field.metadata or {}).get(b"PARQUET:field_id", -1))
                if stored.get(number, field.name) != field.name:
                    raise ValueError(
                        f"found the column {field.name!r} with field id {number} in {file.path}, expected the name {stored[number]!r}; "
                        "rewrite this file"
                    )


def _block_rows(table: OfflineTable) -> int:
    widths = (kind.width or VARIABLE_WIDTH for kind in table.view.features.values())
    return max(1_024, READ_BYTES // sum(widths))


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


def _read_schema(log: LogReader, file: DataFile) -> pa.Schema:
    with log.open(file.path) as content:
        return pq.read_schema(content)


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


def _groups(files: Sequence[DataFile], rows: int) -> Iterator[list[DataFile]]:
    """*files* in order, some together while they have at most *rows*."""
    group: list[DataFile] = []
    for file in files:
        if group and total_rows((each.rows, each.size) for each in (*group, file)) > rows:
            yield group
            group = []
        group.append(file)
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class _Block:
    """Physical rows ``[low, high)``, all in files ``[first, last)``; the first of these files begins at row ``base``."""

    low: int
    high: int
    first: int
    last: int
    base: int


def _blocks(counts: RowCounts, rows: int) -> Iterator[_Block]:
    """Cut files into blocks of about *rows*: small files together, a large file by itself in slices."""
    first, start, end = 0, 0, 0
    for index, count in enumerate([*counts.tolist(), rows + 1]):  # the last one is no file: it ends the last block
        if end > start and end + count - start > rows:
            for low in range(start, end, rows):
                yield _Block(low, min(low + rows, end), first, index, start)
            first, start = index, end
        end += count
