"""Whole runs in tests: the three runs, what the store holds afterwards, and two runs step by step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from materialize import pipeline, watermark
from materialize.decoder import Decoder, Header
from materialize.errors import MaterializeError
from materialize.model import RunReport, to_us
from materialize.online.memory import MemoryStore
from materialize.pipeline import PieceReport, Run
from materialize.plan import Plan
from materialize.serving import FeatureBatch, OnlineFeatures, ReadTerms
from tests.tables import NOW, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = [
    "PATIENT",
    "Stepper",
    "adds_up",
    "amounts",
    "expected_amounts",
    "in_pieces",
    "incremental",
    "interleavings",
    "plan_of",
    "play",
    "position",
    "records",
    "run",
    "served",
    "vectors",
]

#: For readers in tests that are not about time: a machine that does other things too may let a store wait longer than a model server would.
PATIENT = ReadTerms(connect=10, read=10, deadline=20)


def run(run_id: str = "run", now: Any = NOW, *, force: bool = False) -> Run:
    return Run("default", run_id, lambda: now, force=force)


def incremental(table: Table, store: OnlineStore, run_id: str = "run") -> RunReport:
    return pipeline.incremental(table.view, store, run(run_id))


def plan_of(table: Table, store: OnlineStore, mode: Any = "incremental", run_id: str = "run", **options: Any) -> Plan:
    return pipeline.make_plan(table.view, store, mode=mode, store_name="default", run_id=run_id, **options)


def served(view: FeatureView, store: OnlineStore) -> dict[str, dict[str, Any]]:
    """The features of every live record by entity key."""
    known = watermark.schemas(store, view.name)
    return {
        key.decode(): Decoder(known[Header.unpack(record).schema_id]).decode(record)
        for keys, records in store.scan(view.name)
        for key, record in zip(keys, records, strict=True)
        if not Header.unpack(record).tombstone
    }


def amounts(table: Table, store: OnlineStore) -> dict[str, float]:
    return {key: features["amount"] for key, features in served(table.view, store).items()}


def records(view: FeatureView, store: OnlineStore) -> dict[bytes, bytes]:
    return {key: record for keys, found in store.scan(view.name) for key, record in zip(keys, found, strict=True)}


def adds_up(report: RunReport) -> bool:
    return report.entities == report.written + report.stale + report.unchanged + report.expired


def position(table: Table, store: OnlineStore) -> tuple[int, int | None]:
    found = watermark.read(store, table.view.name)
    assert found is not None
    return found.generation, found.version


def expected_amounts(table: Table) -> dict[str, float]:
    """What a first run into an empty store brings."""
    with MemoryStore() as store:
        incremental(table, store, "expected")
        return amounts(table, store)


def in_pieces(table: Table, store: OnlineStore, pieces: int, order: list[int], mode: Any = "incremental") -> RunReport:
    """A run cut into *pieces*, written in this order, some of them again."""
    plan = pipeline.begin(table.view, store, replace(plan_of(table, store, mode), pieces=pieces))
    done: dict[int, PieceReport] = {}
    for piece in order:
        done.setdefault(piece, pipeline.write_piece(table.view, store, plan, piece, now=NOW))
    return pipeline.commit(table.view, store, plan, list(done.values()), now=NOW)


@dataclass(slots=True)
class Stepper:
    """One run, step by step; stops at its first error."""

    table: Table
    store: OnlineStore
    mode: Any
    name: str
    step: int = 0
    plan: Plan | None = None
    pieces: list[PieceReport] | None = None
    error: MaterializeError | None = None

    def advance(self) -> None:
        view, store = self.table.view, self.store
        self.step += 1
        if self.error is not None:
            return
        try:
            if self.step == 1:
                self.plan = plan_of(self.table, store, self.mode, self.name)
            elif self.step == 2:
                self.plan = pipeline.begin(view, store, self.plan)  # type: ignore[arg-type]
            elif self.step == 3:
                pieces = range(self.plan.pieces)  # type: ignore[union-attr]
                self.pieces = [pipeline.write_piece(view, store, self.plan, piece, now=NOW) for piece in pieces]  # type: ignore[arg-type]
            else:
                pipeline.commit(view, store, self.plan, self.pieces, now=NOW)  # type: ignore[arg-type]
        except MaterializeError as error:
            self.error = error


def interleavings() -> Iterator[tuple[str, ...]]:
    """Every way in which the four steps of run x and those of run y can alternate."""
    for chosen in itertools.combinations(range(8), 4):
        yield tuple("x" if index in chosen else "y" for index in range(8))


def play(order: tuple[str, ...], x: Stepper, y: Stepper, between: dict[int, Callable[[], Any]]) -> None:
    for index, turn in enumerate(order):
        if index in between:
            between[index]()
        (x if turn == "x" else y).advance()


def vectors(
    view: FeatureView,
    store: OnlineStore,
    keys: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    now: datetime = NOW,
) -> FeatureBatch:
    """What a reader of *store* gives for some entities at the time *now*."""
    return OnlineFeatures.over([view], store, clock_us=lambda: to_us(now)).batch_read(view.name, keys, names)
