"""The online stores: a URL in, an open store out. A driver is imported when its scheme is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.errors import ConfigError

if TYPE_CHECKING:
    from materialize.model import OnlineStoreConfig
    from materialize.online.base import OnlineStore
    from materialize.online.redis.shared import RedisServers

__all__ = ["open_store"]


def open_store(config: OnlineStoreConfig) -> OnlineStore:
    """The store that *config* names, without touching the network. Raises ConfigError for a scheme that has no store yet."""
    scheme = config.url.partition("://")[0]
    if scheme == "memory":
        from materialize.online.memory import MemoryStore

        return MemoryStore(config.url)
    if scheme == "sqlite":
        from materialize.online.sqlite import SqliteStore

        return SqliteStore(config.url)
    if scheme in {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"}:
        from materialize.online.redis import RedisStore

        return _paced(RedisStore(config.url), config)
    if scheme in {"redis+cluster", "rediss+cluster"}:
        from materialize.online.redis import RedisClusterStore

        return _paced(RedisClusterStore(config.url), config)
    if scheme == "dynamodb":
        from materialize.online.dynamodb import DynamoDbStore

        return DynamoDbStore(config.url, config.tables, config.prices)
    raise ConfigError(
        f"online store {config.name!r}: could not open {config.masked_url}: found the scheme {scheme!r}, "
        "expected memory, sqlite, redis, rediss, unix, redis+cluster, redis+sentinel or dynamodb. Nothing was read or written."
    )


def _paced(store: RedisServers, config: OnlineStoreConfig) -> RedisServers:
    store.read_p99, store.hashed = config.read_p99, config.hashed
    return store
