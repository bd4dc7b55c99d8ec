"""Write units in, waiting out: a token bucket at a share of the table's capacity, slower after throttles and faster again without."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pace"]

#: A throttle halves the rate, at most once in so many seconds: requests under way say the same thing again.
SLOWER, ONCE_IN = 0.5, 1.0
#: Without throttles the rate rises by this share of the full rate each second, and never falls below this share of it.
FASTER, SLOWEST = 0.05, 0.01
#: Seconds of the rate that may be taken at once after a rest.
BURST = 1.0
#: Seconds of the first pause after a throttle; doubles with each throttle in a row, with full jitter, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
MOST_DOUBLINGS = 10


@dataclass(slots=True)
class Pace:
    """Holds writers of one table to ``full`` write units a second, or less. Safe to use from several threads.

    ``threads``: how many of them the last load found worth having.
    """

    full: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random
    rate: float = field(init=False)
    throttles: int = 0
    threads: int = 1
    held_back: float = 0.0
    _tokens: float = field(init=False)
    _at: float = field(init=False)
    _slowed: float = field(init=False, default=float("-inf"))
    _in_a_row: int = field(init=False, default=0)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.rate, self._tokens, self._at = self.full, self.full * BURST, self.clock()

    def take(self, units: float) -> None:
        """Wait until *units* may be written. Asking for more than a second's worth at once is allowed; others then wait longer."""
        with self._lock:
            self._refill()
            self._tokens -= units
            wait = max(0.0, -self._tokens / self.rate)
            self.held_back += wait
        if wait:
            self.sleep(wait)

    def succeeded(self) -> None:
        """A request was taken, most of it at least."""
        with self._lock:
            self._in_a_row = 0

    def throttled(self) -> None:
        """The store refused some of a request for want of capacity: go slower, and pause."""
        with self._lock:
            self._refill()
            self.throttles += 1
            self._in_a_row += 1
            if self._at - self._slowed >= ONCE_IN:
                self.rate, self._slowed = max(self.rate * SLOWER, self.full * SLOWEST), self._at
                self._tokens = min(self._tokens, 0.0)
            pause = self.jitter() * min(FIRST_PAUSE * 2 ** min(self._in_a_row - 1, MOST_DOUBLINGS), LONGEST_PAUSE)
            self.held_back += pause
        self.sleep(pause)

    def _refill(self) -> None:
        now = self.clock()
        passed = now - self._at
        self._at = now
        self._tokens = min(self._tokens + passed * self.rate, self.rate * BURST)
        if now - self._slowed > ONCE_IN:
            self.rate = min(self.rate + passed * FASTER * self.full, self.full)
