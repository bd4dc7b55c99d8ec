"""Records weighed by a server in, the memory that servers need for as many out: records, hash tables, and what has to stay free.

What a record takes is measured. The buckets of the server's hash tables grow by doubling, so what they take depends on the number of
keys and cannot be measured with some: that is computed, as the sources of Redis (dict.c) and Valkey (hashtable.c) have it.
"""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from materialize.online.base import EncodedBatch
    from materialize.online.demand import Demand

__all__ = ["EXPIRY_MS", "ROWS", "Weights", "estimated", "scratch", "sizing", "table_bytes", "weights"]

#: Records of one call: 0.5 ms of the server's time.
ROWS = 50
#: Milliseconds after which a weighed key would leave by itself.
EXPIRY_MS = 60_000
#: Bytes beside key and value where nothing can be measured: entries of tables, string headers, rounding by malloc.
OVERHEAD = 64
#: What MEMORY USAGE does not tell of a Redis key: its table entry of 24 bytes is allocated as 32; an expiry has such an entry of its own.
ENTRY_ROUNDING, EXPIRY_ENTRY = 8, 32
#: The same of each field of a hash: packed, in a hash table of Redis 7, in one of Valkey 9 (50 floats, measured).
PACKED_FIELD, REDIS_FIELD, VALKEY_FIELD = 5, 60, 32
#: Bytes and fields up to which a hash is packed by default: hash-max-listpack-value and hash-max-listpack-entries.
PACKED_BYTES, PACKED_FIELDS = 64, 512
MIB = 2**20
#: Of a machine's memory, what has to be free while a snapshot is saved and pages are copied: ElastiCache's reserved-memory-percent
#: (https://docs.aws.amazon.com/AmazonElastiCache/latest/dg/redis-memory-management.html).
COPY_ON_WRITE = 0.25
#: Bytes that a replica which is behind may hold: client-output-buffer-limit replica 256mb (redis.conf).
REPLICA_BUFFER = 256 * MIB
#: Where a server has too little memory in use for its own ratio to mean something: which ratio is taken.
SMALL, FRAGMENTATION = 256 * MIB, 1.1
SLOTS = 16_384
#: Entries of a bucket of Valkey's hash table from 8.1 on, and its bytes. A full one has 6, and a child.
VALKEY_ENTRIES, VALKEY_BUCKET = 7, 64
#: Bytes of a bucket of Redis' hash table, and of the head of one table, of which a cluster may have one for each slot (MEMORY STATS of an empty one).
REDIS_BUCKET, TABLE_HEAD = 8, 112
#: First versions with buckets of a cache line; with a hash table for each slot of a cluster.
CACHE_LINES = (8, 1)
SLOT_TABLES = {"valkey": (8, 0), "redis": (7, 4)}


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a record in the mean: by MEMORY USAGE, by used_memory (None where it was not asked), and ``each``, which is used for projections:
    all but the buckets of the hash tables. ``how``: where ``each`` comes from, for people.
    """

    each: float
    usage: float | None
    growth: float | None
    how: str


def scratch(view: str) -> str:
    """A name as long as that of *view*, which no view can have: names begin with a letter."""
    return f"~{view[1:]}"


def estimated(batch: EncodedBatch, head: str, why: str, info: Mapping[str, Any] | None = None) -> Weights:
    """What records take by their length alone, because *why*. Hashes by the default settings of the server that *info* is of, else of Redis."""
    each = _mean(pc.binary_length(batch.keys)) + len(head) + 3 + OVERHEAD + _mean(pc.binary_length(batch.values))
    if batch.fields:
        each += _fields_bytes(batch, VALKEY_FIELD if _cache_lines(info or {}) else REDIS_FIELD)
    return Weights(each, None, None, f"estimated from the length of records, not measured: {why}")


def _fields_bytes(batch: EncodedBatch, unpacked_field: int) -> float:
    """What the texts of a record take in the mean, with their names and what a server whose settings are the default ones adds to each."""
    lengths = {name: pc.binary_length(text) for name, text in batch.fields.items()}
    there = [pc.cast(pc.is_valid(length), pa.int64()) for length in lengths.values()]
    longest = pc.max_element_wise(pc.binary_length(batch.values), *lengths.values())
    fields = reduce(pc.add, there, pa.scalar(1, pa.int64()))
    unpacked = pc.or_(pc.greater(longest, PACKED_BYTES), pc.greater(fields, PACKED_FIELDS))
    each = pc.if_else(unpacked, unpacked_field, PACKED_FIELD)
    names = sum(len(name.encode()) * _mean(one) for name, one in zip(lengths, there, strict=True))
    texts = sum(_mean(pc.fill_null(length, 0)) for length in lengths.values())
    return names + texts + _mean(pc.multiply(fields, each))


def _mean(numbers: Any) -> float:
    return float(pc.mean(numbers).as_py())


def weights(
    replies: Sequence[Sequence[int]], info: Mapping[str, Any], *, expires: bool, hashed: bool = False
) -> Weights:
    """*replies*: of weigh.lua; with one key each in a cluster, where used_memory tells nothing of so little."""
    usage = statistics.fmean(size for reply in replies for size in reply[1:])
    more: float = 0 if _cache_lines(info) else ENTRY_ROUNDING + EXPIRY_ENTRY * expires
    if hashed:
        # Each field in a hash table has such an entry too. What used_memory grows by tells nothing where a row is many words.
        unpacked = sum(reply[0] for reply in replies) / sum(len(reply) - 1 for reply in replies)
        more += 0 if _cache_lines(info) else ENTRY_ROUNDING * unpacked
        how = f"MEMORY USAGE and {more:.0f} bytes of table entries; of a record {unpacked:.1f} fields are in a hash table, the others packed"
        return Weights(usage + more, usage, None, how)
    if max(map(len, replies)) <= 2:  # noqa: PLR2004 - one key
        return Weights(usage + more, usage, None, f"MEMORY USAGE and {more} bytes of table entries")
    # The median: a table that is doubled in one of the calls is not part of a record.
    growth = statistics.median(reply[0] / (len(reply) - 1) for reply in replies)
    if _cache_lines(info):
        return Weights(usage, usage, growth, "MEMORY USAGE; keys have no table entries beside")
    if growth < usage:
        return Weights(
            usage + more,
            usage,
            growth,
            f"MEMORY USAGE and {more} bytes of table entries, because used_memory grew less",
        )
    return Weights(growth, usage, growth, "growth of used_memory; MEMORY USAGE leaves the entry of an expiry out")


def table_bytes(info: Mapping[str, Any], keys: int, *, expires: bool, slots: int | None = None) -> float:
    """The buckets of the hash tables of *keys*, bytes. *slots*: of a cluster that the server owns; None for no cluster."""
    kind, version = _kind(info)
    tables = slots if slots and version >= SLOT_TABLES[kind] else 1
    one = keys / tables
    if _cache_lines(info):
        buckets = 2.0 ** math.ceil(math.log2(max(one / VALKEY_ENTRIES, 1)))
        size = VALKEY_BUCKET * (buckets + buckets * _children(one / buckets))
    else:
        size = REDIS_BUCKET * 2.0 ** math.ceil(math.log2(max(one, 4)))
    head = TABLE_HEAD if tables > 1 else 0
    return float((size + head) * tables) * (1 + expires)


def _children(mean: float) -> float:
    """Child buckets of a bucket that *mean* keys hash to, by Poisson's law: one for 8 to 13 keys, two for 14 to 19 ..."""
    chance, expected = math.exp(-mean), 0.0
    for keys in range(64):
        expected += chance * math.ceil(max(0, keys - VALKEY_ENTRIES) / (VALKEY_ENTRIES - 1))
        chance *= mean / (keys + 1)
    return expected


def sizing(
    weighed: Weights, told: Mapping[str, Mapping[str, Any]], demand: Demand, *, expires: bool, slots: int | None
) -> dict[str, Any]:
    """The memory for *demand*, as facts for people. *told*: INFO of each server by name. *slots*: those of the server with most of a
    cluster's, None for a single server.
    """
    info = max(told.values(), key=lambda one: int(one.get("used_memory", 0)), default={})
    share = 1.0 if slots is None else slots / SLOTS
    keys = math.ceil(demand.entities * share)
    tables = table_bytes(info, keys, expires=expires, slots=slots)
    records = keys * weighed.each
    # Each table is doubled beside the old one, which goes when all keys are moved.
    doubling = 2 * tables / (1 + expires)
    buffers = int(info.get("repl_backlog_size", MIB)) + int(info.get("mem_clients_normal", 0))
    own = int(info.get("used_memory_startup", MIB))
    maxmemory = MIB * math.ceil((records + tables + doubling + buffers + own) / MIB)
    ratio, whose = _fragmentation(info)
    resident = maxmemory * ratio + REPLICA_BUFFER
    return {
        "bytes_each": round(weighed.each + tables / max(keys, 1), 1),
        "record_bytes": round(weighed.each, 1),
        "how": weighed.how,
        "memory_usage_bytes": _rounded(weighed.usage),
        "used_memory_growth_bytes": _rounded(weighed.growth),
        "servers": max(len(told), 1),
        "per_server": {
            "entities": keys,
            "records": round(records),
            "hash_tables": round(tables),
            "memory": round(records + tables),
            "a_table_that_doubles": round(doubling),
            "backlog_and_clients": buffers,
            "empty_server": own,
            "maxmemory": maxmemory,
            "fragmentation": ratio,
            "fragmentation_is": whose,
            "replica_buffer": REPLICA_BUFFER,
            "free_for_copy_on_write": f"{COPY_ON_WRITE:.0%}",
            "ram": MIB * math.ceil(resident / (1 - COPY_ON_WRITE) / MIB),
        },
        "memory": round((records + tables) / share),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _fragmentation(info: Mapping[str, Any]) -> tuple[float, str]:
    """Resident memory for each byte that is used, and whose word that is."""
    used = int(info.get("used_memory", 0))
    if used < SMALL:
        return FRAGMENTATION, f"assumed: with {used:,} bytes in use the server's own ratio says nothing"
    return max(1.0, float(info.get("mem_fragmentation_ratio", FRAGMENTATION))), "as the server reports it"


def _kind(info: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    kind = "valkey" if info.get("server_name") == "valkey" else "redis"
    text = str(info.get("valkey_version" if kind == "valkey" else "redis_version", "7.0"))
    return kind, tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _cache_lines(info: Mapping[str, Any]) -> bool:
    """Whether the server has Valkey's newer hash table, whose buckets point to keys without an entry between."""
    kind, version = _kind(info)
    return kind == "valkey" and version >= CACHE_LINES
