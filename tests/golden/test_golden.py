"""Bytes that stores already hold: what was written once is written and read the same for as long as its format version."""

import json
import re
import struct
from dataclasses import fields
from datetime import date, timedelta
from decimal import Context, Decimal
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from materialize import codec, decoder
from materialize.codec import entity_keys
from materialize.entity_key import format_key, parse_key
from materialize.feature_type import FIXED_WIDTHS, LIST_ITEMS, MAX_PRECISION, FeatureType
from materialize.model import FeatureView, Watermark, from_us
from materialize.online.base import OnlineStore
from materialize.online.dynamodb import DynamoDbStore
from materialize.order import NO_CREATED
from materialize.plain import plain_texts

GOLDEN = json.loads((Path(__file__).parent / "format_1.json").read_text(encoding="utf-8"))
PLAIN = json.loads((Path(__file__).parent / "plain_1.json").read_text(encoding="utf-8"))
FIELDS = {golden["name"]: golden["fields"] for golden in PLAIN["records"]}
FORMAT = (Path(__file__).parent.parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
DTYPES = {
    **{f"int{bits}": getattr(pl, f"Int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(pl, f"UInt{bits}") for bits in (8, 16, 32, 64)},
    "bool": pl.Boolean,
    "string": pl.String,
    "binary": pl.Binary,
    "date": pl.Date,
    "timestamp": pl.Datetime("us", "UTC"),
    "float32": pl.Float32,
    "float64": pl.Float64,
}
records = pytest.mark.parametrize("golden", [pytest.param(golden, id=golden["name"]) for golden in GOLDEN["records"]])


def value_of(text, kind):
    """A value of the file as Python has it; a float stays the bits that the file names."""
    if text is None or kind in {"bool", "string"}:
        return text
    if kind == "binary":
        return bytes.fromhex(text)
    if kind == "date":
        return date.fromisoformat(text)
    if kind == "timestamp":
        return from_us(int(text))
    return Decimal(text) if kind == "decimal" else int(text, 16 if kind.startswith("float") else 10)


def numbers(texts, kind):
    """A column of numbers; floats by way of their bits, so that no NaN is touched."""
    values = [value_of(text, kind) for text in texts]
    if kind.startswith("float"):
        bits = np.array(values, dtype=f"u{FIXED_WIDTHS[kind]}")
        return pl.Series(bits.view(f"f{FIXED_WIDTHS[kind]}"), dtype=DTYPES[kind])
    return pl.Series(values, dtype=DTYPES[kind])


def column_of(text, kind):
    """A column of one row."""
    if kind.kind == "list":
        items = pl.List(DTYPES[kind.item])
        return pl.Series([None], dtype=items) if text is None else numbers(text, kind.item).implode()
    if kind.kind == "decimal":
        return pl.Series([value_of(text, "decimal")], dtype=pl.Decimal(kind.precision, kind.scale))
    if text is None:
        return pl.Series([None], dtype=DTYPES[kind.kind])
    return numbers([text], kind.kind)


def view_of(schema):
    features = {name: FeatureType.parse(kind) for name, kind in schema}
    return FeatureView("v", "source", ("k",), "ts", features, ("default",))


def told(value, kind):
    """A decoded value as the file writes it."""
    if value is None or kind.kind in {"bool", "string"}:
        return value
    if kind.kind == "list":
        return [told(item, FeatureType(kind.item)) for item in value]
    if kind.kind.startswith("float"):
        return struct.pack(">f" if kind.kind == "float32" else ">d", value).hex()
    if kind.kind == "timestamp":
        return str((value - from_us(0)) // timedelta(microseconds=1))
    if kind.kind == "decimal":
        return f"{value.quantize(Decimal(1).scaleb(-kind.scale), context=Context(prec=38)):f}"
    return value.hex() if kind.kind == "binary" else str(value)


@records
def test_a_golden_record_is_written_the_same(golden):
    view, header = view_of(golden["schema"]), golden["header"]
    pairs = zip(golden["schema"], golden["row"], strict=True)
    frame = pl.DataFrame([column_of(text, FeatureType.parse(kind)).alias(name) for (name, kind), text in pairs])
    order = pl.DataFrame({name: [int(header[name])] for name in ("event_us", "created_us", "version")})

    batch = codec.encode(
        pl.Series([b"k"]), order, frame, view, schema_id=header["schema_id"], floor=int(header["floor"])
    )

    assert codec.unstorable_rows(frame, view, max_value_bytes=2**20) is None
    assert batch.values[0].as_py().hex() == golden["record"]


@records
def test_a_golden_record_is_read_the_same(golden):
    view, record = view_of(golden["schema"]), bytes.fromhex(golden["record"])

    header = decoder.Header.unpack(record)
    values = decoder.Decoder(view.features).decode(record)

    found = {name: getattr(header, name) for name in ("schema_id", "event_us", "created_us", "version", "floor")}
    assert found == {name: int(value) for name, value in golden["header"].items()}
    assert not header.tombstone
    assert [told(value, kind) for value, kind in zip(values.values(), view.features.values(), strict=True)] == golden[
        "row"
    ]


@records
def test_the_golden_texts_of_a_record_are_written_the_same(golden):
    view = view_of(golden["schema"])
    pairs = zip(golden["schema"], golden["row"], strict=True)
    frame = pl.DataFrame([column_of(text, FeatureType.parse(kind)).alias(name) for (name, kind), text in pairs])

    texts = {name: text[0].as_py() for name, text in plain_texts(frame, view.features).items()}

    written = {name: text for name, text in texts.items() if text is not None}
    assert FIELDS[golden["name"]] == {
        name: text.hex() if view.features[name].kind == "binary" else text.decode() for name, text in written.items()
    }
    assert [name for name in view.features if name not in written] == [
        name for (name, _), value in zip(golden["schema"], golden["row"], strict=True) if value is None
    ]


@pytest.mark.parametrize("golden", GOLDEN["tombstones"])
def test_a_golden_tombstone_is_written_and_read_the_same(golden):
    batch = codec.tombstones([b"k"], int(golden["version"]))

    header = decoder.Header.unpack(bytes.fromhex(golden["record"]))

    assert batch.values[0].as_py().hex() == golden["record"]
    assert (header.tombstone, header.version, header.floor) == (True, int(golden["version"]), int(golden["version"]))


@pytest.mark.parametrize("golden", GOLDEN["keys"])
def test_a_golden_key_is_made_the_same_by_columns_values_and_people(golden):
    names = [str(index) for index in range(len(golden["values"]))]
    values = [value_of(text, kind) for text, kind in zip(golden["values"], golden["types"], strict=True)]
    dtypes = [DTYPES[kind] for kind in golden["types"]]
    triples = zip(names, values, dtypes, strict=True)
    rows = pl.DataFrame([pl.Series(name, [value], dtype=dtype) for name, value, dtype in triples])

    assert entity_keys(rows, names).to_list() == [golden["key"].encode()]
    assert format_key(values) == golden["key"].encode()
    assert parse_key(golden["key"], names) == golden["key"].encode()


def test_every_type_and_an_absent_created_time_have_golden_bytes():
    kinds = {FeatureType.parse(kind) for golden in GOLDEN["records"] for _, kind in golden["schema"]}

    assert {kind.kind for kind in kinds} == {*FIXED_WIDTHS, "string", "binary", "list"}
    for length in (None, 2):
        assert {kind.item for kind in kinds if kind.length == length and kind.kind == "list"} >= set(LIST_ITEMS)
    assert any(golden["header"]["created_us"] == str(-(2**53)) for golden in GOLDEN["records"])


def test_the_documented_vectors_are_golden():
    documented = dict(re.findall(r"^\| ([\w ^+-]+) \| `([0-9a-f]{72,})` \|$", FORMAT, re.MULTILINE))
    golden = {golden["name"]: golden["record"] for golden in GOLDEN["records"]}
    tombstone = documented.pop("tombstone at version 2^40 + 7")

    assert len(documented) == 4
    assert documented.items() <= golden.items()
    assert tombstone == GOLDEN["tombstones"][0]["record"]


def test_the_documented_fields_are_golden():
    documented = dict(re.findall(r"^\| fields of (\w[\w ]*) \| `(\{.*\})` \|$", FORMAT, re.MULTILINE))

    assert len(documented) == 3
    assert {name: json.loads(fields) for name, fields in documented.items()}.items() <= FIELDS.items()


def test_the_record_taken_apart_in_the_documentation_is_the_golden_one():
    parts = re.findall(r"^\| (\d+) \| `([0-9a-f]+)` \| ", FORMAT, re.MULTILINE)
    record = "".join(data for _, data in parts)

    assert record == GOLDEN["records"][0]["record"]
    assert [int(offset) for offset, _ in parts] == [
        sum(len(data) for _, data in parts[:index]) // 2 for index in range(len(parts))
    ]


def test_the_limits_in_the_documentation_are_those_of_the_code():
    limits = FORMAT[FORMAT.index("## Limits") : FORMAT.index("## Schemas")]

    assert f"| entity key | 1 to {OnlineStore.max_key_bytes:,} bytes |" in limits
    assert f"| record | {OnlineStore.max_value_bytes:,} bytes, header included |" in limits
    assert f"400 KB | {DynamoDbStore.max_value_bytes:,} bytes, header included |" in limits
    assert f"| decimal digits | {MAX_PRECISION} |" in limits
    assert f"| {NO_CREATED} (-2^53) for none" in FORMAT.replace("created time of the row; ", "| ")


def test_the_documented_slots_are_those_of_the_code():
    types = FORMAT[FORMAT.index("| feature type |") : FORMAT.index("## Limits")]
    documented = {}
    for names, sizes in re.findall(r"^\| ((?:`\w+` ?)+)\| ([\d, ]+) \|", types, re.MULTILINE):
        documented |= dict(zip(re.findall(r"\w+", names), map(int, re.findall(r"\d+", sizes)), strict=True))

    assert documented == {kind: size for kind, size in FIXED_WIDTHS.items() if kind != "decimal"} | {
        "string": 4,
        "binary": 4,
    }


def test_the_documented_watermark_and_schemas_are_those_of_the_code():
    cell = FORMAT[FORMAT.index("## Watermark") : FORMAT.index("## What a reader does")]
    named = [name for row in re.findall(r"^\| (`.*?) \|", cell, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    (example,) = re.findall(r"```json\n(.*)\n```", FORMAT)

    assert sorted(named) == sorted(field.name for field in fields(Watermark))
    ((schema_id, text),) = json.loads(example).items()
    assert (schema_id, view_of(json.loads(text)).schema_text) == ("513", text)
