"""Settings in, a cache out that the store keeps up to date where that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.serving.cache import RecordCache

if TYPE_CHECKING:
    from materialize.online.reading import ReadTerms
    from materialize.serving.cache import CacheSettings
    from materialize.serving.core import Core

__all__ = ["open_cache"]


def open_cache(settings: CacheSettings, core: Core, terms: ReadTerms) -> RecordCache:
    """The cache of a reader. It waits for nothing."""
    views = [schemas.view for schemas in core.schemas.values()]
    return RecordCache(views, settings, deadline=terms.deadline)
