"""Settings in, a cache out that the store keeps up to date where that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.errors import ConfigError
from materialize.metrics.names import Point
from materialize.metrics.regular import Regularly
from materialize.online.following import open_follower
from materialize.serving.cache import RecordCache

if TYPE_CHECKING:
    from materialize.model import OnlineStoreConfig
    from materialize.online.reading import ReadTerms
    from materialize.serving.cache import CacheSettings
    from materialize.serving.core import Core

__all__ = ["open_cache"]


def open_cache(settings: CacheSettings, core: Core, store: OnlineStoreConfig, terms: ReadTerms) -> RecordCache:
    """The cache of a reader of *store*. It waits for nothing. Raises ConfigError where the store does not tell what changes."""
    views = [schemas.view for schemas in core.schemas.values()]
    cache = RecordCache(views, settings, deadline=terms.deadline)
    if settings.tracking and cache.lifetimes:
        if terms.replicas:
            raise ConfigError(
                f"online store {store.name!r}: could not follow changes in {store.masked_url}: found reads from replicas, expected none. A replica "
                "may give what its primary has already changed. Leave out tracking=True, or replicas=True."
            )
        cache.helpers.append(open_follower(store, list(cache.lifetimes), cache))
    cache.helpers.append(Regularly(lambda: counted(cache, store.name)))
    for helper in cache.helpers:
        helper.begin()
    return cache


def counted(cache: RecordCache, store: str) -> list[Point]:
    """The counts of *cache* as metrics."""
    return [
        Point(f"materialize.cache.{name}", value, (view, store, *label))
        for view, counts in cache.stats().items()
        for name, value, *label in (
            ("reads", counts.hits, "hit"),
            ("reads", counts.misses, "miss"),
            ("reads", counts.waits, "wait"),
            ("evictions", counts.evicted, "full"),
            ("evictions", counts.invalidated, "changed"),
            ("entries", counts.entries),
        )
    ]
