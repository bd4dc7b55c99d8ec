"""One Delta table pinned at one version: its columns and its files."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timezone
from typing import TYPE_CHECKING, Any

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from materialize.errors import OfflineStoreError
from materialize.model import mask_credentials, to_us
from materialize.offline.deletion_vector import Selection, deleted_rows, positions
from materialize.offline.log import (
    OLDEST,
    CommitGone,
    DataFile,
    LogReader,
    partition_value,
    rows_of,
)
from materialize.offline.schema import Column, check_columns, columns_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt

    from materialize.model import FeatureView, Interval

__all__ = ["OfflineTable", "causes", "open_table", "pinned", "reading"]

#: Reader features that change nothing here, or that reading through deltalake's file lists and deletion vectors covers.
READER_FEATURES = frozenset(
    {"columnMapping", "deletionVectors", "timestampNtz", "typeWidening", "v2Checkpoint", "vacuumProtocolCheck"}
)
#: Log statistics are cut to milliseconds; an event may be up to this much outside its file's bounds.
STATISTICS_SLACK_US = 1_000
#: A partition's value in a file's path, which may be an entity's key.
HIVE_VALUE = r"([^/\s=]+)=[^/\n]*(?=/)"


def open_table(view: FeatureView, version: int | None = None, *, check: bool = True) -> OfflineTable:
    """Open the table of *view*, pinned at *version* or at its head, and check that it can feed the view.

    Raises OfflineStoreError that lists every problem; nothing is read but the log.
    """
    with reading(view):
        delta = DeltaTable(view.source, version=version, storage_options=view.storage_options or None)
    return pinned(view, delta, check=check)


def pinned(view: FeatureView, delta: DeltaTable, *, check: bool = True) -> OfflineTable:
    """The table of *view* that is open as *delta*, at its version there. Raises as `open_table` does."""
    with reading(view):
        metadata, protocol = delta.metadata(), delta.protocol()
        table = OfflineTable(
            view=view,
            delta=delta,
            version=int(delta.version()),
            table_id=str(metadata.id),
            columns=columns_of(delta.schema().to_json()),
            partition_columns=tuple(metadata.partition_columns),
            log=LogReader(delta, view.storage_options),
        )
    if unknown := sorted(set(protocol.reader_features or ()) - READER_FEATURES):
        raise OfflineStoreError(
            f"{table.subject}: could not read exactly: found the table feature {', '.join(unknown)}, expected only "
            f"{', '.join(sorted(READER_FEATURES))}. Nothing was read. Rewrite the table without it, or wait for support."
        )
    if check and (problems := check_columns(view, table.columns)):
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


@contextmanager
def reading(view: FeatureView) -> Iterator[None]:
    """Turn what deltalake and polars raise while reading into an OfflineStoreError that names the view and the table."""
    subject = f"feature view {view.name!r}: could not read Delta table {mask_credentials(view.source)}"
    try:
        yield
    except TableNotFoundError:
        raise OfflineStoreError(
            f"{subject}: found no readable table there, expected a folder with _delta_log. Nothing was written. "
            "Check the view's source, its credentials, and that the first commit is done."
        ) from None
    except _of_polars("SchemaError") as error:
        raise OfflineStoreError(
            f"{subject}: {causes(error)}. Nothing was written by this step; the watermark stays. If the column was widened from another "
            "kind of type, write its old files anew, by Spark: ALTER TABLE ... DROP FEATURE typeWidening"
        ) from None  # its own text has file paths, and they have the values of partitions
    except (DeltaError, OSError, KeyError, ValueError, _of_polars("PolarsError")) as error:
        raise OfflineStoreError(
            f"{subject}: {type(error).__name__}: {causes(error)}. Nothing was written by this step; the watermark stays."
        ) from None  # its own text has file paths, and they have the values of partitions


def _of_polars(name: str) -> type[Exception]:
    """An exception of polars; asked for when something was raised, because a run with nothing new does not load polars."""
    from polars import exceptions

    found: type[Exception] = getattr(exceptions, name)
    return found


def causes(error: BaseException) -> str:
    """The first line of a message and the causes that deltalake lists below it, without its colours and backtrace."""
    lines = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines() or [""]
    causes = [line.strip().removeprefix("↳").strip() for line in lines[1:] if "↳" in line]
    text = re.sub(HIVE_VALUE, r"\1=***", ": ".join([lines[0], *causes]))
    return mask_credentials(text)


@dataclass(frozen=True, slots=True)
class OfflineTable:
    """A table pinned at ``version``. ``columns``: by name."""

    view: FeatureView
    delta: DeltaTable
    version: int
    table_id: str
    columns: dict[str, Column]
    partition_columns: tuple[str, ...]
    log: LogReader

    @property
    def subject(self) -> str:
        return f"feature view {self.view.name!r}: {mask_credentials(self.view.source)}"

    @property
    def size(self) -> int:
        """Bytes of the live data files."""
        import polars as pl

        with reading(self.view):
            return int(pl.DataFrame(self.delta.get_add_actions())["size_bytes"].sum())

    def committed_us(self, version: int) -> int:
        """When the commit *version* was made, in microseconds; of one that the log has not any more, the next one that it has."""
        with reading(self.view):
            return self.log.committed_us(version)

    def snapshot_files(self, interval: Interval | None = None) -> list[DataFile]:
        """The live files of the pinned version, by address; with *interval*, only those that may hold event times inside it.

        Their ``version`` is OLDEST: `with_versions` looks it up.
        """
        import polars as pl

        with reading(self.view):
            actions = pl.DataFrame(self.delta.get_add_actions()).to_dicts()
            deleted = self._deleted_rows()
            files = [self._snapshot_file(action, deleted) for action in actions]
        if unknown := deleted.keys() - {file.uri for file in files}:
            raise OfflineStoreError(
                f"{self.subject}: could not read exactly: found {len(unknown)} deletion vectors of no live file at version {self.version}, "
                "expected none. Nothing was read."
            )
        return sorted(
            (file for file in files if _may_overlap(file, self.view.event_timestamp, interval)),
            key=lambda file: file.uri,
        )

    def _deleted_rows(self) -> dict[str, npt.NDArray[np.uint64]]:
        """The deleted row numbers of every file with a deletion vector, by address."""
        import numpy as np
        import polars as pl

        features = set(self.delta.protocol().reader_features or ())
        if "deletionVectors" not in features:
            return {}
        if "typeWidening" not in features:
            masks = pl.DataFrame(self.delta.deletion_vectors())
            return {
                self.log.uri(uri.removeprefix(self.log.root)): np.flatnonzero(~np.asarray(mask, dtype=np.bool_)).astype(
                    np.uint64
                )
                for uri, mask in masks.iter_rows()
            }
        try:  # deltalake refuses to read deletion vectors of a table with widened types
            vectors = self.log.vectors(self.version)
        except CommitGone as gone:
            raise OfflineStoreError(
                f"{self.subject}: could not read exactly: found type widening and deletion vectors together, and commit {gone.version} "
                "gone, expected the whole log. Nothing was read. Run on the table: REORG TABLE ... APPLY (PURGE), then drop a feature."
            ) from None
        return {self.log.uri(path): positions(deleted_rows(vector, self.log.read)) for path, vector in vectors.items()}

    def _snapshot_file(self, action: dict[str, Any], deleted: dict[str, npt.NDArray[np.uint64]]) -> DataFile:
        values, uri = action.get("partition") or {}, self.log.uri(action["path"])
        return DataFile(
            path=action["path"],
            uri=uri,
            version=OLDEST,
            size=action["size_bytes"],
            rows=action["num_records"],
            partition_values=values,
            selection=Selection(deleted[uri]) if uri in deleted else None,
            bounds={name: self._bounds(action, name) for name in self.view.order_columns},
        )

    def _bounds(self, action: dict[str, Any], name: str) -> tuple[Any, Any]:
        """Nothing in the file is less than the first value or greater than the second; None where the log does not tell."""
        values = action.get("partition") or {}
        if name in values:
            return values[name], values[name]
        stored = self.columns[name].stored
        least, most = ((action.get(end) or {}).get(stored) for end in ("min", "max"))
        return least, most

    def data_file(self, action: dict[str, Any], *, version: int, selection: Selection | None = None) -> DataFile:
        """The file of an add or remove action of the log."""
        values = action.get("partitionValues") or {}
        return DataFile(
            path=action["path"],
            uri=self.log.uri(action["path"]),
            version=version,
            size=action.get("size") or 0,
            rows=rows_of(action),
            partition_values={
                name: partition_value(values[self.columns[name].stored], self.columns[name].type)
                for name in self.partition_columns
                if self.columns[name].stored in values
            },
            selection=selection,
        )


def _may_overlap(file: DataFile, event_timestamp: str, interval: Interval | None) -> bool:
    """Whether the bounds of *file* leave room for event times in *interval*."""
    least, most = file.bounds.get(event_timestamp, (None, None))
    if interval is None or least is None or most is None:
        return True
    begin, end = (to_us(moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)) for moment in (least, most))
    return begin - STATISTICS_SLACK_US < to_us(interval.end) and end + STATISTICS_SLACK_US >= to_us(interval.start)
