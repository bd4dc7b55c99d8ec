"""Records back to values by docs/format.md alone, with struct and without the product: what a load left is compared with the table."""

from __future__ import annotations

import sqlite3
import struct
from typing import TYPE_CHECKING, Any

from lake import VIEW
from measure import WrongResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import redis
    from lake import Lake

__all__ = ["Stored", "agree", "check", "in_dynamodb", "in_redis", "in_sqlite", "values"]

#: Format version, flags, schema id, event_us, created_us, version, floor.
HEADER = struct.Struct("<BBHqqqq")
FORMAT_VERSION, TOMBSTONE, HAS_NULLS = 1, 1, 2
#: What the slot of each type holds; of a string its length in bytes.
SLOTS = {"float64": "d", "int64": "q", "timestamp": "q", "bool": "?", "string": "I"}
#: Keys of one read of DynamoDB, its own limit.
READ = 100

#: What a store holds of one entity: format version, flags, event_us, created_us, and everything behind the header.
Stored = tuple[int, int, int, int, bytes]


def values(kinds: Sequence[str], flags: int, body: bytes) -> tuple[Any, ...]:
    """The values of a live record with features of *kinds*; *body* is what is behind its header. Raises ValueError for other bytes."""
    nulls, start = 0, 0
    if flags & HAS_NULLS:
        start = (len(kinds) + 7) // 8
        nulls = int.from_bytes(body[:start], "little")
    layout = struct.Struct("<" + "".join(SLOTS[kind] for kind in kinds))
    slots, at = layout.unpack_from(body, start), start + layout.size
    found: list[Any] = []
    for index, (kind, slot) in enumerate(zip(kinds, slots, strict=True)):
        value = slot
        if kind == "string":
            value, at = body[at : at + slot].decode(), at + slot
        found.append(None if nulls >> index & 1 else value)
    if at != len(body):
        raise ValueError(f"found {len(body)} bytes, expected {at}")
    return tuple(found)


def in_redis(client: redis.Redis, keys: Sequence[str]) -> list[Stored | None]:
    records = client.mget([f"fs:{VIEW}:{{{key}}}" for key in keys])
    return [None if record is None else of_record(record) for record in records]


def of_record(record: bytes) -> Stored:
    format_version, flags, _, event_us, created_us, _, _ = HEADER.unpack_from(record)
    return format_version, flags, event_us, created_us, record[HEADER.size :]


def in_sqlite(file: Path, keys: Sequence[str]) -> list[Stored | None]:
    found: list[Stored | None] = []
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        for key in keys:
            row = connection.execute(
                "SELECT lead, event_us, created_us, payload FROM records WHERE view = ? AND entity_key = ?",
                (VIEW, key.encode()),
            ).fetchone()
            found.append(None if row is None else (row[0][0], row[0][1], row[1], row[2], row[3]))
    finally:
        connection.close()
    return found


def in_dynamodb(api: Any, table: str, keys: Sequence[str]) -> list[Stored | None]:
    items: dict[str, Stored] = {}
    for low in range(0, len(keys), READ):
        wanted = [{"k": {"S": key}} for key in keys[low : low + READ]]
        answer = api.batch_get_item(RequestItems={table: {"Keys": wanted, "ConsistentRead": True}})
        for item in answer["Responses"][table]:
            record = bytes(item["r"]["B"])
            items[item["k"]["S"]] = (record[0], record[1], int(item["e"]["N"]), int(item["c"]["N"]), record[4:])
    return [items.get(key) for key in keys]


def check(name: str, table: Lake, day: int, read: Any) -> None:
    """Compare what ``read(keys)`` gives for the sampled entities with the rows after *day*. Raises WrongResult."""
    expected = table.expected(day)
    kinds = list(table.feature_types.values())
    for key, record in zip(expected, read(list(expected)), strict=True):
        if record is None:
            raise WrongResult(f"{name}: an entity of the sample is not in the store")
        format_version, flags, event_us, created_us, body = record
        if (format_version, flags & TOMBSTONE) != (FORMAT_VERSION, 0):
            raise WrongResult(
                f"{name}: found format version {format_version} and flags {flags}, expected a live record"
            )
        if (event_us, created_us, values(kinds, flags, body)) != expected[key]:
            raise WrongResult(f"{name}: an entity of the sample holds other values than its latest row")


def agree(name: str, counts: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Compare a run's report with what must have happened: every entity counted, nothing dropped. Raises WrongResult."""
    found = {key: report[key] for key in counts}
    if found != dict(counts):
        raise WrongResult(f"{name}: found {found}, expected {dict(counts)}")
    if report["entities"] != report["written"] + report["stale"] + report["unchanged"] + report["expired"]:
        raise WrongResult(f"{name}: the counts do not add up: {report}")
