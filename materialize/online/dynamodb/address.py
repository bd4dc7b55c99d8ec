"""The URL of a DynamoDB store in, its parts out: ``dynamodb://[KEY:SECRET@]REGION[/PREFIX][?option=value&...]``.

| option | what | default |
|---|---|---|
| ``table`` | ``per_view``: a table ``PREFIX.VIEW`` each; ``shared``: one table ``PREFIX-features`` for all | ``per_view`` |
| ``share`` | how much of a table's write capacity a run may use, over 0 to 1 | 0.5 |
| ``write_units`` | write units a second, instead of a share | |
| ``requests`` | requests at once | 8 |
| ``consistent`` | whether readers read consistently, at twice the price: ``true`` or ``false`` | ``false`` |
| ``timeout`` | seconds to connect and to wait for an answer | 5 |
| ``endpoint_url`` | another address than AWS's, such as DynamoDB Local's | |
| ``aws_session_token``, ``role_arn`` | of an Airflow connection | |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from materialize.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Address"]

#: Table names have these characters only, 3 to 255 of them; the dot is what ends a prefix.
PREFIX = r"[A-Za-z0-9_-]{1,100}"


@dataclass(frozen=True, slots=True)
class Address:
    """The parts of a URL; the repr has no credentials. Raises ConfigError for a wrong URL, without quoting what may be secret."""

    region: str
    prefix: str = "fs"
    shared: bool = False
    share: float = 0.5
    write_units: float | None = None
    requests: int = 8
    consistent: bool = False
    timeout: float = 5.0
    endpoint_url: str | None = None
    role_arn: str | None = None
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str) -> Address:
        account, _, rest = url.removeprefix("dynamodb://").rpartition("@")
        subject = f"online store dynamodb://{'***@' * bool(account)}{rest.partition('?')[0]}"
        shape = re.fullmatch(r"dynamodb://(?:([^/?#@:]*):([^/?#@]*)@)?([a-z0-9-]+)/?([^/?#@:]*)/?(?:\?([^#]*))?", url)
        if shape is None or not re.fullmatch(PREFIX, shape[4] or "fs"):
            raise ConfigError(
                f"{subject}: found another form than expected, which is dynamodb://[KEY:SECRET@]REGION/PREFIX such as "
                "dynamodb://eu-central-1/fs, the prefix of letters, digits, '_' and '-', special characters of key and secret percent-encoded"
            )
        key, secret, region, prefix, query = shape.groups()
        pairs = parse_qsl(query or "", keep_blank_values=True)
        options = dict(pairs)
        if unknown := [name for name in options if name not in CHECKS]:
            named = [name for name in unknown if re.fullmatch(r"[a-z_]{1,30}", name)]
            raise ConfigError(
                f"{subject}: found unknown options{': ' * bool(named)}{', '.join(named)}, expected {', '.join(CHECKS)}"
            )
        wrong = [name for name, value in options.items() if not re.fullmatch(CHECKS[name][0], value)]
        if wrong:
            expected = "; ".join(f"{name}: expected {CHECKS[name][1]}" for name in wrong)
            raise ConfigError(f"{subject}: {expected}, found something else")
        if len(options) < len(pairs) or {"share", "write_units"} <= options.keys():
            raise ConfigError(f"{subject}: expected each option once, and one of share and write_units, found more")
        if bool(key) != bool(secret) or ("aws_session_token" in options and not key):
            raise ConfigError(f"{subject}: expected a key and its secret, or neither and no token, found one alone")
        given = {name: convert(options[name]) for name, convert in CONVERTED.items() if name in options}
        return cls(
            region=region,
            prefix=prefix or "fs",
            shared=options.get("table") == "shared",
            key=unquote(key or "") or None,
            secret=unquote(secret or "") or None,
            session_token=options.get("aws_session_token"),
            **given,
        )

    @property
    def location(self) -> str:
        """For messages."""
        beside = f" at {self.endpoint_url}" if self.endpoint_url else ""
        return f"dynamodb://{self.region}/{self.prefix}{beside}"

    def table(self, view: str) -> str:
        """The table that holds *view*. No view is called so that its table could be the shared one."""
        return f"{self.prefix}-features" if self.shared else f"{self.prefix}.{view}"


#: What an option may be, and that in words.
CHECKS = {
    "table": ("per_view|shared", "per_view or shared"),
    "share": (r"0?\.\d*[1-9]\d*|1(\.0*)?", "over 0 to 1, such as 0.5"),
    "write_units": (r"[1-9]\d{0,8}", "a whole number of write units a second, from 1"),
    "requests": (r"[1-9]\d{0,2}", "1 to 999 requests at once"),
    "consistent": ("true|false", "true or false"),
    "timeout": (r"(?=.*[1-9])\d{0,4}(\.\d+)?", "seconds above 0 such as 5 or 0.5"),
    "endpoint_url": (
        r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[A-Za-z0-9._/-]*)?",
        "the address of a server such as http://localhost:8000, without an account",
    ),
    "role_arn": (r"arn:.+", "the ARN of a role"),
    "aws_session_token": (r".+", "a token"),
}
#: Options that are fields of an `Address` by the same name.
CONVERTED: dict[str, Callable[[str], Any]] = {
    "share": float,
    "write_units": float,
    "requests": int,
    "consistent": lambda text: text == "true",
    "timeout": float,
    "endpoint_url": str,
    "role_arn": str,
}
