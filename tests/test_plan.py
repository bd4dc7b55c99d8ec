"""Which way a run goes, and how files are cut into pieces."""

import json

import pytest
from hypothesis import given, strategies as st

from materialize.feature_type import FeatureType
from materialize.model import FeatureView, Interval, Watermark, from_us
from materialize.plan import (
    CHANGES_READ,
    MAX_PIECES,
    ROWS_PER_PIECE,
    Plan,
    choose_path,
    cut,
    instead_of_changes,
    piece_count,
)

VIEW = FeatureView("v", "s", ("k",), "ts", {"x": FeatureType("int64")}, ("default",))


def watermark(**changes):
    fields = {
        "generation": 3,
        "table_id": "t",
        "version": 7,
        "schema": VIEW.schema_text,
        "order": VIEW.order_text,
        "run_id": "r",
    }
    return Watermark(**{**fields, **changes})


@pytest.mark.parametrize(
    ("mode", "found", "snapshot", "generation"),
    [
        ("incremental", None, True, 1),
        ("incremental", watermark(), False, 3),
        ("incremental", watermark(version=None), True, 3),
        ("incremental", watermark(version=None, table_id="other"), True, 4),
        ("incremental", watermark(version=None, schema="[]"), True, 4),
        ("rebuild", None, True, 1),
        ("rebuild", watermark(), True, 4),
        ("rebuild", watermark(version=None), True, 4),
        ("backfill", None, False, 1),
        ("backfill", watermark(), False, 3),
    ],
)
def test_a_run_goes_by_its_watermark(mode, found, snapshot, generation):
    path = choose_path(VIEW, mode, found, "t")

    assert (path.snapshot, path.generation) == (snapshot, generation)
    assert path.reason


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"schema": "[]"}, "features: added x since version 7"),
        ({"schema": '[["x","int32"],["y","string"]]'}, "features: changed type of x since version 7"),
        ({"order": '[["k"],"other",null]'}, "the join keys or time columns changed since version 7"),
    ],
)
def test_a_view_that_says_something_else_is_written_again_in_a_new_generation(changes, why):
    path = choose_path(VIEW, "incremental", watermark(**changes), "t")

    assert (path.snapshot, path.generation) == (True, 4)
    assert why in path.reason


@pytest.mark.parametrize("schema", ['[["x","int64"],["gone","string"]]', '[["gone","string"],["x","int64"]]'])
def test_a_feature_that_is_only_gone_needs_no_snapshot(schema):
    assert not choose_path(VIEW, "incremental", watermark(schema=schema), "t").snapshot


def test_the_snapshot_is_read_when_the_changes_cost_more():
    usual = {"changed_bytes": 4 * CHANGES_READ, "largest_rows": 10, "snapshot_bytes": CHANGES_READ}

    assert instead_of_changes(3, **usual) is None
    assert instead_of_changes(3, **usual | {"changed_bytes": 4 * CHANGES_READ + 1}).generation == 3
    assert instead_of_changes(3, **usual | {"changed_bytes": CHANGES_READ, "snapshot_bytes": 1}) is None
    assert instead_of_changes(3, **usual | {"changed_bytes": CHANGES_READ + 1, "snapshot_bytes": 1}) is not None


def test_the_snapshot_is_read_when_a_commit_rewrote_more_rows_than_the_memory_limit_lets_compare():
    usual = {"changed_bytes": 1, "snapshot_bytes": CHANGES_READ, "rows_held": 2_000}

    assert instead_of_changes(3, **usual, largest_rows=4_444) is None
    assert instead_of_changes(3, **usual, largest_rows=4_445).reason == (
        "a commit rewrote about 4,445 rows, and within the memory limit of the view no more than 4,444 are compared at once"
    )


@given(st.lists(st.integers(0, 10), max_size=40), st.integers(1, 8))
def test_pieces_hold_every_file_once_and_in_order(sizes, pieces):
    parts = cut(range(len(sizes)), sizes, pieces)

    assert len(parts) == pieces
    assert [file for part in parts for file in part] == list(range(len(sizes)))


@given(st.lists(st.integers(1, 10), min_size=1, max_size=40), st.integers(1, 8))
def test_no_piece_is_larger_than_its_share_by_more_than_a_file(sizes, pieces):
    parts = cut(range(len(sizes)), sizes, pieces)

    assert all(sum(sizes[file] for file in part) <= sum(sizes) / pieces + max(sizes) for part in parts)


def test_pieces_grow_with_the_rows_and_stop_at_the_limits():
    assert piece_count(0, items=None) == 1
    assert piece_count(ROWS_PER_PIECE, items=None) == 1
    assert piece_count(ROWS_PER_PIECE + 1, items=None) == 2
    assert piece_count(ROWS_PER_PIECE * 1000, items=None) == MAX_PIECES
    assert piece_count(ROWS_PER_PIECE * 1000, items=3) == 3
    assert piece_count(0, items=0) == 0
    assert piece_count(100, items=None, most=30) == 4


@pytest.mark.parametrize("interval", [None, Interval(from_us(0), from_us(1))])
def test_a_plan_survives_json(interval):
    plan = Plan(
        view="v",
        store="default",
        mode="backfill",
        run_id="r",
        table_id="t",
        from_version=1,
        to_version=2,
        generation=3,
        snapshot=False,
        pieces=4,
        rows=5,
        reason="why",
        engine="polars",
        interval=interval,
    )

    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert len(plan.piece_labels) == 4
