"""Entity keys: readable, injective, the same by every way to make them."""

import re
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, strategies as st

from materialize.codec import entity_keys
from materialize.entity_key import format_key, parse_key

FORMAT = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
pieces = st.one_of(st.sampled_from(["%", "|", "{", "}", "7C", "25", "%7C", "%25", "%7B"]), st.characters(codec="utf-8"))
texts = st.lists(pieces, max_size=8).map("".join)
keys = st.tuples(texts, st.integers(-(2**63), 2**63 - 1), st.dates(), st.booleans())
NAMES = ["a", "b", "c", "d"]


def columnar(rows):
    dtypes = [pl.String, pl.Int64, pl.Date, pl.Boolean]
    columns = zip(NAMES, zip(*rows, strict=True), dtypes, strict=True)
    return entity_keys(pl.DataFrame([pl.Series(name, values, dtype=dtype) for name, values, dtype in columns]), NAMES)


@given(st.lists(keys, min_size=1, max_size=20))
def test_columns_and_single_values_make_the_same_key(rows):
    assert columnar(rows).to_list() == [format_key(row) for row in rows]


@given(st.lists(keys, min_size=2, max_size=20, unique=True))
def test_different_entities_have_different_keys(rows):
    assert columnar(rows).n_unique() == len(rows)


@given(keys)
def test_a_key_that_was_printed_is_read_back(row):
    key = format_key(row)

    assert parse_key(key.decode(), NAMES) == key


@given(st.text(st.characters(codec="utf-8", exclude_characters="%|"), max_size=20))
def test_a_single_key_is_written_as_it_is(text):
    assert parse_key(text, ["a"]) == format_key([text])


def test_the_documented_keys_hold():
    table = FORMAT[FORMAT.index("| join key values |") :]
    documented = re.findall(r"^\| (`.*`) \| `(.*)` \|$", table, re.MULTILINE)

    assert len(documented) == 4
    for values, key in documented:
        parts = [value.replace("\\|", "|") for value in re.findall(r"`([^`]*)`", values)]
        assert format_key(parts) == key.replace("\\|", "|").encode()


def test_values_of_other_types_have_their_documented_text():
    assert format_key([-7, date(2025, 1, 31), True, "x" * 300]) == b"-7|2025-01-31|true|" + b"x" * 300


@pytest.mark.parametrize(("dtype", "bits"), [(pl.Int8, 8), (pl.Int16, 16), (pl.Int32, 32), (pl.Int64, 64)])
def test_an_integer_key_has_the_same_text_in_every_size(dtype, bits):
    limit = 2 ** (bits - 1)
    values = [-limit, -1, 0, 1, limit - 1]

    found = entity_keys(pl.DataFrame({"a": pl.Series(values, dtype=dtype)}), ["a"])

    assert found.to_list() == [str(value).encode() for value in values] == [format_key([value]) for value in values]


def test_long_keys_are_kept_whole_and_apart():
    values = ["|" * 300, "|" * 299 + "{", "é" * 300, "x" * 300, "x" * 301]

    found = entity_keys(pl.DataFrame({"a": values}), ["a"]).to_list()

    assert found == [format_key([value]) for value in values]
    assert found[0] == b"%7C" * 300
    assert len(set(found)) == len(values)


@pytest.mark.parametrize(("text", "found"), [("a", 1), ("a|b|c", 3), ("", 1)])
def test_a_key_with_the_wrong_number_of_parts_is_refused(text, found):
    with pytest.raises(ValueError, match=rf"expected 2 part\(s\) for the join keys x, y.*found {found}"):
        parse_key(text, ["x", "y"])
