"""A batch in, requests that write its rows out: made by columns, no Python object for a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from materialize.online.redis.framing import bulk
from materialize.online.redis.hashes import hash_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from materialize.online.base import EncodedBatch

__all__ = ["BYTES_PER_CALL", "ROWS_PER_CALL", "WORDS_PER_CALL", "Columns", "absent_requests", "columns_of", "in_turn"]

#: Rows per script call: at 1.5 us a row a call keeps readers waiting 0.15 ms; 4,000 rows raised their median to 7 ms.
ROWS_PER_CALL = 100
#: Words of rows of many words per script call, for hashes: a word costs the server about 1 us.
WORDS_PER_CALL = 250
#: Bytes per script call, for long values: one call stays below what a reader should wait for.
BYTES_PER_CALL = 256 * 2**10


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows to be written, framed: keys and values as RESP bulk strings one after the other, each with the n + 1 places where they end.

    ``words``: how many bulk strings the values of one row are. ``shared``: words that all rows of a call have in common, not framed.
    """

    keys: memoryview
    key_ends: npt.NDArray[np.int64]
    values: memoryview
    value_ends: npt.NDArray[np.int64]
    words: int = 1
    shared: Sequence[bytes] = ()

    def calls(self) -> Iterator[tuple[int, int]]:
        """The rows ``[low, high)`` of each script call."""
        return calls(self.value_ends, self.words)

    def requests(self, script: bytes, options: bytes) -> Iterator[bytes]:
        """One call of *script* for some rows after the other, of one server."""
        return (self.request(script, options, low, high) for low, high in list(self.calls()))

    def request(self, script: bytes, options: bytes, low: int, high: int) -> bytes:
        """The call of *script* for some rows, whose keys are declared: one server, or one slot of a cluster."""
        return b"".join(
            (
                b"*%d\r\n$7\r\nEVALSHA\r\n" % self._words_of(high - low),
                script,
                bulk(b"%d" % (high - low)),
                self.keys[self.key_ends[low] : self.key_ends[high]],
                options,
                *map(bulk, self.shared),
                self.values[self.value_ends[low] : self.value_ends[high]],
            )
        )

    def undeclared(self, script: bytes, options: bytes, low: int, high: int) -> bytes:
        """The same for keys of several slots of one server, which are arguments after the options."""
        return b"".join(
            (
                b"*%d\r\n$7\r\nEVALSHA\r\n" % self._words_of(high - low),
                script,
                b"$1\r\n0\r\n",
                options,
                *map(bulk, self.shared),
                self.keys[self.key_ends[low] : self.key_ends[high]],
                self.values[self.value_ends[low] : self.value_ends[high]],
            )
        )

    def _words_of(self, rows: int) -> int:
        """Of a call with so many rows: their keys and values, EVALSHA, the script, the number of keys and three options."""
        return (1 + self.words) * rows + 6 + len(self.shared)


def columns_of(name: str, batch: EncodedBatch, *, hashed: bool) -> Columns:
    """The rows of *batch*, whose keys are below *name*, for the script of their layout."""
    words, shared = hash_words(batch) if hashed else ([batch.values], [])
    keys = framed(batch.keys, before=f"{name}:{{".encode(), after=b"}")
    return Columns(*keys, *framed(*words), len(words), shared)


def calls(ends: npt.NDArray[np.int64], words: int = 1) -> Iterator[tuple[int, int]]:
    """Cut rows into calls of bounded rows, words and bytes; a longer value has a call of its own.

    *ends*: int64, shape (n + 1,), where the values of each row begin and end. *words*: those of each row. Yields: rows ``[low, high)``.
    """
    rows, low = len(ends) - 1, 0
    most = ROWS_PER_CALL if words == 1 else max(1, min(ROWS_PER_CALL, WORDS_PER_CALL // words))
    while low < rows:
        fitting = int(np.searchsorted(ends, ends[low] + BYTES_PER_CALL, side="right")) - 1
        high = min(max(fitting, low + 1), low + most, rows)
        yield low, high
        low = high


def framed(
    *columns: pa.BinaryArray, before: bytes = b"", after: bytes = b""
) -> tuple[memoryview, npt.NDArray[np.int64]]:
    """Every value as a RESP bulk string, those of one row after the other, and the n + 1 positions where rows begin and end."""
    parts: list[bytes | pa.BinaryArray] = [b"$"]
    for column in columns:
        sizes = pc.add(pc.binary_length(column), len(before) + len(after))
        parts += [pc.cast(pc.cast(sizes, pa.string()), pa.binary()), b"\r\n" + before, column, after + b"\r\n$"]
    parts[-1] = after + b"\r\n"
    joined = pc.binary_join_element_wise(
        *(pa.scalar(part, pa.binary()) if isinstance(part, bytes) else part for part in (*parts, b""))
    )
    _, offsets, data = joined.buffers()
    return memoryview(data), np.frombuffer(offsets, dtype=np.int32, count=len(joined) + 1).astype(np.int64)


# --- keys that may be absent -------------------------------------------------------------------------------------------
#
# Of an absent key the order rule says that the record is stored as it is. MSETNX does that for all keys of a call, or for none of them, in
# less than half of a script's time: a script turns every value into a string of Lua, and the servers' Lua hashes each byte of a string.


def in_turn(batch: EncodedBatch) -> list[list[tuple[int, int]]]:
    """The rows ``[low, high)`` of each call of *batch*: first one call, which tells whether the others are worth it, then these."""
    sizes = pc.binary_length(batch.values).to_numpy()
    every = list(calls(np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))))
    return [some for some in (every[:1], every[1:]) if some]


def absent_requests(batch: EncodedBatch, name: str, some: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
    """One MSETNX for the rows of each of *some* calls, which follow each other; the keys are below *name*, the records never expire.

    The reply is 1 where all rows of the call were stored, 0 where none was. All requests are the data of one joined column: in a row of
    it are a key and a value as bulk strings, and before them, in the first row of a call, the words that its request begins with.
    """
    first, end = some[0][0], some[-1][1]
    keys, values = batch.keys[first:end], batch.values[first:end]
    before, after = f"{name}:{{".encode(), b"}"
    words = [b"*%d\r\n$6\r\nMSETNX\r\n" % (1 + 2 * (high - low)) for low, high in some]
    widths = np.zeros(len(keys) + 1, dtype=np.int32)
    widths[[low - first + 1 for low, _ in some]] = [len(word) for word in words]
    ends = np.cumsum(widths, dtype=np.int32)
    heads = pa.BinaryArray.from_buffers(pa.binary(), len(keys), [None, *map(pa.py_buffer, (ends, b"".join(words)))])
    sizes = (pc.add(pc.binary_length(keys), len(before) + len(after)), pc.binary_length(values))
    key_size, value_size = (pc.cast(pc.cast(each, pa.string()), pa.binary()) for each in sizes)
    key = (b"$", key_size, b"\r\n" + before, keys, after + b"\r\n")
    value = (b"$", value_size, b"\r\n", values, b"\r\n")
    parts = (pa.scalar(part, pa.binary()) if isinstance(part, bytes) else part for part in (heads, *key, *value, b""))
    joined = pc.binary_join_element_wise(*parts)
    _, offsets, data = joined.buffers()
    places, stream = np.frombuffer(offsets, dtype=np.int32, count=len(joined) + 1), memoryview(data)
    return (stream[places[low - first] : places[high - first]] for low, high in some)
