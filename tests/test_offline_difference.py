"""When a row of a removed file is the same as one of an added file: equal rows are counted, floats compared by their bits."""

from __future__ import annotations

import math
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from tests.offline import changed, difference, removal, rewrite, users
from tests.tables import SCHEMA, UTC_TIME, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("before", "after", "brought", "lost"),
    [
        ("aa", "a", "", "a"),
        ("a", "aa", "a", ""),
        ("aab", "ab", "", "a"),
        ("aaab", "abb", "b", "a"),
        ("ab", "ba", "", ""),
        ("aa", "aa", "", ""),
        ("", "aa", "aa", ""),
        ("aa", "", "", "a"),
    ],
)
def test_equal_rows_are_counted(table: Table, before: str, after: str, brought: str, lost: str) -> None:
    table.create()
    first = table.add_file("f.parquet", table.arrow([row(user, 1) for user in before]))
    table.commit(first)
    rewrite(table, first, "g.parquet", *(row(user, 1) for user in after))

    rows, gone = difference(table, 1)

    assert (set(users(rows)), gone) == (set(brought), list(lost))
    assert len(rows) >= len(brought)


def test_rows_of_an_entity_that_are_equal_in_time_are_told_apart_by_their_features(table: Table) -> None:
    table.create()
    first = table.add_file("f.parquet", table.arrow([row("a", 1, amount) for amount in (1.0, 2.0, 3.0)]))
    table.commit(first)
    rewrite(table, first, "g.parquet", *(row("a", 1, amount) for amount in (3.0, 4.0, 1.0)))

    assert changed(table, 1) == ([("a", 4.0)], ["a"])


def test_null_times_and_keys_are_equal_to_themselves(table: Table) -> None:
    table.create()
    rows = [row(None, 1), row("a", None, created=None), row("b", 1, created=None), row(None, None)]
    first = table.add_file("f.parquet", table.arrow([*rows, row("c", 1)]))
    table.commit(first)
    rewrite(table, first, "g.parquet", *rows)

    assert changed(table, 1) == ([], ["c"])


KINDS = {
    "float64": pa.float64(),
    "float32": pa.float32(),
    "list<float64>": pa.list_(pa.float64()),
    "list<float32>": pa.list_(pa.float32()),
}


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (math.nan, math.nan, True),
        (None, None, True),
        (-0.0, -0.0, True),
        (math.nan, None, False),
        (0.0, None, False),
        (0.0, -0.0, False),
        (math.nan, 0.0, False),
        (math.inf, math.nan, False),
        (math.inf, -math.inf, False),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_compared_by_their_bits(tmp_path: Path, kind: str, before: Any, now: Any, *, same: bool) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("x", KINDS[kind])]))
    table.change_view(features={"x": kind})
    values = [[1.0, value] if "list" in kind else value for value in (before, now)]
    table.create()
    first = table.add_file("f.parquet", table.arrow([row("a", 1, x=values[0]), row("b", 1, x=values[0])]))
    table.commit(first)
    rewrite(table, first, "g.parquet", row("a", 1, x=values[1]), row("b", 1, x=values[0]))

    rows, lost = difference(table, 1)

    assert (users(rows), lost) == (([], []) if same else (["a"], ["a"]))


@pytest.mark.parametrize(
    ("kind", "stored", "values"),
    [
        ("list<float32>", pa.list_(pa.float32()), [None, [], [None], [0.0], [0.0, 0.0]]),
        ("list<int32>", pa.list_(pa.int32()), [None, [], [None], [0], [0, 0], [1]]),
        ("string", pa.string(), [None, "", "0", "a", "A", "a "]),
        ("binary", pa.binary(), [None, b"", b"\0", b"\0\0"]),
        ("bool", pa.bool_(), [None, False, True]),
        ("int64", pa.int64(), [None, 0, 1, -1, 2**63 - 1]),
        ("decimal(9,2)", pa.decimal128(9, 2), [None, Decimal("0.00"), Decimal("0.01")]),
        ("timestamp", UTC_TIME, [None, at(0), at(0.00001)]),
        ("date", pa.date32(), [None, date(1970, 1, 1), date(1970, 1, 2)]),
    ],
)
def test_values_of_a_feature_are_told_apart(tmp_path: Path, kind: str, stored: pa.DataType, values: list[Any]) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("x", stored)]))
    table.change_view(features={"x": kind})
    table.create()
    shifted = [*values[1:], values[0]]
    first = table.add_file("f.parquet", table.arrow([row(f"u{at}", 1, x=value) for at, value in enumerate(values)]))
    table.commit(first)
    again = [row(f"same{at}", 1, x=value) for at, value in enumerate(values)]
    second = table.add_file("g.parquet", table.arrow([row(f"u{at}", 1, x=value) for at, value in enumerate(shifted)]))
    third = table.add_file("h.parquet", table.arrow(again))
    fourth = table.add_file("i.parquet", table.arrow(again))
    table.commit(third)
    table.commit(removal(first), removal(third), second, fourth)

    rows, lost = difference(table, 2)

    assert users(rows) == lost == sorted(f"u{at}" for at in range(len(values)))


def test_values_do_not_trade_places_between_features(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", schema=pa.schema([*SCHEMA, ("x", pa.float64()), ("y", pa.float64())]))
    table.change_view(features={"x": "float64", "y": "float64"})
    table.create()
    first = table.add_file("f.parquet", table.arrow([row("a", 1, x=1.0, y=2.0), row("b", 1, x=None, y=2.0)]))
    table.commit(first)
    rewrite(table, first, "g.parquet", row("a", 1, x=2.0, y=1.0), row("b", 1, x=2.0, y=None))

    rows, lost = difference(table, 1)

    assert (users(rows), lost) == (["a", "b"], ["a", "b"])
