"""Rows that cannot be stored are kept in a Delta table of their own, once, with their reason, until they are released."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from materialize import pipeline
from materialize.errors import OfflineStoreError
from materialize.feature_type import FeatureType
from materialize.offline import Quarantine, held_rows
from materialize.online.memory import MemoryStore
from tests.stepping import amounts, in_pieces, incremental, plan_of, position, run
from tests.tables import NOW, SCHEMA, Table, at, kept_rows, row

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.online.base import OnlineStore


def held(table: Table, store: str = "default") -> list[dict[str, Any]]:
    return held_rows(table.view, store).to_dicts()


def reasons(table: Table) -> list[str]:
    return sorted(one["reason"] for one in held(table))


def everything(table: Table) -> pl.DataFrame:
    """The quarantine table as any reader of Delta tables sees it."""
    return pl.DataFrame(kept_rows(table.view))


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_every_row_that_cannot_be_stored_is_kept_with_its_reason(table: Table) -> None:
    table.schema = SCHEMA.append(pa.field("small", pa.int64())).append(pa.field("pair", pa.list_(pa.float64())))
    features = {"amount": "float64", "country": "string", "small": "int8", "pair": "list<float64,2>"}
    table.change_view(features=features)
    good = {"small": 1, "pair": [1.0, 2.0]}
    bad = {
        "null join key": row(None, 1, **good),
        "empty join key": row("", 1, **good),
        "entity key longer than 100 bytes": row("x" * 101, 1, **good),
        "null event timestamp": row("b", None, **good),
        "event timestamp more than 1d in the future": row("c", 60 * 24 * 11, **good),
        "event timestamp before 1684": row("d", 0, **good) | {"event_timestamp": at(-60 * 24 * 365.25 * 500)},
        "created timestamp outside 1684 to 2255": row("e", 0, **good) | {"created": at(60 * 24 * 365.25 * 200)},
        "feature 'small' outside int8": row("f", 1, **good | {"small": 300}),
        "feature 'pair' is not of length 2": row("g", 1, **good | {"pair": [1.0]}),
        "feature 'pair' has a null inside a list": row("h", 1, **good | {"pair": [1.0, None]}),
        "record longer than 1,000 bytes": row("i", 1, country="x" * 1_000, **good),
    }
    table.append(row("a", 1, 7.0, **good), *bad.values())

    with MemoryStore() as store:
        store.max_key_bytes, store.max_value_bytes = 100, 1_000
        report = incremental(table, store, "run-1")
        found = held(table)

        assert amounts(table, store) == {"a": 7.0}
    assert report.quarantine_reasons == dict.fromkeys(bad, 1)
    by_reason = {one["reason"]: one for one in found}
    assert by_reason.keys() == bad.keys()
    for reason, one in by_reason.items():
        source, told = bad[reason], json.loads(one["row"])
        assert (one["view"], one["store"], one["run_id"], one["at"]) == ("spending", "default", "run-1", NOW)
        assert (one["table_version"], one["commit_version"]) == (0, 0)
        assert one["event_timestamp"] == source["event_timestamp"]
        assert one["created_timestamp"] == source["created"]
        assert one["entity"] == source["user_id"]
        assert {name: told[name] for name in ("user_id", *features)} == {
            name: source[name] for name in ("user_id", *features)
        }


def test_a_row_that_loses_no_place_is_kept_only_when_it_would_have_been_served(
    table: Table, store: OnlineStore
) -> None:
    """As it is counted: the values of older rows are not read, unless the latest row cannot be stored."""
    table.change_view(features={"amount": "float64", "count": "int8"})
    table.append(row("a", 1, count=300), row("a", 2, count=1), row("b", 1, 5.0, count=1), row("b", 2, count=300))

    report = incremental(table, store)

    assert report.quarantined == len(held(table)) == 1
    assert amounts(table, store)["b"] == 5.0


def test_rows_of_a_partitioned_table_are_kept_whole(table: Table, store: OnlineStore) -> None:
    table.create(partition_by=["country"])
    table.append(row("a", 1, country="DE"), row(None, 1, country="FR"), row(None, 2, country=None))

    incremental(table, store)

    assert sorted(str(json.loads(one["row"])["country"]) for one in held(table)) == ["FR", "None"]


def test_neither_keys_nor_values_are_in_the_log_of_the_quarantine_table(table: Table, store: OnlineStore) -> None:
    table.append(row("secret-key", None, country="secret-value"))

    incremental(table, store)

    logs = (table.path.parent / "table_quarantine" / "_delta_log").glob("*.json")
    assert "secret" not in "".join(log.read_text() for log in logs)
    assert everything(table)["entity"].to_list() == ["secret-key"]


def test_views_and_stores_share_a_table_and_see_their_own_rows(table: Table, store: OnlineStore) -> None:
    table.append(row(None, 1))
    incremental(table, store)
    other = replace(table.view, name="other", features={"count": FeatureType.parse("int64")})

    pipeline.incremental(other, store, run("second"))

    assert everything(table).height == 2
    assert [one["run_id"] for one in held(table)] == ["run"]
    assert held_rows(other, "default")["run_id"].to_list() == ["second"]
    assert held(table, "another store") == []


# --- once, whatever happens --------------------------------------------------------------------------------------------


def test_a_row_that_is_met_again_is_kept_once(table: Table, store: OnlineStore) -> None:
    table.append(row(None, 1), row("a", None), row("b", 1))
    incremental(table, store, "first")

    pipeline.rebuild(table.view, store, run("again"))
    table.delta.optimize.compact()
    pipeline.rebuild(table.view, store, run("after a compaction"))

    assert [one["run_id"] for one in held(table)] == ["first", "first"]
    assert everything(table).height == 2


def test_equal_rows_of_two_blocks_of_a_piece_are_kept_once(table: Table, store: OnlineStore) -> None:
    table.append(row("a", None), row("b", None))
    incremental(table, store)
    rows = held_rows(table.view, "default").with_columns(view=pl.lit("other"))
    quarantine = Quarantine(replace(table.view, name="other"), "default")

    for block in (rows[:1], rows, rows[1:]):
        quarantine.keep(block)

    assert everything(table).filter(view="other")["entity"].sort().to_list() == ["a", "b"]


def test_pieces_in_any_order_and_again_keep_each_row_once(table: Table, store: OnlineStore) -> None:
    table.append(*(row(f"u{index}", None, float(index)) for index in range(20)), row("a", 1))

    report = in_pieces(table, store, 4, [2, 0, 0, 3, 1, 2])

    assert report.quarantined == len(held(table)) == everything(table).height == 20


def test_a_crash_after_the_quarantine_and_before_the_commit_loses_and_doubles_nothing(
    table: Table, store: OnlineStore
) -> None:
    table.append(row("a", 1))
    incremental(table, store)
    table.append(row(None, 1))
    plan = pipeline.begin(table.view, store, plan_of(table, store, run_id="dies"))
    pipeline.write_piece(table.view, store, plan, 0, now=NOW)
    assert (position(table, store), len(held(table))) == ((1, 0), 1)

    report = incremental(table, store, "next")

    assert (position(table, store), report.quarantined) == ((1, 1), 1)
    assert [one["run_id"] for one in held(table)] == ["dies"]


def test_the_same_row_for_another_reason_is_listed_once_with_the_newest(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 60 * 24 * 20))
    incremental(table, store)
    table.change_view(max_future=timedelta(days=2))

    pipeline.rebuild(table.view, store, run("later", NOW + timedelta(minutes=1)))

    assert reasons(table) == ["event timestamp more than 2d in the future"]


# --- where it cannot be kept -------------------------------------------------------------------------------------------


def blocked(table: Table) -> Path:
    """A file where the quarantine table should be: nobody can write there, not even root."""
    path = table.path.parent / "table_quarantine"
    path.write_text("")
    return path


def test_a_run_that_cannot_keep_its_rows_stops_before_the_watermark(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    incremental(table, store)
    table.append(row("b", 1), row("secret", None))
    blocked(table)

    with pytest.raises(
        OfflineStoreError, match=r"'spending'.*keep 1 rows.*table_quarantine.*quarantine: none"
    ) as failed:
        incremental(table, store)

    assert position(table, store) == (1, 0)
    assert "secret" not in str(failed.value)


def test_a_table_of_somebody_else_is_left_alone(table: Table, store: OnlineStore) -> None:
    other = Table(table.path.parent / "table_quarantine")
    other.append(row("theirs", 1))
    table.append(row(None, 1))

    with pytest.raises(OfflineStoreError, match="quarantine"):
        incremental(table, store)

    assert other.version == 0


def test_quarantine_none_counts_and_keeps_nothing(table: Table, store: OnlineStore) -> None:
    table.append(row(None, 1), row("a", 1))
    table.change_view(quarantine="none")

    report = incremental(table, store)

    assert report.quarantined == 1
    assert not (table.path.parent / "table_quarantine").exists()
    assert held(table) == []


def test_another_address_is_used(table: Table, store: OnlineStore, tmp_path: Path) -> None:
    table.append(row(None, 1))
    table.change_view(quarantine=str(tmp_path / "elsewhere"))

    incremental(table, store)

    assert DeltaTable(str(tmp_path / "elsewhere")).version() == 0
    assert len(held(table)) == 1
