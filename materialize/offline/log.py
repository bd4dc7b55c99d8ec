"""The Delta transaction log: commit files in, the data files they added out.

Format: https://github.com/delta-io/delta/blob/master/PROTOCOL.md. The commit files are read through deltalake's own object
store, because the change feed and snapshot differences are silently wrong in known cases.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow.fs as pafs
from deltalake.fs import DeltaStorageHandler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    import numpy.typing as npt
    from deltalake import DeltaTable

__all__ = ["OLDEST", "Commit", "CommitGone", "DataFile", "LogReader", "partition_value", "total_rows"]

#: Commit files read at once; reads are small and latency-bound on object stores.
READERS = 16
#: The version of a data file whose commit file is gone: older than any other.
OLDEST = -1


class CommitGone(Exception):
    """A commit file that is needed is not in the log any more."""

    def __init__(self, version: int, oldest: int | None) -> None:
        super().__init__(version, oldest)
        self.version, self.oldest = version, oldest


@dataclass(frozen=True, slots=True)
class DataFile:
    """One Parquet file of a table.

    ``version``: the commit that brought its rows. ``rows``: its row count when the log tells. ``partition_values``:
    typed, from the log. ``live``: bool, shape (physical rows,), False for rows that a deletion vector removed; None when
    all live. ``min_event_us``, ``max_event_us``: bounds of the event time when the log tells.
    """

    uri: str
    version: int
    size: int
    rows: int | None
    partition_values: dict[str, Any] = field(default_factory=dict)
    live: npt.NDArray[np.bool_] | None = None
    min_event_us: int | None = None
    max_event_us: int | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """The actions of one commit, as the log has them."""

    version: int
    adds: list[dict[str, Any]]
    removes: list[dict[str, Any]]
    metadata: dict[str, Any] | None
    protocol: dict[str, Any] | None

    @classmethod
    def parse(cls, version: int, text: bytes) -> Commit:
        actions = [json.loads(line) for line in text.splitlines() if line.strip()]
        return cls(
            version=version,
            adds=[action["add"] for action in actions if "add" in action],
            removes=[action["remove"] for action in actions if "remove" in action],
            metadata=next((action["metaData"] for action in actions if "metaData" in action), None),
            protocol=next((action["protocol"] for action in actions if "protocol" in action), None),
        )


class LogReader:
    """Reads the commit files of one table through its object store, with the table's own credentials."""

    def __init__(self, delta: DeltaTable) -> None:
        self.files = pafs.PyFileSystem(DeltaStorageHandler.from_table(delta._table))  # noqa: SLF001 - no public way to the table's own store
        self.root = delta.table_uri

    def uri(self, path: str) -> str:
        """The address that polars opens for a path as written in the log (percent-encoded, relative or absolute)."""
        decoded = unquote(path)
        if decoded.startswith("file:///"):
            return decoded.removeprefix("file://")
        if "://" in path:
            return decoded
        root = self.root.removeprefix("file://") if self.root.startswith("file:///") else self.root
        return decoded if decoded.startswith("/") else f"{unquote(root) if root.startswith('/') else root}{decoded}"

    def versions(self) -> list[int]:
        """The versions whose commit files are in the log, ascending."""
        listing = self.files.get_file_info(pafs.FileSelector("_delta_log"))
        names = (info.base_name for info in listing if info.type == pafs.FileType.File)
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def commits(self, first: int, last: int) -> list[Commit]:
        """The commits *first* to *last*, both included, in order. Raises CommitGone when one is missing."""
        return self._read(range(first, last + 1))

    def _read(self, versions: Iterable[int]) -> list[Commit]:
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._commit, versions))

    def _read_left(self, last: int) -> list[Commit]:
        """Every commit up to *last* that the log still has; a cleanup may take some while they are read."""
        while True:
            with suppress(CommitGone):
                return self._read(version for version in self.versions() if version <= last)

    def _commit(self, version: int) -> Commit:
        try:
            with self.files.open_input_file(f"_delta_log/{version:020d}.json") as file:
                return Commit.parse(version, file.read())
        except FileNotFoundError:
            oldest = next(iter(self.versions()), None)
            raise CommitGone(version, oldest) from None

    def missing(self, paths: list[str]) -> set[str]:
        """The addresses of those of *paths* (as in the log) that are no files any more."""
        absent = {path for path in paths if "://" not in path and not path.startswith("/")}
        if absent:
            found = self.files.get_file_info([unquote(path) for path in sorted(absent)])
            absent -= {
                path for path, info in zip(sorted(absent), found, strict=True) if info.type == pafs.FileType.File
            }
        return {self.uri(path) for path in absent}

    def file_versions(self, last: int) -> Callable[[str], int]:
        """Which commit brought the rows of a file (path as in the log), as far as the log still tells.

        A compacted file counts as the newest of its inputs, because compaction brings no rows. Used to break ties.
        """
        brought: dict[str, int] = {}
        for commit in self._read_left(last):
            inputs = [brought.get(remove["path"], OLDEST) for remove in commit.removes if not remove["dataChange"]]
            for add in commit.adds:
                brought[add["path"]] = commit.version if add["dataChange"] else max(inputs, default=OLDEST)
        return lambda path: brought.get(path, OLDEST)


def partition_value(text: str | None, kind: str) -> Any:
    """A partition value of the log as a Python value; the empty string means NULL (PROTOCOL.md, partition value serialization)."""
    if text is None or text == "":
        return None
    return PARTITION_PARSERS[kind.partition("(")[0]](text)


def _timestamp(text: str) -> datetime:
    # Writers leave out zeros at the end of a fraction; Python 3.10 reads three or six digits only.
    text = re.sub(r"\.(\d{1,6})(?!\d)", lambda fraction: f".{fraction[1]:0<6}", text.replace("Z", "+00:00"))
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _binary(text: str) -> bytes:
    return text.encode("utf-8")


PARTITION_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("byte", "short", "integer", "long"), int),
    **dict.fromkeys(("float", "double"), float),
    "boolean": lambda text: text == "true",
    "string": str,
    "binary": _binary,
    "date": date.fromisoformat,
    "timestamp": _timestamp,
    "decimal": Decimal,
}


def total_rows(files: Iterable[DataFile]) -> int:
    """The rows of *files* as far as the log tells; a file without a count counts by its size, at 100 bytes a row."""
    return sum(file.size // 100 if file.rows is None else file.rows for file in files)
