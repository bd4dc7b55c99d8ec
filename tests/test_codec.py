"""Records: every type and value comes back, and the bytes are those of docs/format.md, by an encoder of its own."""

import math
import re
import struct
from datetime import date, datetime, timedelta, timezone
from decimal import Context, Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from materialize import codec, decoder, latest
from materialize.errors import OnlineStoreError
from materialize.feature_type import FIXED_WIDTHS, LIST_ITEMS, FeatureType
from materialize.model import FeatureView
from materialize.order import NO_CREATED, stamp

FORMAT = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
#: The default context rounds to 28 digits.
EXACT = Context(prec=38)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
EVENT, CREATED, VERSION, SCHEMA = 1700000000000001, 1700000000000002, stamp(1, 7), 513
GOLDEN_TYPES = {
    "a": "float64",
    "b": "string",
    "c": "int16",
    "d": "list<float32>",
    "e": "decimal(9,2)",
    "f": "bool",
    "g": "list<uint8,3>",
    "h": "timestamp",
    "i": "date",
}
GOLDEN_ROWS = {
    "plain": (
        1.5,
        "hé",
        -2,
        [1.0, -0.5],
        Decimal("-12.34"),
        True,
        [1, 2, 255],
        EPOCH + timedelta(microseconds=7),
        date(2025, 1, 31),
    ),
    "empty": (0.0, "", 0, [], Decimal("0.00"), False, [0, 0, 0], EPOCH, date(1970, 1, 1)),
    "some null": (None, "x", None, None, Decimal("99.99"), None, [9, 8, 7], None, date(1969, 12, 31)),
    "all null": (None,) * 9,
}
CODES = dict(zip(FIXED_WIDTHS, ["?", "b", "h", "i", "q", "B", "H", "I", "Q", "f", "d", "i", "q"], strict=False))
DTYPES = {
    "bool": pl.Boolean,
    **{f"int{bits}": getattr(pl, f"Int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(pl, f"UInt{bits}") for bits in (8, 16, 32, 64)},
    "float32": pl.Float32,
    "float64": pl.Float64,
    "string": pl.String,
    "binary": pl.Binary,
    "date": pl.Date,
    "timestamp": pl.Datetime("us", "UTC"),
}


def view_of(types):
    features = {name: FeatureType.parse(text) for name, text in types.items()}
    return FeatureView("v", "source", ("k",), "ts", features, ("default",))


def dtype_of(kind):
    if kind.kind == "list":
        return pl.List(DTYPES[kind.item])
    return pl.Decimal(kind.precision, kind.scale) if kind.kind == "decimal" else DTYPES[kind.kind]


def frame_of(view, rows):
    columns = zip(view.features.items(), zip(*rows, strict=True), strict=True)
    return pl.DataFrame([pl.Series(name, list(values), dtype=dtype_of(kind)) for (name, kind), values in columns])


def encoded(view, rows, *, floor=0):
    return encoded_frame(view, frame_of(view, rows), floor=floor)


def encoded_frame(view, frame, *, floor=0):
    """The record of each row, whatever order the encoder puts them in."""
    height = frame.height
    keys = pl.Series([b"%d" % row for row in range(height)], dtype=pl.Binary)
    order = pl.DataFrame(
        {"event_us": [EVENT] * height, "created_us": [CREATED] * height, "version": [VERSION] * height},
        schema=dict.fromkeys(("event_us", "created_us", "version"), pl.Int64),
    )
    batch = codec.encode(keys, order, frame, view, schema_id=SCHEMA, floor=floor)
    records = dict(zip(batch.keys.to_pylist(), batch.values.to_pylist(), strict=True))
    return [records[b"%d" % row] for row in range(height)]


def by_hand(view, row, *, floor=0):
    """The record of one row, as docs/format.md says it, value by value."""
    nulls = sum(1 << index for index, value in enumerate(row) if value is None)
    record = struct.pack("<BBHqqqq", 1, 2 if nulls else 0, SCHEMA, EVENT, CREATED, VERSION, floor)
    record += nulls.to_bytes((len(row) + 7) // 8, "little") if nulls else b""
    variable = b""
    for value, kind in zip(row, view.features.values(), strict=True):
        if kind.width is None:
            data = b"" if value is None else plain_bytes(value, kind)
            record += struct.pack("<I", len(data))
            variable += data
        else:
            record += bytes(kind.width) if value is None else plain_bytes(value, kind)
    return record + variable


def plain_bytes(value, kind):
    if kind.kind == "list":
        return b"".join(struct.pack("<" + CODES[kind.item], item) for item in value)
    if kind.kind == "decimal":
        return int(value.scaleb(kind.scale, EXACT)).to_bytes(16, "little", signed=True)
    if kind.kind in {"string", "binary"}:
        return value.encode() if kind.kind == "string" else value
    if kind.kind == "date":
        value = value.toordinal() - date(1970, 1, 1).toordinal()
    if kind.kind == "timestamp":
        value = (value - EPOCH) // timedelta(microseconds=1)
    return struct.pack("<" + CODES[kind.kind], value)


def same(left, right):
    """Equal, with NaN equal to NaN and 0.0 not equal to -0.0."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float) and isinstance(right, float):
        return struct.pack("<d", left) == struct.pack("<d", right) or (math.isnan(left) and math.isnan(right))
    return left == right and type(left) is type(right)


def fits_in(value, kind):
    try:
        struct.pack("<" + CODES[kind], value)
    except struct.error:
        return False
    return True


def values_of(kind):
    if kind.kind == "list":
        size = {"min_size": kind.length, "max_size": kind.length} if kind.length else {"max_size": 4}
        return st.lists(values_of(FeatureType(kind.item)), **size)
    if kind.kind == "decimal":
        limit = 10**kind.precision - 1
        return st.integers(-limit, limit).map(lambda number: Decimal(number).scaleb(-kind.scale, EXACT))
    if kind.kind.startswith(("int", "uint")):
        bits = int(kind.kind.removeprefix("u").removeprefix("int"))
        low, high = (0, 2**bits - 1) if kind.kind.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return st.one_of(st.integers(low, high), st.sampled_from([low, high]))
    return {
        "bool": st.booleans(),
        "float32": st.floats(width=32),
        "float64": st.floats(),
        "string": st.text(max_size=8),
        "binary": st.binary(max_size=8),
        "date": st.dates(),
        "timestamp": st.datetimes(timezones=st.just(timezone.utc)),
    }[kind.kind]


list_types = [f"list<{item}{length}>" for item in LIST_ITEMS for length in ("", ",3")]
types = st.one_of(
    st.sampled_from([*DTYPES, *list_types]),
    st.tuples(st.integers(1, 38), st.integers(0, 38)).map(lambda pair: f"decimal({max(pair)},{min(pair)})"),
)


@st.composite
def tables(draw):
    view = view_of({f"f{index}": text for index, text in enumerate(draw(st.lists(types, min_size=1, max_size=10)))})
    row = st.tuples(*(st.none() | values_of(kind) for kind in view.features.values()))
    full = st.tuples(*(values_of(kind) for kind in view.features.values()))
    return view, draw(st.lists(st.one_of(row, full), min_size=1, max_size=6))


@given(tables())
@settings(max_examples=400, deadline=None)
def test_every_value_comes_back_and_the_bytes_are_those_of_the_format(table):
    view, rows = table

    records = encoded(view, rows)

    reading = decoder.Decoder(view.features)
    for record, row in zip(records, rows, strict=True):
        assert record == by_hand(view, row)
        assert all(map(same, reading.decode(record).values(), row))


@given(tables(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_slice_of_several_chunks_encodes_as_its_rows(table, data):
    view, rows = table
    padded = [rows[-1], *rows, rows[0]]
    cut = data.draw(st.integers(1, len(padded) - 1))
    chunked = pl.concat([frame_of(view, padded[:cut]), frame_of(view, padded[cut:])], rechunk=False)

    assert encoded_frame(view, chunked[1:-1]) == [by_hand(view, row) for row in rows]


def unstorable(frame, view, *, max_value_bytes):
    """Which rows are not storable, None for none; and their number by reason."""
    reasons = codec.unstorable_rows(frame, view, max_value_bytes=max_value_bytes)
    return (None, {}) if reasons is None else (reasons.is_not_null(), latest.by_reason(reasons))


@given(tables(), st.integers(36, 160))
@settings(max_examples=300, deadline=None)
def test_a_record_is_refused_exactly_when_its_bytes_are_over_the_limit(table, limit):
    view, rows = table
    sizes = [len(by_hand(view, row)) for row in rows]

    for most in {limit, sizes[0], sizes[0] - 1}:
        flags, reasons = unstorable(frame_of(view, rows), view, max_value_bytes=most)

        assert [size > most for size in sizes] == ([False] * len(rows) if flags is None else flags.to_list())
        assert sum(reasons.values()) == sum(size > most for size in sizes)


integers = st.sampled_from([kind for kind in DTYPES if "int" in kind])


@given(integers, integers, st.data())
@settings(max_examples=300, deadline=None)
def test_an_integer_column_of_another_size_is_exact_or_refused(column, feature, data):
    values = data.draw(st.lists(st.none() | values_of(FeatureType(column)), min_size=1, max_size=6))
    view = view_of({"a": feature, "b": f"list<{feature}>"})
    items = [None if value is None else [value] for value in values]
    frame = pl.DataFrame(
        {"a": pl.Series(values, dtype=DTYPES[column]), "b": pl.Series(items, dtype=pl.List(DTYPES[column]))}
    )
    fits = [value is None or fits_in(value, feature) for value in values]

    flags, reasons = unstorable(frame, view, max_value_bytes=1000)

    bad = pl.Series([False] * len(values)) if flags is None else flags
    assert [not flag for flag in bad] == fits
    assert reasons == ({f"feature 'a' outside {feature}": fits.count(False)} if not all(fits) else {})
    good = [row for row, fit in zip(zip(values, items, strict=True), fits, strict=True) if fit]
    assert encoded_frame(view, frame.filter(~bad)) == [by_hand(view, row) for row in good]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.booleans())
def test_every_bit_of_a_float_is_kept(bits, holed):
    view = view_of({"a": "float64", "b": "float32", "c": "list<float32>"})
    wide = np.array(bits, dtype=np.uint64)
    narrow = wide.astype(np.uint32)
    frame = pl.DataFrame(
        {
            "a": wide.view(np.float64),
            "b": narrow.view(np.float32),
            "c": pl.Series(narrow.view(np.float32)).reshape((-1, 1)).arr.to_list(),
        }
    )
    nulls = pl.DataFrame([[None, None, None]], schema=frame.schema, orient="row")

    records = encoded_frame(view, pl.concat([nulls, frame]) if holed else frame)[int(holed) :]

    expected = zip(wide.tolist(), narrow.tolist(), strict=True)
    assert [record[36:] for record in records] == [struct.pack("<QIII", a, b, 4, b) for a, b in expected]


def test_no_rows_make_no_records():
    view = view_of({name: name for name in (*DTYPES, *list_types, "decimal(9,2)")})

    assert (
        encoded_frame(view, pl.DataFrame(schema={name: dtype_of(kind) for name, kind in view.features.items()})) == []
    )


@pytest.mark.parametrize("name", GOLDEN_ROWS)
def test_the_documented_vectors_hold(name):
    view = view_of(GOLDEN_TYPES)
    documented = re.search(rf"^\| {name} \| `([0-9a-f]+)` \|$", FORMAT, re.MULTILINE)

    (record,) = encoded(view, [GOLDEN_ROWS[name]])

    assert documented, f"docs/format.md lacks: | {name} | `{record.hex()}` |"
    assert record.hex() == documented[1]
    assert tuple(decoder.Decoder(view.features).decode(record).values()) == GOLDEN_ROWS[name]


def test_the_documented_tombstone_holds():
    batch = codec.tombstones([b"k"], VERSION)

    assert f"| tombstone at version 2^40 + 7 | `{batch.values[0].as_py().hex()}` |" in FORMAT
    assert decoder.Header.unpack(batch.values[0].as_py()).tombstone
    assert batch.tombstone


def test_float_bits_survive():
    view = view_of({"a": "float64", "b": "float32"})
    for bits in (0x7FF8000000000001, 0xFFF8000000000000, 0x7FF0000000000000, 0x8000000000000000, 1):
        (value,) = struct.unpack("<d", struct.pack("<Q", bits))

        (record,) = encoded(view, [(value, -0.0)])

        assert struct.unpack_from("<Q", record, 36)[0] == bits
        assert record[44:] == struct.pack("<f", -0.0)


@pytest.mark.parametrize("digits", ["9" * 38, "1" + "0" * 37, "1", "0"])
@pytest.mark.parametrize("sign", ["", "-"])
def test_decimals_of_38_digits_and_both_signs_are_exact(digits, sign):
    view = view_of({"a": "decimal(38,10)"})
    padded = digits.rjust(38, "0")
    value = Decimal(f"{sign}{padded[:28]}.{padded[28:]}")

    (record,) = encoded(view, [(value,)])

    assert int.from_bytes(record[36:], "little", signed=True) == int(f"{sign}{digits}")
    assert decoder.Decoder(view.features).decode(record) == {"a": value}


def test_a_narrower_column_feeds_a_wider_feature_and_slices_encode_as_themselves():
    view = view_of({"a": "int64", "b": "float64", "c": "uint8", "d": "string", "e": "list<int32>"})
    frame = pl.DataFrame(
        {
            "a": pl.Series([1, -2, 3, None], dtype=pl.Int8),
            "b": pl.Series([0.5, None, 1.5, 2.5], dtype=pl.Float32),
            "c": pl.Series([0, 255, 7, 8], dtype=pl.Int64),
            "d": ["w", "x", "yy", "z"],
            "e": pl.Series([[1], [2, 3], [], [4]], dtype=pl.List(pl.Int16)),
        }
    )
    chunked = pl.concat([frame[:2], frame[2:]], rechunk=False)
    order = pl.DataFrame({name: [EVENT] * 4 for name in ("event_us", "created_us", "version")})
    keys = pl.Series([b"0", b"1", b"2", b"3"])

    for low, high in ((0, 4), (1, 3), (2, 4)):
        batch = codec.encode(keys[low:high], order[low:high], chunked[low:high], view, schema_id=SCHEMA)
        found = dict(zip(batch.keys.to_pylist(), batch.values.to_pylist(), strict=True))
        for row in range(low, high):
            assert tuple(decoder.Decoder(view.features).decode(found[b"%d" % row]).values()) == frame.row(row)


def test_the_order_fields_of_a_batch_belong_to_their_rows_when_rows_with_nulls_move():
    view = view_of({"a": "int64"})
    order = pl.DataFrame({"event_us": [1, 2, 3], "created_us": [4, NO_CREATED, 6], "version": [7, 8, 9]})

    batch = codec.encode(
        pl.Series([b"x", b"y", b"z"]), order, pl.DataFrame({"a": [None, 5, None]}), view, schema_id=3, floor=11
    )

    for index, record in enumerate(batch.values.to_pylist()):
        header = decoder.Header.unpack(record)
        fields = (header.event_us, header.created_us, header.version)
        assert fields == (batch.event_us[index], batch.created_us[index], batch.version[index])
        assert fields == order.row([b"x", b"y", b"z"].index(batch.keys[index].as_py()))
        assert (header.floor, header.schema_id) == (11, 3)
    assert decoder.headers(batch.values.to_pylist())["event_us"].tolist() == batch.event_us.tolist()


@pytest.mark.parametrize(
    ("kind", "dtype", "good", "bad", "reason"),
    [
        ("int8", pl.Int64, [127, -128, None], [128, -129], "feature 'a' outside int8"),
        ("uint64", pl.Int64, [0, None], [-1], "feature 'a' outside uint64"),
        (
            "list<float32>",
            pl.List(pl.Float32),
            [[], [1.0], None],
            [[None], [1.0, None]],
            "feature 'a' has a null inside a list",
        ),
        (
            "list<float32,2>",
            pl.List(pl.Float32),
            [[1.0, 2.0], None],
            [[1.0], [], [1.0, 2.0, 3.0]],
            "feature 'a' is not of length 2",
        ),
        ("list<int8>", pl.List(pl.Int64), [[127], None], [[1, 128]], "feature 'a' has an item outside int8"),
        ("string", pl.String, ["x" * 60, None, ""], ["x" * 61, "é" * 31], "record longer than 100 bytes"),
        ("binary", pl.Binary, [b"x" * 60], [b"x" * 61], "record longer than 100 bytes"),
        ("list<int64>", pl.List(pl.Int64), [[1] * 7], [[1] * 8], "record longer than 100 bytes"),
    ],
)
def test_a_row_that_no_record_can_hold_is_named_with_its_reason(kind, dtype, good, bad, reason):
    view = view_of({"a": kind})

    flags, reasons = unstorable(pl.DataFrame({"a": pl.Series([*good, *bad], dtype=dtype)}), view, max_value_bytes=100)

    assert flags.to_list() == [False] * len(good) + [True] * len(bad)
    assert reasons == {reason: len(bad)}
    storable = pl.DataFrame({"a": pl.Series(good, dtype=dtype)})
    assert unstorable(storable, view, max_value_bytes=100) == (None, {})


@pytest.mark.parametrize(
    ("kind", "physical", "good", "bad"),
    [
        ("date", pl.Int32, [-719162, 0, 2932896, None], [-719163, 2932897, 2**31 - 1]),
        (
            "timestamp",
            pl.Int64,
            [-62135596800000000, 253402300799999999, None],
            [-62135596800000001, 253402300800000000, -(2**63)],
        ),
    ],
)
def test_a_moment_that_no_reader_could_name_is_refused(kind, physical, good, bad):
    view = view_of({"a": kind})
    column = pl.Series("a", [*good, *bad], dtype=physical).cast(DTYPES[kind])

    flags, reasons = unstorable(column.to_frame(), view, max_value_bytes=1000)

    assert flags.to_list() == [False] * len(good) + [True] * len(bad)
    assert reasons == {"feature 'a' outside the years 1 to 9999": len(bad)}
    for row in range(len(good), len(column)):
        assert unstorable(column[row : row + 1].to_frame(), view, max_value_bytes=1000)[0].to_list() == [True]
    for record in encoded_frame(view, column[: len(good)].to_frame()):
        decoder.Decoder(view.features).decode(record)


def test_a_view_whose_records_have_one_size_has_a_limit_too():
    view = view_of({"a": "list<float64,5>"})
    frame = pl.DataFrame({"a": [[1.0] * 5, None]}, schema={"a": pl.List(pl.Float64)})

    assert unstorable(frame, view, max_value_bytes=77) == (None, {})
    flags, reasons = unstorable(frame, view, max_value_bytes=76)
    assert (flags.to_list(), reasons) == ([False, True], {"record longer than 76 bytes": 1})
    assert unstorable(frame, view, max_value_bytes=75)[1] == {"record longer than 75 bytes": 2}


def test_a_row_with_two_reasons_is_counted_once():
    view = view_of({"a": "int8", "b": "list<float32,1>"})
    frame = pl.DataFrame({"a": [300], "b": pl.Series([[1.0, 2.0]], dtype=pl.List(pl.Float32))})

    flags, reasons = unstorable(frame, view, max_value_bytes=1000)

    assert flags.to_list() == [True]
    assert reasons == {"feature 'a' outside int8": 1}


@pytest.mark.parametrize(
    "record", [b"", b"\x01" * 35, b"\x02" + bytes(50), b"hello, I am something else, and long enough"]
)
def test_bytes_that_are_no_record_are_refused(record):
    with pytest.raises(OnlineStoreError, match="expected a record of format version 1"):
        decoder.Header.unpack(record)
    with pytest.raises(OnlineStoreError, match="expected a record of format version 1"):
        decoder.headers([record])


@pytest.mark.parametrize(
    "change", [lambda record: record[:-1], lambda record: record + b"x", lambda record: record[:40]]
)
@pytest.mark.parametrize("row", [("hello", 7), (None, 7)])
def test_a_damaged_record_is_refused_and_not_half_read(change, row):
    view = view_of({"a": "string", "b": "int64"})
    (record,) = encoded(view, [row])

    with pytest.raises(OnlineStoreError, match=r"found \d+ bytes, expected .*materialize rebuild VIEW"):
        decoder.Decoder(view.features).decode(change(record))


def test_headers_of_live_records_and_tombstones_are_read_together():
    view = view_of({"a": "int64"})
    records = [*encoded(view, [(1,), (None,)], floor=5), codec.tombstones([b"k"], 9).values[0].as_py()]

    found = decoder.headers(records)

    assert [tuple(row) for row in found.tolist()] == [
        (1, 0, SCHEMA, EVENT, CREATED, VERSION, 5),
        (1, 2, SCHEMA, EVENT, CREATED, VERSION, 5),
        (1, 1, 0, 0, 0, 9, 9),
    ]
    assert decoder.headers([]).size == 0
