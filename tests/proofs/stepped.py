"""A store whose every call is a step with a name and a number: it writes them down, and dies at the one that it is told."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from materialize.online.base import EncodedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.online.base import OnlineStore

__all__ = ["BATCHES", "READS", "Died", "Failpoint", "Step", "Stepped"]

#: The calls that change nothing. Every other one, also one that is new, counts as a write.
READS = {
    "describe",
    "estimate",
    "evidence",
    "now_us",
    "positions",
    "read",
    "read_cell",
    "read_copies",
    "read_views",
    "record_bytes",
    "scan",
}
#: The writes that may take effect for a part of their rows.
BATCHES = {"merge", "replace"}


class Died(BaseException):
    """The process is gone: no error that anybody handles."""


class Step(NamedTuple):
    """One call of a store. ``name``: of the method, with the cell that it is about, or ``tombstones`` for a batch of these."""

    method: str
    name: str

    def ways(self) -> list[Way]:
        """How a process can die at it. After a read is the same as before the next step."""
        if self.method in READS:
            return ["before"]
        return ["before", "half", "after"] if self.method in BATCHES else ["before", "after"]


Way = Literal["before", "half", "after"]


@dataclass(frozen=True, slots=True)
class Failpoint:
    """Die at step *number* of a run, counted from 0: before its effect, after half of its rows, or after all of it."""

    number: int
    way: Way


class Stepped:
    """*store*, one call at a time. ``steps``: those of the run so far. After its death no call has any effect.

    *passes* is called at each failpoint that the run passes, with the store as a process that dies there leaves it; for half a
    batch with what writes it, whose effect must be gone when *passes* returns.
    """

    parallel_writes = 1

    def __init__(
        self,
        store: OnlineStore,
        dies: Failpoint | None = None,
        passes: Callable[[Failpoint, Callable[[], Any] | None], None] = lambda _point, _half: None,
    ) -> None:
        self.store, self.dies, self.passes = store, dies, passes
        self.steps: list[Step] = []
        self.dead = False
        self.turn = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if name == "scan":
            return partial(self._scanned, found)
        return partial(self._called, name, found) if callable(found) else found

    def _called(self, method: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with self.turn:
            if self.dead:
                raise Died("it died before")
            number, step = len(self.steps), Step(method, _named(method, arguments))
            self.steps.append(step)
            result = None
            for way in step.ways():
                point = Failpoint(number, way)
                half = partial(_half, call, *arguments, **named) if way == "half" else None
                if way == "after":
                    result = call(*arguments, **named)
                if point == self.dies:
                    self.dead = True
                    if half is not None:
                        half()
                    raise Died(step.name)
                self.passes(point, half)
            return call(*arguments, **named) if method in READS else result

    def _scanned(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Iterator[Any]:
        """Each batch of a scan is a step, read before whoever asked does anything with it."""
        batches = list(call(*arguments, **named))
        for batch in [*batches, None]:
            found = self._called("scan", lambda batch=batch: batch)
            if found is not None:
                yield found


def _half(call: Callable[..., Any], view: str, batch: EncodedBatch, **named: Any) -> None:
    """Write every other row of *batch* in the order of their keys, for the order of a batch is not always the same."""
    keys = batch.keys.to_pylist()
    call(view, batch.take(np.array(sorted(range(len(keys)), key=keys.__getitem__)[::2], dtype=np.int64)), **named)


def _named(method: str, arguments: tuple[Any, ...]) -> str:
    if method in BATCHES:
        return f"{method} tombstones" if arguments[1].tombstone else method
    words = [one for one in arguments[1:2] if isinstance(one, str)]
    return " ".join([method, *words])
