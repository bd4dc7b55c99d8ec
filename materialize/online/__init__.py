"""The online stores: a URL in, an open store out. A driver is imported when its scheme is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.errors import ConfigError

if TYPE_CHECKING:
    from materialize.model import OnlineStoreConfig
    from materialize.online.base import OnlineStore
    from materialize.online.reading import AsyncReader, ReadTerms
    from materialize.online.redis.shared import RedisServers

#: Schemes of one server, or of the primary that sentinels name; and of clusters.
REDIS = frozenset(("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel"))
REDIS_CLUSTER = frozenset(("redis+cluster", "rediss+cluster"))

__all__ = ["open_async_reader", "open_reader", "open_store"]


def open_store(config: OnlineStoreConfig) -> OnlineStore:
    """The store that *config* names, without touching the network. Raises ConfigError for a scheme that has no store yet."""
    scheme = config.url.partition("://")[0]
    if scheme == "memory":
        from materialize.online.memory import MemoryStore

        return MemoryStore(config.url)
    if scheme == "sqlite":
        from materialize.online.sqlite import SqliteStore

        return SqliteStore(config.url)
    if scheme in REDIS:
        from materialize.online.redis import RedisStore

        return _configured(RedisStore(config.url), config)
    if scheme in REDIS_CLUSTER:
        from materialize.online.redis import RedisClusterStore

        return _configured(RedisClusterStore(config.url), config)
    if scheme == "dynamodb":
        from materialize.online.dynamodb import DynamoDbStore

        return DynamoDbStore(config.url, config.tables, config.prices)
    raise _unknown(config)


def open_reader(config: OnlineStoreConfig, terms: ReadTerms) -> OnlineStore:
    """The store that *config* names for a model server, without touching the network: `read`, `read_views` and `read_cell` keep *terms*.

    Raises ConfigError for a scheme that has no store, and for replicas of a store that has none.
    """
    scheme = config.url.partition("://")[0]
    if scheme in REDIS:
        from materialize.online.redis import RedisStore

        return _configured(RedisStore(config.url, terms), config)
    if scheme in REDIS_CLUSTER:
        from materialize.online.redis import RedisClusterStore

        return _configured(RedisClusterStore(config.url, terms), config)
    if scheme == "dynamodb":
        from materialize.online.dynamodb import DynamoDbStore

        return DynamoDbStore(config.url, config.tables, config.prices, terms=terms)
    if scheme not in {"memory", "sqlite"}:
        raise _unknown(config)
    if terms.replicas:
        raise ConfigError(
            f"online store {config.name!r}: could not read {config.masked_url} from replicas: found the scheme {scheme!r}, "
            "expected redis+sentinel, rediss+sentinel, redis+cluster, rediss+cluster or dynamodb"
        )
    if scheme == "memory":
        return open_store(config)
    from materialize.online.sqlite import SqliteStore

    # Opening a file that another process holds waits twice; reads of one that is open never wait for a writer.
    return SqliteStore(config.url, busy_timeout=terms.deadline / 2)


def open_async_reader(config: OnlineStoreConfig, terms: ReadTerms) -> AsyncReader:
    """As `open_reader`, for the tasks of one event loop: the first one that reads has to run in it."""
    if config.url.partition("://")[0] in REDIS | REDIS_CLUSTER:
        from materialize.online.redis.async_reader import AsyncRedisReader

        return AsyncRedisReader(config.url, terms, config.hashed)
    from materialize.online.reading import ThreadedReader

    store = open_reader(config, terms)
    return ThreadedReader(store, terms.deadline, store.prepare)


def _unknown(config: OnlineStoreConfig) -> ConfigError:
    scheme = config.url.partition("://")[0]
    return ConfigError(
        f"online store {config.name!r}: could not open {config.masked_url}: found the scheme {scheme!r}, "
        "expected memory, sqlite, redis, rediss, unix, redis+cluster, redis+sentinel or dynamodb. Nothing was read or written."
    )


def _configured(store: RedisServers, config: OnlineStoreConfig) -> RedisServers:
    store.read_p99, store.hashed = config.read_p99, config.hashed
    return store
