"""Whether the online store answers in time: one question at a time, however many ask."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from materialize.errors import OnlineStoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Readiness"]


class Readiness:
    """*ask* is awaited for *deadline* seconds; what it gives does not matter."""

    def __init__(self, ask: Callable[[], Awaitable[object]], deadline: float) -> None:
        self.ask, self.deadline = ask, deadline
        self._asked: asyncio.Task[bool] | None = None

    async def __call__(self) -> bool:
        """Whether the store answers. Those who ask while an answer is waited for get the same one."""
        if self._asked is None or self._asked.done():
            self._asked = asyncio.get_running_loop().create_task(self._answer())
        return await asyncio.shield(self._asked)

    async def _answer(self) -> bool:
        try:
            await asyncio.wait_for(self.ask(), self.deadline)
        except (OnlineStoreError, asyncio.TimeoutError):
            return False
        return True
