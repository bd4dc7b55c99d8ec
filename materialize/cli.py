"""The command line: ``materialize incremental|backfill|rebuild|plan|status|lookup|doctor``.

Results go to standard output, talk to standard error. Exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import json
import logging
import sys
import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from materialize.config import Config, load
from materialize.errors import MaterializeError
from materialize.model import Interval, from_us

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.model import FeatureView, RunReport
    from materialize.online.base import OnlineStore

__all__ = ["app", "main"]

app = typer.Typer(
    help="Move features from Delta Lake to the online store, exactly and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
talk = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False, soft_wrap=True)
#: With -v: what is done; with -vv: everything, and tracebacks.
DEBUG = 2

Views = Annotated[
    list[str] | None, typer.Argument(metavar="[VIEW]...", help="Feature views; all of the config by default.")
]
View = Annotated[str, typer.Argument(metavar="VIEW", help="A feature view.")]
ConfigDir = Annotated[Path, typer.Option("--config", envvar="MATERIALIZE_CONFIG", help="The config folder.")]
StoreName = Annotated[str | None, typer.Option("--store", help="One online store; all stores of each view by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per view and store on standard output.")]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="-v: log what is done; -vv: everything, with tracebacks.")
]
Moment = Annotated[
    str,
    typer.Option(metavar="TIME", help="Event time with a zone, such as 2025-01-01T00:00Z; the end is not included."),
]
DEFAULT_CONFIG = Path("config")


@dataclass(frozen=True, slots=True)
class Target:
    """One view in one store, both resolved, the store open."""

    view: FeatureView
    store_name: str
    store: OnlineStore


class Failures:
    """Runs the work of every target, so that one failure does not hold back the others, and tells each failure once."""

    def __init__(self, *, as_json: bool, verbose: int) -> None:
        self.as_json, self.verbose, self.count = as_json, verbose, 0
        logging.basicConfig(
            stream=sys.stderr,
            level=[logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, DEBUG)],
            format="%(asctime)s %(levelname)s %(name)s %(message)s",
        )

    def guard(self, work: Callable[[], None], **fields: str) -> None:
        try:
            work()
        except (typer.Exit, typer.BadParameter):
            raise
        except Exception as error:  # noqa: BLE001 - the outermost frame: everything is told without a traceback
            self.count += 1
            if self.verbose >= DEBUG:
                talk.print_exception()
            expected = isinstance(error, MaterializeError)
            message = (
                str(error)
                if expected
                else f"unexpected {type(error).__name__}: {error}. The watermark stays. Run again with -vv for the traceback."
            )
            talk.print(f"error: {message}", style="red", markup=False)
            if self.as_json and fields:
                _print_json({**fields, "error": type(error).__name__, "message": message})

    def exit(self) -> None:
        if self.count:
            raise typer.Exit(1)


@app.command()
def incremental(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Bring what is new since the watermark online; the first time, the whole table."""
    _run_all("incremental", views, config, store, as_json=as_json, verbose=verbose)


@app.command()
def rebuild(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Replace everything online by the table's newest snapshot, whatever the store holds; for recovery."""
    _run_all("rebuild", views, config, store, as_json=as_json, verbose=verbose)


@app.command()
def backfill(
    view: View,
    start: Moment,
    end: Moment,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Merge the rows of a past event-time interval; older than what is stored loses, the watermark stays."""
    interval = _interval(start, end)
    if dry_run:
        _plan_all("backfill", [view], config, store, interval, as_json=as_json, verbose=verbose)
    else:
        _run_all("backfill", [view], config, store, interval, as_json=as_json, verbose=verbose)


@app.command()
def plan(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say what an incremental run would do, and why. Writes nothing."""
    _plan_all("incremental", views, config, store, None, as_json=as_json, verbose=verbose)


@app.command()
def status(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say how far each view is in each store, and how far behind its table."""
    failures = Failures(as_json=as_json, verbose=verbose)
    rows: list[dict[str, Any]] = []
    for target, guard in _targets(failures, config, views, store):
        guard(lambda target=target: rows.append(_status(target)))
    if as_json:
        for row in rows:
            _print_json(row)
    else:
        _print_table(rows)
    failures.exit()


@app.command()
def lookup(
    view: View,
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY...", help="Entity keys; a composite key as a|b, with '|' in a value as %7C."),
    ],
    features: Annotated[str | None, typer.Option(help="Feature names, separated by commas; all by default.")] = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Read feature vectors as a model server would."""
    from materialize.codec import parse_key
    from materialize.serving import FeatureReader

    failures = Failures(as_json=as_json, verbose=verbose)
    for target, guard in _targets(failures, config, [view], store):

        def work(target: Target = target) -> None:
            try:
                entity_keys = [parse_key(key, target.view.join_keys) for key in keys]
                vectors = FeatureReader(target.view, target.store).lookup(
                    entity_keys, now=_now(), features=features.split(",") if features else None
                )
            except ValueError as error:
                _usage(str(error))
            for key, vector in zip(keys, vectors, strict=True):
                event = None if vector.event_timestamp is None else vector.event_timestamp.isoformat()
                shown = {"key": key, "status": vector.status, "event_timestamp": event, "features": vector.features}
                if as_json:
                    _print_json({"view": view, "store": target.store_name, **shown})
                else:
                    output.print(f"{key}: {vector.status}" + (f", event time {event}" if event else ""), markup=False)
                    for name, value in vector.features.items():
                        output.print(f"  {name} = {value!r}", markup=False)

        guard(work)
    failures.exit()


@app.command()
def doctor(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Check config, tables and stores, and say what to do about each problem. Writes nothing."""
    from materialize.offline import open_table

    failures = Failures(as_json=as_json, verbose=verbose)
    for target, guard in _targets(failures, config, views, store):

        def table(target: Target = target) -> None:
            found = open_table(target.view)
            _told(
                {"view": target.view.name, "check": "table", "version": found.version, "columns": len(found.columns)},
                as_json=as_json,
            )

        def online(target: Target = target) -> None:
            _told(
                {"view": target.view.name, "check": f"online store {target.store_name}", **target.store.describe()},
                as_json=as_json,
            )

        guard(table)
        guard(online)
    if not failures.count:
        talk.print("all checks passed", style="green")
    failures.exit()


# --- parts of commands -------------------------------------------------------------------------------------------------


def _targets(
    failures: Failures, config_dir: Path, names: list[str] | None, store: str | None
) -> Iterator[tuple[Target, Callable[..., None]]]:
    """Every chosen view in every chosen store, opened one after the other, with the guard to do its work in."""
    from materialize.online import open_store

    loaded: list[Config] = []
    failures.guard(lambda: loaded.append(load(config_dir)))
    failures.exit()
    config = loaded[0]
    _known("feature view", names or [], config.feature_views)
    _known("online store", [store] if store else [], config.online_stores)
    for name in names or config.feature_views:
        for store_name in [store] if store else config.feature_views[name].online_stores:
            guard = partial(failures.guard, view=name, store=store_name)
            opened: list[Target] = []
            guard(
                lambda: opened.append(
                    Target(config.feature_view(name), store_name, open_store(config.online_store(store_name)))
                )
            )  # noqa: B023 - called at once
            for target in opened:
                with target.store:
                    yield target, guard


def _run_all(
    mode: str,
    views: list[str] | None,
    config: Path,
    store: str | None,
    interval: Interval | None = None,
    *,
    as_json: bool,
    verbose: int,
) -> None:
    from materialize import pipeline

    failures = Failures(as_json=as_json, verbose=verbose)
    for target, guard in _targets(failures, config, views, store):

        def work(target: Target = target) -> None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TextColumn("{task.completed:,.0f} entities"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=talk, transient=True, disable=not talk.is_terminal) as bar:
                task = bar.add_task(f"{mode} {target.view.name} -> {target.store_name}", total=None)
                run = pipeline.Run(target.store_name, f"cli-{uuid.uuid4().hex[:12]}", _now, partial(bar.advance, task))
                if interval is not None:
                    report = pipeline.backfill(target.view, target.store, run, interval)
                else:
                    report = (pipeline.rebuild if mode == "rebuild" else pipeline.incremental)(
                        target.view, target.store, run
                    )
            _tell_report(report, as_json=as_json)

        guard(work)
    failures.exit()


def _tell_report(report: RunReport, *, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_dict())
        return
    rate = report.entities / report.seconds if report.seconds else 0
    versions = (
        f"version {report.to_version}"
        if report.from_version is None
        else f"versions {report.from_version} to {report.to_version}"
    )
    counts = ", ".join(
        f"{name} {report.counts[name]:,}"
        for name in ("rows_read", "entities", "written", "stale", "unchanged", "expired", "deleted")
    )
    output.print(
        f"{report.view} -> {report.store}: {report.mode}, {versions}: {counts}, {report.seconds:.2f} s, {rate:,.0f} entities/s",
        markup=False,
    )
    for reason, rows in report.quarantine_reasons.items():
        talk.print(f"warning: {report.view}: quarantined {rows:,} rows: {reason}", style="yellow", markup=False)


def _plan_all(
    mode: Any,
    views: list[str] | None,
    config: Path,
    store: str | None,
    interval: Interval | None,
    *,
    as_json: bool,
    verbose: int,
) -> None:
    from materialize import pipeline

    failures = Failures(as_json=as_json, verbose=verbose)
    for target, guard in _targets(failures, config, views, store):

        def work(target: Target = target) -> None:
            made = pipeline.make_plan(
                target.view, target.store, mode=mode, store_name=target.store_name, run_id="plan", interval=interval
            )
            facts = {
                name: value
                for name, value in made.to_dict().items()
                if name not in {"run_id", "watermark", "schema_id", "engine", "sweep"}
            }
            _told(facts, as_json=as_json)

        guard(work)
    failures.exit()


def _status(target: Target) -> dict[str, Any]:
    from materialize import watermark
    from materialize.offline import open_table

    found = watermark.read(target.store, target.view.name)
    head = open_table(target.view).version
    version = None if found is None else found.version
    return {
        "view": target.view.name,
        "store": target.store_name,
        "watermark_version": version,
        "table_version": head,
        "behind": None if version is None else head - version,
        "event_timestamp": None if found is None or found.event_us is None else from_us(found.event_us).isoformat(),
        "finished": None if found is None or found.finished_us is None else from_us(found.finished_us).isoformat(),
        "run_id": None if found is None else found.run_id,
        "state": "never loaded"
        if found is None
        else "snapshot run unfinished"
        if version is None
        else "up to date"
        if version == head
        else "behind",
    }


def _interval(start: str, end: str) -> Interval:
    moments = []
    for name, text in (("--start", start), ("--end", end)):
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            _usage(f"{name}: found {text!r}, expected a time such as 2025-01-01T00:00Z")
        if moment.tzinfo is None:
            _usage(f"{name}: found {text!r} without a time zone, expected one such as {text}Z")
        moments.append(moment)
    try:
        return Interval(*moments)
    except ValueError as error:
        _usage(str(error))


def _known(what: str, names: list[str], known: dict[str, Any]) -> None:
    if unknown := [name for name in names if name not in known]:
        _usage(f"found the {what} {', '.join(map(repr, unknown))}, expected one of {', '.join(known)}")


def _usage(message: str) -> NoReturn:
    raise typer.BadParameter(message)


def _told(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        _print_json(facts)
    else:
        output.print("  ".join(f"{name}={value}" for name, value in facts.items() if value is not None), markup=False)


def _print_json(row: dict[str, Any]) -> None:
    print(json.dumps(row, default=_plain), flush=True)  # noqa: T201 - results go to standard output


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else value.isoformat() if hasattr(value, "isoformat") else str(value)


def _print_table(rows: list[dict[str, Any]]) -> None:
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*("-" if value is None else str(value) for value in row.values()))
        output.print(table)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def main() -> None:
    """Run the command line; the console script ``materialize``."""
    app(prog_name="materialize")


if __name__ == "__main__":
    main()
