"""How a model server reads: how long it waits, and where; and what asyncio programs read through."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from materialize.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from materialize.online.base import OnlineStore

__all__ = ["AsyncReader", "ReadTerms", "ThreadedReader"]

Result = TypeVar("Result")

#: Threads of a reader whose driver knows no asyncio.
THREADS = 16
#: How much longer than its deadline a call in a thread may take until it is given up, in seconds: it should tell by itself.
GRACE = 0.05


@dataclass(frozen=True, slots=True)
class ReadTerms:
    """How long reads of a model server may take, in seconds, and where they may read. Raises ConfigError for seconds that are not above 0.

    A call is over after ``deadline``, whatever it waits for; so a connection has to be open by then too.
    """

    #: Opening a connection.
    connect: float = 0.5
    #: Waiting for one answer.
    read: float = 0.1
    #: One call with all its retries.
    deadline: float = 0.25
    #: Whether to read from replicas, or eventually consistently.
    replicas: bool = False

    def __post_init__(self) -> None:
        wrong = [field.name for field in fields(self) if field.name != "replicas" and not getattr(self, field.name) > 0]
        if wrong:
            raise ConfigError(
                f"could not read for serving: found {wrong[0]}={getattr(self, wrong[0])!r}, expected seconds above 0"
            )


class AsyncReader(ABC):
    """What is read of an online store, for many tasks of one event loop. Opening one does not touch the network.

    Every method raises what the same method of `OnlineStore` raises. A task that is cancelled leaves nothing behind that another
    task could read.
    """

    #: The URL with credentials masked, for messages.
    location: str

    @abstractmethod
    async def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        """As `OnlineStore.read_views`."""

    @abstractmethod
    async def read_cell(self, view: str, name: str) -> bytes | None:
        """As `OnlineStore.read_cell`."""

    @abstractmethod
    async def close(self) -> None:
        """Give back connections and threads. Calling it twice is harmless."""


class ThreadedReader(AsyncReader):
    """Reads *store*, which it closes in the end, in a few threads. A call that gets none until *deadline* is given up.

    *prepare*: what the first call does before its time begins.
    """

    def __init__(self, store: OnlineStore, deadline: float, prepare: Callable[[], object] | None = None) -> None:
        self.store, self.deadline, self.location, self.prepare = store, deadline, store.location, prepare
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="materialize-reader")

    async def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        return await self._in_thread(partial(self.store.read_views, keys), "read records from")

    async def read_cell(self, view: str, name: str) -> bytes | None:
        return await self._in_thread(
            partial(self.store.read_cell, view, name), f"read the {name} of feature view {view!r} from"
        )

    async def _in_thread(self, call: Callable[[], Result], doing: str) -> Result:
        loop = asyncio.get_running_loop()
        if self.prepare is not None:
            await loop.run_in_executor(self.threads, self.prepare)
            self.prepare = None
        running = loop.run_in_executor(self.threads, call)
        try:
            return await asyncio.wait_for(running, self.deadline + GRACE)
        except asyncio.TimeoutError:
            raise UnavailableError(
                f"could not {doing} {self.location}: no answer in {self.deadline:g} s; {THREADS} reads may be under way at once"
            ) from None

    async def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.store.close)
