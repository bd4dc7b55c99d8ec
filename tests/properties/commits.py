"""What writers do to a Delta table: random commits of every kind that deltalake makes, and deletion vectors as Spark writes them."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from deltalake import DeltaTable, Field

from tests.properties.lake import SPAN, Vector, log_name
from tests.properties.rows import FLOATS, POINTS, T0, key
from tests.tables import deletion_vector_file, inline_deletion_vector

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from tests.properties.lake import Lake
    from tests.properties.rows import Row, Rows

__all__ = ["Commits"]

#: Commits by how often they are made. In a history that only grows, rows are only added and files only compacted.
GROWS = {"append": 8.0, "compact": 1.0, "z_order": 0.7, "checkpoint": 0.4, "add_column": 0.3}
CHANGES = {
    **GROWS,
    "delete": 2.0,
    "delete_partition": 0.6,
    "delete_all": 0.2,
    "update": 3.0,
    "merge": 2.5,
    "overwrite": 0.4,
    "replace_where": 1.0,
    "restore": 1.0,
    "vector": 3.0,
    "vacuum": 0.3,
    "cleanup": 0.2,
    "recreate": 0.1,
}
LOSES = {"vacuum": 2.0, "cleanup": 1.5, "recreate": 1.0}
VECTORS = {
    "protocol": {
        "minReaderVersion": 3,
        "minWriterVersion": 7,
        "readerFeatures": ["deletionVectors"],
        "writerFeatures": ["deletionVectors"],
    }
}
#: deltalake removes commit files that are older than this after any commit, once there is a checkpoint.
CLEANS, KEEPS = ({"delta.logRetentionDuration": f"interval {days} days"} for days in (0, 30))


@dataclass(slots=True)
class Commits:
    """Random commits to *lake*. ``weights``: how often each kind is made, drawn anew for each history; ``told``: the last one."""

    lake: Lake
    rng: random.Random
    rows: Rows
    grows: bool
    weights: dict[str, float] = field(init=False)
    told: str = ""

    def __post_init__(self) -> None:
        kinds = GROWS if self.grows else CHANGES | (LOSES if self.rng.random() < 0.2 else {})
        self.weights = {name: weight * self.rng.choice([0.2, 1, 1, 3]) for name, weight in kinds.items()}

    def any(self, *but: str) -> None:
        """Make one commit, none of the kinds *but*."""
        names = [name for name in self.weights if name not in but]
        name = self.rng.choices(names, [self.weights[name] for name in names])[0]
        self.lake.operation += 1
        getattr(self, name)()

    def commit(self, told: str, change: Callable[[], object], expected: Iterable[int] | None = None) -> None:
        """Do *change*, after which exactly the rows *expected* are live, as before without it."""
        self.told = f"v{self.lake.head + 1} {told}"
        self.lake.commit(change, expected)

    # --- rows come ---

    def create(self) -> None:
        lake = self.lake
        DeltaTable.create(
            lake.uri,
            schema=lake.schema(later=False),
            partition_by=["region"] if lake.partitioned else None,
            storage_options=lake.options,
            mode="overwrite",
        )
        lake.read_log()

    def _some_rows(self, **fixed: Any) -> list[Row]:
        """Rows, some of which are equal in key and times to each other or to one that is there."""
        rng, live = self.rng, list(self.lake.live.values())
        rows = [self.rows.row(**fixed) for _ in range(rng.choice([0, 1, 1, 2, 5, 12]))]
        for twins in (live, rows):
            if twins and rng.random() < 0.4:
                some = rng.sample(twins, min(len(twins), 4))
                twin = max(some, key=lambda row: row["event"] or T0)  # likely to be the latest row of its entity
                times = {name: twin[name] for name in ("region", "user", "event", "created")}
                rows.append(self.rows.row(**(times | fixed)))
        return rows

    def append(self, *, later: bool | None = None) -> None:
        lake = self.lake
        rows = lake.new(self._some_rows(), later=later)
        uids = [*lake.now.came, *(row["uid"] for row in rows)]
        self.commit(f"append {len(rows)} rows", lambda: lake.write(rows, "append", later=later), uids)

    def add_column(self) -> None:
        lake = self.lake
        if lake.has_later or self.rng.random() < 0.5:
            self.append(later=True)
        else:
            self.commit("add column", lambda: lake.table.alter.add_columns(Field("later", "float")))

    # --- rows change ---

    def delete(self) -> None:
        self._delete(*self._predicate())

    def delete_partition(self) -> None:
        region = self.rows.entity()[0]
        self._delete(f"region = {text(region)}", lambda row: row["region"] == region)

    def delete_all(self) -> None:
        self._delete(None, lambda _row: True)

    def _delete(self, where: str | None, hit: Callable[[Row], bool]) -> None:
        lake = self.lake
        left = [uid for uid, row in lake.live.items() if not hit(row)]
        self.commit(f"delete {where}, {len(left)} left", lambda: lake.table.delete(where), left)

    def update(self) -> None:
        lake, (where, hit), (sets, change) = self.lake, self._predicate(), self._assignment()
        uids = [lake.altered(row, change(row)) if hit(row) else uid for uid, row in lake.live.items()]
        updates = {**sets, "uid": f"uid % {SPAN} + {lake.operation * SPAN}"}
        self.commit(f"update {where}: {sets}", lambda: lake.table.update(updates=updates, predicate=where), uids)

    def merge(self) -> None:
        """A source row per entity, by keys or by keys and a time; rows without a partner may be deleted.

        Not by the event time: deltalake skips files by bounds that are cut to milliseconds.
        """
        lake, rng = self.lake, self.rng
        by_time = rng.random() < 0.5
        names = ("region", "user", "created") if by_time else ("region", "user")
        if by_time and lake.live and rng.random() < 0.7:
            some = rng.sample(list(lake.live.values()), min(3, len(lake.live)))
            drawn = [self.rows.row(**{name: row[name] for name in names}) for row in some]
        else:
            drawn = self._some_rows()
        source = {tuple(row[name] for name in names): row for row in drawn}
        new = lake.new(source.values())
        by = " AND ".join(f't."{name}" = s."{name}"' for name in names)
        merging = lake.table.merge(lake.arrow(new), by, source_alias="s", target_alias="t")
        uids: list[int] = []
        told: list[str] = []
        partner = {tuple(row[name] for name in names): row for row in new}
        matched = rng.choice(["update", "delete", "neither"])
        copied = [name for name in ("event", "amount", "name", "points") if rng.random() < 0.5]
        orphan = self.rows.entity() if rng.random() < 0.3 else None
        met = set()
        for uid, row in lake.live.items():
            parts = tuple(row[name] for name in names)
            found = None if None in parts else partner.get(parts)
            if found is not None:
                met.add(found["uid"])
            if found is not None and matched == "update":
                uids.append(lake.altered(row, {name: found[name] for name in copied}))
            elif not (found is not None and matched == "delete") and not (found is None and key(row) == orphan):
                uids.append(uid)
        if matched == "update":
            sets = {f'"{name}"': f's."{name}"' for name in copied}
            merging = merging.when_matched_update({**sets, "uid": f"t.uid % {SPAN} + {lake.operation * SPAN}"})
            told.append(f"updates {copied}")
        elif matched == "delete":
            merging = merging.when_matched_delete()
            told.append("deletes")
        if rng.random() < 0.8 or not told:
            merging = merging.when_not_matched_insert_all()
            uids += [row["uid"] for row in new if row["uid"] not in met]
            told.append("inserts")
        if orphan is not None:
            merging = merging.when_not_matched_by_source_delete(is_entity(orphan, "t."))
            told.append(f"deletes {orphan}")
        self.commit(f"merge {list(partner)}: {', '.join(told)}", merging.execute, uids)

    def overwrite(self) -> None:
        rows = self.lake.new(self._some_rows() + self._kept_rows())
        uids = [row["uid"] for row in rows]
        self.commit(f"overwrite {len(rows)} rows", lambda: self.lake.write(rows, "overwrite"), uids)

    def replace_where(self) -> None:
        """Of one partition, or of one user: the rows there are others now, some of them as they were."""
        lake, (region, user) = self.lake, self.rows.entity()
        fixed: Row = {"region": region} if self.rng.random() < 0.6 else {"user": user}
        where = f"region = {text(region)}" if "region" in fixed else f'"user" = {user}'
        ((name, value),) = fixed.items()
        kept = [row for row in self._kept_rows() if row[name] == value]
        rows = lake.new(self._some_rows(**fixed) + kept)
        uids = [uid for uid, row in lake.live.items() if row[name] != value] + [row["uid"] for row in rows]
        self.commit(
            f"replace {where} by {len(rows)} rows", lambda: lake.write(rows, "overwrite", predicate=where), uids
        )

    def _kept_rows(self) -> list[Row]:
        """Rows as they are in the table, to be written again."""
        live = list(self.lake.live.values())
        return [dict(row) for row in self.rng.sample(live, self.rng.randint(0, len(live)))]

    def restore(self) -> None:
        """To a version of the same protocol: deltalake aborts where it would have to lower it."""
        lake = self.lake
        targets = [
            version
            for version, state in sorted(lake.versions.items())[-12:-1]
            if state.protocol == lake.now.protocol
            and state.metadata["configuration"] != CLEANS
            and lake.readable(version)
        ]
        if targets:
            target = self.rng.choice(targets)
            self.commit(f"restore v{target}", lambda: lake.table.restore(target), lake.versions[target].came)

    def vector(self) -> None:
        """More rows of one data file are removed by a deletion vector, in the log or in a file."""
        lake, rng = self.lake, self.rng
        if not lake.live:
            return
        name, file = rng.choice(
            sorted((item for item in lake.now.files.items() if item[1].live), key=lambda item: min(item[1].live))
        )
        gone = set(rng.sample(sorted(file.live), rng.randint(1, len(file.live))))
        dead = file.dead | {position for position, uid in enumerate(file.uids) if uid in gone}
        if rng.random() < 0.5:
            vector = Vector(inline_deletion_vector(sorted(dead)), dead)
        else:
            path, data, described = deletion_vector_file(
                uuid.UUID(int=rng.getrandbits(128)),
                sorted(dead),
                prefix=rng.choice(["", "ab"]),
                behind=rng.choice([(), (0, 3)]),
            )
            lake.storage.write(path, data)
            vector = Vector(described, dead, path)
        protocol = [] if lake.table.protocol().min_reader_version >= 3 else [VECTORS]
        removed = {file.uids[position] for position in dead}
        left = [uid for uid in lake.now.came if uid not in removed]
        told = f"vector {vector.described['storageType']} removes {len(dead)} of {len(file.uids)}"
        self.commit(told, lambda: lake.put_vector(name, vector, protocol), left)

    def recreate(self) -> None:
        """The table is dropped and created again, with its versions going on or from version 0."""
        anew = self.rng.random() < 0.5
        if anew:
            self.lake.forget()
        self.create()
        self.lake.life += 1
        self.lake.losses += 1
        self.told = f"v{self.lake.head} recreate {'from version 0' if anew else 'over the old one'}"

    # --- rows stay ---

    def compact(self) -> None:
        self.commit("compact", self.lake.table.optimize.compact)

    def z_order(self) -> None:
        self.commit("z-order", lambda: self.lake.table.optimize.z_order(["user", "amount"]))

    def checkpoint(self) -> None:
        self.commit("checkpoint", self.lake.table.create_checkpoint)

    def vacuum(self) -> None:
        table = self.lake.table
        self.lake.losses += 1
        self.commit("vacuum", lambda: table.vacuum(0, dry_run=False, enforce_retention_duration=False))

    def cleanup(self) -> None:
        """The commit files before a checkpoint are removed, by deltalake or as another engine does it."""
        lake = self.lake
        self.checkpoint()
        lake.losses += 1
        if self.rng.random() < 0.5:
            for version in range(lake.oldest_commit(), lake.head):
                lake.storage.remove(log_name(version))
            self.told = f"v{lake.head} cleanup by hand"
            return
        for configuration in (CLEANS, KEEPS):
            metadata = lake.now.metadata | {"configuration": configuration}
            self.commit("cleanup", partial(lake.put, {"metaData": metadata}))
            lake.commit(lake.table.cleanup_metadata)

    # --- parts of commits ---

    def _predicate(self) -> tuple[str, Callable[[Row], bool]]:
        """A condition as SQL and in Python. None of a float column: deltalake takes NaN for the only other value of its file."""
        rng, entity = self.rng, self.rows.entity()
        kind = rng.choice(["entity", "entity", "lately", "user", "count", "row", "nothing"])
        live = list(self.lake.live.values())
        if kind == "row" and live:
            uid = rng.choice(live)["uid"]
            return f"uid = {uid}", lambda row: row["uid"] == uid
        if kind == "lately" and live and None not in (lately := key(live[-1])):
            entity = lately
        if kind == "user":
            return f'"user" = {entity[1]}', lambda row: row["user"] == entity[1]
        if kind == "count":
            return "count = 0", lambda row: row["count"] == 0
        if kind == "nothing":
            return "name = 'nobody'", lambda _row: False
        return is_entity(entity), lambda row: key(row) == entity

    def _assignment(self) -> tuple[dict[str, str], Callable[[Row], Row]]:
        """What an update sets: as SQL, and as the changes of a row."""
        rng = self.rng
        amount, points, minutes = rng.choice(FLOATS), rng.choice(POINTS), rng.choice([-3, 1, 4])
        user = self.rows.entity()[1]
        later, items = timedelta(minutes=minutes), "NULL" if points is None else f"make_array({double(*points)})"
        choices: list[tuple[dict[str, str], Callable[[Row], Row]]] = [
            ({"amount": double(amount)}, lambda _row: {"amount": amount}),
            ({"amount": "-amount"}, lambda row: {"amount": None if row["amount"] is None else -row["amount"]}),
            (
                {"amount": "coalesce(amount, 0.0)"},
                lambda row: {"amount": 0.0 if row["amount"] is None else row["amount"]},
            ),
            ({"count": "coalesce(count, 0)"}, lambda row: {"count": 0 if row["count"] is None else row["count"]}),
            ({"points": f"arrow_cast({items}, 'List(Float32)')"}, lambda _row: {"points": points}),
            (
                {"event": f"event + INTERVAL '{minutes} minutes'"},
                lambda row: {"event": None if row["event"] is None else row["event"] + later},
            ),
            ({'"user"': str(user)}, lambda _row: {"user": user}),
            ({"name": "'it''s new'"}, lambda _row: {"name": "it's new"}),
            ({}, lambda _row: {}),
        ]
        return rng.choice(choices)


def text(value: str) -> str:
    quoted = value.replace("'", "''")
    return f"'{quoted}'"


def is_entity(entity: tuple[str, int], table: str = "") -> str:
    return f'{table}region = {text(entity[0])} AND {table}"user" = {entity[1]}'


def double(*values: float | None) -> str:
    texts = ("NULL" if value is None else "'NaN'" if math.isnan(value) else f"'{value!r}'" for value in values)
    return ", ".join(f"CAST({text} AS DOUBLE)" for text in texts)
