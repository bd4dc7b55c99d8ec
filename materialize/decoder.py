"""Bytes to values: records of format version 1, as docs/format.md fixes them. One record alone, as a reader needs it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Context, Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from materialize.errors import OnlineStoreError
from materialize.feature_type import FIXED_WIDTHS, MAX_PRECISION, FeatureType
from materialize.model import from_us
from materialize.online.base import HEADER, TOMBSTONE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Flags = npt.NDArray[np.bool_]

__all__ = ["FORMAT_VERSION", "Decoder", "Header", "headers", "narrowed"]

FORMAT_VERSION = 1
HAS_NULLS = 2
HEADER_DTYPE = [
    ("format", "u1"),
    ("flags", "u1"),
    ("schema", "<u2"),
    ("event_us", "<i8"),
    ("created_us", "<i8"),
    ("version", "<i8"),
    ("floor", "<i8"),
]
UNIX_DATE = date(1970, 1, 1)
#: Bytes in the fixed section that say how long a value in the variable section is.
LENGTH_BYTES = 4
#: The default context would round decimals to 28 digits.
EXACT = Context(prec=MAX_PRECISION)
NUMBER_CODES = {
    "bool": "?",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "float32": "f",
    "float64": "d",
    "date": "i",
    "timestamp": "q",
}


@dataclass(frozen=True, slots=True)
class Header:
    """The first 36 bytes of a record."""

    flags: int
    schema_id: int
    event_us: int
    created_us: int
    version: int
    floor: int

    @classmethod
    def unpack(cls, record: bytes) -> Header:
        """Raises OnlineStoreError for bytes that are no record of this format version."""
        if len(record) < HEADER.size or record[0] != FORMAT_VERSION:
            found = f"{len(record)} bytes" if len(record) < HEADER.size else f"format version {record[0]}"
            raise OnlineStoreError(
                f"could not decode a stored value: found {found}, expected a record of format version {FORMAT_VERSION}. "
                "Something else writes under this prefix, or a newer release did. Upgrade this reader, or run: materialize rebuild VIEW"
            )
        return cls(*HEADER.unpack_from(record)[1:])

    @property
    def tombstone(self) -> bool:
        return bool(self.flags & TOMBSTONE)


def headers(records: Sequence[bytes]) -> npt.NDArray[Any]:
    """The headers of *records* as one structured array: flags, schema, event_us, created_us, version, floor."""
    for record in records:
        if len(record) < HEADER.size or record[0] != FORMAT_VERSION:
            Header.unpack(record)  # raises, with what was found
    return np.frombuffer(b"".join(record[: HEADER.size] for record in records), dtype=HEADER_DTYPE)


class Decoder:
    """Decodes records of one schema to Python values."""

    def __init__(self, features: Mapping[str, FeatureType]) -> None:
        self.features = dict(features)
        self.names = tuple(self.features)
        self.fixed = struct.Struct("<" + "".join(_slot_code(kind) for kind in features.values()))
        self.bitmap_size = (len(features) + 7) // 8
        self.variable = [index for index, kind in enumerate(features.values()) if kind.width is None]
        converters = [(index, _converter(kind)) for index, kind in enumerate(features.values())]
        self.converters = [(index, convert) for index, convert in converters if convert is not None]

    def decode(self, record: bytes) -> dict[str, Any]:
        """The feature values of a live record by name, None for null: int, float, bool, str, bytes, date, datetime, Decimal or list.

        Raises OnlineStoreError for a record that is shorter or longer than its schema says.
        """
        return dict(zip(self.names, self.values(record), strict=True))

    def values(self, record: bytes) -> Sequence[Any]:
        """The same without names, in the schema's order."""
        start, nulls = HEADER.size, 0
        if record[1] & HAS_NULLS:
            nulls = int.from_bytes(record[start : start + self.bitmap_size], "little")
            start += self.bitmap_size
        position = start + self.fixed.size
        if len(record) < position:
            raise _damaged(len(record), f"at least {position}")
        slots = self.fixed.unpack_from(record, start)
        size = position + sum(slots[index] for index in self.variable) if self.variable else position
        if len(record) != size:
            raise _damaged(len(record), str(size))
        if not (nulls or self.converters or self.variable):
            return slots
        values: list[Any] = list(slots)
        for index in self.variable:
            end = position + slots[index]
            values[index], position = record[position:end], end
        for index, convert in self.converters:
            if not nulls >> index & 1:
                values[index] = convert(values[index])
        if nulls:
            values = [None if nulls >> index & 1 else value for index, value in enumerate(values)]
        return values

    @cached_property
    def dtypes(self) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """A record up to its variable section, without and with a null bitmap; fields by the place of the feature."""
        fixed = [(str(index), _field(kind)) for index, kind in enumerate(self.features.values())]
        head, bitmap = ("head", f"V{HEADER.size}"), ("bitmap", f"({self.bitmap_size},)u1")
        return np.dtype([head, *fixed]), np.dtype([head, bitmap, *fixed])

    def numbers(self, records: Sequence[bytes], names: Sequence[str], *, nulls: bool) -> tuple[Floats, Flags]:
        """Features of live records as numbers, for columns of numbers and truth values only.

        *records*: all with a null bitmap or, without *nulls*, all without. Returns: values float64 and null bool, both of shape
        (n, k), in the order of *names*; the value of a null means nothing. Raises as `decode` does.
        """
        dtype, wanted = self.dtypes[nulls], records
        if self.variable or not {dtype.itemsize}.issuperset(map(len, records)):
            for record in records:  # 1 us each; raises where one is damaged
                self.values(record)
            wanted = [record[: dtype.itemsize] for record in records]
        rows = np.frombuffer(b"".join(wanted), dtype=dtype)
        values = np.empty((len(records), len(names)))
        places = [self.names.index(name) for name in names]
        for column, place in enumerate(places):
            values[:, column] = rows[str(place)]
        if not nulls:
            return values, np.zeros(values.shape, dtype=bool)
        return values, np.unpackbits(rows["bitmap"], axis=1, bitorder="little")[:, places].astype(bool)


def narrowed(record: bytes, held: Mapping[str, FeatureType], wanted: Mapping[str, FeatureType]) -> bytes:
    """A live *record* with the features *held* as `encode` lays out those *wanted* alone, of which each is held.

    The schema id stays. Raises OnlineStoreError for a record that is shorter or longer than its schema says.
    """
    bitmap, position = 0, HEADER.size
    if record[1] & HAS_NULLS:
        position += (len(held) + 7) // 8
        bitmap = int.from_bytes(record[HEADER.size : position], "little")
    fixed, variable = {}, {}
    end = position + sum(kind.width or LENGTH_BYTES for kind in held.values())
    nulls = 0
    for index, (name, kind) in enumerate(held.items()):
        width = kind.width or LENGTH_BYTES
        fixed[name], position = record[position : position + width], position + width
        if kind.width is None:
            start, end = end, end + int.from_bytes(fixed[name], "little")
            variable[name] = record[start:end]
        if name in wanted:
            nulls |= (bitmap >> index & 1) << list(wanted).index(name)
    if end != len(record):
        raise _damaged(len(record), str(end))
    flags = record[1] & ~HAS_NULLS | (HAS_NULLS if nulls else 0)
    head = record[:1] + bytes([flags]) + record[2 : HEADER.size]
    marks = nulls.to_bytes((len(wanted) + 7) // 8, "little") if nulls else b""
    return b"".join((head, marks, *(fixed[name] for name in wanted), *(variable.get(name, b"") for name in wanted)))


def _damaged(found: int, expected: str) -> OnlineStoreError:
    return OnlineStoreError(
        f"could not decode a stored value: found {found} bytes, expected {expected} by its schema. "
        "The value is damaged, or something else writes under this prefix. Run: materialize rebuild VIEW"
    )


def _slot_code(kind: FeatureType) -> str:
    """What `struct` calls a feature's slot in the fixed section."""
    if kind.width is None:
        return "I"
    return f"{kind.width}s" if kind.kind in {"list", "decimal"} else NUMBER_CODES[kind.kind]


def _field(kind: FeatureType) -> str:
    """What numpy calls the same."""
    if kind.width is None:
        return "<u4"
    return f"V{kind.width}" if kind.kind in {"list", "decimal"} else f"<{NUMBER_CODES[kind.kind]}"


def _converter(kind: FeatureType) -> Callable[[Any], Any] | None:
    """What makes a value of what `struct` and slicing give; None where that is the value."""
    if kind.kind == "list":
        width, code = FIXED_WIDTHS[kind.item], NUMBER_CODES[kind.item]
        return lambda data: list(struct.unpack(f"<{len(data) // width}{code}", data))
    if kind.kind == "decimal":
        return lambda data: Decimal(int.from_bytes(data, "little", signed=True)).scaleb(-kind.scale, EXACT)
    return CONVERTERS.get(kind.kind)


CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "string": bytes.decode,
    "date": lambda days: UNIX_DATE + timedelta(days=days),
    "timestamp": from_us,
}
