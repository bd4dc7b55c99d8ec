"""A source that is suddenly empty or small stops a run before its first write; too many rows that cannot be stored before its commit."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from materialize import pipeline, watermark
from materialize.errors import OfflineStoreError, QuarantineError
from materialize.model import Interval
from materialize.online.memory import MemoryStore
from tests.stepping import amounts, incremental, plan_of, position, records, run
from tests.tables import NOW, SCHEMA, Table, at, row

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.online.base import OnlineStore


def fill(table: Table, rows: int, *, first: int = 0, **options: Any) -> None:
    """Commit *rows* entities, each with one row."""
    moments = pa.array([at(1)] * rows, SCHEMA.field("event_timestamp").type)
    columns = {
        "user_id": pa.array([f"u{number}" for number in range(first, first + rows)]),
        "event_timestamp": moments,
        "created": moments,
        "amount": pa.array([1.0] * rows),
        "count": pa.array([1] * rows, pa.int64()),
        "country": pa.array(["DE"] * rows),
    }
    table.append_table(pa.table(columns, schema=SCHEMA), **options)


def known_rows(table: Table, store: OnlineStore) -> int | None:
    found = watermark.read(store, table.view.name)
    return None if found is None else found.rows


def forget_rows(table: Table, store: OnlineStore) -> None:
    """The watermark as a release wrote it that did not count live rows."""
    text = watermark.read_text(store, table.view.name)
    assert text is not None
    old = {name: value for name, value in json.loads(text).items() if name != "rows"}
    assert store.compare_and_set_cell(table.view.name, "watermark", text.encode(), json.dumps(old).encode())


def compact(table: Table) -> None:
    DeltaTable(str(table.path)).optimize.compact()


# --- live rows ---------------------------------------------------------------------------------------------------------


def test_the_watermark_knows_the_live_rows_of_its_version(table: Table, store: OnlineStore) -> None:
    expected = []
    changes: tuple[Callable[[], Any], ...] = (
        lambda: fill(table, 5),
        lambda: fill(table, 3, first=5),
        lambda: table.delta.delete("user_id = 'u1'"),
        partial(compact, table),
        lambda: table.delete_rows(table.delta.file_uris()[0].removeprefix(f"{table.path}/"), [0, 2]),
        lambda: fill(table, 4, first=10),
    )
    for change in changes:
        change()
        incremental(table, store)
        expected.append(known_rows(table, store))

    assert expected == [5, 8, 7, 7, 5, 9]


def test_an_older_watermark_gets_the_live_rows_with_the_next_version(table: Table, store: OnlineStore) -> None:
    fill(table, 5)
    incremental(table, store)
    forget_rows(table, store)
    fill(table, 2, first=5)

    incremental(table, store)

    assert known_rows(table, store) == 7


def test_a_table_without_statistics_is_read_as_ever(table: Table, store: OnlineStore) -> None:
    table.create()
    action = table.add_file("a.parquet", table.arrow([row("a", 1, 2.0)]))
    del action["add"]["stats"]
    table.commit(action)

    incremental(table, store)

    assert (amounts(table, store), known_rows(table, store)) == ({"a": 2.0}, None)


# --- empty and shrunken sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (1_000, 0), (1_000, 400), (2_000, 1)])
def test_an_empty_or_shrunken_source_stops_a_run_before_its_first_write(
    table: Table, store: OnlineStore, mode: Any, before: int, after: int
) -> None:
    fill(table, before)
    incremental(table, store)
    held = records(table.view, store), watermark.read_text(store, "spending")
    fill(table, after, mode="overwrite")

    told = f"'spending'.*found {after} live rows, where there were {before:,} at version 0.*materialize {mode} spending .*--force"
    with pytest.raises(OfflineStoreError, match=told):
        getattr(pipeline, mode)(table.view, store, run())

    assert (records(table.view, store), watermark.read_text(store, "spending")) == held


@pytest.mark.parametrize(("before", "after"), [(3, 1), (999, 1), (1_000, 401), (0, 0)])
def test_a_small_table_or_a_smaller_loss_goes_on(table: Table, store: OnlineStore, before: int, after: int) -> None:
    fill(table, before)
    incremental(table, store)
    fill(table, after, mode="overwrite")

    incremental(table, store)

    assert len(amounts(table, store)) == after


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
def test_force_lets_one_run_pass_and_no_other(table: Table, store: OnlineStore, mode: Any) -> None:
    fill(table, 1_000)
    incremental(table, store)
    fill(table, 300, mode="overwrite")

    getattr(pipeline, mode)(table.view, store, run(force=True))
    assert (len(amounts(table, store)), known_rows(table, store)) == (300, 300)
    incremental(table, store)
    table.delta.delete()

    with pytest.raises(OfflineStoreError, match="found 0 live rows"):
        incremental(table, store)
    assert len(amounts(table, store)) == 300


def test_rows_gone_by_deletion_vectors_are_gone(table: Table, store: OnlineStore) -> None:
    fill(table, 1_000)
    incremental(table, store)
    table.delete_rows(table.delta.file_uris()[0].removeprefix(f"{table.path}/"), range(600))

    with pytest.raises(OfflineStoreError, match="found 400 live rows"):
        incremental(table, store)


def test_a_table_that_was_created_again_empty_stops_a_rebuild(table: Table, store: OnlineStore) -> None:
    fill(table, 5)
    incremental(table, store)
    table.path.rename(table.path.with_name("before"))
    table.create()

    with pytest.raises(OfflineStoreError, match="found 0 live rows, where there were 5"):
        pipeline.rebuild(table.view, store, run())


def test_an_unfinished_rebuild_does_not_forget_how_many_rows_there_were(table: Table, store: OnlineStore) -> None:
    fill(table, 5)
    incremental(table, store)
    pipeline.begin(table.view, store, plan_of(table, store, "rebuild"))
    table.delta.delete()

    with pytest.raises(OfflineStoreError, match="found 0 live rows, where there were 5 before"):
        incremental(table, store)


@pytest.mark.parametrize("lost", ["the rows", "the watermark"])
def test_an_empty_source_stops_where_nobody_knows_how_many_rows_there_were_and_the_store_holds_some(
    table: Table, store: OnlineStore, lost: str
) -> None:
    fill(table, 5)
    incremental(table, store)
    if lost == "the rows":
        forget_rows(table, store)
    else:
        del store.content.cells["spending", "watermark"]  # type: ignore[attr-defined]
    table.delta.delete()

    with pytest.raises(OfflineStoreError, match="found 0 live rows; expected some, because the online store holds"):
        incremental(table, store)


def test_a_first_run_may_find_an_empty_table(table: Table, store: OnlineStore) -> None:
    table.create()

    incremental(table, store)
    fill(table, 2)
    incremental(table, store)

    assert (len(amounts(table, store)), known_rows(table, store)) == (2, 2)


def test_a_backfill_is_never_stopped(table: Table, store: OnlineStore) -> None:
    fill(table, 1_000)
    incremental(table, store)
    table.delta.delete()

    report = pipeline.backfill(table.view, store, run(), Interval(at(0), at(10)))

    assert (report.rows_read, len(amounts(table, store)), known_rows(table, store)) == (0, 1_000, 1_000)


# --- too many rows that cannot be stored -------------------------------------------------------------------------------


def test_more_quarantined_rows_than_allowed_stop_a_run_before_the_watermark(table: Table, store: OnlineStore) -> None:
    table.change_view(max_quarantined=0.1)
    fill(table, 10)
    incremental(table, store)
    fill(table, 8, first=10)
    table.append(row(None, 1), row("a", None))

    with pytest.raises(
        QuarantineError,
        match=r"2 of 10 rows.*null event timestamp: 1; null join key: 1\), expected at most 10.0000%.*quarantine list spending",
    ):
        incremental(table, store)
    assert position(table, store) == (1, 0)
    report = pipeline.incremental(table.view, store, run(force=True))

    assert (position(table, store), report.quarantined) == ((1, 2), 2)


def test_as_many_quarantined_rows_as_allowed_pass(table: Table, store: OnlineStore) -> None:
    table.change_view(max_quarantined=0.1)
    fill(table, 9)
    table.append(row(None, 1))

    assert incremental(table, store).quarantined == 1


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
def test_keys_that_all_become_null_remove_nobody(table: Table, store: OnlineStore, mode: Any) -> None:
    table.change_view(max_quarantined=0.1)
    fill(table, 10)
    incremental(table, store)
    table.delta.update(updates={"user_id": "NULL"}, predicate="user_id <> 'u9'")
    fill(table, 1, first=10)

    with pytest.raises(QuarantineError, match=r"9 of \d+ rows"):
        getattr(pipeline, mode)(table.view, store, run())

    assert len(amounts(table, store)) == 11


def test_a_rebuild_with_too_many_quarantined_rows_removes_nothing(table: Table, store: OnlineStore) -> None:
    fill(table, 10)
    incremental(table, store)
    fill(table, 10, mode="overwrite")
    table.append(row(None, 1))
    table.delta.delete("user_id = 'u3'")
    table.change_view(max_quarantined=0.05)

    with pytest.raises(QuarantineError, match="1 of 10 rows"):
        pipeline.rebuild(table.view, store, run())

    assert "u3" in amounts(table, store)


def test_the_share_is_of_the_whole_run_and_not_of_a_piece(table: Table, store: OnlineStore) -> None:
    table.change_view(max_quarantined=0.1)
    fill(table, 30)
    table.append(row("bad", None), row("bad", None))
    plan = pipeline.begin(table.view, store, replace(plan_of(table, store), pieces=8))
    pieces = [pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in range(8)]
    assert any(piece.quarantined > 0.1 * piece.rows_read for piece in pieces)

    assert pipeline.commit(table.view, store, plan, pieces, now=NOW).quarantined == 2


def test_a_backfill_tells_its_quarantined_rows_and_goes_on(table: Table) -> None:
    table.change_view(max_quarantined=0.1)
    table.append(row("x" * 1_000, 1))

    with MemoryStore() as store:
        store.max_key_bytes = 100
        report = pipeline.backfill(table.view, store, run(), Interval(at(0), at(10)))

    assert report.quarantined == 1
