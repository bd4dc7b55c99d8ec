"""Runs over a `Lake` as schedulers make them - finished, killed, stalled, late, in other pieces - and what must hold after each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from materialize import pipeline, watermark
from materialize.decoder import Decoder, Header
from materialize.errors import MaterializeError, OfflineStoreError, OnlineStoreError, RebuildNeeded, WatermarkError
from materialize.feature_type import FeatureType
from materialize.latest import ENGINE
from materialize.model import FeatureView, to_us
from materialize.testing import CrashingStore
from materialize.verify import verify
from tests.properties import quarantined
from tests.properties.rows import FEATURES, NOW, T0, key, keyed, shown, storable

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from materialize.model import Interval, Mode, RunReport
    from materialize.online.base import OnlineStore
    from materialize.pipeline import PieceReport
    from materialize.plan import Plan
    from tests.properties.lake import Lake, Version
    from tests.properties.rows import Row

__all__ = ["Attempt", "Divergence", "Runs"]


class Divergence(AssertionError):
    """The store and the remembered rows differ."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """A begun run. ``losses``: of the lake when it began; ``state``: the version it is pinned at; ``done``: its pieces so far."""

    view: FeatureView
    plan: Plan
    life: int
    losses: int
    state: Version
    done: dict[int, PieceReport] = field(default_factory=dict)

    @property
    def reach(self) -> tuple[int, int]:
        return self.life, self.plan.to_version


@dataclass(slots=True)
class Runs:
    """``reach``: the newest version of which anything was written. ``windows``: checked incremental runs from a watermark."""

    lake: Lake
    store: OnlineStore
    rng: random.Random
    features: list[str] = field(init=False)
    created: str | None = field(init=False)
    ttl: timedelta | None = field(init=False)
    auto: bool = field(init=False)
    stalled: list[Attempt] = field(default_factory=list)
    meanwhile: Callable[[], None] = field(default=lambda: None)
    reach: tuple[int, int] = (0, -1)
    started: int = 0
    windows: int = 0
    snapshots: int = 0
    rebuilds: int = 0

    def __post_init__(self) -> None:
        self.features = [name for name in FEATURES if name != "later"]
        self.created = None if self.rng.random() < 0.15 else "created"
        # With a ttl about half of the rows are expired.
        self.ttl = NOW - T0 - timedelta(minutes=2) if self.rng.random() < 0.2 else None
        self.auto = self.rng.random() < 0.3

    @property
    def view(self) -> FeatureView:
        return FeatureView(
            name="v",
            source=self.lake.uri,
            join_keys=("region", "user"),
            event_timestamp="event",
            created_timestamp=self.created,
            features={name: FeatureType.parse(FEATURES[name]) for name in self.features},
            online_stores=("s",),
            ttl=self.ttl,
            on_rebuild_needed="auto" if self.auto else "fail",
            storage_options=self.lake.storage.options,
        )

    def run(self) -> pipeline.Run:
        self.started += 1
        return pipeline.Run("s", f"run-{self.started}", lambda: NOW, force=True)  # small tables may become empty

    # --- whole runs ---

    def incremental(self) -> None:
        """To the head, at once or by steps; a rebuild where a file or a commit that is needed has gone."""
        try:
            if self.rng.random() < 0.4:
                attempt = self.begin("incremental")
                self.write(attempt, self.some_order(attempt.plan.pieces))
                self.finish(attempt)
            else:
                self.direct("incremental")
        except RebuildNeeded as error:
            self.refused(error)
            self.rebuild()

    def rebuild(self) -> None:
        if self.rng.random() < 0.4:
            attempt = self.begin("rebuild")
            self.write(attempt, self.some_order(attempt.plan.pieces))
            self.finish(attempt)
        else:
            self.direct("rebuild")

    def direct(self, mode: Mode) -> None:
        view, state, seen = self.view, self.lake.now, self.online(self.view).keys()
        before, why = watermark.read(self.store, "v"), self.why_not()
        self.touch((self.lake.life, self.lake.head))
        report = getattr(pipeline, mode)(view, self.store, self.run())
        self.check(report, view, state, None if before is None else before.version)
        deleted = seen - self.online(view).keys()
        self.expect(report.deleted == len(deleted), f"{report} deleted {sorted(deleted)}")
        auto = report.reason.startswith("rebuild was needed")
        self.expect(
            not auto or why is not None, f"expected an exact run, as everything that changed is there: {report}"
        )
        self.rebuilds += auto

    def backfill(self, interval: Interval) -> None:
        if self.rng.random() < 0.5:
            attempt = self.begin("backfill", interval)
            self.write(attempt, self.some_order(attempt.plan.pieces))
            self.finish(attempt)
            return
        self.touch((self.lake.life, self.lake.head))
        report = pipeline.backfill(self.view, self.store, self.run(), interval)
        inside = [
            row
            for row in self.lake.live.values()
            if row["event"] is not None and interval.start <= row["event"] < interval.end
        ]
        self.check_counts(report, inside)

    def refused(self, error: RebuildNeeded) -> None:
        """Whether the run had to give up: a file or a commit of what changed since the watermark is really gone."""
        self.expect(not self.auto, f"expected a run that rebuilds by itself; it raised {error}")
        self.expect(
            self.why_not() is not None, f"expected an exact run, as everything that changed is there; it raised {error}"
        )
        self.rebuilds += 1

    def why_not(self) -> str | None:
        """Why what changed since the watermark cannot be told any more."""
        found = watermark.read(self.store, "v")
        if found is None or found.version is None:
            return None
        return self.lake.gone(found.table_id, found.version, self.lake.head)

    # --- runs by steps ---

    def begin(self, mode: Mode, interval: Interval | None = None) -> Attempt:
        """Plan and begin a run of the view, in more pieces than it is worth; planning must not write anything."""
        view, before = self.view, self.everything()
        self.started += 1
        plan = pipeline.make_plan(
            view,
            self.store,
            mode=mode,
            store_name="s",
            run_id=f"run-{self.started}",
            interval=interval,
            force=True,
        )
        self.expect(self.everything() == before, f"planning wrote: {before} is {self.everything()} now")
        self.expect(plan.to_version == self.lake.head, f"planned for version {plan.to_version} of {self.lake.head}")
        state, life, losses = self.lake.now, self.lake.life, self.lake.losses
        self.meanwhile()
        rows_held = self.rng.choice([2, plan.rows_held, plan.rows_held])
        plan = pipeline.begin(view, self.store, in_pieces(plan, self.rng.randint(max(plan.pieces, 1), 5), rows_held))
        return Attempt(view, plan, life, losses, state)

    def some_order(self, pieces: int) -> list[int]:
        """All pieces in any order, some of them twice."""
        order = self.rng.sample(range(pieces), pieces)
        return order + order[: self.rng.randint(0, pieces)]

    def write(self, attempt: Attempt, pieces: Iterable[int]) -> None:
        for piece in pieces:
            self.touch(attempt.reach)
            report = pipeline.write_piece(attempt.view, self.store, attempt.plan, piece, now=NOW)
            attempt.done.setdefault(piece, report)
            self.meanwhile()

    def stall(self, mode: Mode, interval: Interval) -> str:
        """A run that stops after some of its pieces, to go on later."""
        try:
            attempt = self.begin(mode, interval if mode == "backfill" else None)
        except RebuildNeeded as error:
            self.refused(error)
            return f"{mode} refused"
        self.stalled.append(attempt)
        return f"{mode} {self.go_on(attempt)}"

    def go_on(self, attempt: Attempt) -> str:
        """Write some pieces of a stalled run, late or again. It may fail where its version can no longer be read."""
        pieces = self.some_order(attempt.plan.pieces)
        some = pieces[: self.rng.randint(0, len(pieces))]
        told = f"{attempt.plan.run_id} {attempt.plan.from_version}..{attempt.plan.to_version} pieces {some} of {attempt.plan.pieces}"
        try:
            self.write(attempt, some)
        except MaterializeError as error:
            self.expect(attempt.losses != self.lake.losses, f"{told}: {type(error).__name__}: {error}")
            return f"{told}: {type(error).__name__}"
        return told

    def finish(self, attempt: Attempt) -> str:
        """Write what is left of a run and commit it. That must fail if another run has moved the watermark since it began."""
        plan, told = attempt.plan, self.left(attempt)
        if len(attempt.done) < plan.pieces:
            return told
        if attempt in self.stalled:
            self.stalled.remove(attempt)
        text = watermark.read_text(self.store, "v")
        moves = plan.mode != "backfill"
        try:
            report = pipeline.commit(attempt.view, self.store, plan, list(attempt.done.values()), now=NOW)
        except WatermarkError:
            self.expect(text != plan.watermark, f"{told}: refused, but the watermark is where it was: {text}")
            return f"{told}: overtaken"
        if moves and text != plan.watermark:
            after = watermark.read_text(self.store, "v")
            self.expect(after == text, f"{told}: was overtaken and moved the watermark from {text} to {after}")
            return f"{told}: overtaken, nothing to move"
        if moves and attempt.reach >= self.reach:
            self.check(report, attempt.view, attempt.state, plan.from_version)
        return f"{told}: done"

    def left(self, attempt: Attempt) -> str:
        plan = attempt.plan
        told = f"{plan.run_id} {plan.from_version}..{plan.to_version}"
        try:
            self.write(attempt, [piece for piece in range(plan.pieces) if piece not in attempt.done])
        except MaterializeError as error:
            self.expect(attempt.losses != self.lake.losses, f"{told}: {type(error).__name__}: {error}")
            return f"{told}: {type(error).__name__}"
        return told

    def crash(self, mode: Mode, interval: Interval) -> str:
        """A run whose store dies under it."""
        after, effect = self.rng.randint(1, 6), self.rng.random() < 0.5
        dying = CrashingStore(self.store, after=after, effect=effect, error=OnlineStoreError)
        alive, self.store = self.store, dying
        try:
            if mode == "backfill":
                self.backfill(interval)
            else:
                self.direct(mode)
        except RebuildNeeded as error:
            self.store = alive
            self.refused(error)
            return f"{mode} refused"
        except OnlineStoreError:
            return f"{mode} at write {after}, {'' if effect else 'not '}done"
        finally:
            self.store = alive
        return f"{mode}, no crash"

    def touch(self, reach: tuple[int, int]) -> None:
        self.reach = max(self.reach, reach)

    # --- what must hold ---

    def check(self, report: RunReport, view: FeatureView, state: Version, after: int | None) -> None:
        """After an incremental run or a rebuild that finished: every entity, every value, every count, the watermark."""
        found = watermark.read(self.store, "v")
        self.expect(
            found is not None and (found.version, found.table_id) == (report.to_version, state.table_id),
            f"the watermark is {found} after {report}",
        )
        self.settle(state, view)
        self.verified(state, view)
        wrong = quarantined.problem(view, (self.lake.values[uid] for uid in state.came), self.lake.values.values())
        self.expect(wrong is None, f"{wrong} after {report}")
        if report.from_version is None:
            self.snapshots += 1
            self.check_counts(report, [self.lake.values[uid] for uid in state.came])
            return
        self.windows += report.mode == "incremental"
        self.expect(report.from_version == after, f"{report} began at {after}")
        commits = range(report.from_version + 1, report.to_version + 1)
        if not all(version in self.lake.versions for version in commits):
            return  # the table was made anew since
        added = [self.lake.added[version] for version in commits]
        if None in added:
            self.check_counts(report)
            return
        rows = sum(added)
        self.expect(report.rows_read == rows, f"rows_read {report.rows_read}, {rows} were added")
        if not any(self.lake.changed[version] for version in commits):
            self.expect((report.rows_read, report.entities, report.bytes) == (0, 0, 0), f"nothing changed: {report}")
        self.check_counts(report)

    def check_counts(self, report: RunReport, read: list[Row] | None = None) -> None:
        total = report.written + report.stale + report.unchanged + report.expired
        self.expect(report.entities == total, f"the counters of {report} do not add up")
        self.expect(report.quarantined == sum(report.quarantine_reasons.values()), f"quarantined of {report}")
        if read is None:
            return
        self.expect(report.rows_read == len(read), f"rows_read {report.rows_read}, {len(read)} rows were there")
        unkeyed = sum(not keyed(row) for row in read)
        oversized = sum(keyed(row) and not storable(row) for row in read)
        self.expect(
            unkeyed <= report.quarantined <= unkeyed + oversized,
            f"quarantined {report.quarantined} of {unkeyed} + {oversized}",
        )
        entities = {key(row) for row in read if storable(row)}
        self.expect(report.entities >= len(entities), f"entities {report.entities} of {len(entities)}")

    def settle(self, state: Version, view: FeatureView | None = None) -> None:
        """The store holds the latest row of each entity of a version, and nothing else that a reader would see."""
        view = view or self.view
        expected = {
            entity: rows
            for entity, rows in self.lake.latest(state, view).items()
            if view.ttl is None or rows[0]["event"] + view.ttl > NOW
        }
        found = self.online(view)
        self.expect(found.keys() == expected.keys(), f"online are {sorted(found)}, expected {sorted(expected)}")
        for entity, rows in expected.items():
            features = [shown({name: row.get(name) for name in view.features}) for row in rows]
            served = shown({name: found[entity][name] for name in view.features if name in found[entity]})
            self.expect(served in features, f"entity {entity!r} is {found[entity]}, expected one of {rows}")

    def verified(self, state: Version, view: FeatureView) -> None:
        """What is right is found to be right, unless the version can no longer be read."""
        try:
            report = verify(view, self.store, self.run())
        except OfflineStoreError as error:
            self.expect(self.lake.now is not state, f"could not verify version {state}: {error}")
        else:
            self.expect(report.mismatched == 0, f"verify found {report} with {report.keys}")

    def online(self, view: FeatureView) -> dict[bytes, dict[str, Any]]:
        """What readers see."""
        schemas = {number: Decoder(features) for number, features in watermark.schemas(self.store, "v").items()}
        found = {}
        for keys, records in self.store.scan("v"):
            for entity, record in zip(keys, records, strict=True):
                header = Header.unpack(record)
                if not header.tombstone and (view.ttl_us is None or header.event_us + view.ttl_us > to_us(NOW)):
                    found[entity] = schemas[header.schema_id].decode(record)
        return found

    def everything(self) -> tuple[Any, ...]:
        """All that the store and the table's log hold."""
        records = {key: record for keys, found in self.store.scan("v") for key, record in zip(keys, found, strict=True)}
        cells = [self.store.read_cell("v", name) for name in ("watermark", "schemas")]
        return records, cells, self.lake.storage.names("_delta_log")

    def expect(self, holds: bool, message: str) -> None:  # noqa: FBT001 - a claim
        if not holds:
            raise Divergence(message)


def in_pieces(plan: Plan, pieces: int, rows_held: int) -> Plan:
    """*plan* in more pieces than it is worth, each with so little memory that it holds only so many rows."""
    return replace(plan, pieces=pieces, rows_held=rows_held, engine=ENGINE)
