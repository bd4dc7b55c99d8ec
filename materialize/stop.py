"""A signal in, an orderly end of a run out: calls under way finish, no new one starts, and the process says how far it came."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = ["Stopped", "hear_at_once", "stop_on"]


class Stopped(BaseException):
    """Somebody asked the process to stop. Running again is harmless.

    Like KeyboardInterrupt it is no Exception: whatever it passes on its way must not take it for an error of its own.
    """

    def __init__(self, number: int, rows: int = 0) -> None:
        super().__init__(number, rows)
        self.number, self.rows = number, rows

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name} after {self.rows:,} rows. The watermark stays where the last finished run left it. Run again."


@contextmanager
def stop_on(*signals: signal.Signals) -> Iterator[Callable[[int], None]]:
    """Within it the first of *signals* raises Stopped, and a second one kills the process at once.

    Gives what to call with the rows of each finished write. A signal that is ignored stays ignored (nohup); outside the main
    thread, which alone gets signals, nothing changes.
    """
    rows = 0

    def count(more: int) -> None:
        nonlocal rows
        rows += more

    def stop(number: int, _frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        raise Stopped(number)

    heard = signals if threading.current_thread() is threading.main_thread() else ()
    before = {one: handler for one in heard if (handler := signal.getsignal(one)) is not signal.SIG_IGN}
    try:
        for one in before:
            signal.signal(one, stop)
        yield count
    except Stopped as stopped:
        raise Stopped(stopped.number, rows) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def hear_at_once() -> None:
    """Let Ctrl-C end what the main thread waits for. To be called once polars is loaded.

    polars puts a handler of its own before Python's, with SA_RESTART: the system then goes on waiting after it, and Python would hear
    of the signal only when the wait is over, which a store that does not answer can make long.
    """
    signal.siginterrupt(signal.SIGINT, True)  # noqa: FBT003 - it has no name
