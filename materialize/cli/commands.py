"""The commands; each says what it does for one target, `for_each` does it for all."""

from __future__ import annotations

import json
import os
import sys
import uuid
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from materialize.cli.show import INTERNAL, print_facts, print_report, print_table, print_vector, talk
from materialize.cli.targets import Options, Target, for_each, for_store, usage_error
from materialize.errors import MismatchError
from materialize.model import Interval, duration_text, from_us
from materialize.stop import Stopped, stop_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.model import Mode, OnlineStoreConfig
    from materialize.pipeline import Run

__all__ = ["app", "main"]

app = typer.Typer(
    help="Move features from Delta Lake to the online store, exactly and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Views = Annotated[list[str] | None, typer.Argument(metavar="[VIEW]...", help="Feature views; all of them by default.")]
View = Annotated[str, typer.Argument(metavar="VIEW", help="A feature view.")]
ConfigDir = Annotated[Path, typer.Option("--config", envvar="MATERIALIZE_CONFIG", help="The config folder.")]
StoreName = Annotated[str | None, typer.Option("--store", help="One online store; every store of a view by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per view and store on standard output.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="-v: log what is done; -vv: and tracebacks.")]
Moment = Annotated[str, typer.Option(metavar="TIME", help="An event time with its zone, such as 2025-01-01T00:00Z.")]
Force = Annotated[bool, typer.Option("--force", help="Do it although a check of source or store says no.")]
DEFAULT_CONFIG = Path("config")
Share = Annotated[float, typer.Option(min=0.000001, max=0.999999)]
#: Facts of a view's state that do not fit on a screen.
DETAILS = ("behind", "event_timestamp", "finished", "run_id")


@app.command()
def incremental(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Bring what is new since the watermark online; the first time, the whole table."""
    options = Options(config, store, as_json, verbose)
    for_each(options, views, partial(_run, options, "incremental", force=force))


@app.command()
def rebuild(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Replace everything online by the table's newest snapshot, whatever the store holds; for recovery."""
    options = Options(config, store, as_json, verbose)
    for_each(options, views, partial(_run, options, "rebuild", force=force))


@app.command()
def backfill(
    view: View,
    start: Moment,
    end: Moment,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    force: Force = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Merge the rows of [start, end) in event time; older than what is stored loses, the watermark stays."""
    options = Options(config, store, as_json, verbose)
    interval = _interval(start, end)
    do = partial(_plan, options) if dry_run else partial(_run, options, force=force)
    for_each(options, [view], partial(do, "backfill", interval=interval))


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
    options = Options(config, store, as_json, verbose)
    for_each(options, views, partial(_plan, options, "incremental"))


@app.command()
def setup(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Make what the stores need before the first run, such as DynamoDB's tables. Doing it again does what is lacking."""
    options = Options(config, store, as_json, verbose)
    for_each(options, views, partial(_setup, as_json=as_json))


@app.command()
def bulk_load(
    view: View,
    location: Annotated[
        str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="Where the files go, for an hour or so.")
    ],
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Load a view for the first time by files that DynamoDB reads itself: a fifth of the price. Other runs stay as they are."""
    options = Options(config, store, as_json, verbose)
    for_each(options, [view], partial(_run, options, "bulk_load", location=location))


@app.command()
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
    rows: list[dict[str, Any]] = []
    try:
        for_each(Options(config, store, as_json, verbose), views, lambda target: rows.append(_status(target)))
    finally:
        shown = rows if as_json else [{name: row[name] for name in row if name not in DETAILS} for row in rows]
        print_table(shown, as_json=as_json)


@app.command()
def lookup(
    view: View,
    keys: Annotated[
        list[str],
        typer.Argument(metavar="KEY...", help="Entity keys; a composite key as a|b, a '|' in a value as %7C."),
    ],
    features: Annotated[str | None, typer.Option(help="Feature names, separated by commas; all by default.")] = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Read feature vectors as a model server would."""
    names = features.split(",") if features else None
    for_each(Options(config, store, as_json, verbose), [view], partial(_lookup, keys, names, as_json=as_json))


@app.command()
def verify(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    full: Annotated[bool, typer.Option("--full", help="Compare every entity, not a sample.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Compare every entity, and write those that differ again.")
    ] = False,
    confidence: Share = 0.99,
    smallest: Share = 0.001,
    keys: Annotated[bool, typer.Option("--keys", help="Print the entity key of each that differs.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Compare what readers see with the table; exit code 1 if more differs than the view's verify.max_mismatched.

    The size of a sample follows from --confidence, the probability to find a problem that a share of --smallest of the entities has.
    """
    from materialize.verify import sample_size

    options = Options(config, store, as_json, verbose)
    sample = None if full or repair else sample_size(confidence, smallest)
    for_each(options, views, partial(_verify, options, sample=sample, repair=repair, keys=keys))


@app.command()
def doctor(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Check config, tables and stores, and say what to do about each problem. Writes no record."""
    options = Options(config, store, as_json, verbose)
    for_each(options, views, partial(_check_table, as_json=as_json), partial(_check_store, as_json=as_json))
    talk.print("all checks passed", style="green")


# --- what a command does for one target; heavy imports are inside, so that --help is quick ---------------------------------


def _run(
    options: Options, kind: Literal["incremental", "backfill", "rebuild", "bulk_load"], target: Target, **more: Any
) -> None:
    """*more*: what this kind of run wants beside view, store and run."""
    from materialize import pipeline

    with _watched(f"{kind} {target.view.name} -> {target.store_name}") as progress:
        run = replace(_new_run(target, progress), force=more.pop("force", False))
        report = getattr(pipeline, kind)(target.view, target.store, run, **more)
    print_report(report, as_json=options.as_json)


def _verify(options: Options, target: Target, *, sample: int | None, repair: bool, keys: bool) -> None:
    from materialize.verify import mismatch, verify

    with _watched(f"verify {target.view.name} in {target.store_name}") as progress:
        report = verify(target.view, target.store, _new_run(target, progress), sample=sample, repair=repair)
    print_facts(report.to_dict(), as_json=options.as_json)
    if keys:
        for problem, those in report.keys.items():
            for key in those:
                print_facts({**target.names, "problem": problem, "key": key.decode()}, as_json=options.as_json)
    if message := mismatch(report, target.view.verify.max_mismatched):
        raise MismatchError(message)


@contextmanager
def _watched(doing: str) -> Iterator[Callable[[int], None]]:
    """A line on the terminal that says how many entities are done, which is told by what this gives; and an orderly end on a signal."""
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} entities"), TimeElapsedColumn())
    bar = Progress(SpinnerColumn(), *columns, console=talk, transient=True, disable=not talk.is_terminal)
    with bar, stop_on(SIGINT, SIGTERM) as count:
        task = bar.add_task(doing, total=None)

        def progress(entities: int) -> None:
            count(entities)
            bar.advance(task, entities)

        yield progress


def _new_run(target: Target, progress: Callable[[int], None]) -> Run:
    from materialize.pipeline import Run

    return Run(target.store_name, f"cli-{uuid.uuid4().hex[:12]}", _now, progress)


def _plan(options: Options, mode: Mode, target: Target, *, interval: Interval | None = None) -> None:
    from materialize import pipeline

    made = pipeline.make_plan(
        target.view, target.store, mode=mode, store_name=target.store_name, run_id="plan", interval=interval
    )
    facts = {name: value for name, value in made.to_dict().items() if name not in INTERNAL}
    cost = target.store.estimate(target.view, made.rows, mode, first=made.watermark is None)
    print_facts(facts | cost, as_json=options.as_json)


def _print_policy(role: str, bucket: str, store: OnlineStoreConfig) -> None:
    from materialize.online.dynamodb.address import Address
    from materialize.online.dynamodb.policy import ROLES, policy

    if role not in ROLES:
        usage_error(f"found the role {role!r}, expected {', '.join(ROLES)}")
    if not store.url.startswith("dynamodb://"):
        usage_error(f"found the online store {store.name!r} at {store.masked_url}, expected one with a dynamodb:// URL")
    typer.echo(json.dumps(policy(Address.parse(store.url), role, bucket=bucket), indent=2))


def _setup(target: Target, *, as_json: bool) -> None:
    done = target.store.setup(target.view.name)
    print_facts({**target.names, "setup": "; ".join(done) or "nothing to do"}, as_json=as_json)


def _status(target: Target) -> dict[str, Any]:
    from materialize.freshness import freshness

    found, wanted, now = freshness(target.view, target.store), target.view.freshness, _now()
    mark, age = found.watermark, found.age(now)
    version = None if mark is None else mark.version
    return {
        **target.names,
        "state": found.state,
        "watermark_version": version,
        "table_version": found.table_version,
        "behind": None if version is None else found.table_version - version,
        "waiting": None if age is None else duration_text(timedelta(seconds=round(age.total_seconds()))),
        "late": None if wanted is None else found.late(now, wanted),
        "event_timestamp": _iso(None if mark is None else mark.event_us),
        "finished": _iso(None if mark is None else mark.finished_us),
        "run_id": None if mark is None else mark.run_id,
    }


def _lookup(keys: list[str], names: list[str] | None, target: Target, *, as_json: bool) -> None:
    from materialize.entity_key import parse_key
    from materialize.serving import FeatureReader

    try:
        entity_keys = [parse_key(key, target.view.join_keys) for key in keys]
        vectors = FeatureReader(target.view, target.store).lookup(entity_keys, now=_now(), features=names)
    except ValueError as error:
        usage_error(str(error))
    for key, vector in zip(keys, vectors, strict=True):
        print_vector(target.names, key, vector, as_json=as_json)


def _check_table(target: Target, *, as_json: bool) -> None:
    from materialize.offline import open_table

    table = open_table(target.view)
    print_facts(
        {**target.names, "check": "table", "version": table.version, "columns": len(table.columns)}, as_json=as_json
    )


def _check_store(target: Target, *, as_json: bool) -> None:
    from materialize import watermark

    watermark.read(target.store, target.view.name)  # a table of the view's own may be missing
    print_facts({**target.names, "check": "online store", **target.store.describe()}, as_json=as_json)


def _iso(moment_us: int | None) -> str | None:
    return None if moment_us is None else from_us(moment_us).isoformat()


def _interval(start: str, end: str) -> Interval:
    moments = []
    for name, text in (("--start", start), ("--end", end)):
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not read the Z
        except ValueError:
            usage_error(f"{name}: found {text!r}, expected a time such as 2025-01-01T00:00Z")
        if moment.tzinfo is None:
            usage_error(f"{name}: found {text!r} without a time zone, expected one such as {text}Z")
        moments.append(moment)
    try:
        return Interval(*moments)
    except ValueError as error:
        usage_error(str(error))


def _now() -> datetime:
    return datetime.now(timezone.utc)


def main() -> None:
    """Run the command line; the console script ``materialize``."""
    try:
        app(prog_name="materialize")
    except Stopped as stopped:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Not sys.exit, which waits for a read in the background: it can take minutes, and nobody wants its rows any more.
        os._exit(128 + stopped.number)
