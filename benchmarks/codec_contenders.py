"""Rows to records and back, on one core: sizes in; seconds of each way in each round out, as a JSON line.

Nothing but these functions is timed: the frame, the entity keys and the records are ready. What must come out is compared once, outside
of all timings, with an encoder and a decoder that follow docs/format.md with struct alone (`records.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import time
from typing import TYPE_CHECKING, Any

if hasattr(os, "sched_setaffinity"):  # before the libraries count the cores
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import lake
import numpy as np
import polars as pl
import records
from generate_lake import values
from measure import WrongResult

from materialize import codec
from materialize.codec import entity_keys
from materialize.decoder import Decoder
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.online.base import HEADER
from materialize.piece import BATCH_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

#: 2025-03-01 in microseconds.
DAY_AT = 1_740_787_200_000_000
VERSION, SCHEMA_ID = 2**40 + 7, 513
#: Records decoded at once by `Decoder.numbers`.
AT_ONCE = 1_000
#: Rows turned at once.
BLOCK = 2_048
#: How often each way is done before it is timed.
WARM = 1


class Rows:
    """The rows of one shape, as a run has them when it encodes; *records*: what comes out."""

    def __init__(self, given: argparse.Namespace) -> None:
        table = lake.Lake(lake.Path(), given.rows, 1, given.features, given.kind, given.seed)
        rng = np.random.default_rng(given.seed)
        self.types = table.feature_types
        kinds = {name: FeatureType.parse(kind) for name, kind in self.types.items()}
        self.view = FeatureView("codec", "", ("user_id",), "event_timestamp", kinds, ("default",))
        columns = {name: values(rng, kind, given.rows) for name, kind in table.feature_kinds.items()}
        self.features = pl.DataFrame(columns).rechunk()
        event_us = DAY_AT + rng.integers(0, 10**9, given.rows)
        self.order = pl.DataFrame({"event_us": event_us, "created_us": event_us + 1}).with_columns(
            version=pl.lit(VERSION, pl.Int64)
        )
        self.ids = pl.DataFrame({"user_id": np.arange(given.rows)})
        self.keys = entity_keys(self.ids, ("user_id",))
        width = int(self.features.estimated_size()) // given.rows + HEADER.size
        self.size = max(1, BATCH_BYTES // width)
        self.records = [record for batch in self.encoded() for record in batch.values.to_pylist()]
        self.decoder = Decoder(kinds)
        self.layout = struct.Struct("<" + "".join(records.SLOTS[kind] for kind in self.types.values()))
        self.bytes = sum(map(len, self.records))

    def encoded(self) -> list[Any]:
        """In the batches of a run."""
        return [
            codec.encode(
                self.keys.slice(low, self.size),
                self.order.slice(low, self.size),
                self.features.slice(low, self.size),
                self.view,
                schema_id=SCHEMA_ID,
            )
            for low in range(0, self.features.height, self.size)
        ]

    def check(self) -> None:
        """The records hold the rows, and both decoders say so."""
        plain = self.features.with_columns(pl.col(pl.Datetime("us", "UTC")).to_physical())
        expected = sorted(zip(self.order["event_us"], plain.iter_rows(), strict=True), key=repr)
        decoded = sorted((self.plain(record) for record in self.records), key=repr)
        if decoded != expected:
            raise WrongResult("the records do not hold the rows that were encoded")
        for record in self.records[: lake.HOURS]:
            found = [
                value if not hasattr(value, "timestamp") else microseconds(value)
                for value in self.decoder.values(record)
            ]
            if tuple(found) != self.plain(record)[1]:
                raise WrongResult("the product's decoder gives other values than docs/format.md says")

    def plain(self, record: bytes) -> tuple[int, tuple[Any, ...]]:
        _, flags, event_us, _, body = records.of_record(record)
        return event_us, records.values(list(self.types.values()), flags, body)


def microseconds(moment: Any) -> int:
    from generate_lake import microseconds as of

    return of(moment)


def packed(rows: Rows) -> list[bytes]:
    """What people write: struct, row by row, and no order, no nulls."""
    blank = {"string": "", "bool": False}
    fills = [blank.get(kind, 0) for kind in rows.types.values()]
    plain = rows.features.with_columns(pl.col(pl.Datetime("us", "UTC")).to_physical())
    if "string" not in rows.types.values():
        return [rows.layout.pack(*row) for row in plain.iter_rows()]
    texts = [index for index, kind in enumerate(rows.types.values()) if kind == "string"]
    found = []
    for row in plain.iter_rows():
        filled = [fill if value is None else value for value, fill in zip(row, fills, strict=True)]
        words = [filled[index].encode() for index in texts]
        for index, word in zip(texts, words, strict=True):
            filled[index] = len(word)
        found.append(rows.layout.pack(*filled) + b"".join(words))
    return found


def ways(rows: Rows) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each way, and how many rows it handles."""
    numbers = [
        rows.features[name].to_numpy()
        for name, kind in rows.types.items()
        if kind == "float64" and not rows.features[name].null_count()
    ]
    columns = [numbers[index % len(numbers)] for index in range(len(rows.types))]
    some = rows.records[: max(1, len(rows.records) // 5)]  # a record at a time is slow
    names = list(rows.types)
    found: dict[str, tuple[Callable[[], Any], int]] = {
        "encode": (rows.encoded, rows.features.height),
        "columns to rows": (lambda: transposed(columns), rows.features.height),
        "struct.pack": (lambda: packed(rows), rows.features.height),
        "entity keys": (lambda: entity_keys(rows.ids, ("user_id",)), rows.features.height),
        "decode": (lambda: [rows.decoder.decode(record) for record in some], len(some)),
        "struct.unpack": (lambda: [rows.layout.unpack_from(record, HEADER.size) for record in some], len(some)),
    }
    if set(rows.types.values()) == {"float64"}:
        batches = [rows.records[low : low + AT_ONCE] for low in range(0, len(rows.records), AT_ONCE)]
        found |= {
            "hash fields": (lambda: [decode_fields(each) for each in hashes(rows, names, len(some))], len(some)),
            "decode matrix": (
                lambda: [rows.decoder.numbers(batch, names, nulls=False) for batch in batches],
                len(rows.records),
            ),
            "viewed": (lambda: [viewed(batch) for batch in batches], len(rows.records)),
        }
    return found


def transposed(columns: list[Any]) -> Any:
    """Columns to rows, a few thousand rows at a time, so that they stay in the processor's cache."""
    found = np.empty((len(columns[0]), len(columns)))
    for low in range(0, len(found), BLOCK):
        for index, column in enumerate(columns):
            found[low : low + BLOCK, index] = column[low : low + BLOCK]
    return found


def viewed(batch: list[bytes]) -> Any:
    """Records of float64 without nulls as a matrix: joined, and seen as numbers."""
    joined = np.frombuffer(b"".join(batch), dtype=np.uint8).reshape(len(batch), -1)
    return np.ascontiguousarray(joined[:, HEADER.size :]).view("<f8")


HASHES: list[dict[bytes, bytes]] = []


def hashes(rows: Rows, names: list[str], number: int) -> list[dict[bytes, bytes]]:
    """What redis-py's HGETALL gives of the textbook's hashes; made once."""
    if not HASHES:
        fields = [name.encode() for name in names]
        HASHES.extend(
            {field: struct.pack("<d", value) for field, value in zip(fields, row, strict=True)}
            for row in rows.features.head(number).iter_rows()
        )
    return HASHES


def decode_fields(fields: dict[bytes, bytes]) -> dict[str, Any]:
    return {name.decode(): struct.unpack("<d", value)[0] for name, value in fields.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows to records and back, on one core.")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--features", type=int, required=True)
    parser.add_argument("--kind", choices=lake.KINDS, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seed", type=int, default=lake.SEED)
    given = parser.parse_args()
    rows = Rows(given)
    rows.check()
    chosen = ways(rows)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for number in range(-WARM, given.rounds):
        for name in list(chosen) if number % 2 else list(reversed(chosen)):
            work, _ = chosen[name]
            used, begin = time.process_time(), time.perf_counter()
            work()
            seconds, cpu = time.perf_counter() - begin, time.process_time() - used
            if number >= 0:
                found[name].append({"seconds": seconds, "cpu_seconds": cpu})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    handled = {name: count for name, (_, count) in chosen.items()}
    print(
        json.dumps(
            {"ways": found, "rows": handled, "bytes": rows.bytes, "records": len(rows.records), "peak_bytes": peak}
        )
    )


if __name__ == "__main__":
    main()
