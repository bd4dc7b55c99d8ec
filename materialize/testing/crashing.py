"""A store that dies in the middle of a run, as data for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from materialize.errors import UnavailableError
from materialize.online.base import EncodedBatch, OnlineStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from materialize.evidence import Facts
    from materialize.model import Retention
    from materialize.online.base import Outcomes

__all__ = ["CrashingStore"]

#: The cell of a lease is renewed by time, which would make the number of a call a matter of chance.
LEASE = "lease"


class CrashingStore(OnlineStore):
    """*store*, dying at write call number *after* (merge, replace, compare-and-set and copies of a cell count, but of a lease), and at
    every later one.

    *effect*: whether the call at which it dies still takes effect, as when only the reply is lost.
    """

    def __init__(
        self, store: OnlineStore, *, after: int, effect: bool, error: type[Exception] = UnavailableError
    ) -> None:
        self.store, self.left, self.effect, self.error = store, after, effect, error
        self.location, self.parallel_writes, self.hashed = store.location, 1, store.hashed
        self.max_key_bytes, self.max_value_bytes = store.max_key_bytes, store.max_value_bytes

    def _write(self, call: Callable[[], Any]) -> Any:
        self.left -= 1
        if self.left > 0:
            return call()
        if self.left == 0 and self.effect:
            call()
        raise self.error("the store died")

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        found: Outcomes = self._write(lambda: self.store.merge(view, batch, tie_wins=tie_wins, retention=retention))
        return found

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        found: Outcomes = self._write(lambda: self.store.replace(view, batch, at=at, retention=retention))
        return found

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        if name == LEASE and self.left > 0:
            return self.store.compare_and_set_cell(view, name, expected, new)
        return bool(self._write(lambda: self.store.compare_and_set_cell(view, name, expected, new)))

    def write_copies(self, view: str, name: str, content: bytes) -> None:
        self._write(lambda: self.store.write_copies(view, name, content))

    def read_copies(self, view: str, name: str) -> list[bytes | None]:
        return self.store.read_copies(view, name)

    def evidence(self) -> Facts | None:
        return self.store.evidence()

    def positions(self) -> dict[str, int]:
        return self.store.positions()

    def settle(self, view: str) -> str:
        return self.store.settle(view)

    def record_bytes(self, view: str, keys: Sequence[bytes]) -> float | None:
        return self.store.record_bytes(view, keys)

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.store.read(view, keys)

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        return self.store.scan(view, start=start)

    def read_cell(self, view: str, name: str) -> bytes | None:
        return self.store.read_cell(view, name)

    def purge(self, view: str, now_us: int) -> None:
        self.store.purge(view, now_us)

    def describe(self) -> dict[str, str]:
        return self.store.describe()

    def close(self) -> None:
        self.store.close()
