"""The files of one Delta table: commit files in, their actions out; where a path of the log is.

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
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pyarrow as pa
    import pyarrow.fs as pafs
    from deltalake import DeltaTable

    from materialize.offline.deletion_vector import Selection

__all__ = [
    "OLDEST",
    "READERS",
    "Commit",
    "CommitGone",
    "DataFile",
    "LogReader",
    "partition_value",
    "rows_of",
    "total_rows",
]

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

    ``path``: as in the log; ``uri``: as polars opens it. ``version``: the commit that brought its rows. ``rows``: its row count
    when the log tells. ``partition_values``: typed, from the log. ``selection``: which of its rows are meant; None for all.
    ``bounds``: least and greatest value by column, None where the log does not tell.
    """

    path: str
    uri: str
    version: int
    size: int
    rows: int | None
    partition_values: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None
    bounds: dict[str, tuple[Any, Any]] = field(default_factory=dict)


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

    def __init__(self, delta: DeltaTable, storage_options: dict[str, str]) -> None:
        self.table = delta
        self.root, self.storage_options = delta.table_uri, storage_options

    @cached_property
    def files(self) -> pafs.FileSystem:
        """The files below the table's folder; opened for the first one that is read, as pyarrow takes 100 ms to load."""
        import pyarrow.fs as pafs
        from deltalake.fs import DeltaStorageHandler

        return pafs.PyFileSystem(DeltaStorageHandler.from_table(self.table._table))  # noqa: SLF001 - no public way to the table's own store

    def uri(self, path: str) -> str:
        """The address that polars opens for a path as written in the log (percent-encoded, relative or absolute)."""
        decoded = unquote(path)
        if decoded.startswith("file:/"):  # Java writes one slash, others three
            return "/" + decoded.removeprefix("file:").lstrip("/")
        if "://" in path:
            return decoded
        root = self.root.removeprefix("file://") if self.root.startswith("file:///") else self.root
        return decoded if decoded.startswith("/") else unquote(root) + decoded

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Some bytes of a file, at a path as written in the log. Raises FileNotFoundError."""
        with self.open(path) as file:
            file.seek(offset)
            return bytes(file.read(length))

    def open(self, path: str) -> pa.NativeFile:
        """A file at a path as written in the log. Raises FileNotFoundError."""
        files, address = self._located(path)
        return files.open_input_file(address)

    def missing(self, paths: Iterable[str]) -> set[str]:
        """Those of *paths* (as in the log) that are no files any more."""
        with ThreadPoolExecutor(READERS) as pool:
            located = {path: pool.submit(self._is_file, path) for path in paths}
            return {path for path, there in located.items() if not there.result()}

    def _is_file(self, path: str) -> bool:
        files, address = self._located(path)
        return bool(files.get_file_info(address).is_file)

    def _located(self, path: str) -> tuple[pafs.FileSystem, str]:
        """The file system of a path as written in the log, and where it is there; a shallow clone names the files of another table."""
        if ":/" not in path and not path.startswith("/"):
            return self.files, unquote(path)
        import pyarrow.fs as pafs
        from deltalake.fs import DeltaStorageHandler

        address = self.uri(path)
        if address.startswith("/"):
            return pafs.LocalFileSystem(), address
        folder, _, name = path.rpartition("/")
        return pafs.PyFileSystem(DeltaStorageHandler(folder, self.storage_options or None)), unquote(name)

    def versions(self) -> list[int]:
        """The versions whose commit files are in the log, ascending."""
        import pyarrow.fs as pafs

        listing = self.files.get_file_info(pafs.FileSelector("_delta_log"))
        names = (info.base_name for info in listing if info.is_file)
        return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def newest(self, known: int) -> int:
        """The newest version, where *known* is one that the log has or had: one look at one file when nothing is new.

        Other threads go on while an object store answers, which they do not in `versions` and where a file is opened.
        """
        while self.files.get_file_info(_commit_path(known + 1)).is_file:
            known += 1
        return known

    def commits(self, first: int, last: int) -> list[Commit]:
        """The commits *first* to *last*, both included, in order. Raises CommitGone when one is missing."""
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._commit, range(first, last + 1)))

    def commits_left(self, last: int, first: int = 0) -> list[Commit]:
        """The commits *first* to *last* that the log still has; a cleanup may take some while they are read."""
        while True:
            with suppress(CommitGone), ThreadPoolExecutor(READERS) as pool:
                return list(pool.map(self._commit, (at for at in self.versions() if first <= at <= last)))

    def _commit(self, version: int) -> Commit:
        try:
            with self.files.open_input_file(_commit_path(version)) as file:
                return Commit.parse(version, file.read())
        except FileNotFoundError:
            oldest = next(iter(self.versions()), None)
            raise CommitGone(version, oldest) from None

    def committed_us(self, version: int) -> int:
        """When a commit was made, in microseconds: by its own word, else by the time of its file. Of one that is gone, the next one left.

        Raises FileNotFoundError when the log has no later commit either.
        """
        left = next((one for one in self.versions() if one >= version), version)
        path = _commit_path(left)
        with self.files.open_input_file(path) as file:
            actions = [json.loads(line) for line in file.read().splitlines() if b"commitInfo" in line]
        for info in (action.get("commitInfo", {}) for action in actions):
            if moment := info.get("inCommitTimestamp", info.get("timestamp")):
                return int(moment) * 1_000
        return int(self.files.get_file_info(path).mtime_ns // 1_000)

    def info(self, version: int) -> dict[str, Any]:
        """What a commit says of itself (its commitInfo action), empty if nothing. Raises CommitGone when its file is not there."""
        try:
            with self.files.open_input_file(_commit_path(version)) as file:
                actions = [json.loads(line) for line in file.read().splitlines() if b"commitInfo" in line]
        except FileNotFoundError:
            raise CommitGone(version, None) from None
        return next((action["commitInfo"] for action in actions if "commitInfo" in action), {})

    def mark(self, version: int) -> tuple[int, int] | None:
        """What tells the file of a commit from another one of its name: its time and size; None where there is none."""
        found = self.files.get_file_info(_commit_path(version))
        return (found.mtime_ns or 0, found.size or 0) if found.is_file else None

    def file_versions(self, last: int) -> dict[str, int]:
        """The commit that brought the rows of each file, by path, as far as the log still tells.

        A compacted file counts as the newest of its inputs, because compaction brings no rows. Used to break ties.
        """
        brought: dict[str, int] = {}
        for commit in self.commits_left(last):
            inputs = [brought.get(remove["path"], OLDEST) for remove in commit.removes if not remove["dataChange"]]
            for add in commit.adds:
                brought[add["path"]] = commit.version if add["dataChange"] else max(inputs, default=OLDEST)
        return brought

    def appended_files(self, last: int) -> set[str]:
        """The paths of the files whose rows are all of the commit that added them, because it removed none: no row is older."""
        appended: dict[str, bool] = {}
        for commit in self.commits_left(last):
            # a file that gets a deletion vector is added again, with older rows
            appended |= {add["path"]: add["dataChange"] and not commit.removes for add in commit.adds}
        return {path for path, alone in appended.items() if alone}

    def vectors(self, last: int) -> dict[str, dict[str, Any]]:
        """The deletion vector of each live file that has one, by path. Raises CommitGone when the log does not go back to the start."""
        found: dict[str, Any] = {}
        for commit in self.commits(0, last):
            for remove in commit.removes:
                found.pop(remove["path"], None)
            for add in commit.adds:
                found[add["path"]] = add.get("deletionVector")
        return {path: vector for path, vector in found.items() if vector is not None}


def _commit_path(version: int) -> str:
    return f"_delta_log/{version:020d}.json"


def rows_of(action: dict[str, Any]) -> int | None:
    """Rows of the data file of an add or remove action, deleted ones included; None when the log does not tell."""
    rows: int | None = json.loads(action.get("stats") or "{}").get("numRecords")
    return rows


def partition_value(text: str | None, kind: str) -> Any:
    """A partition value of the log as a Python value; the empty string means NULL (PROTOCOL.md, partition value serialization)."""
    if text is None or text == "":
        return None
    return PARTITION_PARSERS[kind.partition("(")[0]](text)


def _timestamp(text: str) -> datetime:
    moment = _timestamp_ntz(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _timestamp_ntz(text: str) -> datetime:
    # Writers leave out zeros at the end of a fraction; Python 3.10 reads three or six digits only.
    text = re.sub(r"\.(\d{1,6})(?!\d)", lambda fraction: f".{fraction[1]:0<6}", text.replace("Z", "+00:00"))
    return datetime.fromisoformat(text)


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
    "timestamp_ntz": _timestamp_ntz,
    "decimal": Decimal,
}


def total_rows(sized: Iterable[tuple[int | None, int]]) -> int:
    """The rows of files, from the rows (None: unknown) and the bytes of each; 100 bytes count as a row."""
    return sum(size // 100 if rows is None else rows for rows, size in sized)
