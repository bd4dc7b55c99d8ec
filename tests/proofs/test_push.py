"""Pushers side by side with runs, rebuilds, other writers and deletes: every key is what plain Python reads from the Delta files."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from deltalake.exceptions import CommitFailedError

from materialize import pipeline
from materialize.errors import BusyError, OnlineStoreError, UnavailableError, WatermarkError
from materialize.model import Interval
from materialize.push import Pusher, push
from tests.proofs.oracle import Lake, unpacked, wrong_keys
from tests.stepping import incremental, records, run
from tests.tables import Table, at, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.online.base import OnlineStore

#: Histories of each kind; MATERIALIZE_PUSHES sets another number.
SEEDS = int(os.environ.get("MATERIALIZE_PUSHES", "1"))
ENTITIES = [f"user-{number}" for number in range(12)]
PUSHERS, PUSHES, ROWS, MINUTES = 3, 12, 6, 4
#: Seconds until a history counts as hanging.
SECONDS = 300.0


class History:
    """What happens to one table and one store. Every row has a ``count`` of its own, and times that other rows have too."""

    def __init__(self, table: Table, store: OnlineStore, seed: int) -> None:
        self.table, self.store, self.seed = table, store, seed
        self.numbers = itertools.count(1)
        self.busy = threading.Event()
        self.errors: list[BaseException] = []

    def rows(self, rng: random.Random) -> Iterator[dict[str, Any]]:
        """Some rows, of one entity none with the times of another: which of such would win is not promised."""
        seen = set()
        for _ in range(rng.randint(1, ROWS)):
            times = rng.choice(ENTITIES), rng.randint(1, MINUTES), rng.randint(1, 2)
            if times not in seen:
                seen.add(times)
                yield row(times[0], times[1], rng.random(), created=times[2], count=next(self.numbers))

    def play(self, *, pushers: int, beside: list[Callable[[random.Random], None]]) -> None:
        """Push in as many threads, while each of *beside* is done again and again in a thread of its own."""
        shared = Pusher(self.table.view, self.store, run("shared"))
        pushing = [threading.Thread(target=self._guarded, args=(self._push, n, shared)) for n in range(pushers)]
        others = [threading.Thread(target=self._guarded, args=(self._repeat, n, call)) for n, call in enumerate(beside)]
        for thread in (*pushing, *others):
            thread.start()
        deadline = time.monotonic() + SECONDS
        for thread in pushing:
            thread.join(deadline - time.monotonic())
        self.busy.set()
        for thread in others:
            thread.join(deadline - time.monotonic())
        assert not any(thread.is_alive() for thread in (*pushing, *others)), f"seed {self.seed} hangs"
        assert not self.errors, f"seed {self.seed}: {self.errors}"

    def _guarded(self, call: Callable[..., None], number: int, what: Any) -> None:
        try:
            call(random.Random(f"{self.seed} {call.__name__} {number}"), number, what)
        except BaseException as error:  # noqa: BLE001 - the test's thread tells it
            self.errors.append(error)
            self.busy.set()

    def _push(self, rng: random.Random, number: int, shared: Pusher) -> None:
        """Two of three threads share a Pusher. Some pushes are repeated with their id, as after an outcome that nobody knows."""
        for turn in range(PUSHES):
            rows, push_id = list(self.rows(rng)), f"{number}-{turn}" if rng.random() < 0.3 else None
            for _ in range(1 if push_id is None else 2):
                with suppress(UnavailableError):  # a table that changed meanwhile
                    if number % 3 == 2:
                        push(self.table.view, self.store, rows, run(f"pusher-{number}"), push_id=push_id)
                    else:
                        shared.push(rows, push_id=push_id)

    def _repeat(self, rng: random.Random, _number: int, call: Callable[[random.Random], None]) -> None:
        while not self.busy.is_set():
            with suppress(BusyError, WatermarkError, CommitFailedError):
                call(rng)
            self.busy.wait(rng.random() / 20)

    # --- what goes on beside it ---

    def incremental(self, _rng: random.Random) -> None:
        incremental(self.table, self.store, f"run-{next(self.numbers)}")

    def rebuild(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            pipeline.rebuild(self.table.view, self.store, run(f"rebuild-{next(self.numbers)}"))

    def backfill(self, _rng: random.Random) -> None:
        pipeline.backfill(self.table.view, self.store, run("backfill"), Interval(at(0), at(3)))

    def append(self, rng: random.Random) -> None:
        self.table.append(*self.rows(rng))

    def delete(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            self.table.delta.delete(f"user_id = '{rng.choice(ENTITIES)}' AND count % 2 = 0")

    def wrong(self) -> dict[str, int]:
        online = {key: unpacked(record) for key, record in records(self.table.view, self.store).items()}
        return dict(wrong_keys(Lake(self.table.path), online))


@pytest.fixture(params=range(SEEDS), ids=lambda seed: f"seed {seed}")
def history(request: pytest.FixtureRequest, table: Table, any_store: OnlineStore) -> History:
    found = History(table, any_store, request.param)
    table.append(*(row(entity, 1, 0.5, count=next(found.numbers)) for entity in ENTITIES[:6]))
    incremental(table, any_store)
    return found


def test_pushes_beside_incremental_runs_are_online_at_once(history: History) -> None:
    """No run follows: what every push said is online, is."""
    history.play(pushers=PUSHERS, beside=[history.incremental, history.backfill])

    assert history.wrong() == {}
    incremental(history.table, history.store, "last")
    assert history.wrong() == {}


def test_pushes_beside_everything_are_exact_after_a_run(history: History) -> None:
    beside = [history.incremental, history.rebuild, history.backfill, history.append, history.delete]

    history.play(pushers=PUSHERS, beside=beside)

    incremental(history.table, history.store, "last")
    assert history.wrong() == {}
    assert incremental(history.table, history.store, "again").written == 0
    with pytest.raises(OnlineStoreError, match="never loaded"):
        push(history.table.change_view(name="other"), history.store, [row("a", 1)], run())
