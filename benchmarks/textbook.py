"""What people write by hand, and the bare limit of sqlite: a table or ready records in, a JSON line with seconds and rows out.

    python benchmarks/textbook.py redis --table FOLDER --port N
    python benchmarks/textbook.py sqlite --ready FILE --target FILE

- ``redis``: the pipeline of tutorials. The latest row of each entity by polars' sort and unique, then per entity one HSET with a field for
  each feature, numbers packed by struct, and one EXPIRE, a thousand entities to a pipeline without a transaction.
- ``sqlite``: ready rows, blindly, by one executemany in one transaction into an empty file: nothing can be faster.

Each runs as a process of its own. ``seconds`` leave out the start of Python and the imports, which is a gift to it.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import struct
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

#: Entities of one pipeline, and seconds until they expire.
BATCH, TTL = 1_000, 30 * 86_400
KEYS = ("user_id", "event_timestamp", "created_timestamp", "event_date", "event_hour")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def packed(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<?", value)
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, datetime):
        return struct.pack("<q", (value - EPOCH) // timedelta(microseconds=1))
    return struct.pack("<q", value) if isinstance(value, int) else str(value).encode()


def to_redis(given: argparse.Namespace) -> dict[str, Any]:
    import polars as pl
    import redis
    from deltalake import DeltaTable

    client = redis.Redis(port=given.port)
    client.ping()
    begin = time.perf_counter()
    files = DeltaTable(str(given.table)).file_uris()
    rows = pl.scan_parquet(files, hive_partitioning=False)
    latest = rows.sort("event_timestamp", "created_timestamp").unique("user_id", keep="last").collect()
    names = [name for name in latest.columns if name not in KEYS]
    for part in latest.iter_slices(BATCH):
        pipe = client.pipeline(transaction=False)
        for row in part.iter_rows(named=True):
            key = f"features:{row['user_id']}"
            pipe.hset(key, mapping={name: packed(row[name]) for name in names if row[name] is not None})
            pipe.expire(key, TTL)
        pipe.execute()
    return {"seconds": time.perf_counter() - begin, "rows": latest.height}


def to_sqlite(given: argparse.Namespace) -> dict[str, Any]:
    source = sqlite3.connect(given.ready)
    rows = source.execute(
        "SELECT entity_key, lead, event_us, created_us, version, floor, payload FROM records"
    ).fetchall()
    source.close()
    random.Random(0).shuffle(rows)
    target = sqlite3.connect(given.target)
    target.execute("PRAGMA journal_mode = WAL")
    target.execute("PRAGMA synchronous = NORMAL")
    target.execute(
        "CREATE TABLE ready (entity_key BLOB PRIMARY KEY, lead BLOB, event_us INTEGER, created_us INTEGER, "
        "version INTEGER, floor INTEGER, payload BLOB)"
    )
    begin = time.perf_counter()
    with target:
        target.executemany("INSERT OR REPLACE INTO ready VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    seconds = time.perf_counter() - begin
    target.close()
    return {"seconds": seconds, "rows": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Loads that people write by hand.")
    parser.add_argument("store", choices=("redis", "sqlite"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--target", type=Path)
    given = parser.parse_args()
    print(json.dumps((to_redis if given.store == "redis" else to_sqlite)(given)))


if __name__ == "__main__":
    main()
