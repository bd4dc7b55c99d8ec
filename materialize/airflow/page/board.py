"""The configuration in, where every feature view stands in every store out. A store that hangs delays and hides nobody else."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from materialize.airflow import tasks
from materialize.airflow.page import history
from materialize.config import load
from materialize.errors import ConfigError, MaterializeError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.orm import Session

    from materialize.airflow.page.history import History, Pair
    from materialize.config import Config
    from materialize.freshness import Freshness
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["BACKFILL", "SCHEDULES", "Board", "Reader", "Standing"]

log = logging.getLogger(__name__)

#: The DAG of each schedule, and the DAG of the form.
SCHEDULES = {"hourly": "materialize_hourly", "daily": "materialize_daily"}
BACKFILL = "materialize_backfill"
#: Seconds that a board serves every request, and seconds that its reads may take together.
KEEP, LIMIT = 10.0, 5.0
#: Reads at once for one store. Reads that a store left hanging count, so a dead one never holds more threads than these.
THREADS = 4


@dataclass(frozen=True, slots=True)
class Standing:
    """A view in a store: where it stands, or the sentence that says why that is not known. *view* has no credentials."""

    view: FeatureView
    store: str
    freshness: Freshness | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Board:
    """What there was at one moment. ``problem``: what is wrong with the configuration; then there is nothing else."""

    at: datetime
    standings: tuple[Standing, ...] = ()
    histories: dict[Pair, History] = field(default_factory=dict)
    paused: dict[str, bool] = field(default_factory=dict)
    problem: str = ""


class Reader:
    """Reads a board, and reads it again when it is older than *keep* seconds; for all requests of a process.

    One request reads; those that come meanwhile get the board before, or wait for the first. No read takes much longer than
    *limit* seconds. What a board needs of the stores, the tables and the metadata database does not grow with the requests.
    """

    def __init__(
        self,
        folder: Path,
        session: Callable[[], AbstractContextManager[Session]],
        *,
        keep: float = KEEP,
        limit: float = LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.session = folder, session
        self.keep, self.limit, self.clock = keep, limit, clock
        self.reading = threading.Lock()
        self.kept: tuple[float, Board] | None = None
        #: The threads of each store, with the views that each has still to answer for, the one that it asks about first.
        self.asking: dict[str, list[tuple[threading.Thread, list[str]]]] = {}

    def board(self) -> Board:
        kept = self.kept
        if kept is not None and self.clock() - kept[0] < self.keep:
            return kept[1]
        if not self.reading.acquire(blocking=kept is None):
            return kept[1]  # type: ignore[index]  # it blocks without one
        try:
            kept = self.kept
            if kept is None or self.clock() - kept[0] >= self.keep:
                kept = self.kept = (self.clock(), self.read())
            return kept[1]
        finally:
            self.reading.release()

    def read(self) -> Board:
        at = tasks.utcnow()
        try:
            config = load(self.folder, connections=tasks.connection)
        except ConfigError as error:
            return Board(at, problem=str(error))
        views = config.feature_views
        pairs = [(view.name, store) for view in views.values() for store in view.online_stores]
        found = self.look(config, pairs)
        with self.session() as session:
            histories = history.read(pairs, session)
            paused = history.paused([*SCHEDULES.values(), BACKFILL], session)
        silent = (
            f"could not read where it stands: no answer in {self.limit:g} s. Nothing is lost; the next look may tell."
        )
        standings = []
        for view, store in pairs:
            answer = found.get((view, store), silent)
            told = (None, answer) if isinstance(answer, str) else (answer, "")
            standings.append(Standing(views[view], store, *told))
        return Board(at, tuple(standings), histories, paused)

    def look(self, config: Config, pairs: Sequence[Pair]) -> dict[Pair, Freshness | str]:
        """Where each of *pairs* stands, or what is wrong; without those that did not answer in time."""
        by_store: dict[str, list[str]] = defaultdict(list)
        for view, store in pairs:
            by_store[store].append(view)
        answers: queue.SimpleQueue[tuple[Pair, Freshness | str]] = queue.SimpleQueue()
        late, expected = threading.Event(), 0
        for store, views in by_store.items():
            hanging = [(thread, left) for thread, left in self.asking.get(store, []) if thread.is_alive()]
            # Who hangs since an earlier look is not asked again, so one table that hangs leaves the other threads to the others.
            asked = [view for view in views if all(left[:1] != [view] for _, left in hanging)]
            free = min(THREADS - len(hanging), len(asked))
            for first in range(free):
                left = asked[first::free]
                expected += len(left)
                # A daemon, for the process must be able to end while a store hangs.
                thread = threading.Thread(target=ask, args=(config, store, left, answers, late), daemon=True)
                hanging.append((thread, left))
                thread.start()
            self.asking[store] = hanging
        found: dict[Pair, Freshness | str] = {}
        end = time.monotonic() + self.limit
        while len(found) < expected:
            try:
                pair, answer = answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            found[pair] = answer
        late.set()
        return found


def ask(config: Config, store: str, left: list[str], answers: queue.SimpleQueue[Any], late: threading.Event) -> None:
    """Put an answer for each view of *left*, and take it off the list, until it is *late*. A store that is down is asked once."""
    from materialize.online import open_store

    try:
        with open_store(config.online_store(store)) as online:
            while left and not late.is_set():
                answers.put(((left[0], store), stands(config, left[0], online)))
                left.pop(0)
    except Exception as error:  # noqa: BLE001 - the outermost frame of a thread
        problem = told(error, f"online store {store!r}")
        for place, view in enumerate(left):
            unasked = place > 0 and isinstance(error, UnavailableError)
            answers.put(
                ((view, store), f"not asked, because another view got no answer: {problem}" if unasked else problem)
            )


def stands(config: Config, view: str, online: OnlineStore) -> Freshness | str:
    """Where *view* stands, or what is wrong with it alone. Raises UnavailableError, which is about the store."""
    from materialize.freshness import freshness

    try:
        return freshness(config.feature_view(view), online)
    except UnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 - one view must not hide the others
        return told(error, f"feature view {view!r}")


def told(error: Exception, subject: str) -> str:
    """What a browser may see of *error*: our own messages hold no secret, of any other error the class alone is shown."""
    if isinstance(error, MaterializeError):
        return str(error)
    log.error("could not read where %s stands", subject, exc_info=error)
    return f"could not read where it stands: {type(error).__name__}. The log of the API server says more."
