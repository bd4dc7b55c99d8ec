"""One Delta table pinned at one version: its files, what was added since a watermark, and rows of chosen columns."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from materialize.errors import OfflineStoreError, RebuildNeeded
from materialize.model import mask_credentials, to_us
from materialize.offline.log import Commit, CommitGone, DataFile, LogReader, partition_value
from materialize.offline.schema import check_columns, column_types, polars_type
from materialize.order import NO_CREATED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.model import FeatureView, Interval, Watermark

__all__ = ["OfflineTable", "RowCounts", "open_table", "planned_files"]

#: Physical rows per file: int64, shape (files,).
RowCounts = npt.NDArray[np.int64]

#: Reader features that change nothing here, or that reading through deltalake's file lists and deletion vectors covers.
READER_FEATURES = frozenset({"deletionVectors", "timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"})
#: The greatest protocol version that has no feature list.
LAST_UNLISTED_READER = 2
#: Log statistics are cut to milliseconds; an event may be up to this much outside its file's bounds.
STATISTICS_SLACK_US = 1_000
#: Bytes of wide columns decoded at once, before only the winning rows are kept.
READ_BYTES = 64 * 2**20
#: Assumed width of a value of variable size, when the rows per read are chosen.
VARIABLE_WIDTH = 32
CAST = pl.ScanCastOptions(integer_cast="upcast", float_cast="upcast", datetime_cast="nanosecond-downcast")


def open_table(view: FeatureView, version: int | None = None) -> OfflineTable:
    """Open the table of *view*, pinned at *version* or at its head, and check that it can feed the view.

    Raises OfflineStoreError that lists every problem; nothing is read but the log.
    """
    with _reading(view):
        delta = DeltaTable(view.source, version=version, storage_options=view.storage_options or None)
        table = OfflineTable(view, delta, column_types(delta.schema()))
        protocol, configuration = delta.protocol(), delta.metadata().configuration
    unknown = sorted(set(protocol.reader_features or ()) - READER_FEATURES)
    if unknown or configuration.get("delta.columnMapping.mode", "none") != "none":
        found = ", ".join(unknown) or "column mapping"
        raise OfflineStoreError(
            f"{table.subject}: could not read exactly: found the table feature {found}, expected only {', '.join(sorted(READER_FEATURES))}. "
            "Nothing was read. Rewrite the table without it, or wait for support."
        )
    if problems := check_columns(view, table.columns):
        raise OfflineStoreError(
            "\n  ".join(
                [
                    f"{table.subject}: {len(problems)} problem{'s' * (len(problems) > 1)} at version {table.version}",
                    *problems,
                ]
            )
            + "\nNothing was read. Change the table or the feature view's YAML."
        )
    return table


def planned_files(
    table: OfflineTable, *, whole: bool, interval: Interval | None, watermark: Watermark | None
) -> list[DataFile]:
    """The files that a run reads, in an order that every piece of the run sees alike: live ones, or those added since *watermark*."""
    if whole or watermark is None:
        return table.snapshot_files(interval)
    return table.added_files(watermark)


@contextmanager
def _reading(view: FeatureView) -> Iterator[None]:
    """Turn what deltalake and polars raise while reading into an OfflineStoreError that names the view and the table."""
    subject = f"feature view {view.name!r}: could not read Delta table {mask_credentials(view.source)}"
    try:
        yield
    except TableNotFoundError:
        raise OfflineStoreError(
            f"{subject}: found no readable table there, expected a folder with _delta_log. Nothing was written. "
            "Check the view's source, its credentials, and that the first commit is done."
        ) from None
    except (DeltaError, OSError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
        raise OfflineStoreError(
            f"{subject}: {type(error).__name__}: {_causes(error)}. Nothing was written by this step; the watermark stays."
        ) from error


def _causes(error: BaseException) -> str:
    """The first line of a message and the causes that deltalake lists below it, without its colours and backtrace."""
    lines = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines() or [""]
    causes = [line.strip().removeprefix("↳").strip() for line in lines[1:] if "↳" in line]
    return mask_credentials(": ".join([lines[0], *causes]))


@dataclass(frozen=True, slots=True)
class OfflineTable:
    """A table pinned at ``version``. ``columns``: name -> Delta type."""

    view: FeatureView
    delta: DeltaTable
    columns: dict[str, str]

    @property
    def version(self) -> int:
        return int(self.delta.version())

    @property
    def table_id(self) -> str:
        return str(self.delta.metadata().id)

    @property
    def subject(self) -> str:
        return f"feature view {self.view.name!r}: {mask_credentials(self.view.source)}"

    def snapshot_files(self, interval: Interval | None = None) -> list[DataFile]:
        """The live files of the pinned version, by address; with *interval*, only those that may hold event times inside it."""
        with _reading(self.view):
            log = LogReader(self.delta)
            actions = pl.DataFrame(self.delta.get_add_actions()).to_dicts()
            masks = pl.DataFrame(self.delta.deletion_vectors())
            live = {
                log.uri(uri.removeprefix(log.root)): np.asarray(mask, dtype=np.bool_) for uri, mask in masks.iter_rows()
            }
            version_of = log.file_versions(self.version)
            files = [self._snapshot_file(log, action, version_of(action["path"]), live) for action in actions]
        if unknown := live.keys() - {file.uri for file in files}:
            raise OfflineStoreError(
                f"{self.subject}: could not read exactly: found {len(unknown)} deletion vectors of no live file at version {self.version}, "
                "expected none. Nothing was read."
            )
        return sorted((file for file in files if _may_overlap(file, interval)), key=lambda file: file.uri)

    def _snapshot_file(self, log: LogReader, action: dict[str, Any], version: int, live: dict[str, Any]) -> DataFile:
        least, most = ((action.get(bound) or {}).get(self.view.event_timestamp) for bound in ("min", "max"))
        uri = log.uri(action["path"])
        return DataFile(
            uri=uri,
            version=version,
            size=action["size_bytes"],
            rows=action["num_records"],
            partition_values=action.get("partition") or {},
            live=live.get(uri),
            min_event_us=None if least is None else to_us(least) - STATISTICS_SLACK_US,
            max_event_us=None if most is None else to_us(most) + STATISTICS_SLACK_US,
        )

    def added_files(self, watermark: Watermark) -> list[DataFile]:
        """The files that commits after *watermark* up to the pinned version brought.

        Raises RebuildNeeded, naming the reason, when these commits did anything but add rows, or are not in the log any more.
        """
        after = watermark.version
        assert after is not None  # noqa: S101 - the planner asks only for finished watermarks
        if watermark.table_id != self.table_id:
            raise self._rebuild(
                f"the table was dropped and created again (id {watermark.table_id}, now {self.table_id})", after
            )
        if self.version < after:
            raise self._rebuild(f"the table's head is version {self.version}, behind the watermark", after)
        try:
            with _reading(self.view):
                log = LogReader(self.delta)
                commits = log.commits(after + 1, self.version)
                vacuumed = log.missing([remove["path"] for commit in commits for remove in commit.removes])
        except CommitGone as gone:
            oldest = "no commit file is left" if gone.oldest is None else f"the oldest is {gone.oldest}"
            raise self._rebuild(f"commit {gone.version} is gone from the log ({oldest})", after) from None
        brought = {file.uri: file for commit in commits for file in self._brought(log, commit, after)}
        if lost := vacuumed & brought.keys():
            raise self._rebuild(f"{len(lost)} data files were added, compacted and vacuumed since", after)
        return list(brought.values())

    def _brought(self, log: LogReader, commit: Commit, after: int) -> list[DataFile]:
        if any(remove["dataChange"] for remove in commit.removes):
            raise self._rebuild(f"commit {commit.version} removed or rewrote rows", after)
        meta = commit.metadata
        if meta is not None and meta["partitionColumns"] != self.delta.metadata().partition_columns:
            raise self._rebuild(f"commit {commit.version} changed the partition columns", after)
        return [self._added_file(log, add, commit, after) for add in commit.adds if add["dataChange"]]

    def _added_file(self, log: LogReader, add: dict[str, Any], commit: Commit, after: int) -> DataFile:
        if add.get("deletionVector"):
            raise self._rebuild(f"commit {commit.version} added a file with a deletion vector", after)
        values = {
            name: partition_value(text, self.columns[name])
            for name, text in add["partitionValues"].items()
            if name in self.columns
        }
        rows = json.loads(add.get("stats") or "{}").get("numRecords")
        return DataFile(
            uri=log.uri(add["path"]), version=commit.version, size=add["size"], rows=rows, partition_values=values
        )

    def _rebuild(self, reason: str, after: int) -> RebuildNeeded:
        return RebuildNeeded(
            f"{self.subject}: could not read what changed: {reason}; the watermark stays at version {after}. Run: materialize rebuild {self.view.name}"
        )

    def read_order(self, files: Sequence[DataFile]) -> tuple[pl.DataFrame, RowCounts]:
        """The key and order columns of every live row of *files*, and the physical rows per file.

        Returns: one row per table row, in the order of *files*: the join keys (their own types), event_us Int64 (null for a
        null event time), created_us Int64 (NO_CREATED for none), version Int64, position UInt32 (row number over all physical
        rows of *files*, for `read_features`); and int64, shape (files,).
        """
        view = self.view
        names = list(
            dict.fromkeys((*view.join_keys, view.event_timestamp, view.created_timestamp or view.event_timestamp))
        )
        with _reading(view):
            frame = self._scan(files, names).with_row_index("__position").collect()
        counts = self._rows_per_file(frame["__path"], files)
        frame = self._with_partition_values(frame, files, counts, names)
        created = (
            pl.lit(NO_CREATED)
            if view.created_timestamp is None
            else pl.col(view.created_timestamp).to_physical().fill_null(NO_CREATED)
        )
        ordered = frame.select(
            *view.join_keys,
            event_us=pl.col(view.event_timestamp).to_physical(),
            created_us=created,
            version=pl.Series(np.repeat(np.array([file.version for file in files], dtype=np.int64), counts)),
            position="__position",
        )
        return _live_rows(ordered, files, counts), counts

    def read_features(
        self, files: Sequence[DataFile], counts: RowCounts, positions: pl.Series
    ) -> Iterator[tuple[int, pl.DataFrame]]:
        """The feature columns of the rows at *positions* (UInt32, ascending), in blocks of bounded size.

        Yields: (index into *positions* of the block's first row, the view's features in order, in their column types).
        """
        names, wanted = list(self.view.features), positions.to_numpy()
        for block in _blocks(counts, self._block_rows()):
            begin, stop = np.searchsorted(wanted, (block.low, block.high))
            if begin == stop:
                continue
            some = files[block.first : block.last]
            with _reading(self.view):
                frame = self._scan(some, names).slice(block.low - block.base, block.high - block.low).collect()
            frame = self._with_partition_values(frame, some, self._rows_per_file(frame["__path"], some), names)
            yield int(begin), frame.select(names)[wanted[begin:stop] - block.low]

    def _block_rows(self) -> int:
        widths = (kind.width or VARIABLE_WIDTH for kind in self.view.features.values())
        return max(1_024, READ_BYTES // sum(widths))

    def _scan(self, files: Sequence[DataFile], names: Sequence[str]) -> pl.LazyFrame:
        """The columns *names* that are stored in the files, with the file's address as ``__path``."""
        partitioned = self.delta.metadata().partition_columns
        return pl.scan_parquet(
            [file.uri for file in files],
            schema={name: polars_type(self.columns[name]) for name in names if name not in partitioned},
            hive_partitioning=False,
            glob=False,
            missing_columns="insert",
            extra_columns="ignore",
            cast_options=CAST,
            include_file_paths="__path",
            storage_options=self.view.storage_options or None,
        )

    def _with_partition_values(
        self, frame: pl.DataFrame, files: Sequence[DataFile], counts: RowCounts, names: Sequence[str]
    ) -> pl.DataFrame:
        """Add those of *names* that are partition columns, with the values that the log has for each file."""
        partitioned = [name for name in names if name in self.delta.metadata().partition_columns]
        of_file = np.repeat(np.arange(len(files)), counts)
        return frame.with_columns(
            pl.Series(name, [file.partition_values.get(name) for file in files], dtype=polars_type(self.columns[name]))[
                of_file
            ]
            for name in partitioned
        )

    def _rows_per_file(self, paths: pl.Series, files: Sequence[DataFile]) -> RowCounts:
        """How many consecutive rows of *paths* belong to each file; a file may have none."""
        runs = paths.rle().struct.unnest()
        rows = dict(zip(runs["value"], runs["len"], strict=True))
        counts = np.array([rows.get(file.uri, 0) for file in files], dtype=np.int64)
        if counts.sum() != len(paths):
            raise OfflineStoreError(
                f"{self.subject}: could not read exactly: found {len(paths):,} rows, expected {counts.sum():,} by the files' addresses. "
                "Nothing was written by this step; the watermark stays."
            )
        return counts


def _may_overlap(file: DataFile, interval: Interval | None) -> bool:
    if interval is None or file.min_event_us is None or file.max_event_us is None:
        return True
    return file.min_event_us < to_us(interval.end) and file.max_event_us >= to_us(interval.start)


def _live_rows(frame: pl.DataFrame, files: Sequence[DataFile], counts: RowCounts) -> pl.DataFrame:
    """*frame* without the rows that a deletion vector removed; a vector may be shorter than its file."""
    if all(file.live is None for file in files):
        return frame
    live = np.ones(int(counts.sum()), dtype=np.bool_)
    starts = np.cumsum(counts) - counts
    for start, file in zip(starts, files, strict=True):
        if file.live is not None:
            live[start : start + len(file.live)] = file.live
    return frame.filter(pl.Series(live))


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
