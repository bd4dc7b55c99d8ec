"""A Delta table that lives: appends, late rows, ties, updates and deletes by deltalake itself, commit by commit from one seed."""

from __future__ import annotations

import random
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pyarrow as pa
from deltalake import DeltaTable

from tests.tables import SCHEMA, Table

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Story"]

#: The first event time, in the past of every real clock, and microseconds between two event times.
FIRST_US, STEP_US = int(datetime(2025, 1, 1, tzinfo=timezone.utc).timestamp()) * 10**6, 60_000_000
#: An update adds this, times its own version, to the ``count`` of a row: so ``count`` names one state of one row for ever.
UPDATED = 10**9


class Story:
    """``table`` with users ``u0`` ... ``u<entities - 1>``, none of which has to have a row. The first commit is an append.

    *padding*: bytes of the string feature, for runs that take some time.
    """

    def __init__(self, path: Path, seed: int, *, entities: int = 40, padding: int = 0) -> None:
        self.table, self.rng = Table(path), random.Random(seed)
        self.entities, self.padding, self.rows = entities, padding, 0
        self.hour = 10
        #: Event and created steps of earlier rows, from which ties are made.
        self.known: list[tuple[int, int, int]] = []

    def grow(self, commits: int) -> None:
        for _ in range(commits):
            self.commit()

    def commit(self) -> None:
        """One commit of a random kind. An update or a delete that touches no row is a commit too, or none."""
        kind = self.rng.random()
        if not self.known or kind < 0.55:
            self.append(self.rng.uniform(0.3, 0.9))
        elif kind < 0.75:
            self.update()
        elif kind < 0.9:
            self.delete()
        else:
            self.delete_entities()

    def append(self, share: float) -> None:
        """Rows of a *share* of the entities: most of them of now, some late, some equal in their times to an older row."""
        self.hour += 5
        new: dict[tuple[int, int, int], None] = {}
        for user in self.rng.sample(range(self.entities), max(1, int(self.entities * share))):
            event = self.hour + self.rng.randint(-2, 2)
            new[user, event, event + self.rng.randint(0, 2)] = None
        for user in self.rng.sample(range(self.entities), max(1, self.entities // 8)):
            event = self.rng.randint(0, self.hour)
            new[user, event, event + self.rng.randint(0, 9)] = None  # late
        if self.known:
            new |= dict.fromkeys(self.rng.choices(self.known, k=max(1, self.entities // 8)))  # tied
        self.known = [*self.known[-self.entities :], *new]
        self.table.append_table(self._rows(list(new)))

    def update(self) -> None:
        """New values at the same times, for every row of some users."""
        changes = {"count": f"count + {UPDATED * (self.table.version + 1)}", "amount": "amount + 1.0"}
        self._delta.update(predicate=self._some_users(), updates=changes)

    def delete(self) -> None:
        """The newest rows of some users disappear, so that an older one counts again."""
        self._delta.delete(f"{self._some_users()} AND count >= {self.rows * 7 // 10}")

    def delete_entities(self) -> None:
        self._delta.delete(self._some_users())

    @property
    def _delta(self) -> DeltaTable:
        return DeltaTable(str(self.table.path))

    def _some_users(self) -> str:
        users = self.rng.sample(range(self.entities), max(1, self.entities // 10))
        return f"user_id IN ({', '.join(repr(f'u{user}') for user in users)})"

    def _rows(self, new: list[tuple[int, int, int]]) -> pa.Table:
        numbers = range(self.rows, self.rows + len(new))
        self.rows += len(new)
        times = [
            pa.array([FIRST_US + one[column] * STEP_US for one in new], pa.int64()).cast(SCHEMA.field(column).type)
            for column in (1, 2)
        ]
        columns = {
            "user_id": pa.array([f"u{user}" for user, _, _ in new]),
            "event_timestamp": times[0],
            "created": times[1],
            "amount": pa.array([None if number % 17 == 0 else number / 8 for number in numbers], pa.float64()),
            "count": pa.array(list(numbers), pa.int64()),
            "country": pa.array([None if number % 23 == 0 else f"{number:0{self.padding}d}" for number in numbers]),
        }
        return pa.table(columns, schema=SCHEMA)
