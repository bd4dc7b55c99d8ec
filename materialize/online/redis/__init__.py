"""Redis and Valkey as an online store, one server or a cluster. The only room that imports redis-py."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from materialize.online.redis.cluster import RedisClusterStore
    from materialize.online.redis.store import RedisStore

__all__ = ["RedisClusterStore", "RedisStore"]

#: A cluster's slots need numpy and pyarrow, which one server needs only to write.
MODULES = {"RedisClusterStore": "cluster", "RedisStore": "store"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
