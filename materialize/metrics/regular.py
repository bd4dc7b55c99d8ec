"""What a process that lives for long has counted in, metrics at an interval out, as long as somebody takes them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from materialize import metrics
from materialize.metrics.names import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from materialize.metrics.names import Point

__all__ = ["Regularly"]

#: Seconds between two looks, a fraction of what receivers are usually asked at.
INTERVAL = 10.0


class Regularly:
    """Reports what *counted* gives, from a thread of its own. Whoever counts pays for an addition, and for nothing else.

    *counted*: counters as totals since the process began or was forked, and gauges. Where metrics are asked for later, totals until
    then are told at once.
    """

    def __init__(self, counted: Callable[[], Iterable[Point]], *, seconds: float = INTERVAL) -> None:
        self.counted, self.seconds = counted, seconds
        self.begin_anew()

    def begin_anew(self) -> None:
        self.told: dict[tuple[str, tuple[str, ...]], float] = {}
        self.ended, self.lock = threading.Event(), threading.Lock()

    def begin(self) -> None:
        """Report from now on, in this process: totals count from 0."""
        self.begin_anew()
        threading.Thread(target=self._run, args=(self.ended,), name="materialize-metrics", daemon=True).start()

    def close(self) -> None:
        """Report what was counted since, and no more; waits as `metrics.flush` does. Calling it twice is harmless."""
        self.ended.set()
        self._tell()
        metrics.flush()

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(self.seconds):
            self._tell()

    def _tell(self) -> None:
        if not metrics.wanted():
            return
        with self.lock:
            changed: dict[tuple[str, str], list[Point]] = {}
            gauges: list[Point] = []
            for point in self.counted():
                if METRICS[point.name].kind == "gauge":
                    gauges.append(point)
                    continue
                place = (point.name, point.labels)
                added = point.value - self.told.get(place, 0.0)
                self.told[place] = point.value
                if added:
                    where = (point.labels[0], point.labels[1])
                    changed.setdefault(where, []).append(type(point)(point.name, added, point.labels))
            for where, points in changed.items():
                metrics.tell(where, [*points, *(gauge for gauge in gauges if gauge.labels[:2] == where)])
