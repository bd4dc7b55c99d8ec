"""A primary fails over to a replica that lacks acknowledged writes: the run notices, and the store is exact afterwards.

Failovers with a lost tail at random points of runs, and as many events that lose nothing, in which no run may repair anything.
FAILOVERS sets how many lose something, HARMLESS how many do not, SEED which.
"""

from __future__ import annotations

import collections
import os
import random
import re
import struct
import threading
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.errors import MaterializeError, UnavailableError
from materialize.online.redis import RedisStore
from tests.proofs.data_files import Oracle
from tests.proofs.replicated import Pair
from tests.proofs.restartable import Restartable
from tests.stepping import adds_up, incremental, plan_of, position, run, served
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import redis

    from materialize.model import RunReport

pytestmark = [pytest.mark.e2e, pytest.mark.server]

FAILOVERS = int(os.environ.get("FAILOVERS", "50"))
HARMLESS = int(os.environ.get("HARMLESS", "15"))
SEED = int(os.environ.get("SEED", "20261126"))
USERS, ROWS, PIECES = 300, 40, 3
#: begin, the pieces, commit; and after the run.
STEPS = PIECES + 2
HALVES = [step / 2 for step in range(2 * STEPS + 1)]
#: Bytes of a connection in which the middle of a step may be: of commands and cells, of rows.
FEW, MANY = 1_500, 8_000
#: What a run says when the servers' run id, replication id and offsets tell that what it wrote may be lost.
LOST_IN_RUN = re.compile(r"(?:are|may have) lost|was a replica of another one|went back by")
#: And what the next run says of a failover between runs: the older watermark came back with the older records.
LOST_AFTER = re.compile(r"the store failed over or restarted")
ALARM = re.compile(r"written again|compared all|could not")
#: What an alarm cost: entities that were written anew.
COST = re.compile(r"written again, ([\d,]+) of|repaired ([\d,]+)")


@dataclass(slots=True)
class Trial:
    """One run, step by step, and an event: the replica gets nothing from step *held* on and takes over at step *over*.

    A fraction ``.5`` is in the middle of a step. *held* None: the replica has everything when it takes over. ``records``: those of
    the primary when its last step ended, ``lost`` how many of them the server that took over does not have.
    """

    table: Table
    store: RedisStore
    rng: random.Random
    over: float
    door: Any
    client: Callable[[], redis.Redis]
    event: Callable[[], Any]
    hold: Callable[[], Any] = lambda: None
    held: float | None = None
    happened: bool = False
    in_call: bool = False
    records: dict[bytes, bytes] = field(default_factory=dict)
    lost: int = 0
    error: MaterializeError | None = None
    report: RunReport | None = None
    plan: Any = None
    pieces: list[Any] = field(default_factory=list)

    def play(self) -> None:
        first = 0 if self.door is None else len(self.door.sent)
        for step in range(STEPS):
            if self.held == step:
                self.hold()
            self._event(step)
            if self.over == step + 0.5 and self.door is not None:
                self._in_the_middle(step, first)
            else:
                self._do(step)
            self._event(step + 0.5)
            if self.error is not None:
                break
            if not self.happened:
                self.records = records_of(self.client())
        self._event(STEPS)

    def _event(self, point: float) -> None:
        if self.over <= point and not self.happened:
            self.happened = True
            self.event()
            there = records_of(self.client())
            self.lost = sum(
                key not in there or order(there[key]) < order(record) for key, record in self.records.items()
            )

    def _in_the_middle(self, step: int, first: int) -> None:
        """Do *step* until a connection has sent some bytes of it, and then let the event happen."""
        sent = max(self.door.sent[first:], default=0)
        self.door.limit(sent + self.rng.randrange(1, MANY if 1 <= step <= PIECES else FEW))
        thread = threading.Thread(target=self._do, args=(step,))
        thread.start()
        Pair.poll(lambda: self.door.stuck() or not thread.is_alive())
        self.in_call = thread.is_alive()
        if not self.in_call:
            self.records = records_of(self.client())
        self._event(step + 0.5)
        self.door.open()
        thread.join(60)
        assert not thread.is_alive()

    def _do(self, step: int) -> None:
        view, store = self.table.view, self.store
        try:
            if step == 0:
                made = plan_of(self.table, store, run_id=f"run {self.rng.random()}")
                self.plan = pipeline.begin(view, store, replace(made, pieces=made.pieces and PIECES), now=NOW)
            elif step <= PIECES and step <= self.plan.pieces:
                self.pieces.append(pipeline.write_piece(view, store, self.plan, step - 1, now=NOW))
            elif step == STEPS - 1:
                self.report = pipeline.commit(view, store, self.plan, self.pieces, now=NOW)
        except MaterializeError as error:
            self.error = error

    @property
    def told(self) -> str:
        return str(self.error) if self.error is not None else "" if self.report is None else self.report.reason


def records_of(client: redis.Redis) -> dict[bytes, bytes]:
    """The records of a server, past our own code."""
    keys: Any = client.keys("fs:spending:{*")
    values: Any = client.mget(keys) if keys else []
    return dict(zip(keys, values, strict=True))


def order(record: bytes) -> tuple[int, int]:
    """Event and created time of a record, us (docs/format.md)."""
    return struct.unpack_from("<qq", record, 4)  # type: ignore[return-value]


def append(table: Table, rng: random.Random, number: int) -> None:
    """As many commits as a run has pieces, so that each piece writes rows, all newer than those before *number*."""
    for part in range(PIECES):
        users = rng.sample(range(USERS), ROWS)
        moment = number * PIECES + part
        table.append(
            *(
                row(f"user{user}", moment + rng.random(), rng.random(), country="x" * rng.randrange(99))
                for user in users
            )
        )


def cost(*reasons: str) -> int:
    """How many entities runs wrote anew, by what they say."""
    found = [first or second for reason in reasons for first, second in COST.findall(reason)]
    return sum(int(figure.replace(",", "")) for figure in found)


def true_watermark(table: Table, store: RedisStore, before: dict[str, Any], after: dict[str, Any], last: int) -> bool:
    """Whether the store holds at least what its watermark says: *before* was at version *last*, *after* is at the table's head."""
    there, (_, version) = served(table.view, store), position(table, store)
    if version == table.version:
        return there == after
    return (
        version == last
        and there.keys() >= before.keys()
        and all(features in (before.get(user), after[user]) for user, features in there.items())
    )


def test_a_lost_tail_is_always_noticed_and_repaired(table: Table) -> None:
    """FAILOVERS runs, in each of which a real replica that lacks acknowledged records takes over."""
    rng, oracle, counted = random.Random(SEED), Oracle(table), collections.Counter[str]()
    append(table, rng, 0)
    with ExitStack() as stack:
        # Two pairs in turn: while one is at work, the other one's new replica copies.
        pairs = [stack.enter_context(Pair("valkey")) for _ in range(2)]
        for pair in pairs:
            with RedisStore(pair.url + "?replicas=0") as store:
                incremental(table, store, "first")
        states = [(table.version, oracle.expected())] * 2
        number, expected = 0, oracle.expected()
        while counted["lost"] < FAILOVERS and number < 2 * FAILOVERS:
            number += 1
            pair, (last, before) = pairs[number % 2], states[number % 2]
            append(table, rng, number)
            expected = oracle.expected()
            states[number % 2] = table.version, expected
            held = rng.randrange(1, PIECES + 1)
            over = rng.choice([point for point in HALVES if point >= held + 1])
            pair.attached()
            with RedisStore(pair.url + "?replicas=0") as store:
                trial = Trial(table, store, rng, over, pair.door, pair.asked, pair.fail_over, pair.hold, held)
                trial.play()
                where = (number, held, over, trial.in_call, trial.lost, trial.told)
                counted["lost" if trial.lost else "nothing lost"] += 1
                counted["records lost"] += trial.lost
                after_run = trial.report is not None and over == STEPS
                if trial.report is not None:
                    assert adds_up(trial.report), where
                    if not after_run:
                        assert position(table, store)[1] == table.version, where
                        assert served(table.view, store) == expected, where
                elif trial.lost:
                    assert true_watermark(table, store, before, expected, last), where

                after = incremental(table, store, f"after {number}")

                assert adds_up(after)
                assert served(table.view, store) == expected, where
                if not trial.lost:
                    assert cost(trial.told, after.reason) == 0, (where, after.reason)
                    continue
                if after_run:
                    assert LOST_AFTER.search(after.reason), (where, after.reason)
                    assert after.from_version == last, where
                    assert after.written >= trial.lost, where
                    counted["after the run: noticed, done again"] += 1
                else:
                    assert LOST_IN_RUN.search(trial.told), where
                    counted["in the run: noticed, " + ("written again" if trial.report else "failed")] += 1
                counted["in the middle of a call"] += trial.in_call
                assert incremental(table, store, "plain").reason == f"from the watermark at version {table.version}"
    print(f"seed {SEED}: {dict(counted)}")
    assert counted["lost"] == FAILOVERS


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Restartable]:
    """A server that has every acknowledged write in its append-only file."""
    (tmp_path / "server").mkdir()
    server = Restartable("valkey", tmp_path / "server", "--appendonly", "yes", "--appendfsync", "always")
    try:
        yield server
    finally:
        server.stop()


def test_what_loses_nothing_repairs_nothing(table: Table, durable: Restartable) -> None:
    """HARMLESS failovers to a replica that has everything, as many restarts with an append-only file and as many reruns."""
    rng, oracle, counted = random.Random(SEED), Oracle(table), collections.Counter[str]()
    append(table, rng, 0)
    with Pair("valkey") as pair:

        def fail_over() -> None:
            pair.in_step()
            pair.fail_over()

        for url in (pair.url, durable.url):
            with RedisStore(url) as store:
                incremental(table, store, "first")
        for number in range(1, HARMLESS + 1):
            append(table, rng, number)
            pair.attached()
            for what, url in (("failover", pair.url + "?replicas=0"), ("restart", durable.url)):
                over = rng.choice(HALVES)
                with RedisStore(url) as store:
                    if what == "failover":
                        trial = Trial(table, store, rng, over, pair.door, pair.asked, fail_over)
                    else:
                        trial = Trial(table, store, rng, over, None, lambda: durable.client, durable.kill_and_start)
                    trial.play()
                    after = incremental(table, store, f"after {number}")
                    where = (number, what, over, trial.in_call, trial.told, after.reason)

                    counted[what] += 1
                    counted[f"{what}, written again without need"] += len(ALARM.findall(f"{trial.told}{after.reason}"))
                    assert (trial.lost, trial.error) == (0, None), where
                    assert cost(trial.told, after.reason) == 0, where
                    assert trial.report is not None
                    assert adds_up(trial.report), where
                    assert adds_up(after), where
                    assert after.written == 0, where
                    assert served(table.view, store) == oracle.expected(), where
                    again = incremental(table, store, "rerun")
                    counted["rerun"] += 1
                    assert (again.written, again.reason) == (0, f"from the watermark at version {table.version}"), where
    print(f"seed {SEED}: {dict(counted)}")
    assert counted["failover, written again without need"] == 0


def test_with_replicas_asked_for_a_run_does_not_claim_what_only_the_primary_has(table: Table) -> None:
    rng = random.Random(SEED)
    append(table, rng, 0)
    with Pair("valkey") as pair, RedisStore(pair.url + "?replicas=1&replicas_timeout=0.3") as store:
        pipeline.incremental(table.view, store, run())
        before = position(table, store)
        append(table, rng, 1)
        pair.hold()

        with pytest.raises(UnavailableError, match=r"0 of 1 replicas have it after 0\.3 s, expected 1"):
            pipeline.incremental(table.view, store, run("held"))

        assert position(table, store) == before
        pair.fail_over()
        pair.attached()
        pipeline.incremental(table.view, store, run("after"))
        assert served(table.view, store) == Oracle(table).expected()
