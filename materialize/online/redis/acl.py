"""A store's URL and a role in, the least-privilege ACL line of a Redis or Valkey user out: ``materialize acl``.

Keys are limited to the store's prefix, commands to those that are really sent. Scripts run with the rights of who calls them, so
the commands inside them are among these. SCAN is not limited by key patterns: who may scan sees the names of all keys of the server.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from materialize.errors import ConfigError
from materialize.model import mask_credentials
from materialize.online.redis.store import PREFIX

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PLACEHOLDER", "ROLES", "acl_line", "commands"]

#: What stands for the password: a server refuses the line as long as nobody put 64 hexadecimal digits there.
PLACEHOLDER = "#SHA256_OF_THE_PASSWORD"
#: What every connection sends, and reads of records and cells (materialize.serving).
READ = ("client|setname", "get", "mget")
#: Further, what verify and status send.
VERIFY = (*READ, "scan", "time")
#: Further, what runs send; doctor sends INFO. The last two are sent by the scripts alone.
RUN = (*VERIFY, "evalsha", "info", "memory|usage", "script|load", "set", "wait", "mset", "msetnx")
ROLES = {"run": RUN, "read": READ, "verify": VERIFY}


def commands(url: str, role: str) -> Sequence[str]:
    """The commands that *role* sends to the store at *url*, subcommands as ``command|subcommand``."""
    parts = urlsplit(url)
    database = dict(parse_qsl(parts.query)).get("db") or (parts.path.strip("/") if parts.scheme != "unix" else "")
    return (*ROLES[role], *(["select"] if database not in {"", "0"} else []))


def acl_line(url: str, role: str) -> str:
    """The command that makes or resets the user ``materialize-ROLE`` for the store at *url*.

    It works on Redis 7.0, Valkey 7.2 and newer. It has no password, and takes away what the user could do before.
    Raises ConfigError for a prefix that would mean something else in a pattern.
    """
    prefix = dict(parse_qsl(urlsplit(url).query)).get("prefix", "fs")
    if not re.fullmatch(PREFIX, prefix):
        raise ConfigError(
            f"online store {mask_credentials(url)}: found the prefix {prefix!r}, expected letters, digits, '_', '-', '.' and ':'"
        )
    keys = f"~{prefix}:*" if role == "run" else f"%R~{prefix}:*"
    allowed = " ".join(f"+{command}" for command in commands(url, role))
    return f"ACL SETUSER materialize-{role} reset on {PLACEHOLDER} {keys} {allowed}"
