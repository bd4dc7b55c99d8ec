"""An Airflow connection in, the URL of an online store or the storage options of a Delta table out. Airflow is not needed.

| connection type | as an online store |
|---|---|
| ``redis`` | ``redis://``; ``rediss://`` when extra ``ssl`` is true; ``redis+cluster://`` when extra ``cluster`` is true, ``redis+sentinel://`` when there is an extra ``service``, both with ``host:port,host:port`` as the host where there are several; the database is extra ``db`` or the schema; the other extras become the query |
| ``aws`` | ``dynamodb://KEY:SECRET@REGION/PREFIX?endpoint_url=...``; prefix and options (docs/dynamodb.md) are extras |

As the source of a feature view: ``aws``, or any type whose extra has ``storage_options``, a mapping that is passed on.
A URL of one of our own schemes, given as text in the place of a connection, is taken as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from materialize.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["STORE_SCHEMES", "Connections", "checked_url", "environment_connection", "storage_options", "store_url"]

#: The kinds of online store, as their URLs begin.
STORE_SCHEMES = (
    "memory",
    "sqlite",
    "redis",
    "rediss",
    "unix",
    "redis+cluster",
    "rediss+cluster",
    "redis+sentinel",
    "rediss+sentinel",
    "dynamodb",
)
#: Our schemes that are Airflow connection types as well, or would be read as one.
REDIS_SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
#: Where servers and sentinels listen when nothing else is said.
REDIS_PORT, SENTINEL_PORT = 6379, 26379
#: What an AWS connection says, and the name of the storage option that delta-rs reads for it.
AWS_OPTIONS = {
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "aws_session_token": "AWS_SESSION_TOKEN",
    "region_name": "AWS_REGION",
    "endpoint_url": "AWS_ENDPOINT_URL",
    "role_arn": "AWS_IAM_ROLE_ARN",
}
#: What else an AWS connection may say of an online store (materialize.online.dynamodb.address).
DYNAMODB_OPTIONS = ("table", "share", "write_units", "requests", "consistent", "timeout")


class AirflowConnection(Protocol):
    """What is read of an Airflow connection; Airflow's own class has it."""

    conn_type: str | None
    host: str | None
    schema: str | None
    login: str | None
    password: str | None
    port: int | None
    extra: str | None


#: Airflow's connection of an id, as an object or as the text of an ``AIRFLOW_CONN_`` variable (URI or JSON).
Connections = Callable[[str], "str | AirflowConnection"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a connection, decoded; the repr has no secrets."""

    kind: str
    host: str = ""
    port: str = ""
    login: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    schema: str = ""
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def enabled(self, name: str) -> bool:
        """Whether the extra *name* is true, as JSON or as text."""
        return str(self.extra.get(name, "")).lower() in {"1", "true", "yes", "on"}


def environment_connection(connection_id: str) -> str:
    """The text of the variable ``AIRFLOW_CONN_<ID>``, where Airflow looks first too. Raises `ConfigError` when it is not set."""
    name = f"AIRFLOW_CONN_{connection_id.upper()}"
    if text := os.environ.get(name):
        return text
    raise ConfigError(
        f"could not find the Airflow connection {connection_id!r}: expected the environment variable {name}, found it unset. "
        "Set it to the connection's URI or JSON, or run inside Airflow. Nothing was read or written."
    )


def store_url(connection: str | AirflowConnection) -> str:
    """The URL of the online store that *connection* stands for. Raises ValueError that never holds a secret."""
    if isinstance(connection, str) and connection.startswith(("memory://", "sqlite://", "unix://", "dynamodb://")):
        return connection
    parts = _parts(connection)
    if parts.kind in REDIS_SCHEMES:
        return _redis_url(parts)
    if parts.kind == "aws":
        options = _aws(parts, "dynamodb")
        account = _account(options.pop("key", ""), options.pop("secret", ""))
        region, prefix = options.pop("region_name", ""), parts.extra.get("prefix", "")
        options |= {name: str(parts.extra[name]) for name in DYNAMODB_OPTIONS if name in parts.extra}
        address = f"{region}/{prefix}" if prefix else region
        return f"dynamodb://{account}{address}" + (f"?{urlencode(options)}" if options else "")
    raise ValueError(f"expected a connection of type redis or aws, found the type {parts.kind!r}")


def storage_options(connection: str | AirflowConnection) -> dict[str, str]:
    """What delta-rs needs to read the table that *connection* gives access to. Raises ValueError that never holds a secret."""
    parts = _parts(connection)
    given = parts.extra.get("storage_options")
    passed = {str(name): str(value) for name, value in given.items()} if isinstance(given, dict) else {}
    if parts.kind != "aws":
        if passed:
            return passed
        raise ValueError(
            f"expected a connection of type aws, or 'storage_options' in its extra, found the type {parts.kind!r}"
        )
    options = {AWS_OPTIONS[name]: value for name, value in _aws(parts, "s3").items()}
    if options.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["AWS_ALLOW_HTTP"] = "true"
    return options | passed


def checked_url(url: str, root: Path | None = None) -> str:
    """*url* with a relative sqlite path made absolute under *root*. Raises ValueError, without the URL, for a wrong one."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in STORE_SCHEMES:
        schemes = ", ".join(f"{known}://" for known in STORE_SCHEMES)
        found = f"{scheme}://" if separator and scheme.isalpha() else "none of them"
        raise ValueError(f"expected a URL that begins with one of {schemes}, found {found}")
    if scheme == "sqlite":
        return _sqlite_url(rest, root)
    if scheme in REDIS_SCHEMES:
        _check_redis(url)
    return url


def _sqlite_url(rest: str, root: Path | None) -> str:
    path = rest.removeprefix("/")
    if not rest.startswith("/") or path in {"", "/"} or path.startswith((":memory:", "?")):
        raise ValueError(
            "expected sqlite:///relative/path.db or sqlite:////absolute/path.db (memory:// for none), found another URL"
        )
    if path.startswith("/"):
        return f"sqlite:///{path}"
    if root is None:
        raise ValueError("expected sqlite:////absolute/path.db, found a relative path")
    return f"sqlite:///{os.path.normpath(root / path)}"


def _check_redis(url: str) -> None:
    """A password with special characters would otherwise be cut, and appear in the driver's errors."""
    shape = "SCHEME://[USER:PASSWORD@]HOST[:PORT][/DATABASE]"
    parts = urlsplit(url)
    several = "+" in parts.scheme
    if several:
        shape = "SCHEME://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]"
    places = parts.netloc.rpartition("@")[2]
    try:
        hosts = [urlsplit(f"//{place}") for place in (places.split(",") if several else [places])]
        right = all(host.hostname and (host.port is None or host.port) for host in hosts)
    except ValueError:
        right = False
    if not right or "@" in parts.path + parts.query or parts.netloc.count("@") > 1 or parts.fragment:
        raise ValueError(
            f"expected {shape} with special characters of the password percent-encoded, found a URL of another form"
        )
    if not parts.path.strip("/").isdecimal() and parts.path.strip("/"):
        raise ValueError(f"expected {shape} with a number as the database, found other text")


def _redis_url(parts: Parts) -> str:
    extra = {
        name: value for name, value in parts.extra.items() if name not in {"ssl", "cluster", "db"} and value is not None
    }
    scheme = "rediss" if parts.kind.startswith("rediss") or parts.enabled("ssl") else "redis"
    port = REDIS_PORT
    if parts.kind.endswith("+cluster") or parts.enabled("cluster"):
        scheme += "+cluster"
    elif parts.kind.endswith("+sentinel") or "service" in extra:
        scheme, port = f"{scheme}+sentinel", SENTINEL_PORT
    database = parts.extra.get("db")
    path = parts.schema if database is None else str(database)
    address = _places(parts.host, parts.port or str(port)) + (f"/{quote(path)}" if path else "")
    return f"{scheme}://{_account(parts.login, parts.password)}{address}" + (f"?{urlencode(extra)}" if extra else "")


def _places(host: str, port: str) -> str:
    """``host:port`` of one host, or of each in ``host:port,host``; *port* where none is said."""
    if host.count(":") > 1 and "," not in host:
        return f"[{host}]:{port}"
    places = [place.strip() for place in (host or "localhost").split(",")]
    return ",".join(
        quote(place, safe=":[]") if place.rpartition(":")[2].isdecimal() else f"{quote(place, safe='[]:')}:{port}"
        for place in places
    )


def _account(login: str, password: str) -> str:
    if not (login or password):
        return ""
    return quote(login, safe="") + (f":{quote(password, safe='')}" if password else "") + "@"


def _aws(parts: Parts, service: str) -> dict[str, str]:
    """What is set of the keys of `AWS_OPTIONS`; an endpoint for *service* goes before the general one."""
    services = parts.extra.get("service_config")
    config = services.get(service) if isinstance(services, dict) else None
    own = config.get("endpoint_url") if isinstance(config, dict) else None
    found = {name: parts.extra.get(name) for name in AWS_OPTIONS} | {
        "key": parts.login or parts.extra.get("aws_access_key_id"),
        "secret": parts.password or parts.extra.get("aws_secret_access_key"),
    }
    found["endpoint_url"] = own or found["endpoint_url"]
    return {name: str(value) for name, value in found.items() if value}


def _parts(connection: str | AirflowConnection) -> Parts:
    """The parts of a connection, given as an object, as a URI or as JSON. Raises ValueError without quoting any of it."""
    if not isinstance(connection, str):
        names = ("conn_type", "host", "port", "login", "password", "schema", "extra")
        return _from_fields({name: getattr(connection, name) for name in names})
    if connection.lstrip().startswith("{"):
        return _from_fields(_json_object(connection))
    try:
        uri = urlsplit(connection)
        port = uri.port
    except ValueError:
        raise ValueError(
            "expected a connection URI with special characters of the password percent-encoded, found another form"
        ) from None
    extra = dict(parse_qsl(uri.query, keep_blank_values=True))
    # As Airflow does: the one extra __extra__ holds all of them as JSON.
    whole = extra.pop("__extra__", None)
    return _from_fields(
        {
            "conn_type": uri.scheme.replace("-", "_"),
            "host": unquote(uri.hostname or ""),
            "port": port,
            "login": unquote(uri.username or ""),
            "password": unquote(uri.password or ""),
            "schema": unquote(uri.path[1:]),
            "extra": extra if whole is None else whole,
        }
    )


def _from_fields(fields: dict[str, Any]) -> Parts:
    extra = fields.get("extra") or {}
    return Parts(
        kind=str(fields.get("conn_type") or ""),
        **{name: str(fields.get(name) or "") for name in ("host", "port", "login", "password", "schema")},
        extra=_json_object(extra) if isinstance(extra, str) else extra,
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object in the connection, found something else")
    return found
