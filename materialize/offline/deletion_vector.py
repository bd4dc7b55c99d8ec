"""Which rows of a data file a deletion vector removes.

Format: https://github.com/delta-io/delta/blob/master/PROTOCOL.md, "Deletion Vector Format". The bitmaps are read by pyroaring.
"""

from __future__ import annotations

import base64
import uuid
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import numpy.typing as npt
    from pyroaring import BitMap64

__all__ = ["Selection", "deleted_rows", "positions", "vector_id", "vector_path"]

#: First number of a serialized RoaringBitmapArray in the portable format.
PORTABLE = 1681511377
#: Z85 (https://rfc.zeromq.org/spec/32) in the alphabet of Python's Base85.
TO_BASE85 = str.maketrans(
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#",
    "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~",
)
#: Characters of a UUID in Z85.
UUID_CHARACTERS = 20


@dataclass(frozen=True, slots=True)
class Selection:
    """Some rows of a data file: all but ``positions``, or with ``only`` just these. ``positions``: row numbers, in any order."""

    positions: npt.NDArray[np.uint64]
    only: bool = False

    def mask(self, rows: int) -> npt.NDArray[np.bool_]:
        """Whether each of the file's *rows* is selected: bool, shape (rows,)."""
        import numpy as np

        mask = np.full(rows, not self.only, dtype=np.bool_)
        mask[self.positions] = self.only
        return mask


def vector_id(vector: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """What tells a file's deletion vector from another one; None for no vector."""
    return None if vector is None else (vector["storageType"], vector["pathOrInlineDv"], vector.get("offset"))


def vector_path(vector: Mapping[str, Any]) -> str | None:
    """Where the bytes of *vector* are, as a path in the log is written; None for one that is written in the log itself."""
    kind, text = vector["storageType"], vector["pathOrInlineDv"]
    if kind == "i":
        return None
    if kind == "p":
        return str(text)
    if kind != "u":
        raise ValueError(f"found a deletion vector of the storage type {kind!r}, expected u, i or p")
    prefix, name = text[:-UUID_CHARACTERS], uuid.UUID(bytes=_z85(text[-UUID_CHARACTERS:]))
    return f"{prefix}/deletion_vector_{name}.bin".removeprefix("/")


def deleted_rows(vector: Mapping[str, Any] | None, read: Callable[[str, int, int], bytes]) -> BitMap64:
    """The row numbers that *vector*, as the log describes it, removes. *read*: path, offset and length to bytes.

    Raises ValueError for bytes that are not what the log says, FileNotFoundError.
    """
    from pyroaring import BitMap64

    if vector is None:
        return BitMap64()
    path, size = vector_path(vector), vector["sizeInBytes"]
    if path is None:
        data = _z85(vector["pathOrInlineDv"])[:size]
    else:
        framed = read(path, vector.get("offset") or 0, size + 8)
        data, checksum = framed[4:-4], int.from_bytes(framed[-4:], "big")
        if int.from_bytes(framed[:4], "big") != size or zlib.crc32(data) != checksum:
            raise ValueError(f"found a damaged deletion vector in {path}")
    if int.from_bytes(data[:4], "little") != PORTABLE:
        raise ValueError("found a deletion vector in an unknown format, expected a portable RoaringBitmapArray")
    rows = BitMap64.deserialize(data[4:])
    if len(rows) != vector["cardinality"]:
        raise ValueError(f"found a deletion vector of {len(rows)} rows, expected {vector['cardinality']}")
    return rows


def positions(rows: BitMap64) -> npt.NDArray[np.uint64]:
    """Row numbers as an array, ascending."""
    import numpy as np

    return np.array(rows.to_array(), dtype=np.uint64)


def _z85(text: str) -> bytes:
    return base64.b85decode(text.translate(TO_BASE85))
