"""A primary fails over to a replica that lacks the end of its history: the run notices, and the store is exact afterwards.

Lossy failovers and controls at random points, in runs and between them. FAILOVERS sets how many of each; SEED which.
"""

from __future__ import annotations

import collections
import os
import random
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.errors import MaterializeError
from materialize.online.redis import RedisStore
from tests import servers
from tests.faults.oracle import Oracle
from tests.faults.replicated import Pair
from tests.stepping import adds_up, plan_of, run, served
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.model import RunReport

pytestmark = [pytest.mark.e2e, pytest.mark.server]

LOSSY = int(os.environ.get("FAILOVERS", "25"))
CONTROLS = int(os.environ.get("FAILOVER_CONTROLS", str(max(LOSSY * 2 // 5, 1))))
SEED = int(os.environ.get("SEED", "20261126"))
USERS, ROWS, PIECES = 300, 120, 3
#: begin, the pieces, commit; and after the run.
STEPS = PIECES + 2


@dataclass(slots=True)
class Trial:
    """One run, step by step, and a failover: the replica is cut off at step ``cut`` and takes over at step ``takes_over``.

    A fraction ``.5`` is in the middle of a step. ``acked``: the primary's offset after the last step that ended on it; ``written``: in the
    end, which a step that was cut off may have relied on or not; ``survived``: the offset that the replica had. ``lossy``: whether they may differ.
    """

    pair: Pair
    store: RedisStore
    table: Table
    rng: random.Random
    lossy: bool
    cut: float = 0.0
    takes_over: float = 0.0
    acked: int = 0
    written: int = 0
    survived: int | None = None
    over: bool = False
    error: MaterializeError | None = None
    report: RunReport | None = None
    plan: Any = None
    pieces: list[Any] = field(default_factory=list)

    def play(self) -> None:
        points = [step / 2 for step in range(2 * STEPS + 1)]
        self.cut, self.takes_over = sorted(self.rng.choices(points, k=2))
        if not self.lossy:
            self.cut = self.takes_over
        for step in range(STEPS):
            self._events(step)
            middle = step + 0.5 in {self.cut, self.takes_over}
            self._step(step, in_middle=self._middle(step) if middle else None)
            if self.error is not None:
                break
            if not self.over:
                self.acked = self.pair.offset(self.pair.primary)
        self._events(STEPS)

    def _events(self, point: float) -> None:
        if self.cut <= point and self.survived is None:
            if not self.lossy:
                self.pair.in_step()
            self.survived = self.pair.promote()
        if self.takes_over <= point and not self.over:
            self.over, self.written = True, self.pair.offset(self.pair.primary)
            self.pair.switch()

    def _middle(self, step: int) -> Callable[[], None]:
        return lambda: self._events(step + 0.5)

    def _step(self, step: int, in_middle: Callable[[], None] | None) -> None:
        thread = threading.Thread(target=self._do, args=(step,))
        if in_middle is None:
            return self._do(step)
        before = max(self.pair.valve.sent, default=0)
        self.pair.valve.limit(before + self.rng.randrange(1, 20_000))
        thread.start()
        self.pair.poll(lambda: self.pair.valve.stuck() or not thread.is_alive())
        if not thread.is_alive() and not self.over:
            self.acked = self.pair.offset(self.pair.primary)
        in_middle()
        self.pair.valve.open()
        thread.join(60)
        assert not thread.is_alive()
        return None

    def _do(self, step: int) -> None:
        view, store = self.table.view, self.store
        try:
            if step == 0:
                made = plan_of(self.table, store, run_id=f"run {self.rng.random()}")
                self.plan = pipeline.begin(
                    view, store, replace(made, pieces=min(made.pieces * PIECES, PIECES)), now=NOW
                )
            elif step <= PIECES and step <= self.plan.pieces:
                self.pieces.append(pipeline.write_piece(view, store, self.plan, step - 1, now=NOW))
            elif step == STEPS - 1:
                self.report = pipeline.commit(view, store, self.plan, self.pieces, now=NOW)
        except MaterializeError as error:
            self.error = error

    @property
    def told(self) -> str:
        return str(self.error) if self.error is not None else "" if self.report is None else self.report.reason

    @property
    def lost(self) -> bool:
        return self.survived is not None and self.acked > self.survived


ALARMS = ("are lost", "may have lost", "written again", "compared all", "missing", "went back")
#: A run that ends before its replica's loss can only say that it has none any more.
WARNINGS = (*ALARMS, "replica")


def appended(table: Table, rng: random.Random, commit: int) -> None:
    users = rng.sample(range(USERS), ROWS)
    table.append(
        *(row(f"user{user}", commit + rng.random(), rng.random(), country="x" * rng.randrange(300)) for user in users)
    )


@pytest.mark.parametrize("kind", ["valkey"])
def test_a_lost_tail_is_always_noticed_and_nothing_else_is(table: Table, kind: str) -> None:
    if servers.binary(kind) is None:
        pytest.skip(f"NOT TESTED: no {kind} server")
    rng, oracle, counted = random.Random(SEED), Oracle(table), collections.Counter[str]()
    kinds = [True] * LOSSY + [False] * CONTROLS
    rng.shuffle(kinds)
    with Pair(kind) as pair:
        for commit, lossy in enumerate(kinds):
            appended(table, rng, commit)
            replicas = rng.choice(["", "&replicas=1&replicas_timeout=0.3"])
            with RedisStore(f"redis://127.0.0.1:{pair.valve.port}/0?timeout=5{replicas}") as store:
                trial = Trial(pair, store, table, rng, lossy)
                trial.play()
                where = (commit, lossy, trial.cut, trial.takes_over, replicas, trial.told)

                if trial.lost:
                    counted["lossy"] += 1
                    assert any(word in trial.told for word in WARNINGS), where
                    counted["in a run" if trial.takes_over < STEPS else "between runs"] += 1
                elif trial.written <= (trial.survived or 0):
                    counted["harmless"] += 1
                    assert not any(word in trial.told for word in ALARMS), where
                else:
                    counted["cut off in a write call, which is repeated"] += 1
                if trial.report is not None:
                    assert adds_up(trial.report), where
                if trial.report is not None and (trial.takes_over < STEPS - 1 or not trial.lost):
                    assert served(table.view, store) == oracle.expected(), where

                after = pipeline.incremental(table.view, store, run(f"after {commit}"))
                assert adds_up(after)
                if trial.written <= (trial.survived or 0) and trial.error is None:
                    assert not any(word in after.reason for word in ALARMS), (where, after.reason)
                assert served(table.view, store) == oracle.expected(), where
    print(f"seed {SEED}: {dict(counted)}")
    assert counted["lossy"] >= LOSSY // 2, counted
