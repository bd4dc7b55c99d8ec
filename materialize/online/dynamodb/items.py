"""Batches in, JSON out: what DynamoDB is sent, built by columns. One item is one record.

Numbers are decimal text. docs/format.md describes an item for readers.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, replace as altered
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from materialize.online.base import HEADER, LEAD_BYTES, pack_order
from materialize.order import Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from materialize.model import Retention
    from materialize.online.base import EncodedBatch

__all__ = [
    "CELL",
    "KEY",
    "MAX_VALUE_BYTES",
    "ORDER",
    "UNIT_BYTES",
    "VIEW",
    "Columns",
    "Frames",
    "Statement",
    "cell_key",
    "columns",
    "item_bytes",
    "json_lines",
    "record_of",
    "stored_order",
    "values_of",
]

#: Attribute names count as stored bytes, so they have one letter: entity key, view (in a shared table only), record without its
#: order, event time, created time, version, floor, expiry in seconds.
KEY, VIEW, RECORD, EVENT, CREATED, VERSION, FLOOR, EXPIRES = "k", "v", "r", "e", "c", "n", "f", "x"
ORDER = (EVENT, CREATED, VERSION, FLOOR)
#: Cells are items whose key begins so; in entity keys braces are escaped (docs/format.md).
CELL = "{"
#: The event time of a tombstone: below that of any row (docs/format.md, Limits), so that every row is newer.
NO_EVENT = -(2**53) - 1
#: Names and numbers of an item: at most 8 letters and five numbers of 11 bytes
#: (https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/CapacityUnitCalculations.html).
OTHER_BYTES = 64
#: A write unit pays for so many bytes of an item, rounded up.
UNIT_BYTES = 1024
#: An item has at most 400 KB: what is left for a record beside the longest key, the longest view name and the numbers.
MAX_VALUE_BYTES = 400 * 1024 - 2048 - 255 - OTHER_BYTES

#: JSON texts by attribute, one per row or one for all rows.
Columns = dict[str, "pa.BinaryArray | bytes"]


@dataclass(frozen=True, slots=True)
class Frames:
    """One JSON text per row, each with a comma behind it, in one buffer: row i is ``data[ends[i]:ends[i + 1]]``."""

    data: memoryview
    ends: npt.NDArray[np.int64]

    def __getitem__(self, row: int) -> memoryview:
        return self.slice(range(row, row + 1))

    def slice(self, rows: range) -> memoryview:
        """The texts of *rows*, without the last comma."""
        return self.data[self.ends[rows.start] : self.ends[rows.stop] - 1]

    def within(self, start: int, size: int) -> int:
        """How many rows from *start* on begin within *size* bytes."""
        return int(np.searchsorted(self.ends[start:-1], self.ends[start] + size))


@dataclass(frozen=True, slots=True)
class Statement:
    """A PartiQL statement: its text and the attributes that its parameters are, in order. ``tells``: what is there, if that refuses it."""

    text: str
    parameters: tuple[str, ...]
    tells: bool

    @classmethod
    def insert(cls, table: str, attributes: Sequence[str]) -> Statement:
        """Store an item that is not there; else DuplicateItem."""
        shape = ", ".join(f"'{name}': ?" for name in attributes)
        return cls(f'INSERT INTO "{table}" VALUE {{{shape}}}', tuple(attributes), tells=False)

    @classmethod
    def update(
        cls, table: str, keys: Sequence[str], sets: Sequence[str], removes: Sequence[str], condition: str
    ) -> Statement:
        """Change an item that is there and meets *condition*, in which ``{n}`` stands for the parameter ``n``; else ConditionalCheckFailed."""
        named: list[str] = []

        class _Marks(dict[str, str]):
            def __missing__(self, name: str) -> str:
                named.append(name)
                return "?"

        where = condition.format_map(_Marks())
        text = " ".join(
            [
                f'UPDATE "{table}"',
                *(f"SET {name}=?" for name in sets),
                *(f"REMOVE {name}" for name in removes),
                "WHERE",
                " AND ".join([*(f"{name}=?" for name in keys), where]),
            ]
        )
        return cls(text, (*sets, *keys, *named), tells=True)

    def frames(self, of: Columns) -> Frames:
        """One statement per row, as requests hold it."""
        values = [part for name in self.parameters for part in (of[name], b",")][:-1]
        return _joined([self._head(), *values, self._tail() + b","])

    def frame(self, of: Mapping[str, bytes]) -> bytes:
        """One statement for one row."""
        return self._head() + b",".join(of[name] for name in self.parameters) + self._tail()

    def _head(self) -> bytes:
        return b'{"Statement":' + json.dumps(self.text).encode() + b',"Parameters":['

    def _tail(self) -> bytes:
        return b'],"ReturnValuesOnConditionCheckFailure":"ALL_OLD"}' if self.tells else b"]}"


def columns(batch: EncodedBatch, view: str, retention: Retention) -> Columns:
    """The attributes of *batch* as JSON texts. Without an expiry there is no ``x``."""
    events = np.full(len(batch.keys), NO_EVENT) if batch.tombstone else batch.event_us
    found: Columns = {
        KEY: _keys(batch.keys),
        VIEW: json.dumps({"S": view}).encode(),
        RECORD: _records(batch.values),
        EVENT: _numbers(events),
        CREATED: _numbers(batch.created_us),
        VERSION: _numbers(batch.version),
        FLOOR: _numbers(_floors(batch.values)),
    }
    if batch.tombstone:
        found[EXPIRES] = b'{"N":"%d"}' % -(-retention.keep_until_us // 10**6)
    elif retention.ttl_us is not None:
        # What floor the item keeps is known to the store alone, so each stays as long as one with a floor.
        due = np.maximum(batch.event_us + retention.ttl_us, retention.keep_until_us)
        found[EXPIRES] = _numbers(-(-due // 10**6))
    return found


def json_lines(of: Columns, attributes: Sequence[str], *, condition: str | None) -> bytes:
    """One item per line, as files hold them that DynamoDB reads; it is put where *condition* holds."""
    parts: list[Any] = [b'{"Item":']
    for place, name in enumerate(attributes):
        parts += [b'%b"%b":' % (b"," if place else b"{", name.encode()), of[name]]
    end = b"}" if condition is None else b',"ConditionExpression":%b}' % json.dumps(condition).encode()
    return bytes(_joined([*parts, b"}" + end + b"\n"]).data)


def item_bytes(batch: EncodedBatch) -> npt.NDArray[np.int64]:
    """What each item of *batch* takes at most, in bytes as DynamoDB counts them."""
    sizes = pc.add(pc.binary_length(batch.keys), pc.binary_length(batch.values))
    found: npt.NDArray[np.int64] = sizes.to_numpy(zero_copy_only=False).astype(np.int64) + OTHER_BYTES
    return found


def stored_order(item: Mapping[str, Any]) -> Record:
    """The order fields of an item as boto3 gives it, without its payload."""
    event, created, version, floor = (int(item[name]["N"]) for name in ORDER)
    return Record(None if event == NO_EVENT else event, created, version, floor)


def cell_key(name: str) -> str:
    """The item's key of a cell."""
    return f"{CELL}{name}}}"


def record_of(item: Mapping[str, Any]) -> bytes:
    """The record that an item holds, as boto3 gives it (docs/format.md)."""
    return pack_order(altered(stored_order(item), payload=bytes(item[RECORD]["B"])))


def values_of(record: Record, expires: int | None) -> dict[str, Any]:
    """The attributes of *record*, without its key, as DynamoDB's JSON has them. *expires*: in microseconds."""
    event = NO_EVENT if record.event_us is None else record.event_us
    numbers = dict(zip(ORDER, (event, record.created_us, record.version, record.floor), strict=True))
    if expires is not None:
        numbers[EXPIRES] = -(-expires // 10**6)
    content = base64.b64encode(record.payload).decode()
    return {RECORD: {"B": content}} | {name: {"N": str(number)} for name, number in numbers.items()}


# --- columns -----------------------------------------------------------------------------------------------------------


def _joined(parts: Sequence[pa.BinaryArray | bytes]) -> Frames:
    texts = [pa.scalar(part, pa.binary()) if isinstance(part, bytes) else part for part in parts]
    rows = next(len(part) for part in parts if not isinstance(part, bytes))
    joined = pc.binary_join_element_wise(*texts, pa.scalar(b"", pa.binary()))
    _, ends, data = joined.buffers()
    found = np.frombuffer(ends, dtype=np.int32, count=rows + 1).astype(np.int64)
    return Frames(memoryview(data)[: found[-1]], found)


def _numbers(values: npt.NDArray[np.int64]) -> pa.BinaryArray:
    return _around(b'{"N":"', pc.cast(pc.cast(pa.array(values), pa.string()), pa.binary()), b'"}')


def _keys(keys: pa.BinaryArray) -> pa.BinaryArray:
    texts = pc.cast(keys, pa.string())
    if pc.any(pc.match_substring_regex(texts, r'["\\\x00-\x1f]')).as_py():
        return pa.array([json.dumps({"S": text}).encode() for text in texts.to_pylist()], pa.binary())
    return _around(b'{"S":"', keys, b'"}')


def _around(before: bytes, values: pa.BinaryArray, after: bytes) -> pa.BinaryArray:
    parts = [pa.scalar(part, pa.binary()) for part in (before, after, b"")]
    return pc.binary_join_element_wise(parts[0], values, parts[1], parts[2])


def _records(values: pa.BinaryArray) -> pa.BinaryArray:
    """The records without their order fields, in base64: all rows by one call, each padded to whole groups of three bytes."""
    whole = pc.binary_length(values).to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = whole - (HEADER.size - LEAD_BYTES)
    lacking = -lengths % 3
    fill = pa.array([b"", b"\0", b"\0\0"], pa.binary()).take(pa.array(lacking))
    lead, payload = (
        pc.binary_slice(values, 0, LEAD_BYTES),
        pc.binary_slice(values, HEADER.size, int(whole.max(initial=0))),
    )
    padded = pc.binary_join_element_wise(lead, payload, fill, pa.scalar(b"", pa.binary()))
    ends = np.cumsum((lengths + lacking) // 3 * 4)
    content = memoryview(padded.buffers()[2])[: ends[-1] // 4 * 3]
    text = np.frombuffer(bytearray(binascii.b2a_base64(content, newline=False)), dtype=np.uint8)
    text[ends[lacking > 0] - 1] = ord("=")
    text[ends[lacking == 2] - 2] = ord("=")  # noqa: PLR2004 - base64 fills up three bytes
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    encoded = pa.Array.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(text)])
    return _around(b'{"B":"', encoded, b'"}')


def _floors(values: pa.BinaryArray) -> npt.NDArray[np.int64]:
    """The floor in the header of each record."""
    _, ends, data = values.buffers()
    begins = np.frombuffer(ends, dtype=np.int32)[values.offset : values.offset + len(values)].astype(np.int64)
    bytes_of = np.frombuffer(data, dtype=np.uint8)[begins[:, None] + np.arange(HEADER.size - 8, HEADER.size)]
    return np.ascontiguousarray(bytes_of).view("<i8").ravel()
