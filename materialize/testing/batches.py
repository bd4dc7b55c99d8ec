"""Plain rows in, batches for a store out; and what a store holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from materialize.model import Retention
from materialize.online.base import HEADER, TOMBSTONE, EncodedBatch
from materialize.order import NO_FLOOR, stamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.online.base import OnlineStore

__all__ = ["AT", "FOREVER", "Row", "content", "make_batch"]

#: Nothing expires.
FOREVER = Retention(ttl_us=None, keep_until_us=2**53 - 1)
#: Some version.
AT = stamp(1, 10)


class Row(NamedTuple):
    """One record in plain values; ``event_us`` None is a tombstone."""

    key: bytes
    event_us: int | None = 1
    created_us: int = 0
    version: int = AT
    payload: bytes = b"payload"


def make_batch(rows: Sequence[Row], *, floor: int = NO_FLOOR) -> EncodedBatch:
    """A batch of *rows*, all live or all tombstones, with *floor* in each header (for `replace`: the snapshot)."""
    tombstone = any(row.event_us is None for row in rows)
    heads = (
        HEADER.pack(1, TOMBSTONE if tombstone else 0, 7, row.event_us or 0, row.created_us, row.version, floor)
        for row in rows
    )
    return EncodedBatch(
        keys=pa.array([row.key for row in rows], pa.binary()),
        values=pa.array([head + row.payload for head, row in zip(heads, rows, strict=True)], pa.binary()),
        event_us=np.array([row.event_us or 0 for row in rows], dtype=np.int64),
        created_us=np.array([row.created_us for row in rows], dtype=np.int64),
        version=np.array([row.version for row in rows], dtype=np.int64),
        tombstone=tombstone,
    )


def content(store: OnlineStore, view: str = "view") -> dict[bytes, bytes]:
    """Every record of *view* by entity key."""
    return {key: record for keys, records in store.scan(view) for key, record in zip(keys, records, strict=True)}
