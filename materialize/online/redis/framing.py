"""The words of requests to Redis, and what its replies say."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from materialize.errors import OnlineStoreError

if TYPE_CHECKING:
    from redis.connection import Connection

    from materialize.model import Layout, Retention
    from materialize.online.base import Outcomes

__all__ = [
    "bulk",
    "command",
    "lua",
    "outcomes_of",
    "read_reply",
    "weigh_script",
    "write_options",
    "write_script",
]

#: What the write scripts return for a key that holds something that is no record.
FOREIGN = ord("3") - ord("0")


def lua(name: str) -> str:
    return (files("materialize.online.redis") / "lua" / f"{name}.lua").read_text()


def write_script(layout: Layout) -> str:
    """The script that stores rows in *layout*: the order rule, which is the same for both, and the way of storing."""
    fields = lua("set_fields") if layout == "hash" else ""
    return lua("head") + fields + lua(f"write_{layout}").replace("-- RULE\n", lua("rule"))


def weigh_script() -> str:
    """The script that weighs records of both layouts."""
    return lua("set_fields") + lua("weigh")


def write_options(mode: str, retention: Retention) -> bytes:
    """The first three arguments of the write scripts."""
    ttl = b"" if retention.ttl_us is None else b"%d" % retention.ttl_us
    return b"".join(bulk(part) for part in (mode.encode(), ttl, b"%d" % -(-retention.keep_until_us // 1000)))


def outcomes_of(replies: bytes, subject: str, location: str, name: str) -> Outcomes:
    """What a write script told of each row. Raises OnlineStoreError when a key below *name* holds what is no record."""
    import numpy as np

    outcomes: Outcomes = np.frombuffer(replies, dtype=np.uint8) - ord("0")
    if foreign := int((outcomes == FOREIGN).sum()):
        raise OnlineStoreError(
            f"could not {subject} {location}: found {foreign:,} keys below {name}: that hold something else than a record "
            "of format version 1. They were left alone. Give the store a prefix of its own (?prefix=...) or delete these keys."
        )
    return outcomes


def bulk(data: bytes) -> bytes:
    """*data* as a RESP bulk string."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def command(*words: bytes) -> bytes:
    """A whole RESP request."""
    return b"*%d\r\n" % len(words) + b"".join(bulk(word) for word in words)


def read_reply(connection: Connection) -> Any:
    """The next reply as it is, bytes where it is text. Raises the driver's errors."""
    return connection.read_response(disable_decoding=True)
