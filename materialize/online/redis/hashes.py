"""A batch of a view with the layout `hash` in, the words of its rows out: made by columns, no Python object for a row."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from materialize.online.base import EncodedBatch

__all__ = ["hash_words", "weigh_words"]


def hash_words(batch: EncodedBatch) -> tuple[list[pa.BinaryArray], list[bytes]]:
    """The words of each row as write_hash.lua wants them, a column for each, and those that all rows of a call have in common."""
    texts, none = list(batch.fields.values()), pa.scalar(b"", pa.binary())
    holes = pa.repeat(none, len(batch.keys))
    if any(text.null_count for text in texts):
        nulls = [pc.is_null(text) for text in texts]
        marks = [pc.if_else(null, pa.scalar(b"1", pa.binary()), pa.scalar(b"0", pa.binary())) for null in nulls]
        holes = pc.if_else(reduce(pc.or_, nulls), pc.binary_join_element_wise(*marks, none), holes)
        texts = [pc.fill_null(text, b"") for text in texts]
    return [batch.values, holes, *texts], [b"%d" % len(texts), *map(str.encode, batch.fields)]


def weigh_words(batch: EncodedBatch, *, hashed: bool) -> tuple[list[tuple[bytes, ...]], list[bytes]]:
    """The words of each row of a sample as weigh.lua wants them, and those before them."""
    columns, shared = hash_words(batch) if hashed else ([batch.values], [b""])
    return list(zip(*(column.to_pylist() for column in columns), strict=True)), shared
