"""Batches in, counted outcomes out: writes run in the background, so that encoding and sending overlap."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from materialize.errors import StoreFullError, UnavailableError
from materialize.order import WRITTEN
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes

__all__ = ["Writer"]

#: Rows that are remembered to be read back, one of a batch.
SAMPLE = 32
#: STALE, WRITTEN, UNCHANGED (materialize.order).
OUTCOMES = 3


class Writer:
    """Writes batches with as many calls at once as the store profits from, and never holds more than one batch beyond these.

    After the with block every submitted batch is in the store and counted in ``outcomes`` (int64, by outcome code) and
    ``nbytes``, and ``sample`` has the entity key and event time of some that were written; if it raises, any subset may be: calls under way end, no other one and no further attempt begins, and *progress*
    has been told of every batch that is known to be in the store.
    """

    def __init__(self, store: OnlineStore, progress: Callable[[int], None]) -> None:
        self.pool = ThreadPoolExecutor(store.parallel_writes, thread_name_prefix="materialize-write")
        self.progress = progress
        self.limit = store.parallel_writes + 1
        self.patience = store.patience
        self.pending: deque[tuple[int, EncodedBatch, Future[Outcomes]]] = deque()
        self.outcomes = np.zeros(OUTCOMES, dtype=np.int64)
        self.nbytes = 0
        self.sample: list[tuple[bytes, int]] = []
        self.over = threading.Event()

    def submit(self, batch: EncodedBatch, write: Callable[[EncodedBatch], Outcomes]) -> None:
        """Hand over *batch* for *write*; waits while the store is behind. Raises what an earlier batch met."""
        while len(self.pending) >= self.limit:
            self._collect()
        nbytes = int(batch.keys.nbytes + batch.values.nbytes)
        call = partial(with_retry, partial(write, batch), patience=self.patience, sleep=self._pause)
        self.pending.append((nbytes, batch, self.pool.submit(call)))

    def _pause(self, seconds: float) -> None:
        if self.over.wait(seconds):
            raise UnavailableError("could not write: the run ended before the next attempt")

    def _collect(self) -> None:
        nbytes, batch, future = self.pending[0]
        try:
            outcomes = future.result()
        except StoreFullError as error:
            stored = int(self.outcomes[WRITTEN])
            raise StoreFullError(f"{error} Until then {stored:,} rows of this piece were written.") from None
        if len(self.sample) < SAMPLE and len(written := np.flatnonzero(outcomes == WRITTEN)):
            row = int(written[len(written) // 2])
            self.sample.append((batch.keys[row].as_py(), int(batch.event_us[row])))
        self.pending.popleft()
        self.outcomes += np.bincount(outcomes, minlength=OUTCOMES)
        self.nbytes += nbytes
        self.progress(len(outcomes))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self.pending and error is None:
                self._collect()
        finally:
            self.over.set()
            self.pool.shutdown(wait=True, cancel_futures=True)
            for _, _, future in self.pending:
                if not future.cancelled() and future.exception() is None:
                    self.progress(len(future.result()))
