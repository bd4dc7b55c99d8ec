"""Columns of join keys in, the column of entity keys out: the text that `materialize.entity_key` fixes, for all rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from materialize.entity_key import ESCAPES

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["entity_keys"]


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
