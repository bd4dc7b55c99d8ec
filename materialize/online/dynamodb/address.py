"""The URL of a DynamoDB store in, its parts out: ``dynamodb://[KEY:SECRET@]REGION[/PREFIX][?option=value&...]``.

| option | what | default |
|---|---|---|
| ``table`` | ``per_view``: a table ``PREFIX.VIEW`` each; ``shared``: one table ``PREFIX.features`` for all | ``per_view`` |
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
from urllib.parse import parse_qsl, unquote, urlsplit

from materialize.errors import ConfigError
from materialize.model import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Address"]

#: Table names have these characters only, 3 to 255 of them.
NAME = r"[A-Za-z0-9_.-]{1,100}"


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
        parts = urlsplit(url)
        subject = f"online store {mask_credentials(url)}"
        account, _, region = parts.netloc.rpartition("@")
        key, _, secret = account.partition(":")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := sorted(options.keys() - CHECKS.keys() - {"aws_session_token"}):
            raise ConfigError(f"{subject}: found the options {', '.join(unknown)}, expected {', '.join(CHECKS)}")
        for name, value in options.items():
            shape, expected = CHECKS.get(name, (".+", ""))
            if not re.fullmatch(shape, value):
                raise ConfigError(f"{subject}: found another {name} than expected, which is {expected}")
        prefix = parts.path.strip("/") or "fs"
        if not re.fullmatch(r"[a-z0-9-]+", region) or not re.fullmatch(NAME, prefix):
            raise ConfigError(
                f"{subject}: expected dynamodb://REGION/PREFIX such as dynamodb://eu-central-1/fs, the prefix of letters, digits, '_', '-' and '.'"
            )
        given = {name: convert(options[name]) for name, convert in CONVERTED.items() if name in options}
        return cls(
            region=region,
            prefix=prefix,
            shared=options.get("table") == "shared",
            key=unquote(key) or None,
            secret=unquote(secret) or None,
            session_token=options.get("aws_session_token"),
            **given,
        )

    @property
    def location(self) -> str:
        """For messages."""
        beside = f" at {mask_credentials(self.endpoint_url)}" if self.endpoint_url else ""
        return f"dynamodb://{self.region}/{self.prefix}{beside}"

    def table(self, view: str) -> str:
        """The table that holds *view*."""
        return f"{self.prefix}.features" if self.shared else f"{self.prefix}.{view}"


#: What an option may be, and that in words.
CHECKS = {
    "table": ("per_view|shared", "per_view or shared"),
    "share": (r"0?\.\d*[1-9]\d*|1(\.0*)?", "over 0 to 1, such as 0.5"),
    "write_units": (r"[1-9]\d{0,8}", "a whole number of write units a second"),
    "requests": (r"[1-9]\d{0,2}", "1 to 999 requests at once"),
    "consistent": ("true|false", "true or false"),
    "timeout": (r"(?=.*[1-9])\d{1,4}(\.\d+)?", "seconds above 0 such as 5 or 0.5"),
    "endpoint_url": (r"https?://.+", "the address of a server, http:// or https://"),
    "role_arn": (r"arn:.+", "the ARN of a role"),
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
