"""Settings in, a cache out that the store keeps up to date where that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.errors import ConfigError
from materialize.metrics.names import Point
from materialize.metrics.regular import Regularly
from materialize.online.following import open_follower
from materialize.serving.cache import RecordCache

if TYPE_CHECKING:
    from collections.abc import Iterable

    from materialize.model import FeatureView, OnlineStoreConfig
    from materialize.online.reading import ReadTerms
    from materialize.serving.cache import CacheSettings
    from materialize.serving.core import Core

__all__ = ["cache_of", "counted", "open_cache"]


def open_cache(settings: CacheSettings, core: Core, store: OnlineStoreConfig, terms: ReadTerms) -> RecordCache:
    """The cache of a reader of *store*. It waits for nothing. Raises ConfigError where the store does not tell what changes."""
    cache = cache_of(settings, [schemas.view for schemas in core.schemas.values()], store, terms)
    cache.helpers.append(Regularly(lambda: counted(cache, store.name)))
    for helper in cache.helpers:
        helper.begin()
    return cache


def cache_of(
    settings: CacheSettings, views: Iterable[FeatureView], store: OnlineStoreConfig, terms: ReadTerms
) -> RecordCache:
    """The same before anything works for it. Raises ConfigError where the store does not tell what changes."""
    cache = RecordCache(views, settings, deadline=terms.deadline)
    if settings.tracking and cache.lifetimes:
        if terms.replicas:
            raise ConfigError(
                f"online store {store.name!r}: could not follow changes in {store.masked_url}: found reads from replicas, expected none. A replica "
                "may give what its primary has already changed. Leave out tracking=True (--tracking), or replicas=True (--replicas)."
            )
        cache.helpers.append(open_follower(store, list(cache.lifetimes), cache))
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
