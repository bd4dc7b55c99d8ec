"""Rows that cannot be stored in, a Delta table of them out: each kept once with its reason, listed, and marked when it is released.

The table is beside the source, or where the view's ``quarantine`` says; several views may share one. A row is JSON text, so that a
view whose columns change needs no other table.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from datetime import date
from typing import TYPE_CHECKING, Any

import polars as pl
from deltalake import DeltaTable, QueryBuilder, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from tenacity import retry, retry_if_exception_type, stop_after_attempt

from materialize.errors import OfflineStoreError
from materialize.model import mask_credentials
from materialize.offline.log import OLDEST
from materialize.offline.rows import read_features
from materialize.offline.table import causes
from materialize.order import NO_CREATED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from materialize.model import FeatureView
    from materialize.offline.rows import OrderRows
    from materialize.offline.table import OfflineTable

__all__ = ["HELD", "Quarantine", "erase", "held_rows", "mark_released", "told_rows"]

MOMENT = pl.Datetime("us", "UTC")
#: The columns of a quarantine table. ``table_id``, ``table_version``: of the source, as the row was read; ``commit_version``: the commit that brought the
#: row, null where the log does not tell. ``entity``: null when a join key is. ``id``: of the row's content, the same in every run.
#: ``released_by``, ``released_at``: the run and time that found nothing wrong with it any more, null before.
HELD: dict[str, pl.DataType | type[pl.DataType]] = {
    "view": pl.String,
    "store": pl.String,
    "reason": pl.String,
    "run_id": pl.String,
    "at": MOMENT,
    "table_id": pl.String,
    "table_version": pl.Int64,
    "commit_version": pl.Int64,
    "event_timestamp": MOMENT,
    "created_timestamp": MOMENT,
    "id": pl.String,
    "entity": pl.String,
    "row": pl.String,
    "released_by": pl.String,
    "released_at": MOMENT,
}
PARTITIONS = ["view", "store"]
#: What two entries have in common that are one.
SAME = ["id", "reason"]
#: The log holds the least and greatest value of these columns only: rows and keys belong into the data files alone.
SETTINGS = {"delta.dataSkippingStatsColumns": "at,table_version"}
#: Commits tried before another writer of the table counts as in the way; each loses only against one that succeeded.
ATTEMPTS = 20
#: Characters of a row's id: 128 bits of SHA-256.
ID_LENGTH = 32

#: Days since 1970 of the first and the last date that have a name in ISO 8601 with four digits; the last microsecond of that day.
FIRST_DAY, LAST_DAY = ((day - date(1970, 1, 1)).days for day in (date.min, date.max))
DAY_US = 86_400_000_000
#: What JSON has no numbers for, as Protocol Buffers writes them.
NOT_FINITE = {"NaN": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}


def told_rows(
    table: OfflineTable, refused: Sequence[OrderRows], *, store: str, run_id: str, now: datetime
) -> Iterator[pl.DataFrame]:
    """The rows of *refused*, whose frames also have __reason and __entity String, as the quarantine table has them.

    Yields: frames of bounded size with the columns HELD.
    """
    view = table.view
    names = list(dict.fromkeys((*view.join_keys, view.event_timestamp, view.created_timestamp or "", *view.features)))
    known: dict[str, Any] = {"view": view.name, "store": store, "run_id": run_id}
    known |= {"table_id": table.table_id, "table_version": table.version}
    for rows in refused:
        frame = rows.frame.sort("position")
        for first, features in read_features(table, rows, frame["position"]):
            order = frame.slice(first, features.height)
            created = pl.when(pl.col("created_us") != NO_CREATED).then("created_us").cast(MOMENT)
            times = order.select(event=pl.col("event_us").cast(MOMENT), created=created)
            named = {view.event_timestamp: times["event"]}
            if view.created_timestamp is not None and view.created_timestamp != view.event_timestamp:
                named[view.created_timestamp] = times["created"]
            whole = pl.concat([order.select(view.join_keys), features], how="horizontal").with_columns(**named)
            texts = _row_texts(whole, [name for name in names if name])
            yield order.select(
                *(pl.lit(value).alias(name) for name, value in known.items()),
                reason="__reason",
                at=pl.lit(now, MOMENT),
                commit_version=pl.when(pl.col("version") != OLDEST).then("version"),
                event_timestamp=_in_calendar(pl.lit(times["event"]), MOMENT),
                created_timestamp=_in_calendar(pl.lit(times["created"]), MOMENT),
                id=pl.Series(_ids(texts), dtype=pl.String),
                entity="__entity",
                row=texts,
                released_by=pl.lit(None, pl.String),
                released_at=pl.lit(None, MOMENT),
            ).select(pl.col(name).cast(dtype) for name, dtype in HELD.items())


class Quarantine:
    """Keeps rows of *view* in its quarantine table, which is made if it is not there, each row once under each of its reasons."""

    def __init__(self, view: FeatureView, store: str) -> None:
        self.view, self.store = view, store
        self.before: pl.DataFrame | None = None

    def keep(self, rows: pl.DataFrame) -> None:
        """Keep *rows*, as `told_rows` gives them, in one commit.

        After it returns, each is there; what was there before and is not released is not added again, so that a piece may be
        written twice and a rebuild may read everything. If it raises an OfflineStoreError, they are kept or not. Nothing is kept,
        and nothing raised, when the view says ``quarantine: none``.
        """
        address = self.view.quarantine_table
        if address is None:
            return
        with _working(self.view, f"could not keep {rows.height:,} rows that cannot be stored", KEEPING):
            if self.before is None:
                found = _select(self.view, ", ".join(SAME), self.store)
                self.before = (rows.clear() if found is None else found).select(SAME)
            new = rows.unique(SAME, keep="first", maintain_order=True).join(self.before, on=SAME, how="anti")
            if not new.is_empty():
                _append(address, new, self.view.storage_options)
                self.before = pl.concat([self.before, new.select(SAME)])


def held_rows(view: FeatureView, store: str) -> pl.DataFrame:
    """The rows of *view* that wait in quarantine and that runs into the online store *store* met. Returns: HELD, each row once, oldest first.

    Raises OfflineStoreError when the table cannot be read; where there is none, there are no rows.
    """
    with _working(view, "could not list the rows that cannot be stored"):
        found = _select(view, ", ".join(HELD), store)
    if found is None:
        return pl.DataFrame(schema=HELD)
    return found.select(*HELD).sort("at").unique("id", keep="last", maintain_order=True)


def mark_released(view: FeatureView, store: str, ids: pl.Series, *, run_id: str, now: datetime) -> None:
    """Mark the rows with these *ids* as released by a run, in one commit. Doing it again changes nothing."""
    if view.quarantine_table is None or ids.is_empty():
        return
    marked = ids.unique().to_frame("id").with_columns(run_id=pl.lit(run_id), at=pl.lit(now, MOMENT))
    with _working(view, "could not mark released rows; what can be stored of them is online. Release them again"):
        _merge(
            view,
            store,
            marked,
            "held.id = given.id AND held.released_at IS NULL",
            {"released_by": "run_id", "released_at": "at"},
        )


def erase(view: FeatureView, store: str, entity: bytes) -> int:
    """Erase every row of the entity with this key, released or not, with the data files that held it. Returns how many rows there were.

    Two commits: without the rows, and without the old files, at once; who reads an older version of the table meanwhile may fail.
    If it raises an OfflineStoreError, do it again, also where the rows are gone already: their files may not be. Rows whose join
    key is null are nobody's, and stay.
    """
    if view.quarantine_table is None:
        return 0
    with _working(view, "could not erase an entity"):
        try:
            erased = _merge(view, store, pl.DataFrame({"entity": [entity.decode()]}), "held.entity = given.entity")
        except TableNotFoundError:
            return 0
        # not a full one, which would take the files of a writer that has yet to commit
        _table(view).vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False, full=False)
    return erased


# --- parts -------------------------------------------------------------------------------------------------------------

KEEPING = (
    "Nothing is lost: the rows are in the source, and the watermark does not move. Let the run write there, or set in the feature view's "
    "YAML quarantine: to another address, or quarantine: none to count such rows and not keep them."
)


@contextmanager
def _working(view: FeatureView, doing: str, then: str = "The watermark stays.") -> Iterator[None]:
    """Turn what deltalake raises into an OfflineStoreError that names the view, the table and what to do."""
    try:
        yield
    except OfflineStoreError:
        raise
    except (DeltaError, OSError, ValueError, pl.exceptions.PolarsError) as error:
        where = mask_credentials(str(view.quarantine_table))
        # not the whole text: deltalake may quote rows
        raise OfflineStoreError(
            f"feature view {view.name!r}: {doing}: the quarantine table {where}: found {type(error).__name__}: {causes(error)}, "
            f"expected a table that this run can read and write. {then}"
        ) from None


def _table(view: FeatureView) -> DeltaTable:
    return DeltaTable(str(view.quarantine_table), storage_options=view.storage_options or None)


def _select(view: FeatureView, columns: str, store: str) -> pl.DataFrame | None:
    """Some *columns* of the rows of *view* and *store* that are not released, None where there is no table. Names are letters, digits and underscores."""
    try:
        table = _table(view)
    except TableNotFoundError:
        return None
    query = f"SELECT {columns} FROM held WHERE view = '{view.name}' AND store = '{store}' AND released_at IS NULL"  # noqa: S608
    return pl.DataFrame(QueryBuilder().register("held", table).execute(query).read_all())


#: Another writer of the table was faster.
patiently = retry(retry=retry_if_exception_type(CommitFailedError), stop=stop_after_attempt(ATTEMPTS), reraise=True)


@patiently
def _append(address: str, rows: pl.DataFrame, options: dict[str, Any]) -> None:
    """One commit with *rows*; makes the table."""
    write_deltalake(
        address,
        rows.to_arrow(),
        mode="append",
        partition_by=PARTITIONS,
        configuration=SETTINGS,
        storage_options=options or None,
    )


@patiently
def _merge(view: FeatureView, store: str, given: pl.DataFrame, where: str, sets: dict[str, str] | None = None) -> int:
    """One commit that *sets* columns of the rows *where* they match *given* to columns of it, or deletes them. Returns how many."""
    predicate = f"{where} AND held.view = '{view.name}' AND held.store = '{store}'"
    merger = _table(view).merge(given.to_arrow(), predicate, source_alias="given", target_alias="held")
    if sets is None:
        return int(merger.when_matched_delete().execute()["num_target_rows_deleted"])
    updates = {name: f"given.{column}" for name, column in sets.items()}
    return int(merger.when_matched_update(updates).execute()["num_target_rows_updated"])


def _ids(texts: pl.Series) -> list[str]:
    # A loop, because nothing columnar has a hash that stays the same between versions; about 450,000 rows a second.
    return [hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH] for text in texts]


# --- rows as text ------------------------------------------------------------------------------------------------------


def _row_texts(rows: pl.DataFrame, names: Sequence[str]) -> pl.Series:
    """Each row as a JSON object of its columns *names*, in this order. Returns: String, no nulls.

    Integers keep all digits and floats their shortest exact text; NaN and the infinities, decimals, dates and times (ISO 8601)
    are text, binary values hexadecimal text. A date or time outside the years 1 to 9999 is its number of days or microseconds
    since 1970.
    """
    label = (pl.DataFrame({"name": [name]}).select(_text(pl.col("name"), pl.String())).item() for name in names)
    fields = [
        pl.concat_str(pl.lit(f"{name}:"), _text(pl.col(column), rows.schema[column]).fill_null("null"))
        for name, column in zip(label, names, strict=True)
    ]
    return rows.select(row=pl.concat_str(pl.lit("{"), pl.concat_str(fields, separator=","), pl.lit("}")))["row"]


def _in_calendar(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """*column*, dates or times in microseconds, with null for what is outside the years 1 to 9999: nobody can name it."""
    first, last = (FIRST_DAY, LAST_DAY) if dtype == pl.Date else (FIRST_DAY * DAY_US, (LAST_DAY + 1) * DAY_US - 1)
    return pl.when(column.to_physical().is_between(first, last)).then(column)


def _text(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """The JSON text of each value; null where it is null."""
    if isinstance(dtype, pl.List):
        items = column.list.eval(_text(pl.element(), dtype.inner).fill_null("null"))  # type: ignore[arg-type]
        return pl.concat_str(pl.lit("["), items.list.join(","), pl.lit("]"))
    if dtype == pl.String:
        held = pl.struct(column.alias("v")).struct.json_encode()
        text = held.str.strip_prefix('{"v":').str.strip_suffix("}")
    elif dtype == pl.Binary:
        text = _quoted(column.bin.encode("hex"))
    elif dtype.is_temporal():
        form = "%Y-%m-%d" if dtype == pl.Date else "%Y-%m-%dT%H:%M:%S%.6fZ"
        named = _quoted(_in_calendar(column, dtype).dt.to_string(form))
        text = pl.coalesce(named, column.to_physical().cast(pl.String))
    elif dtype.is_decimal():
        text = _quoted(column.cast(pl.String))
    elif dtype.is_float():
        text = column.cast(pl.String).replace(NOT_FINITE)
    else:
        text = column.cast(pl.String)
    return text


def _quoted(text: pl.Expr) -> pl.Expr:
    return pl.concat_str(pl.lit('"'), text, pl.lit('"'))
