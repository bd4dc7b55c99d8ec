"""Random histories of one Delta table and the runs over it: after each run the store must hold what `Lake` says.

Usable as a script, so that a changed copy of the package can be tried: ``python -m tests.properties.histories STORE_URL FIRST_SEED COUNT``.
"""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from materialize.model import Interval, OnlineStoreConfig
from materialize.online import open_store
from tests.properties.commits import Commits
from tests.properties.lake import Lake
from tests.properties.rows import FEATURES, MAX_VALUE_BYTES, T0, Rows
from tests.properties.runs import Divergence, Runs
from tests.properties.storage import Folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.properties.storage import Storage

__all__ = ["Divergence", "History", "play"]

#: Of a history's steps, how often each is taken between two incremental runs.
STEPS = {"nothing": 6.0, "backfill": 1.5, "rebuild": 0.5, "crash": 1.5, "stall": 2.0, "zombie": 2.5, "view": 1.0}
#: Commits that leave the files of older versions alone, so that a run under way must go on.
HARMLESS_BUT = ("vacuum", "cleanup", "recreate")


@dataclass(slots=True)
class History:
    """One table, one store, and everything that happens to them from one seed. ``log``: what happened, a line per step."""

    seed: int
    runs: Runs
    commits: Commits
    rng: random.Random
    log: list[str] = field(default_factory=list)

    def play(self) -> None:
        self.commits.create()
        for _ in range(self.rng.randint(6, 14)):
            self.some_commits(0, 1, 1, 2, 3)
            self.step()
            self.some_commits(0, 0, 1, 2)
            if self.rng.random() < 0.9:
                self.log.append("incremental")
                self.runs.incremental()
        self.log.append("the last incremental run, then what is left of stalled runs")
        self.runs.meanwhile = lambda: None
        self.runs.incremental()
        for attempt in list(self.runs.stalled):
            self.runs.finish(attempt)
        self.runs.settle(self.runs.lake.now)

    def some_commits(self, *counts: int) -> None:
        for _ in range(self.rng.choice(counts)):
            self.commit()

    def commit(self, *but: str) -> None:
        self.commits.told = "nothing"
        try:
            self.commits.any(*but)
        finally:
            self.log.append(self.commits.told)
        self.runs.features = [name for name in self.runs.features if name in self.runs.lake.now.columns]

    def meanwhile(self) -> None:
        """A commit while a run is under way."""
        if self.rng.random() < 0.15:
            self.log.append("  meanwhile:")
            self.commit(*HARMLESS_BUT)

    def step(self) -> None:
        name = self.rng.choices(list(STEPS), list(STEPS.values()))[0]
        if name == "nothing":
            return
        self.log.append(name)
        steps: dict[str, Callable[[], object]] = {
            "backfill": self.backfill,
            "rebuild": self.runs.rebuild,
            "crash": self.crash,
            "stall": self.stall,
            "zombie": self.zombie,
            "view": self.change_view,
        }
        told = steps[name]()
        self.log[-1] += f" {told}" if isinstance(told, str) else ""

    def interval(self) -> Interval:
        low = self.rng.randint(-5, 8)
        return Interval(T0 + timedelta(minutes=low), T0 + timedelta(minutes=low + self.rng.choice([1, 4, 20])))

    def backfill(self) -> str:
        interval = self.interval()
        self.runs.backfill(interval)
        return str(interval)

    def crash(self) -> str:
        return self.runs.crash(self.rng.choice(["incremental", "incremental", "rebuild", "backfill"]), self.interval())

    def stall(self) -> str:
        return self.runs.stall(self.rng.choice(["incremental", "incremental", "rebuild", "backfill"]), self.interval())

    def zombie(self) -> str:
        if not self.runs.stalled:
            return "none"
        attempt = self.rng.choice(self.runs.stalled)
        return self.runs.finish(attempt) if self.rng.random() < 0.5 else self.runs.go_on(attempt)

    def change_view(self) -> str:
        """One feature more or less."""
        runs = self.runs
        known = [name for name in FEATURES if name in runs.lake.now.columns]
        changed = self.rng.choice([name for name in known if name not in {"amount", "count", "name"}])
        wanted = set(runs.features) ^ {changed}
        runs.features = [name for name in FEATURES if name in wanted]
        return f"features are {', '.join(runs.features)}"


def play(url: str, seed: int, storage: Storage | None = None) -> Runs:
    """Play the history of *seed* on an empty store; FOLDER and SEED in *url* are filled in. Returns: what was run.

    Raises Divergence, with the seed and the history, where the store is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        rng = random.Random(seed)
        address = url.replace("FOLDER", folder).replace("SEED", str(seed))
        with open_store(OnlineStoreConfig("s", address)) as store:
            store.setup("v")
            store.max_value_bytes = MAX_VALUE_BYTES
            lake = Lake(storage or Folder(f"{folder}/t"), partitioned=rng.random() < 0.4)
            commits = Commits(lake, rng, Rows(rng), grows=rng.random() < 0.25)
            if storage is not None:  # a checkpoint saves many requests
                commits.weights["checkpoint"] = 5.0
            history = History(seed, Runs(lake, store, rng), commits, rng)
            history.runs.meanwhile = history.meanwhile
            try:
                history.play()
            except Exception as error:
                wrong = str(error) if isinstance(error, Divergence) else f"{type(error).__name__}: {error}"
                steps = "\n  ".join(history.log)
                raise Divergence(f"seed {seed}: {wrong}\nhistory:\n  {steps}") from error
    return history.runs


if __name__ == "__main__":
    for number in range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])):
        play(sys.argv[1], number)
