"""Settings and an address in, a server that runs until it is told to stop. What is under way then is finished first."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from materialize.config import known, load
from materialize.errors import ConfigError
from materialize.server.settings import check_address, tokens_of
from materialize.serving.caching import cache_of

if TYPE_CHECKING:
    from materialize.config import Config
    from materialize.server.settings import Settings

__all__ = ["Listening", "run"]

#: Connections that the kernel holds until they are accepted.
BACKLOG = 512
#: Seconds that a connection may stay without a request.
KEEP_ALIVE = 30


@dataclass(frozen=True, slots=True)
class Listening:
    """Where and how. ``connections``: in one process, idle ones too. ``grace``: seconds for what is under way at the end."""

    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    connections: int = 1_000
    grace: int = 10


def run(settings: Settings, listening: Listening) -> bool:
    """Serve until SIGTERM or SIGINT. False when the server could not start. Raises ConfigError before anything listens."""
    check_address(listening.host, tokens_of(os.environ))
    config = load(settings.config)
    known(config.online_stores, settings.store, "online store")
    if not any(settings.store in view.online_stores for view in config.feature_views.values()):
        raise ConfigError(
            f"could not serve the online store {settings.store!r}: found no feature view in it, expected one at least."
        )
    _check_cache(settings, config)
    settings.to_environment()
    with ExitStack() as stack:
        if listening.workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="materialize-serve-")
            )
        return _serve(_config(listening))


def _check_cache(settings: Settings, config: Config) -> None:
    """Raises ConfigError for a cache that could not be right, or would never hold anything."""
    if settings.cache is None:
        return
    views = [view for view in config.feature_views.values() if settings.store in view.online_stores]
    if not cache_of(settings.cache, views, config.online_store(settings.store), settings.terms).lifetimes:
        raise ConfigError(
            f"could not cache what the online store {settings.store!r} has: found no feature view with cache_ttl that is not realtime, expected one, or "
            "--cache-ttl, such as --cache-ttl 30s."
        )


def _serve(config: uvicorn.Config) -> bool:
    if config.workers > 1:
        Multiprocess(config, [config.bind_socket()]).run()
        return True
    # uvicorn hands a signal on once it has stopped by it, which would end the process with its number.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    server = uvicorn.Server(config)
    server.run()
    return server.started


def _config(listening: Listening) -> uvicorn.Config:
    return uvicorn.Config(
        "materialize.server.app:from_environment",
        factory=True,
        host=listening.host,
        port=listening.port,
        workers=listening.workers,
        backlog=BACKLOG,
        limit_concurrency=listening.connections,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=listening.grace,
        access_log=False,  # a path holds entity keys
        log_config=_logging(),
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
    )


def _logging() -> dict[str, Any]:
    """Of uvicorn and of the server itself from INFO on, of others warnings: what drivers say below that may hold keys."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
        "filters": {"seldom": {"()": "materialize.server.error_log.Seldom"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["seldom"]}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {"uvicorn": {"level": "INFO"}, "materialize": {"level": "INFO"}},
    }
