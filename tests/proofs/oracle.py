"""What must be online, from the Delta log and the Parquet files alone: plain Python and pyarrow, no line of the product.

The tables are those of `story.Story`: every state of a row has a ``count`` of its own.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Fact", "Lake", "facts_in_redis", "unpacked", "wrong_keys"]

HEAD = struct.Struct("<BBHqqqq")
MICROSECONDS = pa.schema([("event_timestamp", pa.int64()), ("created", pa.int64())])


class Fact(NamedTuple):
    """What readers must get of an entity: times in microseconds, and its three features."""

    event_us: int
    created_us: int
    amount: float | None
    count: int
    country: str | None


class Lake:
    """The table at *path*, version by version; `refresh` reads the commits that are new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: For each version: every entity with its latest row; several where they are equal in their times and one commit
        #: brought them, or where one of them has been moved to a newer file: then the log does not tell which came later.
        self.latest: list[dict[bytes, list[Fact]]] = []
        #: For each version: the facts that live in it.
        self.live: list[dict[bytes, set[Fact]]] = []
        self.born: dict[Fact, int] = {}
        self.files: dict[str, tuple[int, list[tuple[bytes, Fact]]]] = {}
        self.refresh()

    @property
    def head(self) -> int:
        return len(self.latest) - 1

    def refresh(self) -> Lake:
        while (log := self.path / "_delta_log" / f"{len(self.latest):020d}.json").exists():
            for line in log.read_text().splitlines():
                action = json.loads(line)
                if "add" in action:
                    assert not action["add"].get("deletionVector")
                    assert not action["add"]["partitionValues"]
                    rows = self._rows(unquote(action["add"]["path"]))
                    self.files[action["add"]["path"]] = (len(self.latest), rows)
                elif "remove" in action:
                    del self.files[action["remove"]["path"]]
            self._learn(len(self.latest))
        return self

    def _rows(self, name: str) -> list[tuple[bytes, Fact]]:
        columns = pq.read_table(self.path / name, columns=["user_id", *Fact._fields[2:]]).to_pydict()
        us = pq.read_table(self.path / name, columns=["event_timestamp", "created"]).cast(MICROSECONDS)
        rows = zip(
            us["event_timestamp"].to_pylist(),
            us["created"].to_pylist(),
            columns["amount"],
            columns["count"],
            columns["country"],
            strict=True,
        )
        return [(key.encode(), Fact(*row)) for key, row in zip(columns["user_id"], rows, strict=True)]

    def _learn(self, version: int) -> None:
        live: dict[bytes, set[Fact]] = {}
        moved: set[Fact] = set()
        for since, rows in self.files.values():
            for key, fact in rows:
                if self.born.setdefault(fact, version) != since:
                    moved.add(fact)
                live.setdefault(key, set()).add(fact)
        latest = {}
        for key, facts in live.items():
            times = max(fact[:2] for fact in facts)
            tied = [fact for fact in facts if fact[:2] == times]
            last = max(self.born[fact] for fact in tied)
            latest[key] = tied if moved.intersection(tied) else [fact for fact in tied if self.born[fact] == last]
        self.live.append(live)
        self.latest.append(latest)

    # --- what may be online while the watermark says that *version* is ---

    def behind(self, version: int, online: Mapping[bytes, Fact | None]) -> list[bytes]:
        """The entities whose state online is older than what *version* has: lost or stale for readers.

        *online*: facts, None for a tombstone; an absent key is absent. What a later version brought is no fault.
        """
        return [
            key
            for key in {*self.latest[version], *online}
            if not self._as_new(key, version, online.get(key), there=key in online)
        ]

    def _as_new(self, key: bytes, version: int, found: Fact | None, *, there: bool) -> bool:
        wanted = self.latest[version].get(key, [])
        if found is None:
            later = self.latest[version + 1 :] if there else []
            return not wanted or any(key not in latest for latest in later)
        if found in wanted or any(found in latest.get(key, ()) for latest in self.latest[version + 1 :]):
            return True
        newer = not wanted or found[:2] > wanted[0][:2]
        return newer and any(found in live.get(key, ()) for live in self.live[version + 1 :])


def unpacked(record: bytes) -> Fact | None:
    """The fact in a record, read by hand as docs/format.md says; None for a tombstone."""
    version, flags, _, event_us, created_us, _, _ = HEAD.unpack_from(record)
    assert version == 1
    if flags & 1:
        assert len(record) == HEAD.size
        return None
    body, nulls = record[HEAD.size :], 0
    if flags & 2:
        nulls, body = body[0], body[1:]
    amount, count, size = struct.unpack_from("<dqI", body)
    assert len(body) == 20 + size
    country = body[20:].decode()
    return Fact(event_us, created_us, None if nulls & 1 else amount, count, None if nulls & 4 else country)


def facts_in_redis(records: Mapping[bytes, bytes], view: str, prefix: str) -> dict[bytes, Fact | None]:
    """The facts of one view among all strings of a server, by entity key."""
    head = f"{prefix}:{view}:{{".encode()
    return {key[len(head) : -1]: unpacked(value) for key, value in records.items() if key.startswith(head)}


def wrong_keys(lake: Lake, online: Mapping[bytes, Fact | None]) -> Counter[str]:
    """Every entity of the table's head and of the store, by what is wrong with it; empty when all is exact."""
    found: Counter[str] = Counter()
    for key in {*lake.latest[-1], *online}:
        wanted, fact = lake.latest[-1].get(key, []), online.get(key)
        if fact is None and wanted:
            found["missing"] += 1
        elif fact is not None and not wanted:
            found["not deleted"] += 1
        elif fact is not None and fact not in wanted:
            found["stale" if fact[:2] < wanted[0][:2] else "wrong"] += 1
    return found
