"""How readers feel a load, and where its writers rest: what a store and the pacing of its loads have in common."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Brake", "Probe"]

#: Seconds below which a rest is put off: what a thread needs to fall asleep and wake up again.
SHORTEST_REST = 0.0001


class Probe(ABC):
    """Reads as a reader of the store does, on a connection of its own. For one thread; `close` may be called by any.

    Its methods raise `UnavailableError` when the store does not answer, after which they may be called again, and
    `OnlineStoreError` when it refuses.
    """

    @abstractmethod
    def read(self) -> float:
        """Read something small; the seconds that it took, without what this process needed to notice the answer."""

    @abstractmethod
    def behind(self) -> int:
        """Bytes by which the slowest replica is behind, 0 without one. To be called once in a second or so."""

    @abstractmethod
    def close(self) -> None:
        """Give back the connection; a read under way ends at once. Calling it twice is harmless."""


class Brake:
    """Where the writers of a store rest between calls, so that calls are under way for no more than a ``share`` of the time.

    Safe to use from several threads. ``rested``: seconds, summed over all threads. ``began``: whether anything was written.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.share, self.rested, self.began = 1.0, 0.0, False
        self._owed: dict[int, float] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()

    @property
    def free(self) -> bool:
        """Whether nobody has to rest. If not, no call should begin before the one before it is answered."""
        return self.share >= 1.0 or self._over.is_set()

    def rest(self, busy: float) -> None:
        """To be called before each call of a thread, with the seconds that its last one took: waits as long as the share wants it."""
        self.began = True
        if self.free:
            return
        thread, before = threading.get_ident(), self.clock()
        owed = self._owed.get(thread, 0.0) + busy * (1.0 / self.share - 1.0)
        if owed < SHORTEST_REST:
            self._owed[thread] = owed
            return
        self._over.wait(owed)
        rested = self.clock() - before
        # What was rested too long counts for the next time.
        self._owed[thread] = owed - rested
        with self._lock:
            self.rested += rested

    def release(self) -> None:
        """Nobody rests from now on; who does so goes on at once. For a run that was stopped: calls under way end sooner."""
        self._over.set()
