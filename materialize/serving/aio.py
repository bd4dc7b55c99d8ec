"""The features that `materialize.serving.client` gives, awaited: for servers that run on asyncio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from materialize.config import load
from materialize.errors import UnavailableError
from materialize.online import open_async_reader
from materialize.online.reading import ReadTerms
from materialize.serving.caching import open_cache
from materialize.serving.core import Core, utc_us
from materialize.serving.fetching import Call
from materialize.serving.pushing import Pushers, pushed
from materialize.serving.request import Lookup
from materialize.watermark import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import timedelta
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from materialize.config.connections import Connections
    from materialize.online.reading import AsyncReader
    from materialize.push import PushReport, Where
    from materialize.serving.cache import CacheSettings, RecordCache
    from materialize.serving.core import Asked
    from materialize.serving.decoding import FeatureBatch, ServiceBatch
    from materialize.serving.request import EntityKey
    from materialize.serving.vectors import FeatureVector, ServiceVector

__all__ = ["AsyncOnlineFeatures"]


class AsyncOnlineFeatures:
    """Reads feature vectors from one online store. Safe for many tasks of one event loop.

    Every method gives and raises what the one of `materialize.serving.OnlineFeatures` does that has its name.
    """

    def __init__(
        self, core: Core, reader: AsyncReader, cache: RecordCache | None = None, pushers: Pushers | None = None
    ) -> None:
        """As `connect` makes it; without *pushers* it only reads."""
        self.core, self.reader, self.cache, self.pushers = core, reader, cache, pushers

    @classmethod
    def connect(
        cls,
        config_dir: str | Path,
        store: str = "default",
        *,
        terms: ReadTerms | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        cache: CacheSettings | None = None,
        connections: Connections | None = None,
        clock_us: Callable[[], int] = utc_us,
    ) -> Self:
        """A reader of the online store *store*; it waits for nothing."""
        config = load(config_dir, connections=connections)
        terms = terms or ReadTerms()
        opened = open_async_reader(config.online_store(store), terms)
        core = Core.of(config, store, opened.location, defaults=defaults, clock_us=clock_us)
        remembered = None if cache is None else open_cache(cache, core, config.online_store(store), terms)
        return cls(core, opened, remembered, Pushers(config, store, remembered, clock_us))

    async def read_features(
        self,
        view: str,
        entity_key: EntityKey,
        feature_names: Sequence[str] | None = None,
        *,
        max_age: timedelta | None = None,
    ) -> FeatureVector:
        if self.cache is not None and view in self.cache.counts:
            recalled = self.core.recalled(self.cache, view, entity_key, feature_names, max_age)
            if recalled is not None:
                return recalled
        asked = self.core.asked_one(view, entity_key, feature_names, max_age)
        records = await self._fetched(asked)
        return self.core.fallback(asked)[0][0] if records is None else self.core.answer_one(asked, records)

    async def batch_read(
        self,
        view: str,
        entity_keys: Sequence[EntityKey],
        feature_names: Sequence[str] | None = None,
        *,
        max_age: timedelta | None = None,
    ) -> FeatureBatch:
        return (await self.lookup([Lookup(view, entity_keys, feature_names, max_age)]))[0]

    async def lookup(self, lookups: Sequence[Lookup]) -> list[FeatureBatch]:
        asked = self.core.asked(lookups)
        records = await self._fetched(asked)
        return self.core.fallback(asked) if records is None else self.core.answer(asked, records)

    async def _fetched(self, asked: Asked) -> Mapping[str, Sequence[bytes | None]] | None:
        """The records that were asked for, by view, with all that is needed to decode them; None: the defaults have to do."""
        try:
            records = await self._records(asked.keys)
            for schemas in self.core.unknown(records):
                schemas.learn(await self.reader.read_cell(schemas.view.name, SCHEMAS))
        except UnavailableError:
            if self.core.has_defaults(asked):
                return None
            raise
        return records

    async def _records(self, keys: Mapping[str, Sequence[bytes]]) -> Mapping[str, Sequence[bytes | None]]:
        if self.cache is None:
            return await self.reader.read_views(keys)
        call = Call(self.cache, keys)
        while call.claim():
            with call.fetching() as mine:
                if mine:
                    call.take(await self.reader.read_views(mine))
            for flight in call.others:
                await flight.awaited(call.left())
        return call.records()

    async def read_service(self, service: str, entity: Mapping[str, EntityKey]) -> ServiceVector:
        return (await self.batch_read_service(service, [entity]))[0]

    async def batch_read_service(self, service: str, entities: Sequence[Mapping[str, EntityKey]]) -> ServiceBatch:
        wanted, lookups = self.core.service_lookups(service, entities)
        return self.core.combined(wanted, await self.lookup(lookups))

    async def push(self, view: str, rows: Any, to: Where = "both", *, push_id: str | None = None) -> PushReport:
        """As the other one; in a thread, because Delta tables are not written by an event loop."""
        return await asyncio.to_thread(pushed, self.pushers, view, rows, to=to, push_id=push_id)

    async def close(self) -> None:
        """Give back the connections. Calling it twice is harmless."""
        if self.pushers is not None:
            await asyncio.to_thread(self.pushers.close)
        if self.cache is not None:
            await asyncio.to_thread(self.cache.close)
        await self.reader.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
