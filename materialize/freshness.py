"""A feature view and a store in, how far the store is behind the table out. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from materialize import watermark
from materialize.model import from_us
from materialize.offline import open_table
from materialize.retry import with_retry

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from materialize.model import FeatureView, Watermark
    from materialize.online.base import OnlineStore

__all__ = ["Freshness", "freshness"]


@dataclass(frozen=True, slots=True)
class Freshness:
    """Where a view stands in a store.

    ``waiting_since``: when the oldest commit was made that is not online yet; None when none waits. That is what "fresh" means
    here: a table that nobody writes to is fresh however old its newest event, and a run that found nothing new proves nothing.
    ``behind``: versions of the table that are not online, None where no version of this table is online whole.
    """

    state: Literal["up to date", "behind", "never loaded", "snapshot run unfinished"]
    watermark: Watermark | None
    table_version: int
    waiting_since: datetime | None
    behind: int | None = None

    def age(self, now: datetime) -> timedelta | None:
        """How long the oldest commit has been waiting; None when none waits."""
        return None if self.waiting_since is None else now - self.waiting_since

    def late(self, now: datetime, within: timedelta) -> bool:
        """Whether some commit has been waiting for longer than *within*."""
        age = self.age(now)
        return age is not None and age > within


def freshness(view: FeatureView, store: OnlineStore) -> Freshness:
    """Compare the watermark of *view* in *store* with the table's head.

    Raises OfflineStoreError when the table's log cannot be read, OnlineStoreError and UnavailableError as reads do.
    """
    table = open_table(view, check=False)
    found = with_retry(partial(watermark.read, store, view.name))
    online = None if found is None or found.table_id != table.table_id else found.version
    if online is not None and online >= table.version:
        return Freshness("up to date", found, table.version, None, 0)
    waiting = from_us(table.committed_us(0 if online is None else online + 1))
    if found is None:
        return Freshness("never loaded", found, table.version, waiting)
    state: Literal["behind", "snapshot run unfinished"] = (
        "behind" if found.version is not None else "snapshot run unfinished"
    )
    return Freshness(state, found, table.version, waiting, None if online is None else table.version - online)
