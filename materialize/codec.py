"""Rows to bytes: entity keys, and records of format version 1, as docs/format.md fixes them. Columns are encoded at once.

A record is a 36-byte header, a null bitmap if any feature is null, a fixed section and a variable section, all little-endian.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from materialize.decoder import FORMAT_VERSION, HAS_NULLS, HEADER_DTYPE, LENGTH_BYTES, NUMBER_CODES, UNIX_DATE
from materialize.entity_key import ESCAPES
from materialize.feature_type import FIXED_WIDTHS, FeatureType
from materialize.online.base import HEADER, TOMBSTONE, EncodedBatch
from materialize.order import NO_FLOOR
from materialize.plain import plain_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from materialize.model import FeatureView

__all__ = ["encode", "entity_keys", "tombstones", "unstorable_rows"]

#: Rows laid out at once: 2,048 records of 50 features stay in the processor's second-level cache.
LAYOUT_ROWS = 2_048
#: Days since 1970 of the first and last date that Delta's and Python's calendars have; in microseconds for timestamps.
FIRST_DAY, LAST_DAY, DAY_US = (date.min - UNIX_DATE).days, (date.max - UNIX_DATE).days, 86_400_000_000
CALENDAR = {"date": (FIRST_DAY, LAST_DAY), "timestamp": (FIRST_DAY * DAY_US, (LAST_DAY + 1) * DAY_US - 1)}
NUMPY_TYPES = {kind: np.dtype(code).newbyteorder("<") for kind, code in NUMBER_CODES.items()}
INTEGER_TYPES = {
    f"{sign}int{bits}": getattr(pl, f"{'UI' if sign else 'I'}nt{bits}")
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}


def unstorable_rows(features: pl.DataFrame, view: FeatureView, *, max_value_bytes: int) -> pl.Series | None:
    """Which rows hold a value that no record of the view can.

    Returns: __reason String, per row the first that holds, null for a storable one; None when all rows are storable.
    """
    checks: dict[str, pl.Expr] = {}
    for name, kind in view.features.items():
        column = pl.col(name)
        if kind.kind in INTEGER_TYPES and features.schema[name] != INTEGER_TYPES[kind.kind]:
            fits = column.cast(INTEGER_TYPES[kind.kind], strict=False).is_not_null() | column.is_null()
            checks[f"feature {name!r} outside {kind}"] = ~fits
        if kind.kind in CALENDAR:
            inside = column.to_physical().is_between(*CALENDAR[kind.kind])
            checks[f"feature {name!r} outside the years 1 to 9999"] = ~inside
        if kind.kind == "list":
            checks[f"feature {name!r} has a null inside a list"] = column.list.eval(pl.element().is_null()).list.any()
            checks |= _item_checks(name, kind, features.schema[name])
    variable = [_variable_bytes(pl.col(name), kind) for name, kind in view.features.items() if kind.width is None]
    longest = features.select(pl.sum_horizontal(pl.lit(0), *(size.max() for size in variable))).item()
    if _longest_fixed(view) + longest > max_value_bytes:  # else no need to look at each row, which is slow
        checks[f"record longer than {max_value_bytes:,} bytes"] = _record_bytes(view, variable) > max_value_bytes
    flags = features.select(check.fill_null(value=False).alias(reason) for reason, check in checks.items())
    found = [flag for flag in flags if flag.any()]
    if not found:
        return None
    first = pl.coalesce(pl.when(flag).then(pl.lit(flag.name)) for flag in found)
    return pl.DataFrame(found).select(first.alias("__reason"))["__reason"]


def _item_checks(name: str, kind: FeatureType, dtype: pl.DataType) -> dict[str, pl.Expr]:
    """What can be wrong with the items of a list feature, as reason -> condition."""
    column, checks = pl.col(name), {}
    if kind.length is not None:
        checks[f"feature {name!r} is not of length {kind.length}"] = column.list.len() != kind.length
    if kind.item in INTEGER_TYPES and dtype != pl.List(INTEGER_TYPES[kind.item]):
        item = pl.element()
        fits = item.cast(INTEGER_TYPES[kind.item], strict=False).is_not_null() | item.is_null()
        checks[f"feature {name!r} has an item outside {kind.item}"] = column.list.eval(~fits).list.any()
    return checks


def _longest_fixed(view: FeatureView) -> int:
    """Bytes of a record with a null bitmap and nothing in the variable section."""
    slots = sum(kind.width or LENGTH_BYTES for kind in view.features.values())
    return HEADER.size + (len(view.features) + 7) // 8 + slots


def _record_bytes(view: FeatureView, variable: Sequence[pl.Expr]) -> pl.Expr:
    """Bytes of each row's record, with the bytes of its *variable* values; it has a bitmap only with a null."""
    full = pl.all_horizontal(pl.all().is_not_null()).cast(pl.Int64)
    saved = full * ((len(view.features) + 7) // 8)
    return pl.sum_horizontal(pl.lit(_longest_fixed(view), pl.Int64), *variable) - saved


def _variable_bytes(column: pl.Expr, kind: FeatureType) -> pl.Expr:
    """Bytes of each value in the variable section."""
    if kind.kind == "list":
        return column.list.len().cast(pl.Int64) * FIXED_WIDTHS[kind.item]
    return (column.str.len_bytes() if kind.kind == "string" else column.bin.size()).cast(pl.Int64)


def entity_keys(rows: pl.DataFrame, join_keys: Sequence[str]) -> pl.Series:
    """The entity key of each row: the join keys' text in order, escaped, joined by ``|``. Returns: Binary, no nulls."""
    texts = [_key_text(key, rows.schema[key]) for key in join_keys]
    return rows.select(key=pl.concat_str(texts, separator="|").cast(pl.Binary))["key"]


def _key_text(name: str, dtype: pl.DataType) -> pl.Expr:
    text = pl.col(name).cast(pl.String)
    if dtype == pl.String:
        for character, escape in ESCAPES:
            text = text.str.replace_all(character, escape, literal=True)
    return text


def encode(
    keys: pl.Series,
    order: pl.DataFrame,
    features: pl.DataFrame,
    view: FeatureView,
    *,
    schema_id: int,
    floor: int = NO_FLOOR,
) -> EncodedBatch:
    """Encode rows as records.

    *keys*: entity keys, Binary. *order*: event_us, created_us, version Int64. *features*: the view's features in order, in
    their column types, every row storable. All of one height; *floor* goes into every header. Rows with a null are moved
    behind the others, because their records have a bitmap. Of a view with the layout ``hash`` they have their texts too.
    """
    if not any(column.null_count() for column in features):
        records = _records(order, features, view, schema_id, floor, with_nulls=False)
        return _batch(keys, order, records, _fields(features, view))
    nulls = features.select(pl.any_horizontal(pl.all().is_null()).alias("null"))["null"]
    full, holed = (~nulls).arg_true(), nulls.arg_true()
    rows = pl.concat([full, holed])
    parts = [
        _records(order[part], features[part], view, schema_id, floor, with_nulls=with_nulls)
        for part, with_nulls in ((full, False), (holed, True))
        if len(part)
    ]
    return _batch(keys[rows], order[rows], pa.concat_arrays(parts), _fields(features[rows], view))


def _fields(features: pl.DataFrame, view: FeatureView) -> dict[str, pa.BinaryArray]:
    return plain_texts(features, view.features) if view.layout == "hash" else {}


def _batch(
    keys: pl.Series, order: pl.DataFrame, values: pa.BinaryArray, fields: dict[str, pa.BinaryArray]
) -> EncodedBatch:
    event, created, version = (order[name].to_numpy() for name in ("event_us", "created_us", "version"))
    return EncodedBatch(
        keys=keys.to_arrow().cast(pa.binary()),
        values=values,
        event_us=event,
        created_us=created,
        version=version,
        fields=fields,
    )


def _records(
    order: pl.DataFrame, features: pl.DataFrame, view: FeatureView, schema_id: int, floor: int, *, with_nulls: bool
) -> pa.BinaryArray:
    """Records of one shape. The data buffer is laid out in place, column by column, a few thousand rows at a time."""
    bitmap = [("bitmap", "u1", ((len(view.features) + 7) // 8,))] if with_nulls else []
    fixed = [(str(index), *_slot(kind)) for index, kind in enumerate(view.features.values())]
    records: npt.NDArray[Any] = np.zeros(order.height, dtype=np.dtype([*HEADER_DTYPE, *bitmap, *fixed]))
    columns: dict[str, npt.NDArray[Any]] = {
        name: order[name].to_numpy() for name in ("event_us", "created_us", "version")
    }
    if with_nulls:
        flags = features.select(pl.all().is_null()).to_numpy()
        columns["bitmap"] = np.packbits(flags, axis=1, bitorder="little")
    variable = []
    for index, (name, kind) in enumerate(view.features.items()):
        if kind.width is None:
            chunk = _variable(features[name], kind)
            columns[str(index)] = np.diff(
                np.frombuffer(chunk.buffers()[1], dtype=np.int32, count=len(chunk) + 1, offset=4 * chunk.offset)
            )
            variable.append(chunk)
        else:
            columns[str(index)] = _fixed(features[name], kind)
    records["format"], records["schema"], records["floor"] = FORMAT_VERSION, schema_id, floor
    records["flags"] = HAS_NULLS if with_nulls else 0
    for low in range(0, order.height, LAYOUT_ROWS):
        block = records[low : low + LAYOUT_ROWS]
        for name, column in columns.items():
            block[name] = column[low : low + LAYOUT_ROWS]
    heads = _binary(records.view(np.uint8), order.height, records.dtype.itemsize)
    return pc.binary_join_element_wise(heads, *variable, pa.scalar(b"", pa.binary())) if variable else heads


def _slot(kind: FeatureType) -> tuple[Any, ...]:
    """The numpy field of a feature in the fixed section; a variable feature has its length in bytes there."""
    if kind.width is None:
        return ("<u4",)
    if kind.kind == "list":
        return (NUMPY_TYPES[kind.item], (kind.length,))
    return ("V16",) if kind.kind == "decimal" else (NUMPY_TYPES[kind.kind],)


def _fixed(column: pl.Series, kind: FeatureType) -> npt.NDArray[Any]:
    """A column of fixed width as numpy values in the record's type; nulls become zero bytes."""
    if kind.kind == "decimal":
        values = (
            column.cast(pl.Decimal(kind.precision, kind.scale))
            .fill_null(Decimal(0))
            .to_arrow()
            .cast(pa.decimal128(kind.precision, kind.scale))
        )
        return np.frombuffer(values.buffers()[1], dtype="V16", count=len(values), offset=16 * values.offset)
    if kind.kind == "list":
        zeros = pl.Series([0] * (kind.length or 0), dtype=column.dtype.inner)  # type: ignore[attr-defined]
        items = (
            column.to_frame("c").select(pl.col("c").fill_null(zeros.implode()))["c"].explode()
            if column.null_count()
            else column.explode()
        )
        return items.to_numpy().astype(NUMPY_TYPES[kind.item], copy=False).reshape(-1, kind.length or 0)
    if kind.kind in {"date", "timestamp"}:
        column = column.to_physical()
    if column.null_count():
        column = column.fill_null(False if kind.kind == "bool" else 0)
    return column.to_numpy().astype(NUMPY_TYPES[kind.kind], copy=False)


def _variable(column: pl.Series, kind: FeatureType) -> pa.BinaryArray:
    """A column of variable width as bytes; nulls become empty."""
    if kind.kind != "list":
        return column.cast(pl.Binary).fill_null(b"").to_arrow().cast(pa.binary())
    lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
    items = (
        column.drop_nulls()
        .list.explode(keep_nulls=False, empty_as_null=False)
        .to_numpy()
        .astype(NUMPY_TYPES[kind.item], copy=False)
    )
    ends = np.concatenate(([0], np.cumsum(lengths * NUMPY_TYPES[kind.item].itemsize))).astype(np.int32)
    return pa.BinaryArray.from_buffers(
        pa.binary(), len(column), [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(items))]
    )


def _binary(data: npt.NDArray[np.uint8], rows: int, width: int) -> pa.BinaryArray:
    """*rows* values of *width* bytes over *data*, without copying it."""
    offsets = np.arange(0, (rows + 1) * width, width, dtype=np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def tombstones(keys: Sequence[bytes], at: int) -> EncodedBatch:
    """Records that say "nothing in snapshot *at*" for each entity key."""
    header = HEADER.pack(FORMAT_VERSION, TOMBSTONE, 0, 0, 0, at, at)
    zeros = np.zeros(len(keys), dtype=np.int64)
    values = pa.array([header] * len(keys), pa.binary())
    return EncodedBatch(
        pa.array(keys, pa.binary()), values, zeros, zeros, np.full(len(keys), at, dtype=np.int64), tombstone=True
    )
