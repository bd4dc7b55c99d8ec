"""What the clients share: what is asked of the store, and what its records mean. Everything but the waiting for the store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from materialize.config import known
from materialize.model import MICROSECOND
from materialize.serving.decoding import NEVER, FeatureBatch, Selection, ServiceBatch, ViewSchemas
from materialize.serving.request import Lookup, entity_key_bytes
from materialize.serving.vectors import FeatureVector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import timedelta

    from typing_extensions import Self

    from materialize.config import Config
    from materialize.feature_service import FeatureService
    from materialize.model import FeatureView
    from materialize.serving.cache import RecordCache
    from materialize.serving.request import EntityKey

__all__ = ["Asked", "Core", "utc_us"]

#: Choices of features that are remembered: a program has a few, but one that answers others gets as many as they think of.
MOST_SELECTIONS = 1_000


def utc_us() -> int:
    """The time of this machine's clock, in microseconds since 1970 UTC."""
    return time.time_ns() // 1_000


class Part(NamedTuple):  # made for each read: a frozen dataclass takes three times as long
    """One lookup: its features, and which of its view's keys are its own; ``max_age_us`` None: only the ttl counts."""

    selection: Selection
    view: str
    start: int
    stop: int
    max_age_us: int | None


class Asked(NamedTuple):
    """Some lookups. ``keys``: view -> the entity keys of all its lookups, one after the other."""

    parts: tuple[Part, ...]
    keys: dict[str, list[bytes]]


class Core:
    """The views of one store, and what is known of their records. Safe to use from several threads."""

    def __init__(
        self,
        views: Iterable[FeatureView],
        store: str,
        location: str,
        *,
        services: Mapping[str, FeatureService] | None = None,
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        clock_us: Callable[[], int] = utc_us,
    ) -> None:
        """*views*: those that can be read from the online store *store* at *location*. *defaults*: view -> feature -> the value that
        stands for it while the store does not answer. Raises ConfigError or ValueError for names in it that there are not.
        """
        self.store, self.clock_us = store, clock_us
        self.services = dict(services or {})
        self.schemas = {view.name: ViewSchemas(view, location) for view in views}
        self.selections: dict[tuple[str, tuple[str, ...] | None], Selection] = {}
        self.defaults = {view: dict(values) for view, values in (defaults or {}).items()}
        for view, values in self.defaults.items():
            self.selection(view, tuple(values))

    @classmethod
    def of(cls, config: Config, store: str, location: str, **options: Any) -> Self:
        """All views of *config* that are in *store*, and its feature services; *options* as above."""
        views = [view for view in config.feature_views.values() if store in view.online_stores]
        return cls(views, store, location, services=config.feature_services, **options)

    def selection(self, view: str, names: Sequence[str] | None) -> Selection:
        """The features *names* of *view*, all without. Raises ConfigError for a view that the store does not have, ValueError for names."""
        wanted = (view, None if names is None else tuple(names))
        found = self.selections.get(wanted)
        if found is None:
            schemas = known(self.schemas, view, f"feature view of the online store {self.store!r}")
            found = Selection(schemas, names)
            if len(self.selections) >= MOST_SELECTIONS:
                self.selections.clear()
            self.selections[wanted] = found
        return found

    def asked(self, lookups: Sequence[Lookup]) -> Asked:
        """What *lookups* need. Raises ConfigError and ValueError for what cannot be asked for."""
        keys: dict[str, list[bytes]] = {}
        parts = []
        for lookup in lookups:
            selection = self.selection(lookup.view, lookup.feature_names)
            view = selection.schemas.view
            mine = keys.setdefault(lookup.view, [])
            start = len(mine)
            mine += [entity_key_bytes(view, key) for key in lookup.entity_keys]
            max_age_us = None if lookup.max_age is None else lookup.max_age // MICROSECOND
            parts.append(Part(selection, lookup.view, start, len(mine), max_age_us))
        return Asked(tuple(parts), keys)

    def asked_one(
        self, view: str, entity_key: EntityKey, names: Sequence[str] | None, max_age: timedelta | None
    ) -> Asked:
        """The same for one entity, in half the time."""
        selection = self.selection(view, names)
        max_age_us = None if max_age is None else max_age // MICROSECOND
        key = entity_key_bytes(selection.schemas.view, entity_key)
        return Asked((Part(selection, view, 0, 1, max_age_us),), {view: [key]})

    def unknown(self, records: Mapping[str, Sequence[bytes | None]]) -> list[ViewSchemas]:
        """Those that have to `ViewSchemas.learn` before *records*, by view, can be decoded."""
        return [self.schemas[view] for view, some in records.items() if self.schemas[view].unknown(some)]

    def answer(self, asked: Asked, records: Mapping[str, Sequence[bytes | None]]) -> list[FeatureBatch]:
        """The vectors of each lookup, of the *records* of each view."""
        now = self.clock_us()
        return [
            FeatureBatch(
                part.selection,
                records[part.view][part.start : part.stop],
                read_us=now,
                oldest_us=_oldest(part.selection, part.max_age_us, now),
            )
            for part in asked.parts
        ]

    def answer_one(self, asked: Asked, records: Mapping[str, Sequence[bytes | None]]) -> FeatureVector:
        """The vector of the one entity that was asked for, in half the time."""
        ((selection, view, _, _, max_age_us),) = asked.parts
        now = self.clock_us()
        return selection.vector(records[view][0], now, _oldest(selection, max_age_us, now))

    def recalled(
        self,
        cache: RecordCache,
        view: str,
        entity_key: EntityKey,
        names: Sequence[str] | None,
        max_age: timedelta | None,
    ) -> FeatureVector | None:
        """The features of one entity out of *cache* alone, as a lookup would give them; None: it has to be read."""
        selection = self.selection(view, names)
        found = cache.recall(selection, entity_key_bytes(selection.schemas.view, entity_key))
        if found is None:
            return None
        now, event_us = self.clock_us(), found.event_us
        max_age_us = None if max_age is None else max_age // MICROSECOND
        if event_us is not None and event_us <= _oldest(selection, max_age_us, now):
            return FeatureVector("expired", selection.none.copy(), now, event_us, found.created_us, found.version)
        return FeatureVector(
            found.status, found.features.copy(), now, event_us, found.created_us, found.version, found.absent
        )

    def has_defaults(self, asked: Asked) -> bool:
        """Whether `fallback` answers: each view has defaults."""
        return all(part.view in self.defaults for part in asked.parts)

    def fallback(self, asked: Asked) -> list[FeatureBatch]:
        """The defaults of each lookup."""
        now = self.clock_us()
        return [
            FeatureBatch(
                part.selection, [None] * (part.stop - part.start), read_us=now, fallback=self.defaults[part.view]
            )
            for part in asked.parts
        ]

    # --- feature services ---

    def service_lookups(
        self, name: str, entities: Sequence[Mapping[str, EntityKey]]
    ) -> tuple[FeatureService, list[Lookup]]:
        """The lookups of a feature service, one for each view. Raises ConfigError for a service that there is not."""
        service = known(self.services, name, "feature service")
        return service, [Lookup(view, entities, tuple(names)) for view, names in service.features.items()]

    @staticmethod
    def combined(service: FeatureService, batches: Sequence[FeatureBatch]) -> ServiceBatch:
        """One vector of all views for each set of entities."""
        return ServiceBatch(tuple(batches), tuple(tuple(names.values()) for names in service.features.values()))


def _oldest(selection: Selection, max_age_us: int | None, now: int) -> int:
    """The event time at and before which a vector is expired at *now*."""
    ttl = selection.schemas.view.ttl_us
    by_ttl = NEVER if ttl is None else now - ttl
    return by_ttl if max_age_us is None else max(by_ttl, now - max_age_us - 1)
