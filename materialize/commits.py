"""Feature views and a clock in, those that are behind a new commit of their Delta table out. Writes nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from materialize import watermark
from materialize.errors import MaterializeError
from materialize.model import mask_credentials
from materialize.offline import open_table, reading
from materialize.online import open_store
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from materialize.config import Config
    from materialize.model import FeatureView
    from materialize.offline import LogReader, OfflineTable
    from materialize.online.base import OnlineStore

__all__ = ["LONGEST", "Pair", "TableWatch", "behind", "watches"]

log = logging.getLogger(__name__)

#: The name of a feature view and of one of its online stores.
Pair = tuple[str, str]
#: Seconds after which a pair that stays behind is announced again at the latest, however often before: as often as the hourly DAG runs.
LONGEST = 3_600.0
#: Seconds until a table that could not be read is looked at again; doubled each time.
PAUSE = 5.0


def behind(view: FeatureView, online: OnlineStore, table: OfflineTable | None = None) -> bool:
    """Whether the table of *view* has commits that are not online, and no unfinished snapshot run has to bring them.

    Raises OfflineStoreError when the table's log cannot be read, OnlineStoreError and UnavailableError as reads do.
    """
    table = table or open_table(view, check=False)
    found = with_retry(partial(watermark.read, online, view.name))
    if found is None or found.table_id != table.table_id:
        return True
    return found.version is not None and found.version < table.version


@dataclass(frozen=True, slots=True)
class Told:
    """What was announced of a pair: which version, and after how many seconds and when (by the clock) it is announced again."""

    version: int
    gap: float
    again: float


class TableWatch:
    """One Delta table and the feature views on it. One thread at a time may look.

    Between two looks nothing is held but where the log is, how far it was, and what was announced. A look costs one question for
    the next commit file; every *repeat* seconds the table is opened again, with the credentials of that moment, and compared with
    the watermarks: so a pair that stays behind, a table made anew and a lost announcement come up again.
    """

    def __init__(self, config: Config, views: tuple[FeatureView, ...], repeat: float) -> None:
        self.config, self.views, self.repeat = config, views, repeat
        self.stores = tuple(config.online_stores[store] for view in views for store in view.online_stores)
        self.location = mask_credentials(views[0].source)
        self.log: LogReader | None = None
        self.head, self.due, self.failures = -1, 0.0, 0
        self.told: dict[Pair, Told] = {}
        self.silent: set[Pair] = set()

    def same(self, other: TableWatch) -> bool:
        """Whether *other* looks at the same for the same."""
        return (self.views, self.stores) == (other.views, other.stores)

    def look(self, now: float) -> list[Pair]:
        """The pairs to announce at *now*, in seconds of a clock that never goes back. Trouble is logged when it comes and when it is over."""
        if self.log is None and now < self.due:
            return []
        try:
            news = self.compare(now) if self.log is None or now >= self.due else self.peek(self.log, now)
        except MaterializeError as error:
            if not self.failures:
                log.warning("cannot look for commits table=%s, tried again: %s", self.location, error)
            self.log, self.due = None, now + min(PAUSE * 2.0**self.failures, self.repeat)
            self.failures = min(self.failures + 1, 16)
            return []
        if self.failures:
            log.info("looks for commits again table=%s", self.location)
            self.failures = 0
        return news

    def peek(self, reader: LogReader, now: float) -> list[Pair]:
        """Ask for the next commit file. A new commit is online nowhere, so no store is asked."""
        with reading(self.views[0]):
            newest = reader.newest(self.head)
        if newest == self.head:
            return []
        self.head = newest
        return self.news([(view.name, store) for view in self.views for store in view.online_stores], now)

    def compare(self, now: float) -> list[Pair]:
        """Open the table and compare it with the watermark of every pair."""
        views = [self.config.feature_view(view.name) for view in self.views]
        table = open_table(views[0], check=False)
        self.log, self.head, self.due = table.log, table.version, now + self.repeat
        left = [(view.name, store) for view in views for store in view.online_stores if self.left(view, store, table)]
        self.told = {pair: told for pair, told in self.told.items() if pair in left}
        news = self.news(left, now)
        self.due = min([self.due, *(told.again for told in self.told.values())])
        return news

    def left(self, view: FeatureView, store: str, table: OfflineTable) -> bool:
        """Whether the pair is behind *table*; not while its store does not answer, for then a run could do nothing."""
        pair = (view.name, store)
        try:
            with open_store(self.config.online_store(store)) as online:
                found = behind(view, online, table)
        except MaterializeError as error:
            if pair not in self.silent:
                log.warning("cannot compare view=%s store=%s, tried again: %s", *pair, error)
            self.silent.add(pair)
            return False
        if pair in self.silent:
            log.info("compares again view=%s store=%s", *pair)
            self.silent.discard(pair)
        return found

    def news(self, pairs: Iterable[Pair], now: float) -> list[Pair]:
        """Those of *pairs* that were not announced at this version, or long enough ago."""
        news = []
        for pair in pairs:
            told = self.told.get(pair)
            if told is not None and told.version == self.head and now < told.again:
                continue
            gap = min(2 * told.gap, LONGEST) if told is not None and told.version == self.head else self.repeat
            self.told[pair] = Told(self.head, gap, now + gap)
            news.append(pair)
        return news


def watches(config: Config, repeat: float) -> dict[tuple[str, str | None], TableWatch]:
    """One watch for each table of a feature view that says ``on_commit``, by the table's source and connection."""
    tables: dict[tuple[str, str | None], list[FeatureView]] = {}
    for view in config.feature_views.values():
        if view.on_commit:
            tables.setdefault((view.source, view.source_connection), []).append(view)
    return {table: TableWatch(config, tuple(views), repeat) for table, views in tables.items()}
