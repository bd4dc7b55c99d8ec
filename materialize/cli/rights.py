"""The commands that print the least a role needs at a store: ``iam-policy`` for DynamoDB, ``acl`` for Redis and Valkey."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from materialize.cli.options import DEFAULT_CONFIG, ConfigDir
from materialize.cli.show import talk
from materialize.cli.targets import Options, for_store, usage_error

if TYPE_CHECKING:
    from materialize.model import OnlineStoreConfig

__all__ = ["acl", "iam_policy"]

StoreName = Annotated[str | None, typer.Option("--store", help="One online store; 'default' by default.")]
REDIS = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")


def iam_policy(
    role: Annotated[
        str, typer.Argument(metavar="ROLE", help="reader (model servers), writer (runs), setup, or bulk (bulk-load).")
    ],
    bucket: Annotated[str, typer.Option(help="Where bulk-load puts its files.")] = "BUCKET",
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
) -> None:
    """Print the least that a role needs on AWS, as an IAM policy for one DynamoDB store."""
    for_store(Options(config, store, as_json=False, verbose=0), partial(_print_policy, role, bucket))


def acl(
    role: Annotated[
        str | None,
        typer.Option(
            help="run, read (model servers), cache (those that follow changes), plain (HMGET, layout hash) or verify (without --repair); all by default."
        ),
    ] = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
) -> None:
    """Print the least that a role needs on Redis or Valkey, as an ACL SETUSER line for one store. It holds no password."""
    for_store(Options(config, store, as_json=False, verbose=0), partial(_print_acl, role))


def _print_policy(role: str, bucket: str, store: OnlineStoreConfig) -> None:
    from materialize.online.dynamodb.address import Address  # noqa: PLC0415 - boto3 is slow to import
    from materialize.online.dynamodb.policy import ROLES, policy  # noqa: PLC0415 - as above

    if role not in ROLES:
        usage_error(f"found the role {role!r}, expected {', '.join(ROLES)}")
    if not store.url.startswith("dynamodb://"):
        usage_error(f"found the online store {store.name!r} at {store.masked_url}, expected one with a dynamodb:// URL")
    typer.echo(json.dumps(policy(Address.parse(store.url), role, bucket=bucket), indent=2))


def _print_acl(role: str | None, store: OnlineStoreConfig) -> None:
    from materialize.online.redis.acl import PLACEHOLDER, ROLES, acl_line  # noqa: PLC0415 - the driver is slow to import

    if role is not None and role not in ROLES:
        usage_error(f"found the role {role!r}, expected {', '.join(ROLES)}")
    if store.url.partition("://")[0] not in REDIS:
        usage_error(f"found the online store {store.name!r} at {store.masked_url}, expected a Redis or Valkey server")
    for name in ROLES if role is None else (role,):
        typer.echo(acl_line(store.url, name))
    talk.print(
        f"Put '#' and the digits of: printf %s \"$PASSWORD\" | sha256sum  in the place of {PLACEHOLDER}. "
        "Keep the users with ACL SAVE, or CONFIG REWRITE where there is no aclfile.",
        markup=False,
    )
