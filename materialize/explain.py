"""A feature view, a store and an entity key in, why readers get what they get out: record, commit, file, run, and what became of every other row.

Reads the store, the table and its quarantine. Writes nothing, and logs nothing of the entity.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl

from materialize import codec, latest, watermark
from materialize.codec import entity_keys
from materialize.decoder import Decoder, Header
from materialize.entity_key import key_parts
from materialize.errors import OfflineStoreError, OnlineStoreError
from materialize.model import from_us, to_us
from materialize.offline import commits_told, held_rows, join_values, open_table, read_entity
from materialize.order import ERASED, GENERATION, NO_CREATED
from materialize.plan import changed_layout, changed_view
from materialize.retry import with_retry
from materialize.verdicts import HeldRecord, TableRow, Times, disagreement, floor_words, served_row, verdicts

if TYPE_CHECKING:
    from datetime import datetime

    from materialize.model import FeatureView, Watermark
    from materialize.offline import EntityRows, OfflineTable
    from materialize.online.base import OnlineStore

__all__ = ["Explanation", "explain"]

#: Data files that were removed from the table and are looked at for rows of the entity, those that were removed last.
GONE_FILES = 64
#: A verdict of a row that lost against the record that is there, or never got to the store.
LOST = ("late", "same order", "refused", "quarantined", "not online")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why. ``status``: present, null (the feature that was asked for), missing, expired, deleted (a tombstone) or erased. ``record``: the order
    fields of what the store holds, in words; None where it holds nothing. ``commit``: of its version; ``brought_by``: of its row. ``watermark``: where the
    view is in the store. ``rows``: of the table, newest first, then those that are gone; ``refused``: of these what lost after the
    served row came. ``quarantined``: what waits in quarantine. ``disagrees``: how store and table differ, None where they do not or
    nobody can tell (``notes``). ``next``: the command that helps.
    """

    view: str
    store: str
    key: str
    status: str
    features: dict[str, Any]
    record: dict[str, Any] | None
    commit: dict[str, Any] | None
    brought_by: dict[str, Any] | None
    watermark: dict[str, Any] | None
    table_version: int
    rows: list[dict[str, Any]]
    more_rows: int
    refused: list[dict[str, Any]]
    quarantined: list[dict[str, Any]]
    disagrees: str | None
    next: str | None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def explain(
    view: FeatureView,
    store: OnlineStore,
    store_name: str,
    key: bytes,
    *,
    now: datetime,
    feature: str | None = None,
    most: int = 20,
) -> Explanation:
    """Explain what readers of *store* get for the entity *key*; at most *most* rows of it are told.

    Raises ValueError for a key that the join keys' types cannot hold and for a feature that the view does not have, OnlineStoreError for
    bytes that are no record, OfflineStoreError when the table cannot be read, UnavailableError when the store does not answer.
    """
    if feature is not None and feature not in view.features:
        raise ValueError(f"found the feature {feature!r}, expected one of {', '.join(view.features)}")
    mark = with_retry(partial(watermark.read, store, view.name))
    status, held, header = _held(view, store, key, now)
    table = open_table(view)
    found = _Entity(view, store, table, key, now)
    rows = found.rows(table)
    times = Times(_version(mark), 1 if mark is None else mark.generation, view.ttl_us, to_us(now))
    served = served_row(rows, held)
    lines = [_row(row, verdict, feature) for row, verdict in zip(rows, verdicts(rows, held, times), strict=True)]
    differs = found.compared(mark, rows, held, times)
    moved = found.moved(mark)
    features = {name: value for name, value in held.features.items() if name == (feature or name)} if held else {}
    if status == "present" and feature is not None and features.get(feature) is None:
        status = "null"
    return Explanation(
        view=view.name,
        store=store_name,
        key=key.decode(),
        status=status,
        features=features if status in {"present", "null"} else {},
        record=None if header is None else _record(header),
        commit=None if header is None or header.floor >= ERASED else _commit(table, header.version % GENERATION),
        brought_by=None if served is None else _brought(table, rows[served]),
        watermark=None if mark is None else _mark(mark),
        table_version=table.version,
        rows=lines[:most],
        more_rows=max(0, len(lines) - most),
        refused=[line for line in lines if line["verdict"].startswith(LOST)][:most],
        quarantined=found.quarantined(store_name, most),
        disagrees=differs,
        next=_next(view, store_name, mark, table, differs, moved=moved),
        notes=found.notes,
    )


def _held(
    view: FeatureView, store: OnlineStore, key: bytes, now: datetime
) -> tuple[str, HeldRecord | None, Header | None]:
    """What the store holds, and the status that readers see."""
    (record,) = with_retry(partial(store.read, view.name, [key]))
    if record is None:
        return "missing", None, None
    header = Header.unpack(record)
    if header.tombstone:
        held = HeldRecord(None, header.created_us, header.version, header.floor, {})
        return "erased" if held.erased else "deleted", held, header
    known = with_retry(partial(watermark.schemas, store, view.name))
    if header.schema_id not in known:
        raise OnlineStoreError(
            f"feature view {view.name!r}: could not explain a record in {store.location}: found the schema id {header.schema_id}, expected one of "
            f"{sorted(known)}. Nothing was changed. Run: materialize rebuild {view.name}"
        )
    values = Decoder(known[header.schema_id]).decode(record)
    features = {name: values.get(name) for name in view.features}
    held = HeldRecord(header.event_us, header.created_us, header.version, header.floor, features)
    late = view.ttl_us is not None and header.event_us + view.ttl_us <= to_us(now)
    return "expired" if late else "present", held, header


class _Entity:
    """One entity's rows in the table and in quarantine. ``notes``: what could not be looked at, in sentences."""

    def __init__(self, view: FeatureView, store: OnlineStore, table: OfflineTable, key: bytes, now: datetime) -> None:
        self.view, self.store, self.key, self.now = view, store, key, now
        self.head = table
        self.notes: list[str] = []
        self.of = join_values(table, key_parts(key))
        if entity_keys(self.of, view.join_keys)[0] != key:
            # Another spelling of a number or a date is another key for the store, and no row of the table has it.
            self.of = self.of.clear()
            self.notes.append("no row of the table has this key as it is written: a number or date has one spelling")

    def rows(self, table: OfflineTable) -> list[TableRow]:
        found = read_entity(table, self.of, most_gone=GONE_FILES)
        if found.unread and table is self.head:
            self.notes.append(
                f"{found.unread:,} data files that were removed from the table are vacuumed or were not looked at: rows in them are not told"
            )
        reasons = self._unstorable(found)
        seen = self._seen(found, reasons)
        return [
            TableRow(
                event_us=order["event_us"],
                created_us=order["created_us"],
                commit=order["version"],
                exact=order["__exact"],
                file=order["__file"],
                removed_by=order["__removed_by"],
                unstorable=reasons[place],
                features=seen.get(place, values),
            )
            for place, (order, values) in enumerate(
                zip(found.order.iter_rows(named=True), found.features.iter_rows(named=True), strict=True)
            )
        ]

    def _unstorable(self, found: EntityRows) -> list[str | None]:
        """Why each row cannot be stored, None for one that can."""
        order = found.order.with_columns(__place=pl.int_range(found.order.height))
        _, wrong = latest.valid_rows(order, self.view, now=self.now, max_key_bytes=self.store.max_key_bytes)
        reasons = dict(zip(wrong["__place"], wrong["__reason"], strict=True))
        values = codec.unstorable_rows(found.features, self.view, max_value_bytes=self.store.max_value_bytes)
        return [reasons.get(place) or (None if values is None else values[place]) for place in range(order.height)]

    def _seen(self, found: EntityRows, reasons: list[str | None]) -> dict[int, dict[str, Any]]:
        """The features of each storable row as readers would see them, by its place."""
        places = [place for place, reason in enumerate(reasons) if reason is None]
        decoder = Decoder(self.view.features)
        seen = {}
        for place in places:  # one by one, because encode puts rows with nulls last
            order = found.order[place].select("event_us", "created_us", version=pl.lit(0, pl.Int64))
            keys = pl.Series([self.key], dtype=pl.Binary)
            batch = codec.encode(keys, order, found.features[place], self.view, schema_id=1)
            seen[place] = decoder.decode(batch.values[0].as_py())
        return seen

    def compared(
        self, mark: Watermark | None, rows: list[TableRow], held: HeldRecord | None, times: Times
    ) -> str | None:
        """How the store differs from the table at the watermark's version; None where it does not or nobody can tell."""
        changed = None if mark is None else changed_view(self.view, mark)
        if mark is None or mark.version is None or changed is not None or mark.table_id != self.head.table_id:
            what = (
                "the view never loaded" if mark is None else changed or f"the snapshot run {mark.run_id} did not finish"
            )
            if mark is not None and mark.table_id != self.head.table_id:
                what = "the table was dropped and created again since the last run"
            self.notes.append(f"not compared with the table: {what}")
            return None
        if mark.version != self.head.version:
            try:
                rows = self.rows(open_table(self.view, mark.version))
            except OfflineStoreError as error:
                self.notes.append(f"not compared with the table at the watermark: {error}")
                return None
        return disagreement([row for row in rows if row.removed_by is None], held, times)

    def moved(self, mark: Watermark | None) -> bool:
        """Whether the records are not all in the layout that the store keeps the view in now."""
        changed = None if mark is None else changed_layout(mark, self.store.layout(self.view.name))
        if changed is None:
            return False
        self.notes.append(
            f"{changed} since the last run: until a rebuild has written all entities again each is in one or the other, and plain "
            "readers do not see those in the other. Readers of this package see both"
        )
        return True

    def quarantined(self, store_name: str, most: int) -> list[dict[str, Any]]:
        """The rows of the entity that wait in quarantine, newest first."""
        try:
            kept = held_rows(self.view, store_name)
        except OfflineStoreError as error:
            self.notes.append(f"the quarantine was not looked at: {error}")
            return []
        mine = kept.filter(pl.col("entity") == self.key.decode()).reverse().head(most)
        return mine.select("reason", "run_id", "at", "commit_version", "event_timestamp").to_dicts()


def _version(mark: Watermark | None) -> int:
    return -1 if mark is None or mark.version is None else mark.version


def _next(
    view: FeatureView, store_name: str, mark: Watermark | None, table: OfflineTable, differs: str | None, *, moved: bool
) -> str | None:
    """The command that makes the store what the table is. *moved*: to another layout, which other commands refuse."""
    if moved:
        return f"materialize rebuild {view.name} --store {store_name}"
    if differs is not None:
        return f"materialize verify {view.name} --store {store_name} --repair"
    if _version(mark) < table.version or (mark is not None and mark.table_id != table.table_id):
        return f"materialize incremental {view.name} --store {store_name}"
    return None


# --- facts for people --------------------------------------------------------------------------------------------------


def _record(header: Header) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if not header.tombstone:
        facts["event_time"] = from_us(header.event_us)
        facts["created_time"] = _created(header.created_us)
    if header.floor >= ERASED:
        return facts | {"floor": floor_words(header.floor)}
    generation, version = divmod(header.version, GENERATION)
    return facts | {
        "generation": generation,
        "table_version": version,
        "read_as": "the whole state of the entity in this snapshot"
        if header.version == header.floor
        else "a row that was added",
        "floor": floor_words(header.floor),
    }


def _created(created_us: int) -> datetime | None:
    return None if created_us == NO_CREATED else from_us(created_us)


def _mark(mark: Watermark) -> dict[str, Any]:
    finished = None if mark.finished_us is None else from_us(mark.finished_us)
    return {"version": mark.version, "generation": mark.generation, "run_id": mark.run_id, "finished": finished}


def _commit(table: OfflineTable, version: int) -> dict[str, Any]:
    """What the log has of a commit."""
    found = commits_told(table, [version] if version <= table.version else []).get(version)
    if found is None:
        return {"version": version, "operation": "not in the log any more"}
    facts = {"version": version, "at": from_us(found.committed_us), "operation": found.operation}
    return facts | ({"noted": found.noted} if found.noted else {})


def _brought(table: OfflineTable, row: TableRow) -> dict[str, Any]:
    """The commit and the data file of the row that is served."""
    if row.commit is None:
        return {"file": row.file, "commit": "not told by the log any more"}
    exact = (
        {}
        if row.exact
        else {"exact": "no: the file was written anew, so that an earlier commit may have brought the row"}
    )
    return _commit(table, row.commit) | exact | {"file": row.file}


def _row(row: TableRow, verdict: str, feature: str | None) -> dict[str, Any]:
    # Of an entity that was erased nothing is told but that old files still have rows.
    values = {} if verdict == "erased" else row.features
    return {
        "event_time": _moment(row.event_us),
        "created_time": _moment(None if row.created_us == NO_CREATED else row.created_us),
        "commit": row.commit,
        "file": row.file,
        "verdict": verdict,
        "features": {name: value for name, value in values.items() if name == (feature or name)},
    }


def _moment(moment_us: int | None) -> datetime | str | None:
    """A time, or its microseconds where no calendar has it."""
    try:
        return None if moment_us is None else from_us(moment_us)
    except OverflowError:
        return f"{moment_us} us"
