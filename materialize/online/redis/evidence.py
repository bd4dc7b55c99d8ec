"""One server's replies to INFO and WAIT in; what it says about itself, where writes ended and which replicas have them out."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from materialize.evidence import Evidence, position

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis.connection import Connection

__all__ = ["ask_position", "evidence_of", "position_of", "settle"]

FIELDS = re.compile(rb"^(run_id|master_replid|master_repl_offset):(\w+)\r?$", re.MULTILINE)
CONNECTED = re.compile(rb"^connected_slaves:(\d+)", re.MULTILINE)
#: Milliseconds after which the key that `settle` writes leaves.
SETTLE_MS = 60_000


def evidence_of(info: Mapping[str, Any]) -> Evidence:
    """*info*: the whole reply as redis-py parses it. What a server does not tell counts as nothing."""
    return Evidence(
        run_id=str(info["run_id"]),
        replid=str(info.get("master_replid", "")),
        replid2=str(info.get("master_replid2", "")),
        second_offset=int(info.get("second_repl_offset", -1)),
        offset=int(info.get("master_repl_offset", 0)),
        evicted=int(info.get("evicted_keys", 0)),
        used=int(info.get("used_memory", 0)),
        maxmemory=int(info.get("maxmemory", 0)),
        policy=str(info.get("maxmemory_policy", "")),
    )


def position_of(server: bytes, replication: bytes) -> tuple[str, int]:
    """The name of the history and the offset in the replies to ``INFO server`` and ``INFO replication``."""
    found = {name.decode(): value.decode() for name, value in FIELDS.findall(server + b"\r\n" + replication)}
    return position(found["run_id"], found["master_replid"]), int(found["master_repl_offset"])


def ask_position(connection: Connection) -> tuple[str, int]:
    """Where the writes of *connection* ended, at most. Asked on the same connection, so it is the same server that took them."""
    replies = []
    for section in (b"server", b"replication"):
        connection.send_command("INFO", section)  # type: ignore[no-untyped-call]
        replies.append(bytes(connection.read_response(disable_decoding=True)))
    return position_of(*replies)


def settle(
    connection: Connection, cell: bytes, *, replicas: int | None, seconds: float, step: float
) -> tuple[int, int]:
    """Wait until *replicas* (None: all that are connected) have every write that the server took before.

    *cell*: a key that is written for it, and leaves by itself. *seconds*: how long in all; *step*: at most in one command, because
    the driver takes a longer silence for a failure. Returns: how many have it, how many were wanted.
    """
    wanted = replicas
    if wanted is None:
        connection.send_command("INFO", "replication")  # type: ignore[no-untyped-call]
        told = bytes(connection.read_response(disable_decoding=True))
        wanted = int(CONNECTED.findall(told)[0])
    if wanted == 0:
        return 0, 0
    # WAIT looks at the last write of its own connection, and everything written before, by whomever, is older.
    connection.send_command("SET", cell, b"1", "PX", SETTLE_MS)  # type: ignore[no-untyped-call]
    connection.read_response()
    deadline, have = time.monotonic() + seconds, 0
    while have < wanted and (left := deadline - time.monotonic()) > 0:
        connection.send_command("WAIT", wanted, max(1, round(min(left, step) * 1000)))  # type: ignore[no-untyped-call]
        have = int(connection.read_response())
    return have, wanted
