"""Who may run over a view in a store, one run at a time: a cell named ``lease`` in the store, and the store's own clock.

The lease is for efficiency and for clear reasons, not for safety: it spares a second run its work and tells it who is at it. That
older values never replace newer ones, and that a run which was overtaken cannot move the watermark, hold without it, by the
order rule and the watermark's compare-and-set. So losing the cell, or an operator's `free`, harms nothing.

Runs that move the watermark take it: incremental, rebuild, what follows the files of a bulk load, and a repair that needs a new
generation. Backfills move none.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from materialize import process
from materialize.errors import BusyError, MaterializeError, OnlineStoreError, UnavailableError
from materialize.model import from_us
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from materialize.online.base import OnlineStore

__all__ = ["LASTING", "Held", "Lease", "Terms", "current", "free", "held_by", "holding"]

log = logging.getLogger(__name__)

CELL = "lease"
#: Seconds between two looks of a run that waits; shorter where the lease ends before.
LOOK = 1.0
#: Renewals within a lease's time: two of them may fail.
RENEWALS = 3
#: Turns at a cell that tasks of the same run change at the same time.
TURNS = 20
#: The leases that this process holds now, by token.
_LIVE: set[str] = set()
Run = TypeVar("Run")


@dataclass(frozen=True, slots=True)
class Terms:
    """How a run holds its lease. ``seconds``: until it may be taken over unless it is renewed, which it is all the time. ``wait``:
    seconds to wait for another run before giving up. ``lasting``: the lease is of a run in several processes, one after the
    other and side by side, and so outlives each of them; else it ends with its process.
    """

    seconds: float = 60.0
    wait: float = 0.0
    lasting: bool = False


#: Of a run whose steps are tasks of a scheduler: longer than the time between two of them. A task waits in its slot for a short run of
#: another; for a longer one it is tried again.
LASTING = Terms(seconds=900.0, wait=60.0, lasting=True)


@dataclass(frozen=True, slots=True)
class Lease:
    """What the cell says. ``holder``: a run's id. ``who``: where it runs, for people. ``process``: the one that it ends with, as
    `materialize.process` names it; None: it only ends by time. Times are microseconds of the store's clock; ``until_us`` 0: free.
    """

    holder: str
    who: str
    mode: str
    taken_us: int
    until_us: int
    token: str
    process: str | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()

    def __str__(self) -> str:
        since, until = (from_us(us).isoformat(timespec="seconds") for us in (self.taken_us, self.until_us))
        return f"the run {self.holder} ({self.mode}, on {self.who}, since {since}, holding it until {until})"

    def ended(self, now_us: int) -> bool:
        """Whether anybody may take it: it was given back, or its time is over, or its process. A process knows which it holds itself."""
        if self.until_us <= now_us:
            return True
        if self.process is None:
            return False
        return self.token not in _LIVE if self.process == process.name() else process.gone(self.process)


def current(store: OnlineStore, view: str) -> Lease | None:
    """Who holds *view* in *store* now; None: nobody."""
    _, found = with_retry(partial(_read, store, view))
    return None if found is None or found.ended(with_retry(partial(store.now_us, view))) else found


def free(store: OnlineStore, view: str) -> Lease | None:
    """End the lease of *view*, whoever holds it, and also one that cannot be read. Returns: whose it was, None if nobody held it.

    A run of one process that is still there stops before its next write; one of several tasks takes it again if nobody else did.
    """
    held = None
    for _ in range(TURNS):
        content = with_retry(partial(store.read_cell, view, CELL))
        try:
            held = None if content is None else Lease(**json.loads(content))
        except (ValueError, TypeError):
            held = None
        ended = held is not None and held.ended(with_retry(partial(store.now_us, view)))
        freed = Lease(f"freed by {process.person()}", process.here(), "release", 0, 0, "")
        if content is None or with_retry(partial(store.compare_and_set_cell, view, CELL, content, freed.to_json())):
            return None if ended else held
    raise UnavailableError(
        f"feature view {view!r}: could not free the lease in {store.location}: it changed {TURNS} times meanwhile"
    )


class Held:
    """A lease that is held and renewed until the with block of `holding` ends."""

    def __init__(self, store: OnlineStore, view: str, lease: Lease, terms: Terms) -> None:
        self.store, self.view, self.lease, self.terms = store, view, lease, terms
        self.renewed, self.lost = time.monotonic(), ""
        self.turn, self.over = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._keep, name="materialize-lease", daemon=True)

    def check(self) -> None:
        """Whether this run may go on; asked before each piece, after each finished write and before the commit.

        Raises BusyError when the lease is another run's. A process that stood still for longer than the lease's time asks the store.
        """
        if not self.lost and time.monotonic() - self.renewed > self.terms.seconds:
            with_retry(self.renew)
        if self.lost:
            raise BusyError(
                f"feature view {self.view!r}: could not go on with the run {self.lease.holder} in {self.store.location}: found that the lease is of "
                f"{self.lost}, expected it to be held. What this run wrote is harmless, and it moves no watermark. Nothing has to be done."
            )

    def renew(self) -> None:
        """Hold it for the whole time again, or note who has it now."""
        with self.turn:
            asked = time.monotonic()
            for _ in range(TURNS):
                content, found = _read(self.store, self.view)
                now_us = self.store.now_us(self.view)
                mine = found is not None and found.token == self.lease.token
                if not mine and not (self.terms.lasting and (found is None or found.ended(now_us))):
                    self.lost = "nobody, since its cell is gone" if found is None else str(found)
                    return
                renewed = replace(self.lease, until_us=now_us + int(self.terms.seconds * 1e6))
                if self.store.compare_and_set_cell(self.view, CELL, content, renewed.to_json()):
                    self.renewed = asked
                    return

    def _keep(self) -> None:
        while not self.over.wait(self.terms.seconds / RENEWALS) and not self.lost:
            try:
                self.renew()
            except MaterializeError as error:  # noqa: PERF203 - the run itself will meet it
                log.warning("could not renew the lease view=%s: %s", self.view, error)

    def end(self, *, give_back: bool) -> None:
        """Stop renewing. Giving back is tried once: whoever comes next sees that the process is over, or waits."""
        self.over.set()
        self.thread.join()
        _LIVE.discard(self.lease.token)
        if self.lost or not give_back:
            return
        try:
            content, found = _read(self.store, self.view)
            if found is not None and found.token == self.lease.token:
                self.store.compare_and_set_cell(self.view, CELL, content, replace(found, until_us=0).to_json())
        except MaterializeError as error:
            log.warning("could not give the lease back view=%s: %s", self.view, error)


@contextmanager
def holding(
    store: OnlineStore, view: str, holder: str, mode: str, terms: Terms, *, last: bool = True
) -> Iterator[Held]:
    """Hold the lease of *view* in *store* for the run *holder* within the with block, renewed by a thread.

    It is given back at the end, a lasting one by the *last* task or one that fails, stopped ones included: a second try takes it again.
    The same run takes a lasting lease without waiting. After a crash it ends with its process, as far as others can see that, else by
    its time.

    Raises BusyError when another run holds it for longer than ``terms.wait``; then nothing was written.
    """
    token = holder if terms.lasting else uuid.uuid4().hex
    _LIVE.add(token)  # before it is taken, or another thread would take it for one that nobody holds
    try:
        held = Held(store, view, _take(store, view, Lease(holder, process.here(), mode, 0, 0, token), terms), terms)
    except BaseException:
        _LIVE.discard(token)
        raise
    held.thread.start()
    goes_on = False
    try:
        yield held
        goes_on = terms.lasting and not last
    finally:
        held.end(give_back=not goes_on)


def _take(store: OnlineStore, view: str, wanted: Lease, terms: Terms) -> Lease:
    own = None if terms.lasting else process.name()
    until = time.monotonic() + terms.wait
    while True:
        content, found = with_retry(partial(_read, store, view))
        now_us = with_retry(partial(store.now_us, view))
        # One's own is there when a task is tried again, or when a reply was lost.
        if found is None or found.token == wanted.token or found.ended(now_us):
            mine = replace(wanted, taken_us=now_us, until_us=now_us + int(terms.seconds * 1e6), process=own)
            if with_retry(partial(store.compare_and_set_cell, view, CELL, content, mine.to_json())):
                if found is not None and found.until_us:
                    log.info("took the lease over view=%s from %s", view, found)
                return mine
            continue
        left = until - time.monotonic()
        if left <= 0:
            raise BusyError(
                f"feature view {view!r}: could not begin the run {wanted.holder} in {store.location}: found that {found} is writing there, expected no "
                f"other run. Nothing was written by this one. Run again later, or with --wait; if that run is dead: materialize release {view}"
            )
        log.info("waiting view=%s for %s", view, found)
        time.sleep(min(LOOK, left, max((found.until_us - now_us) / 1e6, 0.01)))


def _read(store: OnlineStore, view: str) -> tuple[bytes | None, Lease | None]:
    content = store.read_cell(view, CELL)
    try:
        return content, None if content is None else Lease(**json.loads(content))
    except (ValueError, TypeError):
        raise OnlineStoreError(
            f"feature view {view!r}: could not read the cell {CELL!r} in {store.location}: found something else than this release writes, expected a "
            f"lease. Nothing was written. Upgrade, or if no run is under way: materialize release {view}"
        ) from None


# --- runs of one process -----------------------------------------------------------------------------------------------


@contextmanager
def held_by(run: Run, store: OnlineStore, view: str, mode: str) -> Iterator[Run]:
    """Hold the lease of *view* in *store* for *run*, a `materialize.pipeline.Run`. Gives the run that looks after it.

    The lease is checked whenever that run asks for the time, which it does before each piece and before the commit, and whenever it
    tells its progress, which it does after each finished write. A run whose ``lease`` is None is part of one that holds it.
    """
    asked: Any = run  # its class is of a layer above
    if asked.lease is None:
        yield run
        return
    with holding(store, view, asked.run_id, mode, asked.lease) as held:

        def now() -> Any:
            held.check()
            return asked.now()

        def progress(entities: int) -> None:
            asked.progress(entities)
            held.check()

        yield replace(asked, now=now, progress=progress)
