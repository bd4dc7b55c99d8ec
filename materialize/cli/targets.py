"""Options in, views and stores to work on out; one failing target never holds back the others."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from materialize.cli.show import print_json, talk
from materialize.errors import MaterializeError
from materialize.online import open_store
from materialize.stop import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from materialize.config import Config
    from materialize.model import FeatureView, OnlineStoreConfig
    from materialize.online.base import OnlineStore

__all__ = ["Options", "Target", "for_each", "for_store", "usage_error"]

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
#: How often -v has to be given for tracebacks.
TRACEBACKS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What every command takes."""

    config: Path
    store: str | None
    as_json: bool
    verbose: int
    max_speed: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """One view in one store, both resolved, the store open."""

    view: FeatureView
    store_name: str
    store: OnlineStore

    @property
    def names(self) -> dict[str, str]:
        return {"view": self.view.name, "store": self.store_name}


def usage_error(message: str) -> NoReturn:
    """End with exit code 2."""
    raise typer.BadParameter(message)


def for_each(options: Options, views: Sequence[str] | None, *works: Callable[[Target], None]) -> None:
    """Do all *works* for every chosen view in every chosen store. Ends with exit code 1 when any of it failed."""
    done = [_at(options, target, work) for target in _targets(options, _loaded(options), views) for work in works]
    if not all(done):
        raise typer.Exit(1)


def for_store(options: Options, work: Callable[[OnlineStoreConfig], None]) -> None:
    """Do *work* for the chosen online store. Ends with exit code 1 when it failed."""
    config, name = _loaded(options), options.store or "default"
    _known("online store", (name,), config.online_stores)
    if not _guarded(options, {"store": name}, lambda: work(config.online_store(name))):
        raise typer.Exit(1)


def _loaded(options: Options) -> Config:
    from materialize.config import load

    level = LEVELS[min(options.verbose, len(LEVELS) - 1)]
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    loaded: list[Config] = []
    if not _guarded(options, {}, lambda: loaded.append(load(options.config))):
        raise typer.Exit(1)
    return loaded[0]


def _at(options: Options, target: tuple[Config, str, str], work: Callable[[Target], None]) -> bool:
    config, view, store_name = target

    def opened() -> None:
        with open_store(config.online_store(store_name)) as store:
            if options.max_speed:
                store.read_p99 = None
            work(Target(config.feature_view(view), store_name, store))

    return _guarded(options, {"view": view, "store": store_name}, opened)


def _targets(options: Options, config: Config, views: Sequence[str] | None) -> Iterator[tuple[Config, str, str]]:
    _known("feature view", views or (), config.feature_views)
    _known("online store", (options.store,) if options.store else (), config.online_stores)
    for view in views or config.feature_views:
        for store in (options.store,) if options.store else config.feature_views[view].online_stores:
            yield config, view, store


def _known(what: str, names: Sequence[str], known: dict[str, Any]) -> None:
    if unknown := [name for name in names if name not in known]:
        usage_error(f"found the {what} {', '.join(map(repr, unknown))}, expected one of {', '.join(known)}")


def _guarded(options: Options, names: dict[str, str], work: Callable[[], None]) -> bool:
    """Whether *work* was done; what it failed with or was stopped by is told."""
    try:
        work()
    except typer.BadParameter:
        raise
    except (Exception, Stopped) as error:
        message = str(error)
        if not isinstance(error, MaterializeError | Stopped):
            message = f"unexpected {type(error).__name__}: {error}. The watermark stays. For the traceback run again with -vv."
        if options.verbose >= TRACEBACKS:
            talk.console.print_exception()
        talk.print(f"error: {message}", style="red", markup=False)
        if options.as_json and names:
            print_json({**names, "error": type(error).__name__, "message": message})
        if isinstance(error, Stopped):
            raise
        return False
    return True
