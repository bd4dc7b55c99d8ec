"""Rows that a caller has in, the same rows in the types of a table's columns out, or which of them do not fit, and why.

Nothing is changed on the way: a number has to be the same number in the column's type, a time to have its zone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from materialize.errors import RowsError
from materialize.offline.dtypes import polars_type
from materialize.order import NO_CREATED

if TYPE_CHECKING:
    from materialize.offline.table import OfflineTable

__all__ = ["GivenRows", "given_rows"]

#: Where a column of the table is computed from others, by whoever writes it (PROTOCOL.md, Generated Columns).
GENERATED = "delta.generationExpression"
#: What pyarrow raises for a Python value that it has no type for, or not this one.
NOT_ARROW = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError, ValueError)

NONE: type = type(None)
#: The Python types of values, and those of them that do not count: Arrow takes more than is the same value.
PYTHON_NUMBERS: tuple[tuple[type, ...], tuple[type, ...]] = ((int, float, np.integer, np.floating, NONE), (bool,))
PYTHON_TYPES: dict[Any, tuple[tuple[type, ...], tuple[type, ...]]] = {
    pl.Boolean: ((bool, np.bool_, NONE), ()),
    pl.Decimal: ((Decimal, int, np.integer, NONE), (bool,)),
    pl.Date: ((date, NONE), (datetime,)),
    pl.Datetime: ((datetime, NONE), ()),
    pl.List: ((list, tuple, np.ndarray, NONE), ()),
    pl.String: ((str, NONE), ()),
    pl.Binary: ((bytes, NONE), ()),
}


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows in the types of a table. ``data``: pa.Table, the table's columns in its order and its types.

    ``order``: one row per row: the join keys, event_us Int64 (null for none), created_us Int64 (NO_CREATED for none), version
    Int64 (0: not committed yet), position UInt32. ``features``: the view's features in order, in their column types.
    ``refused``: why a row does not fit, by its index; it has nulls then where it does not.
    """

    data: pa.Table
    order: pl.DataFrame
    features: pl.DataFrame
    refused: dict[int, str]


def given_rows(table: OfflineTable, rows: Any) -> GivenRows:
    """Bring *rows* into the types of *table*. *rows*: mappings by column name, or anything with ``__arrow_c_stream__`` (a pyarrow
    table, a polars or pandas frame).

    Each has every column that the view reads and that partitions the table; others of the table's may be left out, and are null.
    Integers, floats and decimals of another type are taken where they are the same number; a Python float is rounded to the
    nearest float32 where the column is one, and so are integers beside it. Raises RowsError for columns that are missing, unknown or of a type that does not fit.
    """
    columns, refused, rounded = _columns(table, rows)
    fields = _fields(table)
    _check_names(table, fields, list(columns))
    height = len(next(iter(columns.values()))) if columns else 0
    made: dict[str, _Column] = {}
    problems = []
    for name, field in fields.items():
        if name not in columns and field.generated:
            continue
        given = columns.get(name)
        try:
            made[name], reasons = _fitted(table, name, given, field, height, rounded=rounded)
        except _WrongType as wrong:
            problems.append(f"{name!r}: found {wrong}, expected {table.columns[name].type}")
            continue
        for row, reason in reasons.items():
            refused.setdefault(row, f"column {name!r}: {reason}")
    if problems:
        raise _refusal(table, problems)
    data, view = pa.table({name: column.arrow for name, column in made.items()}), table.view
    frame = pl.DataFrame([made[name].polars for name in view.columns])
    created = (
        pl.lit(NO_CREATED)
        if view.created_timestamp is None
        else pl.col(view.created_timestamp).to_physical().fill_null(NO_CREATED)
    )
    order = frame.select(
        *view.join_keys,
        event_us=pl.col(view.event_timestamp).to_physical(),
        created_us=created.cast(pl.Int64),
        version=pl.lit(0, pl.Int64),
        position=pl.int_range(pl.len(), dtype=pl.UInt32),
    )
    return GivenRows(data, order, frame.select(list(view.features)), dict(sorted(refused.items())))


# --- columns -----------------------------------------------------------------------------------------------------------


class _WrongType(Exception):
    """A column whose type is none that fits; says which it is."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A column as the table has it."""

    type: pa.DataType
    nullable: bool
    generated: bool


@dataclass(frozen=True, slots=True)
class _Column:
    """A column in the table's type, twice: ``polars`` is None for a type that no view reads."""

    arrow: pa.ChunkedArray
    polars: pl.Series | None = None


def _fields(table: OfflineTable) -> dict[str, _Field]:
    schema = table.delta.schema()
    told = {field["name"]: field["metadata"] for field in json.loads(schema.to_json())["fields"]}
    return {
        field.name: _Field(field.type, field.nullable, GENERATED in told[field.name])
        for field in pa.schema(schema.to_arrow())
    }


def _columns(table: OfflineTable, rows: Any) -> tuple[dict[str, pa.ChunkedArray | list[Any]], dict[int, str], bool]:
    """The columns of *rows* by name, rows that lack some, and whether their values are Python's own."""
    if hasattr(rows, "__arrow_c_stream__"):
        try:
            data = pa.table(rows)
        except NOT_ARROW as error:
            raise _refusal(table, [f"found rows that Arrow does not take ({type(error).__name__})"]) from None
        names = data.column_names
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise _refusal(table, [f"{name!r}: found it twice" for name in twice])
        return dict(zip(names, data.columns, strict=True)), {}, False
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row)) if rows else list(table.view.columns)
        if unnamed := [name for name in names if not isinstance(name, str)]:
            raise _refusal(table, [f"found {len(unnamed)} column names that are no text, expected text"])
        needed = {*table.view.columns, *table.partition_columns}.intersection(names)
        lacking = {
            index: f"column {next(iter(sorted(needed.difference(row))))!r} is not there"
            for index, row in enumerate(rows)
            if len(row) < len(names) and not needed <= row.keys()
        }
        return {name: [row.get(name) for row in rows] for name in names}, lacking, True
    raise _refusal(
        table, [f"found {type(rows).__name__}, expected a sequence of mappings or an object with __arrow_c_stream__"]
    )


def _check_names(table: OfflineTable, fields: dict[str, _Field], names: list[str]) -> None:
    """Raise RowsError for columns that the table does not have, and for those that it needs."""
    view = table.view
    needed = dict.fromkeys((*view.columns, *table.partition_columns))
    needed |= dict.fromkeys(name for name, field in fields.items() if not field.nullable)
    problems = [f"{name!r}: found no such column in the table" for name in names if name not in fields]
    problems += [
        f"{name!r}: found no such column in the rows"
        for name in needed
        if name not in names and not fields[name].generated
    ]
    problems += [
        f"{name!r}: is computed by the table and read by the view, so it is not known before the commit"
        for name in view.columns
        if name not in names and fields[name].generated
    ]
    if problems:
        raise _refusal(table, problems)


def _refusal(table: OfflineTable, problems: list[str]) -> RowsError:
    return RowsError(
        "\n  ".join(
            [
                f"feature view {table.view.name!r}: could not push rows: {len(problems)} problem{'s' * (len(problems) > 1)} with their columns",
                *problems,
            ]
        )
        + f"\nNothing was written. The table has {', '.join(f'{name} {column.type}' for name, column in table.columns.items())}."
    )


# --- values ------------------------------------------------------------------------------------------------------------


def _fitted(
    table: OfflineTable,
    name: str,
    given: pa.ChunkedArray | list[Any] | None,
    field: _Field,
    height: int,
    *,
    rounded: bool,
) -> tuple[_Column, dict[int, str]]:
    """A column in the table's type, and why some of its values do not fit, by row. Raises _WrongType."""
    reasons: dict[int, str] = {}
    try:
        kind = polars_type(table.columns[name].type)
    except KeyError:  # a type that no view reads: a struct, a map
        return _Column(_as_it_is(given, field, height)), reasons
    if given is None:
        return _Column(
            pa.chunked_array([pa.nulls(height, field.type)]), pl.Series(name, [None] * height, kind)
        ), reasons
    target, utc = kind() if isinstance(kind, type) else kind, table.view.timestamp_ntz == "UTC"
    values = _array(given, target, reasons, utc=utc) if isinstance(given, list) else given
    column = pl.Series(name, values)
    if column.dtype != target:
        if not _may_become(column.dtype, target, utc=utc):
            raise _WrongType(str(values.type))
        column, bad = _cast(column, target, rounded=rounded)
        reasons |= {int(row): f"does not fit into {table.columns[name].type}" for row in bad.arg_true()}
    if not field.nullable and column.null_count():
        for row in column.is_null().arg_true():
            reasons.setdefault(int(row), "null, which the table does not take")
    arrow = values if values.type == field.type else column.to_arrow().cast(field.type)
    return _Column(arrow, column), reasons


def _as_it_is(given: pa.ChunkedArray | list[Any] | None, field: _Field, height: int) -> pa.ChunkedArray:
    if given is None:
        return pa.chunked_array([pa.nulls(height, field.type)])
    if isinstance(given, list):
        try:
            return pa.chunked_array([pa.array(given, field.type)])
        except NOT_ARROW:
            raise _WrongType("Python values of other types") from None
    if given.type != field.type:
        raise _WrongType(str(given.type))
    return given


def _array(values: list[Any], target: pl.DataType, reasons: dict[int, str], *, utc: bool) -> pa.Array:
    """Python *values* as Arrow sees them, with null for those that cannot become *target*."""
    if isinstance(target, pl.Datetime):
        values = [_moment(value, target, row, reasons, utc=utc) for row, value in enumerate(values)]
    allowed, never = PYTHON_TYPES.get(target.base_type(), PYTHON_NUMBERS)
    if all(issubclass(kind, allowed) and not issubclass(kind, never) for kind in {type(value) for value in values}):
        try:
            made = pa.array(values)
            if _may_become(pl.Series(made[:0]).dtype, target, utc=utc):
                return made
        except NOT_ARROW:
            pass
    kept: list[Any] = []
    for row, value in enumerate(values):  # one by one, to say which; only where some do not fit
        fits = isinstance(value, allowed) and not isinstance(value, never) and _fits(value, target, utc=utc)
        whole = fits and target.is_integer() and isinstance(value, float | np.floating)
        kept.append(int(value) if whole else value if fits else None)
        if not fits:
            reasons[row] = f"found {type(value).__name__}"
    try:
        return pa.array(kept)
    except NOT_ARROW:
        raise _WrongType("values of several types") from None


def _moment(value: Any, target: pl.Datetime, row: int, reasons: dict[int, str], *, utc: bool) -> Any:
    """A datetime in UTC, or without a zone as the column is."""
    if not isinstance(value, datetime):
        return value
    if target.time_zone is None:
        if value.tzinfo is None:
            return value
        if utc:
            return value.astimezone(timezone.utc).replace(tzinfo=None)
        reasons[row] = "a time with a zone, and the column has times without"
        return None
    if value.tzinfo is None:
        reasons[row] = "a time without a zone"
        return None
    return value.astimezone(timezone.utc)


def _fits(value: Any, target: pl.DataType, *, utc: bool) -> bool:
    try:
        if target.is_float() and isinstance(value, int | np.integer) and int(float(value)) != value:
            return False  # beside floats, which Arrow makes one of it
        if target.is_integer() and isinstance(value, float | np.floating):
            return float(value).is_integer()
        return _may_become(pl.Series(pa.array([value])[:0]).dtype, target, utc=utc)
    except NOT_ARROW:
        return False


def _may_become(source: pl.DataType, target: pl.DataType, *, utc: bool) -> bool:
    """Whether values of the type *source* can be the same values in the type *target*."""
    if source in (target, pl.Null):
        return True
    if isinstance(target, pl.List):
        return isinstance(source, pl.List | pl.Array) and _may_become(source.inner, target.inner, utc=utc)  # type: ignore[arg-type]
    if isinstance(target, pl.Datetime):
        zones = isinstance(source, pl.Datetime) and (source.time_zone is None, target.time_zone is None)
        return zones in ((True, True), (False, False)) or (utc and zones == (False, True))
    if target.is_decimal():
        return source.is_decimal() or source.is_integer()
    if target.is_numeric():
        return source.is_integer() or source.is_float()
    return target == pl.String and source in (pl.Categorical, pl.Enum)


def _cast(column: pl.Series, target: pl.DataType, *, rounded: bool) -> tuple[pl.Series, pl.Series]:
    """*column* in the type *target*, and which of its values are another one there. Returns: the column, Boolean."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.Datetime) and column.dtype.time_zone is not None:
        column = column.dt.convert_time_zone("UTC")
        if isinstance(target, pl.Datetime) and target.time_zone is None:
            column = column.dt.replace_time_zone(None)
    made = column.cast(target, strict=False)
    if column.dtype == pl.Null or column.dtype == pl.List(pl.Null):
        return made, pl.Series(np.zeros(len(made), dtype=np.bool_))
    if rounded and target == pl.Float32 and column.dtype == pl.Float64:
        return made, (made.is_infinite() & column.is_finite()).fill_null(value=False)
    if rounded and target == pl.List(pl.Float32) and column.dtype == pl.List(pl.Float64):
        infinite = pl.element().is_infinite()
        return made, made.list.eval(infinite).ne_missing(column.list.eval(infinite))
    return made, made.cast(column.dtype, strict=False).ne_missing(column)
