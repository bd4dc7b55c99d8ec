"""Redis and Valkey as an online store. The only room that imports redis-py."""

from materialize.online.redis.store import RedisStore

__all__ = ["RedisStore"]
