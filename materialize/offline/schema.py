"""What a table must look like for a view: Delta column types in, problems and polars dtypes out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl

from materialize.model import FeatureType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltalake import Schema

    from materialize.model import FeatureView

__all__ = ["check_columns", "column_types", "polars_type"]

INTEGERS = {"byte": pl.Int8, "short": pl.Int16, "integer": pl.Int32, "long": pl.Int64}
POLARS_TYPES: dict[str, pl.DataType | type[pl.DataType]] = {
    **INTEGERS,
    "float": pl.Float32,
    "double": pl.Float64,
    "boolean": pl.Boolean,
    "string": pl.String,
    "binary": pl.Binary,
    "date": pl.Date,
    "timestamp": pl.Datetime("us", "UTC"),
    "timestamp_ntz": pl.Datetime("us"),
}
#: Column types whose values have one exact text, as an entity key needs.
KEY_TYPES = (*INTEGERS, "string", "date", "boolean")
#: Columns of the frames that rows travel in beside their join keys (`OfflineTable.read_order`).
RESERVED = ("event_us", "created_us", "version", "position", "__path", "__position")
#: Feature kind -> the column types that it holds without loss. Integers of another size are range-checked row by row.
ACCEPTED = {
    "bool": ("boolean",),
    "float32": ("float",),
    "float64": ("double", "float"),
    "string": ("string",),
    "binary": ("binary",),
    "date": ("date",),
    "timestamp": ("timestamp",),
}


def column_types(schema: Schema) -> dict[str, str]:
    """The type of each column, as Delta writes it: ``long``, ``decimal(10,2)``, ``array<float>`` ..."""
    return {field["name"]: _type_text(field["type"]) for field in _fields(schema)}


def _fields(schema: Schema) -> list[dict[str, Any]]:
    fields: list[dict[str, Any]] = json.loads(schema.to_json())["fields"]
    return fields


def _type_text(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    if kind["type"] == "array":
        return f"array<{_type_text(kind['elementType'])}>"
    return str(kind["type"])


def polars_type(text: str) -> pl.DataType | type[pl.DataType]:
    """The polars dtype in which a column of this Delta type is read."""
    if text.startswith("array<"):
        return pl.List(polars_type(text[6:-1]))
    if text.startswith("decimal("):
        precision, scale = (int(part) for part in text[8:-1].split(","))
        return pl.Decimal(precision, scale)
    return POLARS_TYPES[text]


def check_columns(view: FeatureView, columns: Mapping[str, str]) -> list[str]:
    """Every way in which *columns* (name -> Delta type) cannot feed *view*, one sentence each."""
    problems = []
    for key in view.join_keys:
        problems += _check(columns, key, "join key", KEY_TYPES)
        if key in RESERVED:
            problems.append(f"join key {key!r}: found a reserved name, expected another than {', '.join(RESERVED)}")
    problems += _check(columns, view.event_timestamp, "event_timestamp", ("timestamp",))
    if view.created_timestamp is not None:
        problems += _check(columns, view.created_timestamp, "created_timestamp", ("timestamp",))
    for name, kind in view.features.items():
        problems += _check(columns, name, "feature", _accepted(kind, columns.get(name, "")))
    return problems


def _accepted(kind: FeatureType, found: str) -> tuple[str, ...]:
    """The column types that can feed a feature of *kind*; *found* is echoed when a decimal of it fits."""
    if kind.kind == "list":
        return tuple(f"array<{item}>" for item in _accepted(FeatureType(kind.item), ""))
    if kind.kind == "decimal":
        exact = f"decimal({kind.precision},{kind.scale})"
        return (exact, found) if _decimal_fits(kind, found) else (exact,)
    return ACCEPTED.get(kind.kind, tuple(INTEGERS))


def _decimal_fits(kind: FeatureType, found: str) -> bool:
    if not found.startswith("decimal("):
        return False
    dtype = polars_type(found)
    return isinstance(dtype, pl.Decimal) and dtype.scale == kind.scale and (dtype.precision or 0) <= kind.precision


def _check(columns: Mapping[str, str], name: str, role: str, accepted: tuple[str, ...]) -> list[str]:
    if name not in columns:
        return [f"{role} {name!r}: found no such column, the table has {', '.join(columns)}"]
    found = columns[name]
    if found in accepted:
        return []
    hint = " (a timestamp without time zone: its instants are unknown)" if found == "timestamp_ntz" else ""
    return [f"{role} {name!r}: found a column of type {found}{hint}, expected {' or '.join(accepted)}"]
