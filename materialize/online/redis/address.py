"""The URL of a Redis store in, what its driver and the store need to know out. Verification of certificates is always on.

| scheme | servers |
|---|---|
| ``redis://``, ``rediss://``, ``unix://`` | one, or what stands before one |
| ``redis+cluster://``, ``rediss+cluster://`` | a cluster; ``host:port,host:port`` are some of its servers |
| ``redis+sentinel://``, ``rediss+sentinel://`` | the primary that the sentinels at ``host:port,host:port`` name for ``service`` |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from materialize.errors import ConfigError
from materialize.model import mask_credentials

__all__ = ["Address", "parse"]

#: A prefix takes part in patterns of SCAN, so it has no character that means something there.
PREFIX = r"[A-Za-z0-9_.:-]+"
SECONDS = r"\d{1,4}(\.\d+)?"
#: Our options and their defaults. ``timeout``: seconds to connect and to wait for one answer. ``deadline``: seconds for which one call
#: waits out redirects, failovers and refusals that pass by themselves: twice what a failover takes with the usual 15 s of
#: cluster-node-timeout, and the 30 s of Sentinel's down-after-milliseconds.
DEFAULTS = {"prefix": "fs", "timeout": "5", "deadline": "30", "replicas_timeout": "10", "patience": "30"}
#: Our further options, which are checked by a pattern: name, pattern, what is expected. ``replicas``: how many must have what a run wrote before it is
#: done; ``replicas_timeout``: seconds to wait for them; ``patience``: seconds that a write waits while the server has no memory;
#: ``eviction=allow``: load a server that may evict keys.
FURTHER = (
    ("replicas", r"\d", "how many replicas to wait for, 0 to 9"),
    ("replicas_timeout", SECONDS, "seconds such as 10"),
    ("patience", SECONDS, "seconds such as 30"),
    ("eviction", "allow", "'allow', or nothing"),
)
#: Files for TLS, and the driver's names for them.
TLS_FILES = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
#: What is always so and may be said all the same, as Airflow's connections do.
ALWAYS = {"ssl_cert_reqs": "required", "ssl_check_hostname": "true"}
SENTINEL_OPTIONS = ("service", "sentinel_username", "sentinel_password")
#: Where sentinels and servers listen when the URL does not say it.
PORTS = {"sentinel": 26379}
DEFAULT_PORT = 6379


@dataclass(frozen=True, slots=True)
class Address:
    """Where a store is. ``kind``: ``single``, ``cluster`` or ``sentinel``. ``hosts``: all that the URL names (none for unix sockets).

    ``driver``: keyword arguments of the driver's connections, secrets among them, so they are in no repr. ``sentinel``: the same for
    the sentinels. ``location``: the URL with secrets masked, for messages.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...]
    location: str
    prefix: str
    timeout: float
    deadline: float
    replicas_timeout: float
    patience: float
    service: str = ""
    replicas: int | None = None
    eviction_allowed: bool = False
    driver: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel: dict[str, Any] = field(default_factory=dict, repr=False)


def parse(url: str) -> Address:
    """The address that *url* names. Raises ConfigError, without any secret, for options that are wrong or do not go together."""
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    query |= {name: query.pop(theirs) for name, theirs in TLS_FILES.items() if theirs in query}
    query = {name: value for name, value in query.items() if ALWAYS.get(name) != value.lower()}
    names = (*DEFAULTS, *TLS_FILES, *SENTINEL_OPTIONS, *(name for name, *_ in FURTHER))
    ours = DEFAULTS | {name: query.pop(name) for name in names if name in query}
    location = mask_credentials(_url(parts.scheme, parts.netloc, parts.path, query))
    subject = f"online store {location}"
    _check(subject, kind, ours, query, secure=scheme == "rediss")
    account, at, places = parts.netloc.rpartition("@")
    hosts = [_host(subject, place, PORTS.get(kind, DEFAULT_PORT)) for place in places.split(",") if place]
    if kind and (not hosts or (kind == "cluster" and parts.path.strip("/") not in {"", "0"})):
        raise ConfigError(
            f"{subject}: expected {parts.scheme}://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...], found no host or a database"
        )
    first = places.partition(",")[0]
    address = _url(scheme, account + at + first, parts.path, query)
    try:
        driver: dict[str, Any] = parse_url(address)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigError(f"{subject}: expected options that the driver knows, found: {error}") from None
    common: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": float(ours["timeout"]),
        "socket_connect_timeout": float(ours["timeout"]),
        # Every error reaches our caller: the driver would send a whole batch again behind its back.
        "retry": Retry(NoBackoff(), 0),
        "client_name": "materialize",
        "driver_info": None,  # CLIENT SETINFO: a right that Redis 7.0 cannot give, and two round trips
    }
    tls: dict[str, Any] = {TLS_FILES[name]: ours[name] for name in TLS_FILES if name in ours}
    if scheme == "rediss":
        tls |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    sentinel: dict[str, Any] = {**common, **tls, "ssl": scheme == "rediss"} if kind == "sentinel" else {}
    sentinel |= {name[9:]: ours[name] for name in SENTINEL_OPTIONS[1:] if name in ours}
    return Address(
        kind=kind or "single",
        hosts=tuple(hosts) if scheme != "unix" else (),
        location=location,
        prefix=ours["prefix"],
        timeout=float(ours["timeout"]),
        deadline=float(ours["deadline"]),
        service=ours.get("service", ""),
        replicas=int(ours["replicas"]) if "replicas" in ours else None,
        replicas_timeout=float(ours["replicas_timeout"]),
        patience=float(ours["patience"]),
        eviction_allowed="eviction" in ours,
        driver={**driver, **common, **tls},
        sentinel=sentinel,
    )


def _check(subject: str, kind: str, ours: dict[str, str], query: dict[str, str], *, secure: bool) -> None:
    if not re.fullmatch(PREFIX, ours["prefix"]):
        raise ConfigError(
            f"{subject}: found the prefix {ours['prefix']!r}, expected letters, digits, '_', '-', '.' and ':'"
        )
    for name in ("timeout", "deadline"):
        if not re.fullmatch(SECONDS, ours[name]) or not float(ours[name]):
            raise ConfigError(f"{subject}: found the {name} {ours[name]!r}, expected seconds above 0 such as 5 or 0.5")
    for name, pattern, wanted in FURTHER:
        if name in ours and not re.fullmatch(pattern, ours[name]):
            raise ConfigError(f"{subject}: found {name}={ours[name]!r}, expected {wanted}")
    files = sorted(TLS_FILES.keys() & ours.keys())
    if files and not secure:
        raise ConfigError(
            f"{subject}: found the option {files[0]!r}, expected it with a scheme that begins with rediss"
        )
    if ("cert" in ours) != ("key" in ours):
        raise ConfigError(f"{subject}: found one of the options cert and key, expected both or none (mutual TLS)")
    if weak := sorted(ALWAYS.keys() & query.keys()):
        raise ConfigError(
            f"{subject}: found {weak[0]}={query[weak[0]]!r}, expected none: certificates are always verified. "
            "Name the authority that signed the server's certificate: ?ca=/path/ca.pem"
        )
    if (kind == "sentinel") != bool(ours.get("service")):
        raise ConfigError(f"{subject}: expected ?service=NAME with a +sentinel scheme, and only there")


def _url(scheme: str, netloc: str, path: str, query: dict[str, str]) -> str:
    """As urlunsplit, which leaves out the two strokes of unix:///path."""
    return f"{scheme}://{netloc}{path}{'?' * bool(query)}{urlencode(query)}"


def _host(subject: str, place: str, port: int) -> tuple[str, int]:
    try:
        found = urlsplit(f"//{place}")
        return unquote(found.hostname or "localhost"), found.port or port
    except ValueError:
        raise ConfigError(f"{subject}: expected HOST[:PORT][,HOST[:PORT]...], found another form") from None
