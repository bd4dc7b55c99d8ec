"""An online store in this process's memory: the reference that the other stores are tested against.

It applies `materialize.order` row by row; every other store applies the same rule inside its server.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from materialize import order
from materialize.online.base import EncodedBatch, OnlineStore, pack_order, unpack_order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from materialize.model import FeatureView, Retention
    from materialize.online.base import Outcomes
    from materialize.online.demand import Demand

__all__ = ["MemoryStore"]


@dataclass(slots=True)
class _Content:
    """What one named store holds: records and when each may be purged (microseconds, None: never), and cells."""

    records: dict[tuple[str, bytes], order.Record] = field(default_factory=dict)
    due: dict[tuple[str, bytes], int | None] = field(default_factory=dict)
    cells: dict[tuple[str, str], bytes] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_NAMED: dict[str, _Content] = {}


class MemoryStore(OnlineStore):
    """*url*: ``memory://NAME`` shares its content between all opens of NAME in this process; ``memory://`` is private."""

    def __init__(self, url: str = "memory://") -> None:
        self.location = url
        name = url.partition("://")[2]
        self.content = _NAMED.setdefault(name, _Content()) if name else _Content()

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._apply(view, batch, retention, lambda held, new: order.merge(held, new, tie_wins=tie_wins))

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        return self._apply(view, batch, retention, lambda held, new: order.replace(held, new, at=at))

    def _apply(
        self,
        view: str,
        batch: EncodedBatch,
        retention: Retention,
        rule: Callable[[order.Record | None, order.Record], tuple[int, order.Record]],
    ) -> Outcomes:
        outcomes: Outcomes = np.empty(len(batch.keys), dtype=np.uint8)
        with self.content.lock:
            # Row by row, 400,000 rows/s: this store is for tests, and the rule is to be read here in plain Python.
            for row, (key, value) in enumerate(zip(batch.keys.to_pylist(), batch.values.to_pylist(), strict=True)):
                where = (view, key)
                held = self.content.records.get(where)
                outcomes[row], kept = rule(held, unpack_order(value))
                if kept != held:  # a refused row leaves the record's retention alone, too
                    self.content.records[where] = kept
                    self.content.due[where] = retention.due(kept.event_us, floored=kept.floor != order.NO_FLOOR)
        return outcomes

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        with self.content.lock:
            found = [self.content.records.get((view, key)) for key in keys]
        return [None if record is None else pack_order(record) for record in found]

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        with self.content.lock:
            found = {key: record for (owner, key), record in self.content.records.items() if owner == view}
        keys = list(found)
        keys = keys[int(start * len(keys)) :] + keys[: int(start * len(keys))]
        if keys:
            yield keys, [pack_order(found[key]) for key in keys]

    def read_cell(self, view: str, name: str) -> bytes | None:
        with self.content.lock:
            return self.content.cells.get((view, name))

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        with self.content.lock:
            if self.content.cells.get((view, name)) != expected:
                return False
            self.content.cells[view, name] = new
            return True

    def size(self, view: FeatureView, sample: EncodedBatch, demand: Demand) -> dict[str, Any]:  # noqa: ARG002 - nothing to weigh
        return {"sizing": "not available: the memory store is for tests, and ends with its process"}

    def purge(self, view: str, now_us: int) -> None:
        with self.content.lock:
            for where, due in list(self.content.due.items()):
                if where[0] == view and due is not None and due <= now_us:
                    del self.content.due[where], self.content.records[where]

    def describe(self) -> dict[str, str]:
        return {"kind": "memory", "records": f"{len(self.content.records):,}"}

    def close(self) -> None:
        """Nothing to give back."""
