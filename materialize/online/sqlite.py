"""SQLite, the embedded online store: one file, guarded writes in SQL, one transaction per batch.

The tables and statements are in sqlite.sql. The file may be read by other processes at any time (WAL), also with the
sqlite3 shell, and written by several processes: each batch waits for its turn.

Measured on 2 cores with SQLite 3.40, batches of 20,000 rows of 436 bytes with keys in no order: 200,000 rows/s into an
empty file, 105,000 to 130,000 into one of 200,000 to 400,000 rows, new or newer; refused rows 160,000.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.model import Retention
from materialize.online.base import HEADER, LEAD_BYTES, EncodedBatch, OnlineStore, pack_order
from materialize.order import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.model import FeatureView
    from materialize.online.base import Outcomes
    from materialize.online.demand import Demand

__all__ = ["SqliteStore"]

#: Seconds to wait for another writer's transaction; the longest batch takes a fraction of one.
BUSY_TIMEOUT = 30.0
#: Turns that a process takes at switching a new file to WAL while others make the same file; two were enough in all tries.
WAL_TURNS = 10
#: Of each connection, in KiB and pages. SQLite's 2 MB and 1,000 pages halve the rate of a file of 200,000 rows.
CACHE_KIB, CHECKPOINT_PAGES = 64 * 1024, 4_000
#: Rows per step of a scan; no transaction stays open between steps.
ROWS_PER_STEP = 10_000
STATEMENTS: dict[str, str] = dict(
    re.findall(
        r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)",
        (files("materialize.online") / "sqlite.sql").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


@dataclass(slots=True)
class _Held:
    """A connection that one thread at a time uses; None until its first use."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: sqlite3.Connection | None = None


class SqliteStore(OnlineStore):
    """*url*: ``sqlite:///relative/path.db`` or ``sqlite:////absolute/path.db``. The file is made at the first use.

    Reads have a connection of their own: they never wait for a write, of this process or of another.
    """

    def __init__(self, url: str, *, busy_timeout: float = BUSY_TIMEOUT) -> None:
        self.busy_timeout = busy_timeout
        self.path = Path(url.removeprefix("sqlite:///"))
        self.location = f"sqlite:///{self.path}"
        self.reader, self.writer = _Held(), _Held()

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._write("merge", view, batch, retention, tie_wins=tie_wins, at=0)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        return self._write("replace", view, batch, retention, tie_wins=False, at=at)

    def _write(
        self, mode: str, view: str, batch: EncodedBatch, retention: Retention, *, tie_wins: bool, at: int
    ) -> Outcomes:
        values = {"view": view, "tie_wins": tie_wins, "at": at}
        values |= {"ttl_us": retention.ttl_us, "keep_until_us": retention.keep_until_us}
        with self._connection(self.writer, f"write {len(batch.keys):,} rows of feature view {view!r} to") as connection:
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
        import numpy as np

        return np.array(outcomes, dtype=np.uint8)

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        # One statement per key, 140,000 keys/s of 436-byte records: SQLite is in this process, so there is no round trip to save.
        with self._connection(self.reader, f"read {len(keys):,} entities of feature view {view!r} from") as connection:
            found = [connection.execute(STATEMENTS["read"], (view, key)).fetchone() for key in keys]
        return [None if row is None else _record(*row) for row in found]

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        after, rounds = self._key_at(view, start), 2 if start else 1
        while rounds:
            with self._connection(self.reader, f"scan feature view {view!r} in") as connection:
                rows = connection.execute(STATEMENTS["scan"], (view, after, ROWS_PER_STEP)).fetchall()
            if rows:
                after = rows[-1][0]
                yield [row[0] for row in rows], [_record(*row[1:]) for row in rows]
            else:
                after, rounds = b"", rounds - 1

    def _key_at(self, view: str, start: float) -> bytes:
        """The entity key that *start* of the view's keys come before or are."""
        if not start:
            return b""
        with self._connection(self.reader, f"scan feature view {view!r} in") as connection:
            row = connection.execute(STATEMENTS["key_at"], {"view": view, "start": start}).fetchone()
        return b"" if row is None else bytes(row[0])

    def read_cell(self, view: str, name: str) -> bytes | None:
        with self._connection(self.reader, f"read the {name} of feature view {view!r} from") as connection:
            row = connection.execute(STATEMENTS["read_cell"], (view, name)).fetchone()
        return None if row is None else bytes(row[0])

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        with self._connection(self.writer, f"write the {name} of feature view {view!r} to") as connection:
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute(STATEMENTS["read_cell"], (view, name)).fetchone()
            matches = (None if row is None else bytes(row[0])) == expected
            if matches:
                connection.execute(STATEMENTS["write_cell"], (view, name, new))
            connection.execute("COMMIT")
        return matches

    def size(self, view: FeatureView, sample: EncodedBatch, demand: Demand) -> dict[str, Any]:
        """The *sample* is written to a file of its own, which is removed."""
        with tempfile.TemporaryDirectory(prefix="materialize-sizing-") as folder:
            path = Path(folder) / "sample.db"
            sizes = []
            for rows in (0, len(sample.keys)):
                with SqliteStore(
                    f"sqlite:///{path}"
                ) as scratch:  # closing it brings everything from the WAL to the file
                    if rows:
                        keep = 2**53 if view.ttl is not None else 0
                        scratch.merge(view.name, sample, tie_wins=False, retention=Retention(view.ttl_us, keep))
                    else:
                        scratch.describe()
                sizes.append(path.stat().st_size)
        each = (sizes[1] - sizes[0]) / len(sample.keys)
        return {"bytes_each": round(each, 1), "how": "growth of a file", "file": round(demand.entities * each)}

    def purge(self, view: str, now_us: int) -> None:
        with self._connection(self.writer, f"purge feature view {view!r} in") as connection:
            connection.execute(STATEMENTS["purge"], (view, now_us))

    def describe(self) -> dict[str, str]:
        with self._connection(self.reader, "open") as connection:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        size = self.path.stat().st_size
        return {"kind": f"sqlite {sqlite3.sqlite_version}", "journal_mode": mode, "file": f"{size:,} bytes"}

    def close(self) -> None:
        for held in (self.reader, self.writer):
            with held.lock:
                if held.connection is not None:
                    held.connection.close()
                    held.connection = None

    @contextmanager
    def _connection(self, held: _Held, doing: str) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time. An error rolls back and is translated, once."""
        with held.lock:
            try:
                if held.connection is None:
                    held.connection = _open(self.path, self.busy_timeout)
                yield held.connection
            except BaseException as error:
                if held.connection is not None and held.connection.in_transaction:
                    with suppress(sqlite3.Error):  # the first error says more
                        held.connection.rollback()
                if isinstance(error, sqlite3.Error):
                    raise _translated(error, f"could not {doing} {self.location}", self.path) from None
                raise


def _open(path: Path, busy_timeout: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None, check_same_thread=False)
    try:
        _switch_to_wal(connection, WAL_TURNS)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.executescript(STATEMENTS["schema"])
    except BaseException:
        connection.close()
        raise
    return connection


def _switch_to_wal(connection: sqlite3.Connection, turns: int) -> None:
    """Make the file a WAL file. This is the one statement that fails at once, without the busy timeout, when several
    processes make the same file; so wait for the others by a statement that does wait, and try again.
    """
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if turns == 0 or not _is_busy(error):
            raise
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
        _switch_to_wal(connection, turns - 1)


def _rows(batch: EncodedBatch) -> Iterator[tuple[Any, ...]]:
    """One tuple per row for the ``fill`` statement. SQLite takes single rows only, at about 1 us each."""
    values = batch.values.to_pylist()
    events = [None] * len(batch.keys) if batch.tombstone else batch.event_us.tolist()
    floors = (HEADER.unpack_from(value)[-1] for value in values)
    leads, payloads = (value[:LEAD_BYTES] for value in values), (value[HEADER.size :] for value in values)
    times = (batch.created_us.tolist(), batch.version.tolist())
    return zip(range(len(batch.keys)), batch.keys.to_pylist(), events, *times, floors, leads, payloads, strict=True)


def _record(event_us: int | None, created_us: int, version: int, floor: int, lead: bytes, payload: bytes) -> bytes:
    return pack_order(Record(event_us, created_us, version, floor, lead + payload))


def _is_busy(error: sqlite3.Error) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return True  # as far as this user can see; the driver's words say the rest


def _translated(error: sqlite3.Error, what: str, path: Path) -> OnlineStoreError:
    """The error of this package for one of the driver's. Whatever it was, the transaction of this call is rolled back."""
    if _is_busy(error):
        return UnavailableError(
            f"{what}: another process holds the file and did not let go in time. "
            "Nothing is lost: this call wrote nothing, the watermark stays."
        )
    if not _is_folder(path.parent):
        return OnlineStoreError(
            f"{what}: found no folder {path.parent}. Nothing was written. Create it, or change the URL."
        )
    advice = {
        "readonly": "Nothing was written. Let this user write to the file and its folder.",
        "unable to open": "Nothing was written. Let this user write to the file and its folder.",
        "not a database": "Nothing was written. The file is something else: change the URL.",
        "full": "This call wrote nothing, the watermark stays. Free some disk space and run again.",
        "I/O": "This call wrote nothing, the watermark stays. Look at the disk and run again.",
        "malformed": "The file is damaged. Move it away and run: materialize rebuild, for each view in it.",
    }
    text = str(error)
    hint = next(
        (hint for sign, hint in advice.items() if sign in text), "This call wrote nothing; the watermark stays."
    )
    return OnlineStoreError(f"{what}: {text}. {hint}")
