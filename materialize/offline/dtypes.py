"""The type of a column as Delta writes it in, the polars dtype in which it is read out."""

from __future__ import annotations

import polars as pl

from materialize.offline.schema import decimal_parts

__all__ = ["polars_type"]

POLARS_TYPES: dict[str, pl.DataType | type[pl.DataType]] = {
    "byte": pl.Int8,
    "short": pl.Int16,
    "integer": pl.Int32,
    "long": pl.Int64,
    "float": pl.Float32,
    "double": pl.Float64,
    "boolean": pl.Boolean,
    "string": pl.String,
    "binary": pl.Binary,
    "date": pl.Date,
    "timestamp": pl.Datetime("us", "UTC"),
    "timestamp_ntz": pl.Datetime("us"),
}


def polars_type(text: str) -> pl.DataType | type[pl.DataType]:
    """The polars dtype in which a column of this Delta type is read."""
    if text.startswith("array<"):
        return pl.List(polars_type(text[6:-1]))
    if text.startswith("decimal("):
        return pl.Decimal(*decimal_parts(text))
    return POLARS_TYPES[text]
