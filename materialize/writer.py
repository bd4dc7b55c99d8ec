"""Batches in, counted outcomes out: writes run in the background, so that encoding and sending overlap."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from materialize.errors import StoreFullError, UnavailableError
from materialize.order import WRITTEN
from materialize.retry import with_retry
from materialize.timings import timed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt
    from typing_extensions import Self

    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes
    from materialize.timings import Timed

__all__ = ["Writer"]

#: Written rows of a batch, and of all batches in the end, that are drawn to be read back.
DRAWN = 64
#: STALE, WRITTEN, UNCHANGED (materialize.order).
OUTCOMES = 3


class Writer:
    """Writes batches with as many calls at once as the store profits from, and never holds more than one batch beyond these.

    After the with block every submitted batch is in the store and counted in ``outcomes`` (int64, by outcome code) and
    ``nbytes``; if it raises, any subset may be: calls under way end, no other one and no further attempt begins, and *progress*
    has been told of every batch that is known to be in the store. ``seconds`` and ``work`` are those of all calls (`materialize.timings`),
    ``waited`` those that `submit` and the end waited for them. *rows*: how many will come at most, for messages.
    """

    def __init__(self, store: OnlineStore, progress: Callable[[int], None], *, rows: int = 0) -> None:
        self.store = store
        self.pool = ThreadPoolExecutor(store.parallel_writes, thread_name_prefix="materialize-write")
        self.progress = progress
        self.rows = rows
        self.limit = store.parallel_writes + 1
        self.pending: deque[tuple[int, EncodedBatch, Future[Timed[Outcomes]]]] = deque()
        self.outcomes = np.zeros(OUTCOMES, dtype=np.int64)
        self.nbytes = 0
        self.seconds = self.work = self.waited = 0.0
        self.drawn: list[tuple[pa.BinaryArray, npt.NDArray[np.int64]]] = []
        self.over = threading.Event()

    def submit(self, batch: EncodedBatch, write: Callable[[EncodedBatch], Outcomes]) -> None:
        """Hand over *batch* for *write*; waits while the store is behind. Raises what an earlier batch met."""
        while len(self.pending) >= self.limit:
            self._collect()
        nbytes = sum(int(column.nbytes) for column in (batch.keys, batch.values, *batch.fields.values()))
        call = partial(with_retry, partial(write, batch), sleep=self._pause)
        self.pending.append((nbytes, batch, self.pool.submit(timed(call))))

    def sample(self) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """Entity keys and event times of rows that were written: all of them, or `DRAWN`, spread over all batches."""
        if not self.drawn:
            return [], np.empty(0, dtype=np.int64)
        keys, event_us = (
            pa.concat_arrays([keys for keys, _ in self.drawn]),
            np.concatenate([us for _, us in self.drawn]),
        )
        rows = _spread(np.arange(len(keys)))
        return keys.take(pa.array(rows)).to_pylist(), event_us[rows]

    def _left(self, rows: int, nbytes: int) -> str:
        """What a full store lacks for the batch of *rows* with *nbytes* and for all that would come after it."""
        handled = int(self.outcomes.sum())
        left = max(self.rows - handled, rows)
        return f"Of this piece {int(self.outcomes[WRITTEN]):,} rows are known to be written; up to {left:,} more need about {left * nbytes // max(rows, 1):,} bytes."

    def _pause(self, seconds: float) -> None:
        if self.over.wait(seconds):
            raise UnavailableError("could not write: the run ended before the next attempt")

    def _collect(self) -> None:
        nbytes, batch, future = self.pending[0]
        asked = time.monotonic()
        try:
            call = future.result()
        except StoreFullError as error:
            raise StoreFullError(f"{error} {self._left(len(batch.keys), nbytes)}") from None
        outcomes = call.result
        self.waited += time.monotonic() - asked
        self.seconds, self.work = self.seconds + call.seconds, self.work + call.work
        drawn = _spread(np.flatnonzero(outcomes == WRITTEN))
        self.drawn.append((batch.keys.take(pa.array(drawn)), batch.event_us[drawn]))
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
            if error is not None:
                self.store.brake.release()
            self.pool.shutdown(wait=True, cancel_futures=True)
            for _, _, future in self.pending:
                if not future.cancelled() and future.exception() is None:
                    self.progress(len(future.result().result))


def _spread(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """At most `DRAWN` of *rows*, at equal distances."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), DRAWN)).astype(np.int64)]
