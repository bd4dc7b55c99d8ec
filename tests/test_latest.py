"""The newest storable row of each entity: a total order, quarantine with reasons, and pieces that add up."""

import subprocess
import sys
from datetime import datetime, timedelta, timezone

import polars as pl
import pytest
from hypothesis import given, strategies as st

from materialize import latest
from materialize.entity_key import format_key
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, Interval, from_us, to_us
from materialize.order import NO_CREATED

NOW = datetime(2025, 6, 1, tzinfo=timezone.utc)
NOW_US = to_us(NOW)
SCHEMA = {
    "k": pl.String,
    "n": pl.Int64,
    "event_us": pl.Int64,
    "created_us": pl.Int64,
    "version": pl.Int64,
    "position": pl.UInt32,
}


def view(**changes):
    fields = {"join_keys": ("k", "n"), "event_timestamp": "ts", "features": {"x": FeatureType("int64")}}
    return FeatureView(**{"name": "v", "source": "s", "online_stores": ("default",), **fields, **changes})


def frame(rows):
    return pl.DataFrame([(*row, position) for position, row in enumerate(rows)], schema=SCHEMA, orient="row")


rows = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.integers(0, 1),
        st.integers(0, 3),
        st.sampled_from([NO_CREATED, 1, 2]),
        st.integers(0, 2),
    ),
    max_size=30,
)


@given(rows)
def test_the_winner_is_the_greatest_by_event_created_commit_and_position(given_rows):
    expected = {}
    for position, (key, number, *order) in enumerate(given_rows):
        expected[key, number] = max(expected.get((key, number), ()), (*order, position))

    winners = latest.newest(frame(given_rows), ["k", "n"])

    found = {(row["k"], row["n"]): tuple(list(row.values())[2:]) for row in winners.to_dicts()}
    assert found == expected
    assert winners["position"].is_sorted()


@given(rows, st.integers(1, 5))
def test_shards_cut_the_entities_without_loss_or_overlap(given_rows, shards):
    whole = frame(given_rows)
    parts = [latest.shard(whole, ["k", "n"], part=part, parts=shards) for part in range(shards)]

    assert pl.concat(parts).sort("position").equals(whole)
    owners = [set(part.select("k", "n").rows()) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_shards_are_the_same_in_another_process():
    code = (
        "import polars as pl; from materialize.latest import shard;"
        "rows = pl.DataFrame({'k': [f'key{n}' for n in range(100)], 'n': range(100)});"
        "print(shard(rows, ['k', 'n'], part=1, parts=3)['n'].to_list())"
    )
    rows = pl.DataFrame({"k": [f"key{number}" for number in range(100)], "n": range(100)})

    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout

    assert other.strip() == str(latest.shard(rows, ["k", "n"], part=1, parts=3)["n"].to_list())


def test_an_interval_has_its_start_and_not_its_end_and_no_row_without_event_time():
    rows = frame([("a", 1, moment, 0, 0) for moment in (9, 10, 19, 20, None)])

    found = latest.within(rows, Interval(from_us(10), from_us(20)))

    assert found["event_us"].to_list() == [10, 19]


GOOD = ("a", 1, NOW_US, NO_CREATED, 0)
BAD = {
    "null join key": [(None, 1, NOW_US, 0, 0), ("a", None, NOW_US, 0, 0)],
    "empty join key": [("", 1, NOW_US, 0, 0)],
    "entity key longer than 300 bytes": [("é" * 200, 1, NOW_US, 0, 0), ("|" * 150, 1, NOW_US, 0, 0)],
    "null event timestamp": [("a", 1, None, 0, 0)],
    "event timestamp more than 1d in the future": [("a", 1, NOW_US + 86_400_000_001, 0, 0), ("a", 1, 2**62, 0, 0)],
    "event timestamp before 1684": [("a", 1, -(2**53) - 1, 0, 0)],
    "created timestamp outside 1684 to 2255": [("a", 1, NOW_US, 2**53 + 1, 0), ("a", 1, NOW_US, -(2**53) - 1, 0)],
}


def checked(rows, of, **options):
    """The valid rows, and the number of the others by reason."""
    valid, refused = latest.valid_rows(rows, of, **options)
    assert refused.columns == [*rows.columns, "__reason"]
    assert valid.height + refused.height == rows.height
    return valid, latest.by_reason(refused["__reason"])


@pytest.mark.parametrize("reason", BAD)
def test_a_row_whose_key_or_times_cannot_be_stored_is_quarantined_with_its_reason(reason):
    found, reasons = checked(frame([GOOD, *BAD[reason], GOOD]), view(), now=NOW, max_key_bytes=300)

    assert found["position"].to_list() == [0, len(BAD[reason]) + 1]
    assert reasons == {reason: len(BAD[reason])}


def test_rows_at_the_limits_are_valid():
    limits = [
        ("x" * 298, 1, NOW_US, 0, 0),
        ("|" * 99, 1, NOW_US, 0, 0),
        ("a", 1, NOW_US + 86_400_000_000, 2**53, 0),
        ("a", 1, -(2**53), NO_CREATED, 0),
    ]

    found, reasons = checked(frame(limits), view(), now=NOW, max_key_bytes=300)

    assert (found.height, reasons) == (len(limits), {})


def test_a_row_with_several_reasons_counts_once_under_the_first():
    rows = frame([(None, None, None, 2**60, 0), ("", 1, None, 0, 0)])

    found, reasons = checked(rows, view(), now=NOW, max_key_bytes=300)

    assert (found.height, reasons) == (0, {"null join key": 1, "empty join key": 1})


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "", "a", "b", "x" * 9, "|||"]),
            st.sampled_from([None, 0, -123456]),
            st.sampled_from([None, 0, 1, NOW_US + 86_400_000_001, -(2**53) - 1]),
            st.sampled_from([NO_CREATED, 0, 1, 2**53 + 1]),
            st.integers(0, 1),
        ),
        max_size=30,
    )
)
def test_every_row_is_valid_or_counted_under_its_first_reason_and_the_newest_valid_one_wins(given_rows):
    counted, expected = {}, {}
    for position, (key, number, event, created, version) in enumerate(given_rows):
        reasons = [
            ("null join key", key is None or number is None),
            ("empty join key", key == ""),
            (
                "entity key longer than 10 bytes",
                None not in {key, number} and len(format_key([key, number])) > 10,
            ),
            ("null event timestamp", event is None),
            ("event timestamp more than 1d in the future", event is not None and event > NOW_US + 86_400_000_000),
            ("event timestamp before 1684", event is not None and event < -(2**53)),
            ("created timestamp outside 1684 to 2255", abs(created) > 2**53),
        ]
        first = next((reason for reason, holds in reasons if holds), None)
        if first is None:
            expected[key, number] = max(expected.get((key, number), ()), (event, created, version, position))
        else:
            counted[first] = counted.get(first, 0) + 1

    valid, reasons = checked(frame(given_rows), view(), now=NOW, max_key_bytes=10)
    winners = latest.newest(valid, ["k", "n"])

    assert reasons == counted
    assert valid.height + sum(counted.values()) == len(given_rows)
    assert {row[:2]: row[2:] for row in winners.rows()} == expected


@given(rows, st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_winner_does_not_depend_on_the_order_or_the_parts_of_the_rows(given_rows, parts, random):
    whole = frame(given_rows)
    shuffled = whole[random.sample(range(whole.height), whole.height)]
    cut = [shuffled[part::parts] for part in range(parts)]

    assert latest.newest_of(cut, ["k", "n"]).equals(latest.newest(whole, ["k", "n"]))


def test_runners_up_are_all_but_the_newest_row_of_each_entity():
    rows = frame([("a", 1, 5, 0, 0), ("b", 1, 5, 0, 0), ("a", 1, 4, 0, 0), ("b", 1, 9, 0, 0), ("a", 2, 1, 0, 0)])

    found = latest.runners_up(rows, ["k", "n"])

    assert found["position"].to_list() == [1, 2]


@given(rows, st.integers(1, 5))
def test_the_winners_do_not_depend_on_how_many_rows_are_ranked_at_once(given_rows, at_once):
    whole = frame(given_rows)

    assert latest.newest_of([whole], ["k", "n"], at_once=at_once).equals(latest.newest(whole, ["k", "n"]))


def test_a_row_expires_when_its_ttl_is_over_and_not_before():
    rows = frame([("a", 1, NOW_US - 3_600_000_000, 0, 0), ("b", 1, NOW_US - 3_600_000_000 + 1, 0, 0)])

    assert latest.unexpired(rows, view(ttl=timedelta(hours=1)), NOW)["k"].to_list() == ["b"]
    assert latest.unexpired(rows, view(), NOW).height == 2


def test_a_stamp_is_the_rows_own_commit_or_the_snapshot():
    rows = frame([("a", 1, 1, 0, 4), ("b", 1, 1, 0, 5)])

    assert latest.stamped(rows, 2, at=None)["version"].to_list() == [2 * 2**40 + 4, 2 * 2**40 + 5]
    assert latest.stamped(rows, 2, at=77)["version"].to_list() == [77, 77]


def test_the_greatest_event_time_of_no_rows_is_none():
    assert latest.greatest_event_us(frame([])) is None
    assert latest.greatest_event_us(frame([GOOD])) == NOW_US


@given(rows)
def test_one_shard_is_everything(given_rows):
    whole = frame(given_rows)

    assert latest.shard(whole, ["k", "n"], part=0, parts=1).equals(whole)


@given(rows)
def test_entities_have_ties_if_two_rows_of_one_are_equal_in_both_times(given_rows):
    orders = [row[:4] for row in given_rows]

    assert latest.have_ties(frame(given_rows), ["k", "n"]) == (len(set(orders)) < len(orders))


def test_equal_times_of_two_entities_are_no_tie():
    rows = frame([("a", 1, 5, 6, 0), ("a", 2, 5, 6, 0), ("b", 1, 5, 6, 1), ("a", 1, 5, 7, 0)])

    assert not latest.have_ties(rows, ["k", "n"])
    assert latest.have_ties(pl.concat([rows, rows[:1]]), ["k", "n"])


def test_entities_that_can_never_be_online_are_left_out():
    keys = [("a", 1), (None, 1), ("", 1), ("a", None), ("x" * 9, 1), ("|", 0), ("|||", 1)]
    entities = pl.DataFrame(keys, schema={"k": pl.String, "n": pl.Int64}, orient="row")

    found = latest.valid_entities(entities, ["k", "n"], max_key_bytes=10)

    assert found.rows() == [("a", 1), ("|", 0)]
    assert latest.valid_entities(entities.clear(), ["k", "n"], max_key_bytes=10).is_empty()


@given(rows)
def test_entities_of_several_parts_have_the_join_keys_alone(given_rows):
    whole = frame(given_rows)

    found = latest.entities([whole[:3], whole[3:], whole.clear()], ["n", "k"])

    assert found.equals(whole.select("n", "k"))
