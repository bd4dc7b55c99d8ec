"""Types, times and texts of the nouns."""

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, strategies as st

from materialize.feature_type import FeatureType
from materialize.model import (
    Interval,
    OnlineStoreConfig,
    Retention,
    RunReport,
    Watermark,
    duration_text,
    from_us,
    mask_credentials,
    to_us,
)


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("bool", 1),
        ("int8", 1),
        ("uint64", 8),
        ("float32", 4),
        ("date", 4),
        ("timestamp", 8),
        ("string", None),
        ("binary", None),
        ("decimal(38,10)", 16),
        ("list<float32>", None),
        ("list<float32,128>", 512),
        ("list<int8,3>", 3),
    ],
)
def test_a_type_is_written_as_it_is_read_and_knows_its_width(text, width):
    kind = FeatureType.parse(text)

    assert (str(kind), kind.width) == (text, width)
    assert FeatureType.parse(text.replace(",", " , ")) == kind


@pytest.mark.parametrize(
    "text",
    [
        "",
        "float",
        "Int64",
        "decimal",
        "decimal(39,1)",
        "decimal(2,3)",
        "decimal(0,0)",
        "list",
        "list<string>",
        "list<bool>",
        "list<float32,0>",
        "list<float32,-1>",
        "list<list<int8>>",
        "map<string,int8>",
    ],
)
def test_another_type_is_refused_with_those_that_are(text):
    with pytest.raises(ValueError, match=r"expected one of bool, int8.*list<NUMBER,LENGTH>, found"):
        FeatureType.parse(text)


@given(st.integers(-(2**53), 2**53))
def test_times_are_exact_to_the_microsecond(moment_us):
    assert to_us(from_us(moment_us)) == moment_us


def test_a_naive_time_is_refused():
    with pytest.raises(ValueError, match="time zone"):
        to_us(datetime(2025, 1, 1))  # noqa: DTZ001 - the point of the test


@pytest.mark.parametrize("seconds", [0, -1])
def test_an_interval_that_holds_nothing_is_refused(seconds):
    start = datetime(2025, 1, 1, tzinfo=timezone.utc)

    with pytest.raises(ValueError, match="start before the end"):
        Interval(start, start + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        (timedelta(days=2), "2d"),
        (timedelta(hours=36), "36h"),
        (timedelta(seconds=90), "90s"),
        (timedelta(minutes=5), "5m"),
    ],
)
def test_a_duration_is_written_as_in_the_config(duration, text):
    assert duration_text(duration) == text


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:secret@host:6379/0", "redis://***@host:6379/0"),
        ("redis://user:pass@word@host/0?prefix=a", "redis://***@host/0?prefix=a"),
        ("redis://:pa/ss@host:6379/0", "redis://***@host:6379/0"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("redis://host/0?password=secret&prefix=a", "redis://host/0?password=***&prefix=a"),
        ("s3://bucket/key?aws_secret_access_key=secret", "s3://bucket/key?aws_secret_access_key=***"),
        ("sqlite:////tmp/online.db", "sqlite:////tmp/online.db"),
    ],
)
def test_no_credential_of_a_url_is_shown(url, masked):
    assert mask_credentials(url) == masked
    assert OnlineStoreConfig("default", url).masked_url == masked
    assert "secret" not in repr(OnlineStoreConfig("default", url))


def test_retention_counts_from_the_event_time_and_a_floor_or_tombstone_stays():
    retention = Retention(ttl_us=10, keep_until_us=100)

    assert retention.due(5, floored=False) == 15
    assert retention.due(5, floored=True) == 100
    assert retention.due(95, floored=True) == 105
    assert retention.due(None, floored=True) == 100
    assert Retention(ttl_us=None, keep_until_us=100).due(5, floored=True) is None


def test_a_watermark_survives_its_text_byte_by_byte():
    watermark = Watermark(1, "t", 2, "[]", "[]", "r", 2, 3, 4, counts={"written": 5})

    assert Watermark.from_json(watermark.to_json()) == watermark
    assert Watermark.from_json(watermark.to_json()).to_json() == watermark.to_json()


@pytest.mark.parametrize(
    ("counts", "changed"), [({}, False), ({"stale": 3}, False), ({"written": 1}, True), ({"deleted": 1}, True)]
)
def test_a_run_changed_something_when_readers_can_see_it(counts, changed):
    report = RunReport("v", "s", "incremental", 1, 2, **counts)

    assert report.changed is changed
    assert report.counts["written"] == counts.get("written", 0)
