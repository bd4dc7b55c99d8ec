"""Views of an online store in, each change of their records out as it happens: for who remembers what it read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from materialize.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from materialize.model import OnlineStoreConfig

__all__ = ["Follower", "Listener", "open_follower"]


class Listener(Protocol):
    """Who is told. Every method is called by one thread, and must neither wait nor raise."""

    def ready(self) -> None:
        """From now on every change is told; what happened before this was not."""

    def changed(self, view: str, keys: Iterable[bytes]) -> None:
        """The records of these entity keys changed, came or went; or a part of them was written again as it was."""

    def lost(self) -> None:
        """Until the next `ready` changes may be untold."""


class Follower(Protocol):
    """Listens in a thread of its own, and tries again by itself whatever happens."""

    def begin(self) -> None:
        """Listen from now on, in this process; what a parent process listened to before a fork is left alone. Waits for nothing."""

    def close(self) -> None:
        """Listen no more. Calling it twice is harmless."""


def open_follower(config: OnlineStoreConfig, views: Sequence[str], listener: Listener) -> Follower:
    """What will tell *listener* of changes of *views*, once it has begun. Raises ConfigError for a store that does not tell."""
    scheme = config.url.partition("://")[0]
    if not scheme.startswith(("redis", "unix")):
        raise ConfigError(
            f"online store {config.name!r}: could not follow changes in {config.masked_url}: found the scheme {scheme!r}, expected one of Redis "
            "or Valkey. Nothing was read. Leave out tracking=True (--tracking): the ttl bounds how old a cached record is."
        )
    from materialize.online.redis.following import RedisFollower  # noqa: PLC0415 - the driver is slow to import

    return RedisFollower(config.url, views, listener)
