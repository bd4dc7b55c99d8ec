"""SQLite, the embedded online store: one file, guarded writes in SQL, one transaction per batch.

The tables and statements are in sqlite.sql. The file may be read by other processes at any time (WAL), also with the
sqlite3 shell, and written by several processes: each batch waits for its turn.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.base import HEADER, LEAD_BYTES, EncodedBatch, OnlineStore, pack_order
from materialize.order import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.model import Retention
    from materialize.online.base import Outcomes

__all__ = ["SqliteStore"]

#: Seconds to wait for another writer's transaction; the longest batch takes a fraction of one.
BUSY_TIMEOUT = 30.0
#: Rows per step of a scan; no transaction stays open between steps.
ROWS_PER_STEP = 10_000
STATEMENTS: dict[str, str] = dict(
    re.findall(
        r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)",
        (files("materialize.online") / "sqlite.sql").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


class SqliteStore(OnlineStore):
    """*url*: ``sqlite:///relative/path.db`` or ``sqlite:////absolute/path.db``. The file is made at the first use."""

    def __init__(self, url: str, *, busy_timeout: float = BUSY_TIMEOUT) -> None:
        self.busy_timeout = busy_timeout
        self.path = Path(url.removeprefix("sqlite:///"))
        self.location = f"sqlite:///{self.path}"
        self.lock = threading.RLock()
        self.opened: sqlite3.Connection | None = None

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._write("merge", view, batch, retention, tie_wins=tie_wins, at=0)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        return self._write("replace", view, batch, retention, tie_wins=False, at=at)

    def _write(
        self, mode: str, view: str, batch: EncodedBatch, retention: Retention, *, tie_wins: bool, at: int
    ) -> Outcomes:
        values = {"view": view, "tie_wins": tie_wins, "at": at}
        values |= {"ttl_us": retention.ttl_us, "keep_until_us": retention.keep_until_us}
        with self._connection(f"write {len(batch):,} rows of feature view {view!r} to") as connection:
            connection.execute(STATEMENTS["incoming"])
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(STATEMENTS["empty"])
            connection.executemany(STATEMENTS["fill"], _rows(batch))
            connection.execute(STATEMENTS[mode], values)
            if mode == "replace":
                connection.execute(STATEMENTS["raise"], values)
            connection.execute(STATEMENTS["store"], values)
            outcomes = [outcome for (outcome,) in connection.execute(STATEMENTS["outcomes"])]
            connection.execute("COMMIT")
        return np.array(outcomes, dtype=np.uint8)

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        # One statement per key, 200,000 keys/s: SQLite is in this process, so there is no round trip to save.
        with self._connection(f"read {len(keys):,} entities of feature view {view!r} from") as connection:
            found = [connection.execute(STATEMENTS["read"], (view, key)).fetchone() for key in keys]
        return [None if row is None else _record(*row) for row in found]

    def scan(self, view: str) -> Iterator[tuple[list[bytes], list[bytes]]]:
        after = b""
        while True:
            with self._connection(f"scan feature view {view!r} in") as connection:
                rows = connection.execute(STATEMENTS["scan"], (view, after, ROWS_PER_STEP)).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield [row[0] for row in rows], [_record(*row[1:]) for row in rows]

    def read_cell(self, view: str, name: str) -> bytes | None:
        with self._connection(f"read the {name} of feature view {view!r} from") as connection:
            row = connection.execute(STATEMENTS["read_cell"], (view, name)).fetchone()
        return None if row is None else bytes(row[0])

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        with self._connection(f"write the {name} of feature view {view!r} to") as connection:
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute(STATEMENTS["read_cell"], (view, name)).fetchone()
            matches = (None if row is None else bytes(row[0])) == expected
            if matches:
                connection.execute(STATEMENTS["write_cell"], (view, name, new))
            connection.execute("COMMIT")
        return matches

    def purge(self, view: str, now_us: int) -> None:
        with self._connection(f"purge feature view {view!r} in") as connection:
            connection.execute(STATEMENTS["purge"], (view, now_us))

    def describe(self) -> dict[str, str]:
        with self._connection("open") as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        size = self.path.stat().st_size
        return {"kind": f"sqlite {sqlite3.sqlite_version}", "journal_mode": mode, "file": f"{size:,} bytes"}

    def close(self) -> None:
        with self.lock:
            if self.opened is not None:
                self.opened.close()
                self.opened = None

    @contextmanager
    def _connection(self, doing: str) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time. An error rolls back and is translated, once."""
        with self.lock:
            try:
                if self.opened is None:
                    self.opened = _open(self.path, self.busy_timeout)
                yield self.opened
            except sqlite3.Error as error:
                if self.opened is not None and self.opened.in_transaction:
                    self.opened.rollback()
                raise _translated(error, f"could not {doing} {self.location}", self.path) from None
            except BaseException:
                if self.opened is not None and self.opened.in_transaction:
                    self.opened.rollback()
                raise


def _open(path: Path, busy_timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(STATEMENTS["schema"])
    except BaseException:
        connection.close()
        raise
    return connection


def _rows(batch: EncodedBatch) -> Iterator[tuple[Any, ...]]:
    """One tuple per row for the ``fill`` statement. SQLite takes single rows only, at about 1 us each."""
    values = batch.values.to_pylist()
    events = [None] * len(batch) if batch.tombstone else batch.event_us.tolist()
    floors = (HEADER.unpack_from(value)[-1] for value in values)
    leads, payloads = (value[:LEAD_BYTES] for value in values), (value[HEADER.size :] for value in values)
    times = (batch.created_us.tolist(), batch.version.tolist())
    return zip(range(len(batch)), batch.keys.to_pylist(), events, *times, floors, leads, payloads, strict=True)


def _record(event_us: int | None, created_us: int, version: int, floor: int, lead: bytes, payload: bytes) -> bytes:
    return pack_order(Record(event_us, created_us, version, floor, lead + payload))


def _translated(error: sqlite3.Error, what: str, path: Path) -> OnlineStoreError:
    """The error of this package for one of the driver's."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return UnavailableError(f"{what}: another process holds the file and did not let go in time")
    if not path.parent.is_dir():
        return OnlineStoreError(
            f"{what}: found no folder {path.parent}. Nothing was written. Create it, or change the URL."
        )
    advice = {
        "readonly": "Nothing was written. Let this user write to the file and its folder.",
        "unable to open": "Nothing was written. Let this user write to the file and its folder.",
        "not a database": "Nothing was written. The file is something else: change the URL.",
        "full": "This batch was not written, the watermark stays. Free some disk space and run again.",
    }
    hint = next(
        (hint for sign, hint in advice.items() if sign in text), "This batch was not written; the watermark stays."
    )
    return OnlineStoreError(f"{what}: {text}. {hint}")
