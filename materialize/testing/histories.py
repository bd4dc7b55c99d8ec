"""Random histories of a table and of runs over it, played against a store, the order rule and the table itself."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from materialize import order
from materialize.online.base import HEADER, TOMBSTONE, OnlineStore, unpack_order
from materialize.order import stamp
from materialize.testing.batches import AT, FOREVER, Row, content, make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["play_calls", "play_history"]


class Fact(NamedTuple):
    """One row of the table in a history."""

    entity: bytes
    event: int
    created: int
    version: int
    uid: int


@dataclass(frozen=True, slots=True)
class Step:
    """One write call of a run. ``at`` None: merge, else replace by the snapshot *at*; ``floor``: what the records carry."""

    rows: tuple[Row, ...]
    at: int | None = None
    tie_wins: bool = False
    floor: int = order.NO_FLOOR


class History:
    """A random table with commits, and the write calls that runs over it make. Shares no code with the order rule."""

    entities = (b"a", b"b")

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self.snapshots: list[frozenset[Fact]] = [frozenset()]
        self.log: list[tuple[set[Fact], set[Fact]]] = [(set(), set())]
        self.uid, self.generation, self.watermark, self.floor = 0, 1, 0, order.NO_FLOOR

    @property
    def head(self) -> int:
        return len(self.snapshots) - 1

    def commit(self) -> None:
        """Append, delete or update in place, one to three times."""
        live, version = set(self.snapshots[-1]), len(self.snapshots)
        added: set[Fact] = set()
        removed: set[Fact] = set()
        for _ in range(self.rng.randint(1, 3)):
            kind = self.rng.random()
            if kind < 0.6 or not live:
                new = (self.rng.choice(self.entities), self.rng.randint(1, 9), self.rng.randint(1, 3))
            else:
                old = self.rng.choice(sorted(live))
                live.discard(old)
                (added if old in added else removed).add(old)
                added.discard(old)
                if kind < 0.8:
                    continue
                new = (old.entity, old.event, old.created)
            if any(fact[:4] == (*new, version) for fact in live):
                continue  # equal times within one commit are duplicates: either may be served
            self.uid += 1
            fact = Fact(*new, version, self.uid)
            added.add(fact)
            live.add(fact)
        self.snapshots.append(frozenset(live))
        self.log.append((added, removed))

    def latest(self, facts: Sequence[Fact] | frozenset[Fact], entity: bytes) -> Fact | None:
        mine = [fact for fact in facts if fact.entity == entity]
        return max(mine, key=lambda fact: (fact.event, fact.created, fact.version), default=None)

    def incremental(self, after: int, head: int) -> list[Step]:
        """From *after* to *head*: added rows in shards, and entities that lost a row by their full state."""
        plus: list[Fact] = []
        lost: set[bytes] = set()
        for added, removed in self.log[after + 1 : head + 1]:
            plus = [fact for fact in plus if fact not in removed] + sorted(added)
            lost |= {fact.entity for fact in removed}
        shards: list[list[Fact]] = [[] for _ in range(self.rng.randint(1, 3))]
        for fact in plus:
            self.rng.choice(shards).append(fact)
        steps = [self._merge(shard, None) for shard in shards]
        steps += self._replace(sorted(lost), head)
        self.rng.shuffle(steps)
        return [step for step in steps if step.rows]

    def backfill(self, head: int) -> list[Step]:
        low = self.rng.randint(1, 9)
        inside = [fact for fact in self.snapshots[head] if low <= fact.event < low + 4]
        return [step for step in [self._merge(inside, head)] if step.rows]

    def rebuild(self, head: int) -> list[Step]:
        self.generation += 1
        self.floor = stamp(self.generation, head)
        return [step for step in self._replace(list(self.entities), head) if step.rows]

    def _merge(self, facts: Sequence[Fact], version: int | None) -> Step:
        winners = [fact for entity in self.entities if (fact := self.latest(facts, entity)) is not None]
        rows = (self._row(fact, fact.version if version is None else version) for fact in winners)
        return Step(tuple(rows), tie_wins=version is None, floor=self.rng.choice([order.NO_FLOOR, self.floor]))

    def _replace(self, entities: Sequence[bytes], head: int) -> list[Step]:
        at = stamp(self.generation, head)
        found = {entity: self.latest(self.snapshots[head], entity) for entity in entities}
        live = tuple(self._row(fact, head) for fact in found.values() if fact is not None)
        gone = tuple(Row(entity, None, 0, at, b"") for entity, fact in found.items() if fact is None)
        return [Step(live, at, floor=at), Step(gone, at, floor=at)]

    def _row(self, fact: Fact, version: int) -> Row:
        return Row(fact.entity, fact.event, fact.created, stamp(self.generation, version), struct.pack("<q", fact.uid))

    def expected(self) -> dict[bytes, int]:
        """The uid of each entity's latest row at the head, computed from the table alone."""
        found = {entity: self.latest(self.snapshots[self.head], entity) for entity in self.entities}
        return {entity: fact.uid for entity, fact in found.items() if fact is not None}


def play_history(store: OnlineStore, seed: int, view: str) -> None:
    """Play one random history: runs, repeats, partial and late zombies, backfills, rebuilds.

    Raises AssertionError when an outcome or a record is not what `materialize.order` says, or when at the end an entity is not
    its latest row in the table.
    """
    history, model = History(seed), dict[bytes, order.Record]()
    zombies: list[list[Step]] = []
    rng = history.rng
    for _ in range(rng.randint(4, 20)):
        kind = rng.random()
        if kind < 0.45:
            history.commit()
        elif kind < 0.6:
            steps = history.incremental(history.watermark, history.head)
            overlapping = zombies[-1] if zombies else []
            played = [*steps, *rng.sample(steps, len(steps) // 2), *overlapping]
            rng.shuffle(played)
            _apply(store, view, model, played, seed)
            zombies.append(steps)
            history.watermark = history.head
        elif kind < 0.75:
            zombies.append(history.incremental(history.watermark, history.head))
        elif kind < 0.85:
            _apply(store, view, model, history.backfill(history.head), seed)
        elif kind < 0.9:
            _apply(store, view, model, history.rebuild(history.head), seed)
            history.watermark = history.head
        elif zombies:
            stalled = rng.choice(zombies)
            _apply(store, view, model, rng.sample(stalled, rng.randint(0, len(stalled))), seed)
    _apply(store, view, model, history.incremental(history.watermark, history.head), seed)
    for stalled in zombies:
        _apply(store, view, model, stalled, seed)
    served = {key: record for key, record in content(store, view).items() if not record[1] & TOMBSTONE}
    uids = {key: struct.unpack("<q", record[HEADER.size :])[0] for key, record in served.items()}
    assert uids == history.expected(), f"seed {seed}"


def play_calls(store: OnlineStore, seed: int, view: str) -> None:
    """Play random merges and replaces of three entities, most of which no run would make.

    So every branch of the rule is taken within some hundred seeds; histories reach some of them once in a thousand. Raises
    AssertionError when an outcome or a record is not what `materialize.order` says.
    """
    rng, model = random.Random(seed), dict[bytes, order.Record]()  # noqa: S311 - repeatable, not secret
    width = 1_000 if seed % 3 == 0 else 0  # a store may treat long records in another way
    for call in range(rng.randint(5, 20)):
        version, gone = AT + rng.randint(1, 6), rng.random() < 0.3
        replaces = gone or rng.random() < 0.4
        rows = tuple(
            Row(
                key=entity,
                event_us=None if gone else rng.randint(1, 2),
                created_us=0 if gone else rng.randint(1, 3),
                version=version,
                payload=b"" if gone else (b"%d" % call).ljust(width, b"."),
            )
            for entity in rng.sample((b"a", b"b", b"c"), rng.randint(1, 3))
        )
        if replaces:
            step = Step(rows, at=version, floor=version)
        else:
            step = Step(rows, tie_wins=rng.random() < 0.6, floor=rng.choice([order.NO_FLOOR, AT + rng.randint(1, 6)]))
        _apply(store, view, model, [step], seed)


def _apply(store: OnlineStore, view: str, model: dict[bytes, order.Record], steps: Sequence[Step], seed: int) -> None:
    for step in steps:
        batch = make_batch(step.rows, floor=step.floor)
        expected = []
        for row, value in zip(step.rows, batch.values.to_pylist(), strict=True):
            held, new = model.get(row.key), unpack_order(value)
            if step.at is None:
                outcome, model[row.key] = order.merge(held, new, tie_wins=step.tie_wins)
            else:
                outcome, model[row.key] = order.replace(held, new, at=step.at)
            expected.append(outcome)
        if step.at is None:
            found = store.merge(view, batch, tie_wins=step.tie_wins, retention=FOREVER)
        else:
            found = store.replace(view, batch, at=step.at, retention=FOREVER)
        assert found.tolist() == expected, f"seed {seed}: {step}"
        assert {key: unpack_order(value) for key, value in content(store, view).items()} == model, (
            f"seed {seed}: {step}"
        )
