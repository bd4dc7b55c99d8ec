"""What a table must look like for a view: Delta column types in, problems out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from materialize.feature_type import FeatureType

if TYPE_CHECKING:
    from collections.abc import Mapping

    from materialize.model import FeatureView

__all__ = ["Column", "check_columns", "columns_of", "decimal_parts", "same_values"]

INTEGERS = ("byte", "short", "integer", "long")
#: Types that hold every value of the ones before them (PROTOCOL.md, Type Widening), as far as entity keys and records are the same.
WIDENING = (INTEGERS, ("float", "double"))
#: Column types whose values have one exact text, as an entity key needs.
KEY_TYPES = (*INTEGERS, "string", "date", "boolean")
#: Columns of the frames that rows travel in beside their join keys (`offline.read_order`).
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


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. ``type`` as Delta writes it: ``long``, ``decimal(10,2)``, ``array<float>`` ...; ``stored``: its name in
    data files and in the log, another one than readers know when the table has a column mapping; ``id``: its number there.
    """

    type: str
    stored: str
    id: int | None = None


def columns_of(schema: str) -> dict[str, Column]:
    """The columns of a Delta schema (its JSON), by name."""
    columns = {}
    for field in json.loads(schema)["fields"]:
        mapping = field["metadata"]
        stored = mapping.get("delta.columnMapping.physicalName", field["name"])
        columns[field["name"]] = Column(_type_text(field["type"]), stored, mapping.get("delta.columnMapping.id"))
    return columns


def same_values(before: Column, now: Column) -> bool:
    """Whether what was written to the column *before* reads as the same values *now*: the same column, or a wider type."""
    if before.stored != now.stored:
        return False
    chain = next((chain for chain in WIDENING if before.type in chain and now.type in chain), None)
    if chain:
        return chain.index(before.type) <= chain.index(now.type)
    if before.type.startswith("decimal(") and now.type.startswith("decimal("):
        (digits, scale), (more, same) = (decimal_parts(kind) for kind in (before.type, now.type))
        return scale == same and digits <= more
    return before.type == now.type


def decimal_parts(kind: str) -> tuple[int, int]:
    """Precision and scale of the column type ``decimal(P,S)``."""
    precision, scale = kind.removeprefix("decimal(").removesuffix(")").split(",")
    return int(precision), int(scale)


def _type_text(kind: Any) -> str:
    if isinstance(kind, str):
        return kind
    if kind["type"] == "array":
        return f"array<{_type_text(kind['elementType'])}>"
    return str(kind["type"])


def check_columns(view: FeatureView, table_columns: Mapping[str, Column]) -> list[str]:
    """Every way in which *table_columns* cannot feed *view*, one sentence each."""
    columns = {name: _declared(view, column.type) for name, column in table_columns.items()}
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


def _declared(view: FeatureView, kind: str) -> str:
    """The type as *view* declares it: times without a zone may be said to be UTC."""
    return kind.replace("timestamp_ntz", "timestamp") if view.timestamp_ntz == "UTC" else kind


def _accepted(kind: FeatureType, found: str) -> tuple[str, ...]:
    """The column types that can feed a feature of *kind*; *found* is echoed when a decimal of it fits."""
    if kind.kind == "list":
        return tuple(f"array<{item}>" for item in _accepted(FeatureType(kind.item), ""))
    if kind.kind == "decimal":
        exact = f"decimal({kind.precision},{kind.scale})"
        return (exact, found) if _decimal_fits(kind, found) else (exact,)
    return ACCEPTED.get(kind.kind, INTEGERS)


def _decimal_fits(kind: FeatureType, found: str) -> bool:
    if not found.startswith("decimal("):
        return False
    precision, scale = decimal_parts(found)
    return scale == kind.scale and precision <= kind.precision


def _check(columns: Mapping[str, str], name: str, role: str, accepted: tuple[str, ...]) -> list[str]:
    if name not in columns:
        return [f"{role} {name!r}: found no such column, the table has {', '.join(columns)}"]
    found = columns[name]
    if found in accepted:
        return []
    hint = (
        " (without a time zone; if it is UTC, say timestamp_ntz: UTC in the feature view's YAML)"
        if found == "timestamp_ntz"
        else ""
    )
    return [f"{role} {name!r}: found a column of type {found}{hint}, expected {' or '.join(accepted)}"]
