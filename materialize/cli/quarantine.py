"""``materialize quarantine list`` and ``release``: the rows that could not be stored."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from materialize.cli.options import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigDir,
    StoreName,
    Verbose,
    View,
    Views,
)
from materialize.cli.runs import new_run, watched
from materialize.cli.show import print_facts, print_table
from materialize.cli.targets import Options, Target, for_each, usage_error

if TYPE_CHECKING:
    import polars as pl

__all__ = ["quarantine"]

quarantine = typer.Typer(help="See the rows that could not be stored, and try them again.", no_args_is_help=True)
#: What `list --rows` shows of a row.
SHOWN = ("reason", "run_id", "at", "table_version", "commit_version", "event_timestamp", "entity", "row")


@quarantine.command(name="list")
def list_rows(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    rows: Annotated[bool, typer.Option("--rows", help="Show rows, keys and values included.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Rows of a view and store that --rows shows, newest first.")] = 20,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Count the rows in quarantine by reason, or show some."""
    counted: list[dict[str, Any]] = []
    options = Options(config, store, as_json, verbose)
    try:
        for_each(options, views, partial(_show_rows if rows else _count, options, counted, limit))
    finally:
        print_table(counted, as_json=as_json)


@quarantine.command()
def release(
    view: View,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Try all rows of the view again.")] = False,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Those with this text in their reason.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Those that this run met first.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Read the entities of quarantined rows from the source again, and write what can be stored now."""
    if every + (reason is not None) + (run is not None) != 1:
        usage_error("expected one of --all, --reason TEXT and --run RUN")
    options = Options(config, store, as_json, verbose)
    for_each(options, [view], partial(_release, options, reason=reason, met_by=run))


def _count(_options: Options, counted: list[dict[str, Any]], _limit: int, target: Target) -> None:
    held = _held(target)
    for reason in sorted(held["reason"].unique()):
        some = held.filter(reason=reason)
        newest = some.row(some.height - 1, named=True)
        counted.append(
            {
                **target.names,
                "reason": reason,
                "rows": some.height,
                "newest": newest["at"].isoformat(timespec="seconds"),
            }
            | {"run_id": newest["run_id"]}
        )


def _show_rows(options: Options, _counted: list[dict[str, Any]], limit: int, target: Target) -> None:
    for row in _held(target).reverse().head(limit).to_dicts():
        print_facts({**target.names, **{name: row[name] for name in SHOWN}}, as_json=options.as_json)


def _held(target: Target) -> pl.DataFrame:
    from materialize.offline import held_rows

    return held_rows(target.view, target.store_name)


def _release(options: Options, target: Target, *, reason: str | None, met_by: str | None) -> None:
    from materialize.release import release as released

    with watched(f"release {target.view.name} in {target.store_name}") as progress:
        run = new_run(target, progress)
        report = released(target.view, target.store, run, reason=reason, met_by=met_by)
    print_facts(report.to_dict(), as_json=options.as_json)
