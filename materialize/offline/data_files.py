"""Data files in, the same ones out: better known, fewer, or in groups. What is in them is not read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from materialize.offline.log import OLDEST, READERS, total_rows
from materialize.offline.table import reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.offline.log import DataFile, LogReader
    from materialize.offline.table import OfflineTable

__all__ = ["brought", "check_field_ids", "counted", "groups"]

#: The least bytes that a row takes in a data file, to tell a small file from one that may be large.
NARROWEST = 4


def brought(table: OfflineTable, files: Sequence[DataFile]) -> list[DataFile]:
    """*files* of a snapshot, each with the commit that brought its rows, as far as the log tells."""
    with reading(table.view):
        versions = table.log.file_versions(table.version)
    return [replace(file, version=versions.get(file.path, OLDEST)) for file in files]


def check_field_ids(table: OfflineTable, files: Sequence[DataFile]) -> None:
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


def counted(table: OfflineTable, files: Sequence[DataFile], rows: int) -> list[DataFile]:
    """*files*, with their exact rows where parts of *rows* rows depend on these: the log may not have them, or be wrong."""
    if sum(file.size // NARROWEST if file.rows is None else file.rows for file in files) <= rows:
        return list(files)
    asked = [file for file in files if file.rows is None or file.rows > rows]
    with reading(table.view), ThreadPoolExecutor(READERS) as pool:
        counts = pool.map(lambda file: _read_footer(table.log, file).num_rows, asked)
        found = {file.uri: count for file, count in zip(asked, counts, strict=True)}
    return [replace(file, rows=found.get(file.uri, file.rows)) for file in files]


def _read_footer(log: LogReader, file: DataFile) -> pq.FileMetaData:
    with log.open(file.path) as content:
        return pq.read_metadata(content)


def groups(files: Sequence[DataFile], rows: int) -> Iterator[list[DataFile]]:
    """*files* in order, some together while they have at most *rows*."""
    group: list[DataFile] = []
    for file in files:
        if group and total_rows((each.rows, each.size) for each in (*group, file)) > rows:
            yield group
            group = []
        group.append(file)
    if group:
        yield group


def _read_schema(log: LogReader, file: DataFile) -> pa.Schema:
    with log.open(file.path) as content:
        return pq.read_schema(content)
