"""A load in, all its rows settled out: threads that send what it has, as many as the store's answers take time for."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.dynamodb.client import SERVER_ERROR, THROTTLES
from materialize.online.dynamodb.load import AGAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from materialize.online.dynamodb.client import Client
    from materialize.online.dynamodb.load import Load, Writes
    from materialize.online.dynamodb.pace import Pace

__all__ = ["PATIENCE", "Sending"]

log = logging.getLogger(__name__)

#: Seconds without any progress until the table counts as unavailable.
PATIENCE = 60.0
#: While a request is under way and this process needs less of a core than this, it waits for the store, and one thread more helps;
#: beyond, threads would only take turns at Python's lock (eight of them on a server that answers at once: half more CPU per row).
BUSY = 0.5
#: How much one request says of that: some are slow by chance.
WEIGHT = 0.2


@dataclass(slots=True)
class Sending:
    """One load, and the threads that send it; the caller's is the first. What they do to the load they do in turn.

    ``read``: the items of entity keys, with their order alone.
    """

    load: Load
    client: Client
    pace: Pace
    read: Callable[[list[str]], Mapping[str, Mapping[str, Any]]]
    pool: ThreadPoolExecutor
    clock: Callable[[], float]
    turn: threading.Condition = field(default_factory=threading.Condition)
    others: list[Future[None]] = field(default_factory=list)
    under_way: int = 0
    over: bool = False
    error: BaseException | None = None
    busy: float = 1.0
    left: int = field(init=False)
    since: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.since = self.load.left, self.clock()

    def run(self) -> None:
        """Keep requests under way until every row is settled.

        Raises UnavailableError when no row was settled for `PATIENCE`, and what the requests raise.
        """
        try:
            for _ in range(1, self.pace.threads):
                self.add()
            self.work()
        finally:
            with self.turn:
                self.over = True
                self.turn.notify_all()
            for other in self.others:
                other.cancel()
            wait(self.others)
        if self.error is not None:
            raise self.error
        if refused := dict(self.load.counts):
            rows, rate = len(self.load.shuffled), self.pace.rate
            log.info("wrote batch view=%s rows=%s refused=%s rate=%.0f", self.load.view, rows, refused, rate)

    def work(self) -> None:
        """Send and tell until nothing is left, or something failed."""
        while (step := self.next_step()) is not None:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                tell = step()
            except BaseException as error:  # noqa: BLE001 - raised by `run`, in the caller's thread
                tell = partial(self.fail, error)
            self.done(tell, busy=(time.process_time() - cpu) / (time.perf_counter() - wall))

    def next_step(self) -> Callable[[], Callable[[], None]] | None:
        """What to send; what it returns tells the load. Waits while the answers of others decide."""
        with self.turn:
            while not (self.over or self.load.left == 0):
                if rows := self.load.take_reads():
                    self.under_way += 1
                    return partial(self.read_orders, rows)
                if writes := self.load.take_writes(alone=self.under_way == 0):
                    self.under_way += 1
                    return partial(self.write, writes)
                self.turn.wait()
        return None

    def done(self, tell: Callable[[], None], *, busy: float) -> None:
        """Tell the load. *busy*: how much of a core this process needed during the request."""
        with self.turn:
            self.under_way -= 1
            try:
                tell()
                self.check_progress()
            except Exception as error:  # noqa: BLE001 - raised by `run`, in the caller's thread
                self.fail(error)
            self.busy += WEIGHT * (busy - self.busy)
            if (
                self.busy < BUSY
                and len(self.others) < self.client.address.requests - 1
                and not self.over
                and self.load.left
            ):
                self.add()
                self.pace.threads = 1 + len(self.others)
            self.turn.notify_all()

    def add(self) -> None:
        self.others.append(self.pool.submit(self.work))

    def fail(self, error: BaseException) -> None:
        self.error, self.over = self.error or error, True

    def check_progress(self) -> None:
        if self.load.left < self.left:
            self.left, self.since = self.load.left, self.clock()
        elif self.clock() - self.since > PATIENCE:
            raise UnavailableError(
                f"could not write {self.load.left:,} rows of feature view {self.load.view!r} to {self.client.address.location}: "
                f"no row was taken for {PATIENCE:.0f} s; refused: {dict(self.load.counts)}"
            )

    def check_answers(self, found: int, expected: int) -> None:
        if found != expected:
            raise OnlineStoreError(
                f"could not write rows of feature view {self.load.view!r} to {self.client.address.location}: "
                f"found {found} answers to {expected} statements, expected one each. Running again is harmless."
            )

    def read_orders(self, rows: range) -> Callable[[], None]:
        items = self.read([self.load.key(row) for row in rows])
        return partial(self.load.met_by_reading, rows, items)

    def write(self, writes: Writes) -> Callable[[], None]:
        """Send one request of statements."""
        self.pace.take(writes.units)
        try:
            answer = self.client.call("batch_execute_statement", writes.body)
        except ClientError as error:
            code = error.response["Error"]["Code"].removesuffix("Exception")
            if code not in AGAIN and error.response["ResponseMetadata"]["HTTPStatusCode"] < SERVER_ERROR:
                raise
            told = {"Code": code if code in AGAIN else "InternalServerError"}
            errors: list[Any] = [told] * (len(writes.attempts) + len(writes.fresh))
            resent = True
        else:
            errors = [response.get("Error") for response in answer.get("Responses", ())]
            self.check_answers(len(errors), len(writes.attempts) + len(writes.fresh))
            resent = bool(answer["ResponseMetadata"]["RetryAttempts"])
        throttles = sum(error is not None and error["Code"].removesuffix("Exception") in THROTTLES for error in errors)
        if 2 * throttles < len(errors):
            self.pace.succeeded()
        if throttles:
            self.pace.throttled()
        return partial(self.load.met_by_writing, writes, errors, resent=resent)
