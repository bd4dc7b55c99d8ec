"""The command that answers model servers over HTTP until it is told to stop."""

from __future__ import annotations

from typing import Annotated

import typer

from materialize.cli.options import DEFAULT_CONFIG, ConfigDir, seconds
from materialize.cli.show import talk
from materialize.errors import ConfigError

__all__ = ["serve"]


def serve(
    config: ConfigDir = DEFAULT_CONFIG,
    *,
    store: Annotated[str, typer.Option(help="The online store that is read.")] = "default",
    host: Annotated[str, typer.Option(help="Where to listen; beyond this machine only with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535)] = 8080,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the limits below hold for each.")] = 1,
    max_entities: Annotated[int, typer.Option(min=1, help="Entities in one request.")] = 1_000,
    max_body: Annotated[int, typer.Option(min=1_024, help="Bytes in one request's body.")] = 262_144,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Requests at once; others are refused with 503.")] = 64,
    max_connections: Annotated[int, typer.Option(min=2, help="Connections at once, idle ones too.")] = 1_000,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds for one request.")] = 1.0,
    connect_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for a connection to the store.")] = 0.5,
    read_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for one answer of the store.")] = 0.1,
    store_deadline: Annotated[float, typer.Option(min=0.001, help="Seconds for the store, retries included.")] = 0.25,
    replicas: Annotated[bool, typer.Option("--replicas", help="Read from replicas, which may lag behind.")] = False,
    cache: Annotated[int, typer.Option(min=0, help="Entities that are remembered; 0: none, each read asks.")] = 0,
    cache_ttl: Annotated[str, typer.Option(metavar="30s", help="For how long, of views without a cache_ttl.")] = "",
    tracking: Annotated[bool, typer.Option("--tracking", help="Redis and Valkey tell the cache what changes.")] = False,
    open_metrics: Annotated[bool, typer.Option("--open-metrics", help="Tell metrics without a token.")] = False,
    grace: Annotated[int, typer.Option(min=1, help="Seconds for requests under way when told to stop.")] = 10,
) -> None:
    """Answer feature lookups over HTTP. Tokens come from MATERIALIZE_SERVE_TOKENS or MATERIALIZE_SERVE_TOKENS_FILE."""
    from materialize.server.settings import Limits, Settings

    try:
        from materialize.server.run import Listening, run
    except ImportError as error:
        talk.print(
            f"error: {error.name} is not installed, expected delta-materialize[serve]", style="red", markup=False
        )
        raise typer.Exit(1) from None
    limits = Limits(max_entities, max_body, max_in_flight, deadline)
    settings = Settings(
        str(config),
        store,
        limits,
        connect=connect_timeout,
        read=read_timeout,
        store_deadline=store_deadline,
        replicas=replicas,
        open_metrics=open_metrics,
        entries=cache,
        ttl=seconds(cache_ttl) if cache_ttl else None,
        tracking=tracking,
    )
    try:
        started = run(settings, Listening(host, port, workers, max_connections, grace))
    except ConfigError as error:
        talk.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    if not started:
        raise typer.Exit(1)
