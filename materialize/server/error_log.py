"""Errors of requests in, log lines out: few, and without a value."""

from __future__ import annotations

import logging
import time
import traceback
from typing import TYPE_CHECKING

from materialize.errors import MaterializeError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ErrorLog", "Seldom"]

log = logging.getLogger(__name__)

#: Seconds in which errors of one class get one line: a store that is down would fill the disk of a busy server.
SELDOM = 5.0


class ErrorLog:
    """*clock*: seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lines: dict[str, tuple[float, int]] = {}

    def add(self, error: Exception) -> None:
        """A line for a failed request, or a count for the next line. A message that is not ours may hold values and is not told."""
        kind, now = type(error).__name__, self.clock()
        last, unsaid = self._lines.get(kind, (now - SELDOM, 0))
        if now - last < SELDOM:
            self._lines[kind] = (last, unsaid + 1)
            return
        self._lines[kind] = (now, 0)
        told = str(error) if isinstance(error, MaterializeError) else f"in {_place(error)}"
        log.error("request failed: %s: %s (%d more since the last line)", kind, told, unsaid)


class Seldom(logging.Filter):
    """Lets a message of uvicorn pass once in `SELDOM` seconds: it has one for every connection that there is no room for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.clock = clock
        self._said: dict[str, float] = {}  # uvicorn has some twenty messages

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "uvicorn.error" or record.levelno < logging.WARNING:
            return True
        now = self.clock()
        if now - self._said.get(record.msg, now - SELDOM) < SELDOM:
            return False
        self._said[record.msg] = now
        return True


def _place(error: BaseException) -> str:
    """Where *error* was raised: file and line, of which neither is a value."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"
