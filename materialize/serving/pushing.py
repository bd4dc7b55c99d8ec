"""Rows of an application in, through to the Delta table and the online store that a reader reads: `materialize.push` beside a reader."""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Any

from materialize.config import known
from materialize.errors import ConfigError
from materialize.model import from_us

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.config import Config
    from materialize.online.base import OnlineStore
    from materialize.push import Pusher, PushReport, Where
    from materialize.serving.cache import RecordCache

__all__ = ["Pushers", "pushed"]

#: Random bytes of the name by which a process is known in the commits that it makes.
ID_BYTES = 8


class Pushers:
    """A `Pusher` for each view that was pushed, and the store that they write, with the timeouts of its URL. Safe across threads.

    What writing needs (polars, deltalake) is imported by the first push, so that a server that only reads does without.
    """

    def __init__(self, config: Config, store: str, cache: RecordCache | None, clock_us: Callable[[], int]) -> None:
        self.config, self.store_name, self.cache, self.clock_us = config, store, cache, clock_us
        self.lock = threading.Lock()
        self.store: OnlineStore | None = None
        self.pushers: dict[str, Pusher] = {}

    def push(self, view: str, rows: Any, *, to: Where, push_id: str | None) -> PushReport:
        with self.lock:
            pusher = self.pushers.get(view) or self._opened(view)
        return pusher.push(rows, to=to, push_id=push_id)

    def _opened(self, view: str) -> Pusher:
        from materialize.online import open_store
        from materialize.pipeline import Run
        from materialize.push import Pusher

        views = {
            view.name: view for view in self.config.feature_views.values() if self.store_name in view.online_stores
        }
        known(views, view, f"feature view of the online store {self.store_name!r}")
        if self.store is None:
            self.store = open_store(self.config.online_store(self.store_name))
        run = Run(self.store_name, f"push-{secrets.token_hex(ID_BYTES)}", lambda: from_us(self.clock_us()))
        changed = {} if self.cache is None else {"changed": self.cache.changed}
        pusher = self.pushers[view] = Pusher(self.config.feature_view(view), self.store, run, **changed)
        return pusher

    def close(self) -> None:
        """Give back the connections. Calling it twice is harmless."""
        with self.lock:
            if self.store is not None:
                self.store.close()


def pushed(pushers: Pushers | None, view: str, rows: Any, *, to: Where, push_id: str | None) -> PushReport:
    """Raises ConfigError for a reader that was made without a config."""
    if pushers is None:
        raise ConfigError(
            f"feature view {view!r}: could not push: found a reader of a store that was open already, expected one made by connect(). Nothing was written."
        )
    return pushers.push(view, rows, to=to, push_id=push_id)
