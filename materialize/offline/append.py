"""Rows in a table's types in, one commit that appends them out, and which version it got."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from deltalake import CommitProperties, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from materialize.errors import OfflineStoreError, RowsError, UnavailableError
from materialize.offline.log import CommitGone
from materialize.offline.table import causes, open_table, pinned, reading

if TYPE_CHECKING:
    import pyarrow as pa

    from materialize.model import FeatureView
    from materialize.offline.table import OfflineTable

__all__ = ["Appended", "Appender", "digest"]

#: Commits of others that one append may lose against; a look at each takes as long as reading its commit file.
ATTEMPTS = 30
#: Versions after which the table is opened anew: deltalake reads every commit since the checkpoint that it began with each time that it
#: writes, 0.2 ms each, and never begins with a newer one (benchmarks/push.py).
REOPENED = 20
#: What commits of this module say in their commitInfo, beside ``run_id``.
WRITER, TOKEN, PUSH_ID, DIGEST = "materialize.writer", "materialize.token", "materialize.push_id", "materialize.digest"
#: What deltalake says of rows that break a constraint, before it quotes them.
BROKEN = "Invalid data found"
#: What it says of a table that it cannot write.
UNSUPPORTED = "Unsupported table features required"


@dataclass(frozen=True, slots=True)
class Appended:
    """``version``: the commit with the rows, None for one whose commit file is gone. ``again``: an earlier call with the same id made it."""

    version: int | None
    again: bool


class Appender:
    """Commits rows to the table of *view*, which it holds open between commits. Safe across threads, one commit at a time.

    Opening a table reads every commit since its last checkpoint; looking for what is new reads that alone.
    """

    def __init__(self, view: FeatureView) -> None:
        self.view = view
        self.turn = threading.Lock()
        self.table: OfflineTable | None = None
        self.opened = 0
        #: Of the commit file of the version *opened*.
        self.mark: tuple[int, int] | None = None

    def newest(self) -> OfflineTable:
        """The table at its head, checked to feed the view. Raises as `offline.open_table` does."""
        with self.turn:
            self.table = self._brought_up(self.table)
            return self.table

    def _brought_up(self, held: OfflineTable | None) -> OfflineTable:
        self.table = None
        if held is not None and int(held.delta.version()) - self.opened < REOPENED:
            with reading(self.view):
                # A table that was dropped and made again has another file there, or none.
                same = self.mark is not None and held.log.mark(self.opened) == self.mark
                if same:
                    held.delta.update_incremental()
            if same:
                return pinned(self.view, held.delta)
        opened = open_table(self.view)
        with reading(self.view):
            self.opened, self.mark = opened.version, opened.log.mark(opened.version)
        return opened

    def append(
        self, table: OfflineTable, rows: pa.Table, *, token: str, run_id: str, push_id: str | None, content: str
    ) -> Appended:
        """Commit *rows*, in the types of *table* (from `newest`), in one commit, or find that it is done.

        *token*: of this call alone. *push_id*: of these rows, for ever; a call with an id that is committed commits nothing. *content*: the
        `digest` of the rows, which has to be the same then.

        After it returns, the rows are in the table once per call, or once per *push_id*. A crash leaves them all there or none of
        them, and data files that nobody reads. Other writers' commits in between are waited for, `ATTEMPTS` of them, then
        UnavailableError is raised: nothing was committed. Raises RowsError for rows that the table's constraints refuse,
        OfflineStoreError when the table cannot be written; where that leaves open whether it was, the message says so.
        """
        with self.turn:
            # Another thread may have opened it anew, or dropped it with an error.
            given, table = table, self.table or table
            if _shape(given) != _shape(table):
                raise UnavailableError(
                    f"{table.subject}: could not append {rows.num_rows:,} rows: the table changed its columns meanwhile. Nothing was written. Push again"
                )
            if push_id is not None and (done := self._done_before(table, push_id, content)):
                return done
            base = int(table.delta.version())
            try:
                _write(table, rows, base, _told(token, run_id, push_id, content), self._app(push_id))
            except (DeltaError, OSError, ValueError) as error:
                self.table = None
                found = self._found(base, token, push_id, content)
                if isinstance(found, Appended):
                    return found
                raise self._translated(table, rows.num_rows, error, known=found) from None
            return Appended(self._version(table, base, token), again=False)

    def _app(self, push_id: str | None) -> str | None:
        return None if push_id is None else f"materialize.push/{self.view.name}/{push_id}"

    def _done_before(self, table: OfflineTable, push_id: str, content: str) -> Appended | None:
        """The commit of an earlier call with this id. Delta keeps the ids that were committed; ours with the version before it."""
        with reading(self.view):
            base = table.delta.transaction_version(str(self._app(push_id)))
            found = None if base is None else _said(table, base + 1, table.version, PUSH_ID, push_id)
        if found is None:
            return None if base is None else Appended(None, again=True)
        self._check_content(table, found[1], content)
        return Appended(found[0], again=True)

    def _check_content(self, table: OfflineTable, told: dict[str, Any], content: str) -> None:
        before = str(told.get(DIGEST))
        if (
            before != content and before.split(maxsplit=1)[0] == content.split(maxsplit=1)[0]
        ):  # of one version of polars
            raise RowsError(
                f"{table.subject}: could not push rows again: their push_id was committed with other rows, or another feature view on them, "
                "expected the same. Nothing was written. Give each push an id of its own"
            ) from None  # not of what deltalake said, which may quote rows

    def _version(self, table: OfflineTable, base: int, token: str) -> int:
        """The version that the commit with *token* got."""
        version = int(table.delta.version())
        with reading(self.view):
            if table.log.info(version).get(TOKEN) == token:
                return version
            found = _said(table, base + 1, table.log.newest(base), TOKEN, token)
        if found is None:
            raise OfflineStoreError(
                f"{table.subject}: could not tell the version of a commit that was made after version {base}: found it in no commit file that is "
                "left. The rows are in the table; the next run brings them"
            )
        return found[0]

    def _found(self, base: int, token: str, push_id: str | None, content: str) -> Appended | bool:
        """What became of a commit that raised: the commit; or whether it is known that there is none."""
        try:
            table = open_table(self.view)
            mine = _said(table, base + 1, table.version, TOKEN, token)
            other = None if push_id is None else _said(table, base + 1, table.version, PUSH_ID, push_id)
        except (OfflineStoreError, OSError):
            return False
        if mine is None and other is not None:
            self._check_content(table, other[1], content)
        found = mine or other
        return True if found is None else Appended(found[0], again=mine is None)

    def _translated(self, table: OfflineTable, rows: int, error: Exception, *, known: bool) -> Exception:
        subject = f"{table.subject}: could not append {rows:,} rows"
        text = str(error)
        if BROKEN in text:  # and then it quotes them
            return RowsError(
                f"{subject}: found rows that break a constraint of the table (CHECK, an invariant, a generated column). Nothing was written. "
                "deltalake does not tell which; push them in smaller parts to find out"
            )
        if UNSUPPORTED in text:
            return OfflineStoreError(
                f"{subject}: found a table that this writer cannot write: {causes(error)}. Nothing was written. "
                "Let the engine that owns the table append them"
            )
        state = (
            "Nothing was written"
            if known
            else "Whether they are in the table is not known: push again with the same push_id"
        )
        if isinstance(error, CommitFailedError):
            return UnavailableError(
                f"{subject}: other writers were faster {ATTEMPTS} times, or changed the table: {causes(error)}. {state}. Push again"
            )
        return OfflineStoreError(
            f"{subject}: found {type(error).__name__}: {causes(error)}, expected a table that can be written. {state}"
        )


def digest(view: FeatureView, rows: pa.Table) -> str:
    """What tells *rows* from others: a hash of what *view* reads of them, behind the version of polars that made it."""
    hashes = pl.DataFrame(rows.select(list(view.columns))).hash_rows(seed=0)
    return f"{pl.__version__} {hashlib.sha256(hashes.to_numpy().tobytes()).hexdigest()}"


def _said(table: OfflineTable, first: int, last: int, name: str, value: str) -> tuple[int, dict[str, Any]] | None:
    """The first of the commits *first* to *last*, as far as the log still has them, that says *value* of *name*; and all that it says."""
    for version in range(first, last + 1):
        with suppress(CommitGone):
            told = table.log.info(version)
            if told.get(name) == value:
                return version, told
    return None


def _shape(table: OfflineTable) -> tuple[Any, ...]:
    return table.table_id, table.columns, table.partition_columns


def _told(token: str, run_id: str, push_id: str | None, content: str) -> dict[str, str]:
    told = {WRITER: "materialize push", "run_id": run_id, TOKEN: token}
    return told if push_id is None else told | {PUSH_ID: push_id, DIGEST: content}


def _write(table: OfflineTable, rows: pa.Table, base: int, told: dict[str, str], app: str | None) -> None:
    transactions = None if app is None else [Transaction(app, base)]
    properties = CommitProperties(custom_metadata=told, max_commit_retries=ATTEMPTS, app_transactions=transactions)
    write_deltalake(table.delta, rows, mode="append", commit_properties=properties)
