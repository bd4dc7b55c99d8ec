"""Random histories of one Delta table and the runs over it, against a plain list of every row that was committed.

Usable as a script, so that a patched copy of the package can be tried: ``python histories.py STORE_URL FIRST_SEED COUNT``.
It shares no code with the package's own idea of "latest".
"""

from __future__ import annotations

import math
import random
import string
import struct
import sys
import tempfile
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from materialize import pipeline, watermark
from materialize.codec import Decoder, Header
from materialize.errors import RebuildNeeded
from materialize.model import FeatureType, FeatureView, Interval, OnlineStoreConfig, RunReport
from materialize.online import open_store
from materialize.online.base import OnlineStore

__all__ = ["Divergence", "play", "shards"]

T0 = datetime(2095, 1, 1, tzinfo=timezone.utc)
NOW = datetime(2095, 6, 1, tzinfo=timezone.utc)
UTC_TIME = pa.timestamp("us", tz="UTC")
BASE = [("region", pa.string()), ("user", pa.int64()), ("event", UTC_TIME), ("created", UTC_TIME)]
COLUMNS = {
    "amount": ("float64", pa.float64()),
    "count": ("int64", pa.int64()),
    "name": ("string", pa.string()),
    "flags": ("list<int32>", pa.list_(pa.int32())),
    "later": ("float32", pa.float32()),  # added to the table in the course of some histories
}
#: What a record may hold at most; an oversized string is above it.
OVERSIZED = "x" * (2**20 + 1)
REGIONS = ["de", "a|b", "{}", "100%", "%7C", "ü€😀", "x" * 200]
FLOATS = [0.0, -0.0, 1.5, math.nan, math.inf, -math.inf, 5e-324, None]


class Divergence(AssertionError):
    """The store and the remembered rows differ."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One committed row. ``blurred``: the first commit that may have put it into a file with rows of other commits."""

    values: dict[str, Any]
    commit: int
    blurred: float = math.inf

    @property
    def key(self) -> tuple[Any, Any]:
        return self.values["region"], self.values["user"]

    @property
    def storable(self) -> bool:
        event = self.values["event"]
        keyed = self.values["region"] not in {None, ""} and self.values["user"] is not None
        return bool(
            keyed and event is not None and event <= NOW + timedelta(days=1) and self.values["name"] != OVERSIZED
        )

    @property
    def order(self) -> tuple[Any, Any]:
        created = self.values["created"]
        return self.values["event"], datetime.min.replace(tzinfo=timezone.utc) if created is None else created


@dataclass(slots=True)
class History:
    """One table, its rows, and one store. ``online`` is what the store must hold: per entity all rows that are equally right."""

    seed: int
    folder: Path
    store: OnlineStore
    rng: random.Random = field(init=False)
    facts: list[Fact] = field(default_factory=list)
    wide: bool = False
    partitioned: bool = False
    version: int = -1
    snapshot: int = -1  # the newest version that was read as a snapshot, which cannot tell blurred rows' commits
    log: list[str] = field(default_factory=list)
    entities: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.partitioned = self.rng.random() < 0.4
        self.entities = [
            (self.rng.choice(REGIONS), self.rng.choice([-1, 0, 1, 2**62 + 1])) for _ in range(self.rng.randint(1, 7))
        ]

    @property
    def view(self) -> FeatureView:
        names = [name for name in COLUMNS if self.wide or name != "later"]
        return FeatureView(
            name="v",
            source=str(self.folder / "t"),
            join_keys=("region", "user"),
            event_timestamp="event",
            created_timestamp="created",
            features={name: FeatureType.parse(COLUMNS[name][0]) for name in names},
            online_stores=("s",),
        )

    # --- commits ---

    def row(self) -> dict[str, Any]:
        rng = self.rng
        region, user = rng.choice(self.entities)
        odd = rng.random()
        event: datetime | None = T0 + timedelta(minutes=rng.randint(-4, 8), microseconds=rng.choice([0, 0, 1]))
        created = None if rng.random() < 0.1 else T0 + timedelta(minutes=rng.randint(0, 2))
        if odd < 0.03:
            region = rng.choice([None, ""])
        elif odd < 0.05:
            user = None
        elif odd < 0.08:
            event = rng.choice([None, NOW + timedelta(days=2)])
        values = {
            "region": region,
            "user": user,
            "event": event,
            "created": created,
            "amount": rng.choice(FLOATS),
            "count": rng.choice([None, 0, -(2**63), 2**63 - 1, len(self.facts)]),
            "name": rng.choice([None, "", "ü€", "".join(rng.choices(string.printable, k=rng.randint(1, 30)))]),
            "flags": rng.choice([None, [], [1, -2, 3]]),
        }
        if rng.random() < 0.04:
            values["name"] = OVERSIZED
        if self.wide:
            values["later"] = rng.choice([None, 0.5, -1.0])
        return values

    def append(self) -> None:
        rows = [self.row() for _ in range(self.rng.choice([0, 1, 2, 5, 12]))]
        if self.facts and self.rng.random() < 0.5:  # equal times in another commit: the later one wins
            twin = self.rng.choice(self.facts).values
            rows.append(self.row() | {name: twin[name] for name in ("region", "user", "event", "created")})
        rows = self._without_duplicates(rows)
        self._write(rows, "append")
        self.facts += [Fact(values, self.version) for values in rows]

    def _without_duplicates(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of rows with equal key and times in one commit either may be served, so there is only one."""
        chosen = {(row["region"], row["user"], row["event"], row["created"]): row for row in rows}
        return list(chosen.values())

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        columns = [*BASE, *((name, COLUMNS[name][1]) for name in COLUMNS if self.wide or name != "later")]
        by = ["region"] if self.partitioned else None
        data = pa.Table.from_pylist(rows, schema=pa.schema(columns))
        write_deltalake(str(self.folder / "t"), data, mode=mode, partition_by=by, schema_mode="merge")  # type: ignore[call-overload]
        self.version = int(DeltaTable(str(self.folder / "t")).version())

    def compact(self) -> None:
        """Rows of several commits in one file: a snapshot cannot tell which of two equal ones is later any more."""
        table = DeltaTable(str(self.folder / "t"))
        if self.rng.random() < 0.5:
            table.optimize.compact()
        else:
            table.optimize.z_order(["user", "amount"])
        self.version = int(table.version())
        self.facts = [Fact(fact.values, fact.commit, min(fact.blurred, self.version)) for fact in self.facts]

    def delete(self) -> None:
        region, user = self.rng.choice(self.entities)
        table = DeltaTable(str(self.folder / "t"))
        quoted = region.replace("'", "''")
        table.delete(f"region = '{quoted}' AND \"user\" = {user}")
        self.version = int(table.version())
        # Rows that share a file with a deleted one are written again by that commit.
        self.facts = [
            Fact(fact.values, fact.commit, min(fact.blurred, self.version))
            for fact in self.facts
            if fact.key != (region, user)
        ]

    # --- runs ---

    def run(self) -> pipeline.Run:
        return pipeline.Run("s", f"run-{len(self.log)}", lambda: NOW)

    def planned(self, mode: Any, pieces: int) -> RunReport:
        """A run by its steps: more pieces than the table is worth, in any order, some twice."""
        view, store = self.view, self.store
        plan = pipeline.make_plan(view, store, mode=mode, store_name="s", run_id=f"run-{len(self.log)}")
        plan = pipeline.begin(view, store, replace(plan, pieces=pieces))
        order = list(range(pieces))
        self.rng.shuffle(order)
        done = {}
        for piece in order + order[: self.rng.randint(0, pieces)]:
            report = pipeline.write_piece(view, store, plan, piece, now=NOW)
            done.setdefault(piece, report)
        return pipeline.commit(view, store, plan, list(done.values()), now=NOW)

    def incremental(self) -> None:
        before = watermark.read(self.store, "v")
        snapshot = before is None or before.version is None
        try:
            report = (
                self.planned("incremental", self.rng.randint(2, 5))
                if self.rng.random() < 0.3
                else pipeline.incremental(self.view, self.store, self.run())
            )
        except RebuildNeeded:
            self.rebuild()
            return
        after = -1 if snapshot else before.version  # type: ignore[union-attr]
        if snapshot:
            self.snapshot = self.version
        self._check_counts(report, [fact for fact in self.facts if snapshot or fact.commit > after])  # type: ignore[operator]
        self.settle()

    def rebuild(self) -> None:
        if self.rng.random() < 0.3:
            report = self.planned("rebuild", self.rng.randint(2, 5))
        else:
            report = pipeline.rebuild(self.view, self.store, self.run())
        self.snapshot = self.version
        self._check_counts(report, self.facts)
        self.settle()

    def backfill(self) -> None:
        low = T0 + timedelta(minutes=self.rng.randint(-5, 8))
        interval = Interval(low, low + timedelta(minutes=self.rng.randint(1, 6)))
        report = pipeline.backfill(self.view, self.store, self.run(), interval)
        self.snapshot = self.version
        inside = [
            fact
            for fact in self.facts
            if fact.values["event"] is not None and interval.start <= fact.values["event"] < interval.end
        ]
        self._check_counts(report, inside)

    def _check_counts(self, report: RunReport, read: list[Fact]) -> None:
        self.expect(report.rows_read == len(read), f"rows_read {report.rows_read}, {len(read)} rows were there")
        total = report.written + report.stale + report.unchanged + report.expired
        self.expect(report.entities == total, f"the counters of {report} do not add up")
        self.expect(report.quarantined == sum(report.quarantine_reasons.values()), f"quarantined of {report}")
        unkeyed = sum(not Fact({**fact.values, "name": None}, 0).storable for fact in read)
        oversized = sum(
            Fact({**fact.values, "name": None}, 0).storable and fact.values["name"] == OVERSIZED for fact in read
        )
        self.expect(
            unkeyed <= report.quarantined <= unkeyed + oversized,
            f"quarantined {report.quarantined} of {unkeyed} + {oversized}",
        )
        entities = {fact.key for fact in read if fact.storable}
        self.expect(report.entities >= len(entities), f"entities {report.entities} of {len(entities)}")

    # --- what must be online ---

    def settle(self) -> None:
        """After an incremental run or a rebuild: every entity, every value."""
        expected: dict[bytes, list[Fact]] = {}
        for fact in self.facts:
            if fact.storable:
                expected.setdefault(entity_key(fact.key), []).append(fact)
        found = self.online()
        self.expect(found.keys() == expected.keys(), f"online are {sorted(found)}, expected {sorted(expected)}")
        for key, facts in expected.items():
            newest = max(fact.order for fact in facts)
            right = self.ties([fact for fact in facts if fact.order == newest])
            features = [shown({name: fact.values.get(name) for name in self.view.features}) for fact in right]
            self.expect(shown(found[key]) in features, f"entity {key!r} is {found[key]}, expected one of {features}")

    def ties(self, facts: list[Fact]) -> list[Fact]:
        """Those of equal rows that may be served: the one of the latest commit, or one that a snapshot could not tell from it."""
        latest = max(facts, key=lambda fact: fact.commit)
        if latest.commit > self.snapshot:
            return [latest]
        return [fact for fact in facts if fact is latest or fact.blurred <= self.snapshot]

    def online(self) -> dict[bytes, dict[str, Any]]:
        schemas = {number: Decoder(features) for number, features in watermark.schemas(self.store, "v").items()}
        found = {}
        for keys, records in self.store.scan("v"):
            for key, record in zip(keys, records, strict=True):
                header = Header.unpack(record)
                if not header.tombstone:
                    found[key] = schemas[header.schema_id].decode(record)
        return found

    def expect(self, holds: bool, message: str) -> None:  # noqa: FBT001 - a claim
        if not holds:
            raise Divergence(f"seed {self.seed}: {message}\nhistory: {' '.join(self.log)}")

    # --- the history ---

    def play(self) -> None:
        steps = {
            "append": (self.append, 8),
            "incremental": (self.incremental, 5),
            "compact": (self.compact, 2),
            "backfill": (self.backfill, 2),
            "delete": (self.delete, 0.7),
            "rebuild": (self.rebuild, 0.7),
        }
        self._write([], "append")
        names = list(steps)
        widen_at = self.rng.choice([None, None, 3, 5])
        for number in range(self.rng.randint(5, 12)):
            if number == widen_at:
                self.wide = True  # the next append brings the column; a view that wants it before is refused
                self.log.append("widen")
                self.append()
                self.rebuild()
                continue
            name = self.rng.choices(names, [weight for _, weight in steps.values()])[0]
            self.log.append(name)
            steps[name][0]()
        self.log.append("last")
        self.incremental()


def entity_key(parts: tuple[Any, ...]) -> bytes:
    escapes = {"%": "%25", "|": "%7C", "{": "%7B", "}": "%7D"}
    return "|".join("".join(escapes.get(character, character) for character in str(part)) for part in parts).encode()


def shown(features: dict[str, Any]) -> dict[str, Any]:
    """Values as they compare exactly: floats by their bits."""
    return {name: struct.pack("<d", value) if isinstance(value, float) else value for name, value in features.items()}


def play(url: str, seed: int) -> None:
    """Play the history of *seed* on an empty store. Raises Divergence, with the seed, where the store is wrong."""
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        address = url.replace("FOLDER", folder).replace("SEED", str(seed))
        with open_store(OnlineStoreConfig("s", address)) as store:
            history = History(seed, Path(folder), store)
            try:
                history.play()
            except Divergence:
                raise
            except Exception as error:
                raise Divergence(
                    f"seed {seed}: {type(error).__name__}: {error}\nhistory: {' '.join(history.log)}"
                ) from error


def shards(count: int, parts: int) -> list[range]:
    """The seeds 0 .. *count* - 1 in *parts* ranges."""
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


if __name__ == "__main__":
    for number in range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])):
        play(sys.argv[1], number)
