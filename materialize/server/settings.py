"""What a server is told once: where the config is, what a request may take; and the tokens, which come from the environment alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from materialize.errors import ConfigError
from materialize.online.reading import ReadTerms
from materialize.serving import CacheSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TOKENS", "TOKENS_FILE", "Limits", "Settings", "Tokens", "check_address", "tokens_of"]

#: The tokens themselves, separated by commas or spaces; or the file that has one on each line. Several: while they are exchanged.
TOKENS, TOKENS_FILE = "MATERIALIZE_SERVE_TOKENS", "MATERIALIZE_SERVE_TOKENS_FILE"
#: Where the processes of one server find the settings; they hold no secret.
SETTINGS = "MATERIALIZE_SERVE_SETTINGS"
#: Characters of the shortest token: 16 random hexadecimal digits are 64 bits, too many to try over a network.
SHORTEST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may take, and how many there may be at once in one process.

    ``body``: bytes. ``deadline``: seconds from a request's head to its answer, the body's arrival included.
    """

    entities: int = 1_000
    body: int = 256 * 1_024
    in_flight: int = 64
    deadline: float = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """``config``: the folder. ``connect``, ``read``, ``store_deadline``: seconds, of `materialize.serving.ReadTerms`.

    ``entries``: of the cache, 0: there is none. ``ttl``: seconds, of `materialize.serving.CacheSettings`, as ``tracking`` is.
    """

    config: str
    store: str = "default"
    limits: Limits = Limits()
    connect: float = 0.5
    read: float = 0.1
    store_deadline: float = 0.25
    replicas: bool = False
    open_metrics: bool = False
    entries: int = 0
    ttl: float | None = None
    tracking: bool = False

    @property
    def terms(self) -> ReadTerms:
        return ReadTerms(self.connect, self.read, self.store_deadline, self.replicas)

    @property
    def cache(self) -> CacheSettings | None:
        """Raises ConfigError for terms of a cache that there is not."""
        if self.entries:
            ttl = None if self.ttl is None else timedelta(seconds=self.ttl)
            return CacheSettings(self.entries, ttl, tracking=self.tracking)
        if self.ttl is not None or self.tracking:
            raise ConfigError(
                "could not cache: found --cache-ttl or --tracking without --cache, expected how many entities are remembered, such as --cache 100000."
            )
        return None

    def to_environment(self) -> None:
        """Hand the settings to processes that this one starts."""
        os.environ[SETTINGS] = json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Settings:
        found = json.loads(os.environ[SETTINGS])
        return cls(**found | {"limits": Limits(**found["limits"])})


class Tokens:
    """What clients prove themselves with; no token at all admits everybody. Its repr has none of them."""

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    def __len__(self) -> int:
        return len(self._digests)

    def admit(self, authorization: bytes) -> bool:
        """Whether an Authorization header is ``Bearer`` and a known token. How long that takes tells nothing about tokens."""
        if not self._digests:
            return True
        scheme, _, token = authorization.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        known = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them, whichever it is
        return scheme.lower() == b"bearer" and any(known)


def tokens_of(environment: Mapping[str, str]) -> Tokens:
    """The tokens that `TOKENS` or the file `TOKENS_FILE` has. Raises ConfigError, without any of them, for one that is too short."""
    name, text = TOKENS, environment.get(TOKENS, "")
    if TOKENS_FILE in environment:
        name = TOKENS_FILE
        if text:
            raise ConfigError(f"could not tell the tokens: found {TOKENS} and {TOKENS_FILE}, expected one of them.")
        try:
            text = Path(environment[TOKENS_FILE]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"could not read the file that {TOKENS_FILE} names: found {type(error).__name__}, expected a text file with a token on each line."
            ) from None
    tokens = text.replace(",", " ").split()
    if any(len(token) < SHORTEST_TOKEN or not token.isascii() for token in tokens):
        raise ConfigError(
            f"could not take the tokens of {name}: found one that is shorter or not ASCII, expected at least {SHORTEST_TOKEN} characters each. Make one with: openssl rand -hex 32"
        )
    if name in environment and not tokens:
        raise ConfigError(
            f"could not take the tokens of {name}: found none, expected at least one, or no {name} at all."
        )
    return Tokens(tokens)


def check_address(host: str, tokens: Tokens) -> None:
    """Raises ConfigError when everybody who reaches *host* could read without a token. What is on this machine's loopback may."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or tokens):
        raise ConfigError(
            f"could not listen on {host!r}: found no token, expected one in {TOKENS} or in the file that {TOKENS_FILE} names wherever others than "
            "this machine can reach the server. Make one with: openssl rand -hex 32, or listen on 127.0.0.1."
        )
