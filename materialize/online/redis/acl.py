"""A store's URL and a role in, the least-privilege ACL line of a Redis or Valkey user out: ``materialize acl``.

Keys are limited to the store's prefix, commands to those that are really sent. Scripts run with the rights of who calls them, so
the commands inside them are among these. SCAN is not limited by key patterns: who may scan sees the names of all keys of the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.online.redis.address import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PLACEHOLDER", "ROLES", "acl_line", "commands"]

#: What stands for the password: a server refuses the line as long as nobody put 64 hexadecimal digits there.
PLACEHOLDER = "#SHA256_OF_THE_PASSWORD"
#: What every connection sends, and reads of records and cells (materialize.serving).
READ = ("client|setname", "get", "hget", "mget")
#: Further, what a reader sends that caches and has the server tell what changes.
CACHE = (*READ, "client|tracking")
#: Further, what verify and status send.
VERIFY = (*READ, "scan", "time")
#: What the scripts alone send.
SCRIPTS = ("exists", "getrange", "hset", "mset", "object|encoding", "persist", "pexpireat", "setrange")
#: Further, what runs send; doctor sends INFO.
RUN = (*VERIFY, "evalsha", "info", "memory|usage", "msetnx", "script|load", "set", "wait", *SCRIPTS)
#: What readers in any language send to hashes (docs/layouts.md). They cannot read records of the layout `vector`.
PLAIN = ("client|setname", "hget", "hgetall", "hmget")
ROLES = {"run": RUN, "read": READ, "cache": CACHE, "plain": PLAIN, "verify": VERIFY}
#: Further, what each sends to the servers of a cluster; readonly: a model server that reads from replicas.
_READ = ("asking", "cluster|slots")
_VERIFY = (*_READ, "cluster|countkeysinslot", "cluster|getkeysinslot", "cluster|nodes")
CLUSTER = {
    "run": (*_VERIFY, "eval"),
    "read": (*_READ, "readonly"),
    "cache": (*_READ, "readonly"),
    "plain": _READ,
    "verify": _VERIFY,
}


def commands(url: str, role: str) -> Sequence[str]:
    """The commands that *role* sends to the store at *url*, subcommands as ``command|subcommand``. Raises ConfigError for a wrong URL."""
    address = parse(url)
    cluster = CLUSTER[role] if address.kind == "cluster" else ()
    return (*ROLES[role], *cluster, *(["select"] if address.driver.get("db") else []))


def acl_line(url: str, role: str) -> str:
    """The command that makes or resets the user ``materialize-ROLE`` for the store at *url*, on each of its servers.

    It works on Redis 7.0, Valkey 7.2 and newer. It has no password, and takes away what the user could do before.
    Raises ConfigError for a wrong URL, and so for a prefix that would mean something else in a pattern.
    """
    prefix = parse(url).prefix
    keys = f"~{prefix}:*" if role == "run" else f"%R~{prefix}:*"
    allowed = " ".join(f"+{command}" for command in commands(url, role))
    return f"ACL SETUSER materialize-{role} reset on {PLACEHOLDER} {keys} {allowed}"
