"""Commits to Delta tables in, events for the DAG ``materialize_on_commit`` out. Runs in Airflow's triggerer."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseEventTrigger, TriggerEvent

from materialize.airflow import tasks
from materialize.config import load
from materialize.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from materialize.commits import Pair, TableWatch

__all__ = ["POLL_INTERVAL", "REPEAT", "CommitTrigger"]

log = logging.getLogger(__name__)

#: Seconds from one look at every table to the next.
POLL_INTERVAL = 5.0
#: Seconds until a feature view that stays behind is announced again; doubled each time, up to an hour.
REPEAT = 300.0
#: Tables looked at at once; a look waits for an object store most of the time.
LOOKS = 16
#: Seconds that a pass waits for the slowest table; what takes longer is told by a later pass, so it holds nobody back.
SLOWEST = 1.0


class CommitTrigger(BaseEventTrigger):
    """Looks at the table of every feature view with ``on_commit: true``, every *poll_interval* seconds, until it is cancelled.

    An event ``{"behind": [[view, store], ...]}`` says that these are behind the head of their table: at once for a new commit, and
    again after *repeat* seconds, and then after ever more up to an hour, while one stays behind. It is a hint; whoever gets it looks
    for himself, so an event too few, too many or too late does no harm.

    Everything is in memory: after a restart, whatever is behind is announced again. The configuration is read again when a file of
    it changed, Airflow's connections every *repeat* seconds and after an error. Its arguments, which Airflow stores, hold no secret.
    """

    def __init__(self, *, dags_folder: str, poll_interval: float = POLL_INTERVAL, repeat: float = REPEAT) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dags_folder, self.poll_interval, self.repeat = dags_folder, poll_interval, repeat
        self.pool: ThreadPoolExecutor | None = None
        self.watches: dict[tuple[str, str | None], TableWatch] = {}
        self.looking: dict[TableWatch, asyncio.Future[list[Pair]]] = {}
        self.files: list[tuple[str, int, int]] | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("dags_folder", "poll_interval", "repeat")
        return f"{__name__}.{type(self).__name__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        self.pool = ThreadPoolExecutor(LOOKS, thread_name_prefix="commits")
        try:
            while True:
                started = time.monotonic()
                # In a thread: files are read synchronously, and 200 of them take a moment to parse.
                await asyncio.to_thread(self.reload)
                if behind := await self.poll(self.pool):
                    yield TriggerEvent({"behind": sorted(map(list, behind))})  # type: ignore[no-untyped-call]
                await asyncio.sleep(max(0.0, started + self.poll_interval - time.monotonic()))
        finally:
            await self.cleanup()

    async def cleanup(self) -> None:
        """Start no look any more. One that waits for an answer ends by its own timeout and closes what it opened."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)

    async def poll(self, pool: ThreadPoolExecutor) -> list[Pair]:
        """One pass over all tables: the pairs to announce."""
        loop = asyncio.get_running_loop()
        for watch in self.watches.values():
            if watch not in self.looking:
                self.looking[watch] = loop.run_in_executor(pool, watch.look, time.monotonic())
        if not self.looking:
            return []
        done, _ = await asyncio.wait(self.looking.values(), timeout=SLOWEST)
        ended = {watch: look for watch, look in self.looking.items() if look in done}
        behind: list[Pair] = []
        for watch, look in ended.items():
            del self.looking[watch]
            if error := look.exception():
                log.error("could not look for commits table=%s", watch.location, exc_info=error)
            elif watch in self.watches.values():
                behind += look.result()
        return behind

    def reload(self) -> None:
        """Read the configuration when a file of it changed. One that is wrong is told once, and the one before it stays."""
        from materialize.commits import watches

        # Told in this process: its environment may name another folder than the dag processor's.
        folder = tasks.config_dir(Path(self.dags_folder))
        if (files := fingerprint(folder)) == self.files:
            return
        self.files = files
        try:
            new = watches(load(folder, connections=tasks.connection), self.repeat)
        except ConfigError as error:
            log.warning("cannot read the configuration, the one before stays: %s", error)
            return
        old = self.watches
        self.watches = {
            table: old[table] if table in old and old[table].same(watch) else watch for table, watch in new.items()
        }
        log.info("looks for commits tables=%s", [watch.location for watch in self.watches.values()])


def fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """The names, times and sizes of the files of a configuration."""
    found = []
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("feature_views/*.yaml")]):
        try:
            stat = path.stat()
        except OSError:  # gone since the listing
            continue
        found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return found
