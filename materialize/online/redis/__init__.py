"""Redis and Valkey as an online store, one server or a cluster. The only room that imports redis-py."""

from materialize.online.redis.cluster import RedisClusterStore
from materialize.online.redis.store import RedisStore

__all__ = ["RedisClusterStore", "RedisStore"]
