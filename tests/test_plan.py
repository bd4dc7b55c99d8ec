"""Which way a run goes, and how files are cut into pieces."""

import json

import pytest
from hypothesis import given, strategies as st

from materialize.errors import RebuildNeeded
from materialize.model import FeatureType, FeatureView, Interval, Watermark, from_us
from materialize.plan import MAX_PIECES, ROWS_PER_PIECE, Plan, choose_path, cut, piece_count

VIEW = FeatureView("v", "s", ("k",), "ts", {"x": FeatureType("int64")}, ("default",))


def watermark(**changes):
    fields = {"generation": 3, "table_id": "t", "version": 7, "schema": VIEW.schema_text, "run_id": "r"}
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


def test_changed_features_need_a_rebuild_and_the_error_says_so():
    with pytest.raises(RebuildNeeded, match=r"'v'.*features.*changed since version 7.*materialize rebuild v"):
        choose_path(VIEW, "incremental", watermark(schema='[["x","int32"]]'), "t")


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
    assert piece_count(0, files=None) == 1
    assert piece_count(ROWS_PER_PIECE, files=None) == 1
    assert piece_count(ROWS_PER_PIECE + 1, files=None) == 2
    assert piece_count(ROWS_PER_PIECE * 1000, files=None) == MAX_PIECES
    assert piece_count(ROWS_PER_PIECE * 1000, files=3) == 3
    assert piece_count(0, files=0) == 0


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
