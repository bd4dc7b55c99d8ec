"""Feature columns in, a column of plain text for each out, as docs/format.md fixes it for readers that know no record (layout `hash`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Mapping

    from materialize.feature_type import FeatureType

__all__ = ["plain_texts"]

TIMESTAMP = "%Y-%m-%dT%H:%M:%S%.6fZ"
FLOATS = {"float32": pl.Float32, "float64": pl.Float64}


def plain_texts(rows: pl.DataFrame, features: Mapping[str, FeatureType]) -> dict[str, pa.BinaryArray]:
    """The text of each feature of each row, null where the feature is.

    *rows*: the *features* in their column types, every value storable. Returns: pa.binary columns by feature name, in the order of
    *features*, as high as *rows*.
    """
    texts = rows.select(_text(pl.col(name), kind).cast(pl.Binary).alias(name) for name, kind in features.items())
    return {name: texts[name].rechunk().to_arrow().cast(pa.binary()) for name in features}


def _text(column: pl.Expr, kind: FeatureType) -> pl.Expr:
    if kind.kind in {"string", "binary"}:
        return column
    if kind.kind == "list":
        items = column.list.eval(_item(pl.element(), kind.item)).list.join(",")
        return pl.format("[{}]", items)
    if kind.kind == "decimal":
        return column.cast(pl.Decimal(kind.precision, kind.scale)).cast(pl.String)
    if kind.kind == "timestamp":
        return column.dt.strftime(TIMESTAMP)
    return _number(column, kind.kind)


def _item(column: pl.Expr, kind: str) -> pl.Expr:
    """An item of a JSON array. JSON has no word for NaN and infinity, so they are texts there."""
    text = _number(column, kind)
    if kind not in FLOATS:
        return text
    return pl.when(column.is_finite()).then(text).otherwise(pl.format('"{}"', text))


def _number(column: pl.Expr, kind: str) -> pl.Expr:
    """Integers and bools as they are, dates, and floats by the shortest text that reads back as the same float of the same size."""
    if kind not in FLOATS:
        return column.cast(pl.String)
    value = column.cast(FLOATS[kind])
    return pl.when(value.is_nan()).then(pl.lit("nan")).otherwise(value.cast(pl.String))
