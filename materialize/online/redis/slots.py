"""Entity keys in, the hash slots of a cluster out, by columns; and for each slot a text that hashes to it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from redis.crc import key_slot

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["SLOTS", "entity_slots", "slot_of", "slot_tags"]

#: Hash slots of a cluster.
SLOTS = 16_384
#: Numbers that are tried at once for texts of every slot; 170,000 are expected to do.
TRIED = 2**18


def slot_of(name: bytes) -> int:
    """The slot of one whole key, by the driver."""
    return int(key_slot(name))


def entity_slots(keys: pa.BinaryArray, name: str = "") -> npt.NDArray[np.int64]:
    """The slot of the record's key ``name:{entity key}``, for each entity key. 15 ns for a byte.

    A key that is empty or has a closing brace in it (entity keys of ours have none) takes the slow way.
    """
    slots = _crc16(keys).astype(np.int64) % SLOTS
    odd = pc.or_(pc.equal(pc.binary_length(keys), 0), pc.match_substring(keys, "}"))
    for row in np.flatnonzero(odd.to_numpy(zero_copy_only=False)):
        slots[row] = slot_of(b"%b:{%b}" % (name.encode(), keys[int(row)].as_py()))
    return slots


@lru_cache(maxsize=1)
def slot_tags() -> tuple[bytes, ...]:
    """For each slot the smallest number whose digits hash to it."""
    numbers = pa.array(range(TRIED)).cast(pa.string()).cast(pa.binary())
    slots, first = np.unique(entity_slots(numbers), return_index=True)
    if len(slots) != SLOTS:
        raise AssertionError(f"expected {TRIED} numbers to hit {SLOTS} slots, found {len(slots)}")
    return tuple(b"%d" % number for number in first)


def _table() -> npt.NDArray[np.uint16]:
    """CRC16 of each byte: XMODEM, polynomial 0x1021, as the cluster specification has it."""
    table = np.arange(256, dtype=np.uint16) << 8
    for _ in range(8):
        table = np.where(table & 0x8000, (table << 1) ^ 0x1021, table << 1).astype(np.uint16)
    return np.asarray(table, dtype=np.uint16)


TABLE = _table()


def _crc16(column: pa.BinaryArray) -> npt.NDArray[np.uint16]:
    """One step for each place in the longest value, over all values that reach it; the longest are first for that."""
    if not len(column):
        return np.empty(0, dtype=np.uint16)
    _, offset_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(data_buffer or b"", dtype=np.uint8)
    sizes = np.diff(offsets)
    order = np.argsort(-sizes, kind="stable")
    starts, crc = offsets[:-1][order].astype(np.int64), np.zeros(len(column), dtype=np.uint16)
    # reaching[n]: how many values have more than n bytes.
    reaching = len(column) - np.cumsum(np.bincount(sizes))
    for place in range(int(sizes.max(initial=0))):
        some = crc[: reaching[place]]
        byte = data[starts[: reaching[place]] + place]
        crc[: reaching[place]] = (some << 8) ^ TABLE[(some >> 8) ^ byte]
    found = np.empty_like(crc)
    found[order] = crc
    return found
