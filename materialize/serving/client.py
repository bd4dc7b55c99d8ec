"""Features for model servers: a view and entity keys in, feature vectors out, in one round trip to each server that has some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from materialize.config import load
from materialize.errors import UnavailableError
from materialize.online import open_reader
from materialize.online.reading import ReadTerms
from materialize.serving.caching import open_cache
from materialize.serving.core import Core, utc_us
from materialize.serving.fetching import Call
from materialize.serving.pushing import Pushers, pushed
from materialize.serving.request import Lookup
from materialize.watermark import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import timedelta
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from materialize.config.connections import Connections
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore
    from materialize.push import PushReport, Where
    from materialize.serving.cache import CacheSettings, RecordCache
    from materialize.serving.core import Asked
    from materialize.serving.decoding import FeatureBatch, ServiceBatch
    from materialize.serving.request import EntityKey
    from materialize.serving.vectors import FeatureVector, ServiceVector

__all__ = ["OnlineFeatures"]


class OnlineFeatures:
    """Reads feature vectors from one online store. Safe to use from several threads; one object for a whole process is meant.

    No read depends on the state of any run: a load, a crashed one too, never makes a read fail. Every method raises `UnavailableError`
    when the store does not answer within the deadline (and there are no defaults), `OnlineStoreError` when it refuses or holds
    what this release cannot decode, `ConfigError` for a view or service that is not in the config, and ValueError for feature names and
    entity keys that a view does not have. Messages never hold entity keys or values.
    """

    def __init__(
        self, core: Core, store: OnlineStore, cache: RecordCache | None = None, pushers: Pushers | None = None
    ) -> None:
        """As `connect` makes it; without *pushers* it only reads."""
        self.core, self.store, self.cache, self.pushers = core, store, cache, pushers

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
        """A reader of the online store that *config_dir* calls *store*; the network is touched by the first read.

        *terms*: timeouts, in seconds, and whether replicas are read. *defaults*: view -> feature -> value, which is given with the
        status ``default`` while the store does not answer; a read of a view that is not in it raises instead. *cache*: what is
        remembered (docs/caching.md), None: nothing, each read asks the store. *connections*: see
        `materialize.config.load`. *clock_us*: microseconds since 1970 UTC.
        """
        config = load(config_dir, connections=connections)
        terms = terms or ReadTerms()
        opened = open_reader(config.online_store(store), terms)
        core = Core.of(config, store, opened.location, defaults=defaults, clock_us=clock_us)
        remembered = None if cache is None else open_cache(cache, core, config.online_store(store), terms)
        return cls(core, opened, remembered, Pushers(config, store, remembered, clock_us))

    @classmethod
    def over(cls, views: Iterable[FeatureView], store: OnlineStore, *, clock_us: Callable[[], int] = utc_us) -> Self:
        """A reader of *views* in a store that is open already; closing the one closes the other."""
        return cls(Core(views, store.location, store.location, clock_us=clock_us), store)

    def read_features(
        self,
        view: str,
        entity_key: EntityKey,
        feature_names: Sequence[str] | None = None,
        *,
        max_age: timedelta | None = None,
    ) -> FeatureVector:
        """The features of one entity.

        *entity_key*: a value where the view has one join key, else values in the order of the join keys, or by their names.
        *feature_names*: in the order wanted, None: all of the view. *max_age*: an event time longer ago counts as expired.
        """
        if self.cache is not None and view in self.cache.counts:
            recalled = self.core.recalled(self.cache, view, entity_key, feature_names, max_age)
            if recalled is not None:
                return recalled
        asked = self.core.asked_one(view, entity_key, feature_names, max_age)
        records = self._fetched(asked)
        return self.core.fallback(asked)[0][0] if records is None else self.core.answer_one(asked, records)

    def batch_read(
        self,
        view: str,
        entity_keys: Sequence[EntityKey],
        feature_names: Sequence[str] | None = None,
        *,
        max_age: timedelta | None = None,
    ) -> FeatureBatch:
        """The features of each of n entities, in their order; an entity may be there twice. See `read_features`."""
        return self.lookup([Lookup(view, entity_keys, feature_names, max_age)])[0]

    def lookup(self, lookups: Sequence[Lookup]) -> list[FeatureBatch]:
        """The vectors of each lookup, in their order, by one round trip to each server for all together."""
        asked = self.core.asked(lookups)
        records = self._fetched(asked)
        return self.core.fallback(asked) if records is None else self.core.answer(asked, records)

    def _fetched(self, asked: Asked) -> Mapping[str, Sequence[bytes | None]] | None:
        """The records that were asked for, by view, with all that is needed to decode them; None: the defaults have to do."""
        try:
            records = self._records(asked.keys)
            for schemas in self.core.unknown(records):
                schemas.learn(self.store.read_cell(schemas.view.name, SCHEMAS))
        except UnavailableError:
            if self.core.has_defaults(asked):
                return None
            raise
        return records

    def _records(self, keys: Mapping[str, Sequence[bytes]]) -> Mapping[str, Sequence[bytes | None]]:
        """The records of entity keys by view, those that are remembered and those that another read fetches without asking the store."""
        if self.cache is None:
            return self.store.read_views(keys)
        call = Call(self.cache, keys)
        while call.claim():
            with call.fetching() as mine:
                if mine:
                    call.take(self.store.read_views(mine))
            for flight in call.others:
                flight.wait(call.left())
        return call.records()

    def read_service(self, service: str, entity: Mapping[str, EntityKey]) -> ServiceVector:
        """The features of the feature service *service* for the entities that *entity* names: join key -> value, of all its views."""
        return self.batch_read_service(service, [entity])[0]

    def batch_read_service(self, service: str, entities: Sequence[Mapping[str, EntityKey]]) -> ServiceBatch:
        """The features of a feature service for each of n sets of entities, in one round trip to each server."""
        wanted, lookups = self.core.service_lookups(service, entities)
        return self.core.combined(wanted, self.lookup(lookups))

    def push(self, view: str, rows: Any, to: Where = "both", *, push_id: str | None = None) -> PushReport:
        """Commit *rows* to the view's Delta table, and with *to* ``both`` (write-through) bring them online before it returns; with
        ``offline`` (write-behind) the next run does, seconds later where the view says ``on_commit``.

        *rows*: mappings by column name, or a table of pyarrow, polars and the like. *push_id*: a text for these rows and no others.
        What holds after a crash: before the commit nothing happened; between the commit and the online store, or in the middle of
        that, the rows are in the table, any of them online, and the next run brings the others; so does the same push with the same
        *push_id*, which commits nothing again. Returns and raises as `materialize.push.Pusher.push`; waits as long as the store's
        URL says, not as reads do. This reader's cache forgets what was written.
        """
        return pushed(self.pushers, view, rows, to=to, push_id=push_id)

    def close(self) -> None:
        """Give back the connections. Calling it twice is harmless."""
        if self.pushers is not None:
            self.pushers.close()
        if self.cache is not None:
            self.cache.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
