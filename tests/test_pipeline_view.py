"""What a changed feature view means for the next run: a new feature fills every entity, one that is gone costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from deltalake import Field
from deltalake.schema import PrimitiveType

from materialize import pipeline, watermark
from materialize.errors import OfflineStoreError, OnlineStoreError, WatermarkError
from materialize.model import Interval
from materialize.testing import CrashingStore
from tests.stepping import adds_up, incremental, plan_of, position, records, run, served, vectors
from tests.tables import NOW, Table, at, row

if TYPE_CHECKING:
    from materialize.online.base import OnlineStore

ONE = {"amount": "float64"}
TWO = {"amount": "float64", "count": "int64"}


def loaded(table: Table, store: OnlineStore, features: dict[str, str]) -> None:
    """Three entities online, each of its own commit."""
    table.change_view(features=features)
    for number, user in enumerate("abc", start=1):
        table.append(row(user, number, float(number), count=10 * number))
    incremental(table, store, "before")


def looked_up(table: Table, store: OnlineStore, key: bytes) -> Any:
    return vectors(table.view, store, [key])[0].features


def test_added_feature_is_announced_and_fills_every_entity_in_a_new_generation(
    table: Table, any_store: OnlineStore
) -> None:
    loaded(table, any_store, ONE)
    table.change_view(features=TWO)
    assert looked_up(table, any_store, b"a") == {"amount": 1.0, "count": None}

    plan = plan_of(table, any_store)
    report = incremental(table, any_store)

    assert plan.reason == "features: added count since version 2: every entity is written again"
    assert (plan.snapshot, plan.generation, plan.from_version, report.reason) == (True, 2, None, plan.reason)
    assert (report.written, report.deleted, report.rows_read, adds_up(report)) == (3, 0, 3, True)
    assert [features["count"] for _, features in sorted(served(table.view, any_store).items())] == [10, 20, 30]
    assert looked_up(table, any_store, b"a") == {"amount": 1.0, "count": 10}
    assert position(table, any_store) == (2, 2)
    assert not incremental(table, any_store).changed


def test_added_feature_of_an_added_column_is_null_where_the_rows_do_not_have_it(
    table: Table, store: OnlineStore
) -> None:
    loaded(table, store, ONE)
    table.delta.alter.add_columns([Field("score", PrimitiveType("double"))])
    table.change_view(features={**ONE, "score": "float64"})

    report = incremental(table, store)

    assert (report.written, position(table, store)) == (3, (2, 3))
    assert looked_up(table, store, b"b") == {"amount": 2.0, "score": None}


def test_run_of_the_view_as_it_was_cannot_take_an_added_feature_away(table: Table, any_store: OnlineStore) -> None:
    loaded(table, any_store, ONE)
    before = table.view
    table.append(row("a", 9, 9.0, count=90))
    zombie = pipeline.begin(before, any_store, plan_of(table, any_store, run_id="zombie"))
    table.change_view(features=TWO)
    incremental(table, any_store)

    late = pipeline.write_piece(before, any_store, zombie, 0, now=NOW)
    with pytest.raises(WatermarkError):
        pipeline.commit(before, any_store, zombie, [late], now=NOW)

    assert served(table.view, any_store)["a"] == {"amount": 9.0, "count": 90}


def test_removed_feature_needs_no_snapshot_and_is_not_seen_any_more(table: Table, any_store: OnlineStore) -> None:
    loaded(table, any_store, TWO)
    before = records(table.view, any_store)
    table.change_view(features=ONE)
    assert looked_up(table, any_store, b"a") == {"amount": 1.0}
    plan = plan_of(table, any_store)
    assert (plan.snapshot, plan.pieces, plan.generation) == (False, 0, 1)

    report = incremental(table, any_store)

    found = watermark.read(any_store, "spending")
    assert found is not None
    assert (found.schema, found.version, found.generation) == (table.view.schema_text, 2, 1)
    assert (report.rows_read, report.changed) == (0, False)
    assert records(table.view, any_store) == before
    table.append(row("b", 9, 9.0))
    assert incremental(table, any_store).written == 1
    assert [looked_up(table, any_store, key) for key in (b"a", b"b")] == [{"amount": 1.0}, {"amount": 9.0}]


def test_order_of_features_needs_no_snapshot(table: Table, store: OnlineStore) -> None:
    loaded(table, store, TWO)
    table.change_view(features=dict(reversed(TWO.items())))
    table.append(row("b", 9, 9.0, count=90))

    report = incremental(table, store)

    assert (report.rows_read, report.written, position(table, store)[0]) == (1, 1, 1)
    assert [looked_up(table, store, key) for key in (b"a", b"b")] == [
        {"count": 10, "amount": 1.0},
        {"count": 90, "amount": 9.0},
    ]


@pytest.mark.parametrize("ran", [False, True], ids=["no run between", "a run between"])
def test_feature_that_comes_back_is_filled_where_it_was_not_written(
    table: Table, any_store: OnlineStore, *, ran: bool
) -> None:
    loaded(table, any_store, TWO)
    table.change_view(features=ONE)
    if ran:
        table.append(row("b", 9, 9.0, count=90))
        incremental(table, any_store)
    table.change_view(features=TWO)

    report = incremental(table, any_store)

    assert (report.written, position(table, any_store)[0]) == ((3, 2) if ran else (0, 1))
    found = {key: features["count"] for key, features in served(table.view, any_store).items()}
    assert found == {"a": 10, "b": 90 if ran else 20, "c": 30}


def test_feature_of_another_type_is_written_again(table: Table, any_store: OnlineStore) -> None:
    loaded(table, any_store, TWO)
    table.append(row("b", 9, 9.0, count=2**40))
    table.change_view(features={"amount": "float64", "count": "int16"})
    plan = plan_of(table, any_store)
    assert plan.reason == "features: changed type of count since version 2: every entity is written again"

    report = incremental(table, any_store)

    assert (report.written, report.quarantined, position(table, any_store)) == (3, 1, (2, 3))
    assert looked_up(table, any_store, b"b") == {"amount": 2.0, "count": 20}


def test_all_changes_of_the_features_are_announced(table: Table, store: OnlineStore) -> None:
    loaded(table, store, TWO)
    table.change_view(features={"count": "int32", "country": "string"})

    assert plan_of(table, store).reason == (
        "features: added country; changed type of count since version 2: every entity is written again"
    )


def test_other_join_keys_sweep_the_old_entities(table: Table, any_store: OnlineStore) -> None:
    loaded(table, any_store, ONE)
    table.change_view(join_keys=("country", "user_id"))
    plan = plan_of(table, any_store)
    assert plan.reason == "the join keys or time columns changed since version 2: every entity is written again"

    report = incremental(table, any_store)

    assert set(served(table.view, any_store)) == {"DE|a", "DE|b", "DE|c"}
    assert (report.written, report.deleted, position(table, any_store)) == (3, 3, (2, 2))
    table.append(row("a", 9, 9.0))
    assert incremental(table, any_store).written == 1


@pytest.mark.parametrize(
    ("change", "amount"),
    [
        ({"event_timestamp": "created", "created_timestamp": None}, 5.0),
        ({"event_timestamp": "created", "created_timestamp": "event_timestamp"}, 5.0),
        ({"created_timestamp": None}, 1.0),
    ],
)
def test_other_time_columns_order_the_rows_anew(
    table: Table, any_store: OnlineStore, change: dict[str, Any], amount: float
) -> None:
    table.append(row("a", 50, 1.0, created=1), row("a", 2, 5.0, created=60), row("b", 1, 3.0))
    incremental(table, any_store)
    assert served(table.view, any_store)["a"]["amount"] == 1.0
    table.change_view(**change)

    report = incremental(table, any_store)

    assert served(table.view, any_store)["a"]["amount"] == amount
    assert (report.written, report.deleted, position(table, any_store)) == (2, 0, (2, 0))


def test_run_that_dies_with_a_changed_view_is_finished_by_the_next(table: Table, store: OnlineStore) -> None:
    loaded(table, store, ONE)
    table.change_view(features=TWO)
    with pytest.raises(OnlineStoreError):
        incremental(table, CrashingStore(store, after=4, effect=False, error=OnlineStoreError), "dies")
    assert position(table, store) == (2, None)

    report = incremental(table, store, "again")

    assert report.reason == "the snapshot run dies did not finish"
    assert position(table, store) == (2, 2)
    assert looked_up(table, store, b"c") == {"amount": 3.0, "count": 30}


@pytest.mark.parametrize(
    ("features", "generation"), [(ONE, 2), ({"amount": "float64", "country": "string"}, 3)], ids=["back", "other"]
)
def test_view_that_changes_again_after_a_run_died_is_written_whole(
    table: Table, any_store: OnlineStore, features: dict[str, str], generation: int
) -> None:
    loaded(table, any_store, ONE)
    table.change_view(features=TWO)
    with pytest.raises(OnlineStoreError):
        incremental(table, CrashingStore(any_store, after=4, effect=False, error=OnlineStoreError), "dies")
    table.delta.delete("user_id = 'b'")
    table.change_view(features=features)

    incremental(table, any_store, "again")

    assert set(served(table.view, any_store)) == {"a", "c"}
    assert list(looked_up(table, any_store, b"c")) == list(features)
    assert None not in looked_up(table, any_store, b"c").values()
    assert position(table, any_store) == (generation, 3)


def test_changed_view_and_removed_rows_in_one_run_end_right(table: Table, any_store: OnlineStore) -> None:
    loaded(table, any_store, TWO)
    table.change_view(features=ONE)
    table.delta.delete("user_id = 'b'")
    table.append(row("a", 9, 9.0))

    report = incremental(table, any_store)

    assert (report.deleted, report.written, position(table, any_store)) == (1, 1, (1, 4))
    assert {key: features["amount"] for key, features in served(table.view, any_store).items()} == {"a": 9.0, "c": 3.0}


def test_backfill_with_an_added_feature_leaves_the_snapshot_to_the_next_run(table: Table, store: OnlineStore) -> None:
    loaded(table, store, ONE)
    table.change_view(features=TWO)

    filled = pipeline.backfill(table.view, store, run("fill"), Interval(at(0), at(60)))

    assert (filled.unchanged, filled.written, position(table, store)) == (3, 0, (1, 2))
    assert incremental(table, store).written == 3
    assert looked_up(table, store, b"c") == {"amount": 3.0, "count": 30}


def test_feature_without_a_column_stops_the_run_and_what_is_online_stays(table: Table, store: OnlineStore) -> None:
    loaded(table, store, ONE)
    before = records(table.view, store), position(table, store)
    table.change_view(features={**ONE, "nothing": "int64"})

    with pytest.raises(OfflineStoreError, match="feature 'nothing': found no such column"):
        incremental(table, store)

    assert (records(table.view, store), position(table, store)) == before
    assert looked_up(table, store, b"a") == {"amount": 1.0, "nothing": None}
