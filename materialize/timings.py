"""Calls in, how long they took out: where the seconds of a run go, by stage.

Three parts of a piece work at the same time, so each has stages of its own, and only those of the second add up to its seconds:
- the reading thread: ``read`` (keys and order, then the features of the winners) and ``winners`` (the latest row of each entity);
- the thread that encodes: ``wait_read``, ``encode`` (entity keys and records), ``wait_store`` (as many calls as are useful are under way),
  and ``rest`` (opening the table, quarantine, removals, reading back);
- the threads that send: ``send``, their work, and ``server``, their waiting: for the server, for a core, and for readers of the store.
A run has ``plan`` before its pieces, which its seconds leave out, and ``commit`` after them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["PARTS", "Timed", "summed", "timed", "told"]

Result = TypeVar("Result")

#: The stages by who works at them; within a part one after the other, the parts at the same time.
PARTS = {
    "reading": ("read", "winners"),
    "encoding": ("wait_read", "encode", "wait_store", "rest"),
    "sending": ("send", "server"),
}


@dataclass(frozen=True, slots=True)
class Timed(Generic[Result]):
    """What a call returned, with the clocks of its thread before and after: seconds."""

    began: float
    worked: float
    result: Result
    ended: float
    worked_then: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def work(self) -> float:
        """Seconds for which the thread had a core; in the others it waited."""
        return self.worked_then - self.worked


def timed(call: Callable[[], Result]) -> Callable[[], Timed[Result]]:
    """*call* for a thread of a pool, with its time. What it raises is raised."""
    return lambda: Timed(time.monotonic(), time.thread_time(), call(), time.monotonic(), time.thread_time())


def summed(several: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The seconds of each stage of all of them."""
    total: dict[str, float] = {}
    for timings in several:
        for stage, seconds in timings.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return {stage: round(seconds, 6) for stage, seconds in total.items()}


def told(timings: Mapping[str, float]) -> str:
    """*timings* of a run for people, on one line."""
    parts = {"plan": ("plan",), **PARTS, "commit": ("commit",)}
    words = {
        part: ", ".join(f"{stage} {timings[stage]:.3f}" for stage in stages if stage in timings)
        for part, stages in parts.items()
    }
    return " | ".join(text if text.startswith(part) else f"{part}: {text}" for part, text in words.items() if text)
