"""The commands that run over views: incremental, rebuild, backfill, bulk-load, plan, verify."""

from __future__ import annotations

import uuid
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from functools import partial
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from materialize import metrics
from materialize.cli.options import (
    DEFAULT_CONFIG,
    AsJson,
    ConfigDir,
    Force,
    MaxSpeed,
    Moment,
    StoreName,
    Verbose,
    View,
    Views,
    Wait,
    interval,
    seconds,
)
from materialize.cli.show import INTERNAL, print_facts, print_report, talk
from materialize.cli.sizing import Asked, ChangesPerDay, Entities, NodePrice, ReadsPerSecond, show_size
from materialize.cli.targets import Options, Target, for_each, usage_error
from materialize.errors import MismatchError
from materialize.piece_report import no_progress
from materialize.stop import stop_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.model import Interval, Mode
    from materialize.pipeline import Run

__all__ = ["backfill", "bulk_load", "incremental", "new_run", "now", "plan", "rebuild", "verify", "watched"]

Share = Annotated[float, typer.Option(min=0.000001, max=0.999999)]


def incremental(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    wait: Wait = "0s",
    force: Force = False,
    max_speed: MaxSpeed = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Bring what is new since the watermark online; the first time, the whole table."""
    options = Options(config, store, as_json, verbose, max_speed)
    for_each(options, views, partial(_run, options, "incremental", wait=seconds(wait), force=force))


def rebuild(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    wait: Wait = "0s",
    force: Force = False,
    max_speed: MaxSpeed = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Replace everything online by the table's newest snapshot, whatever the store holds; for recovery."""
    options = Options(config, store, as_json, verbose, max_speed)
    for_each(options, views, partial(_run, options, "rebuild", wait=seconds(wait), force=force))


def backfill(
    view: View,
    start: Moment,
    end: Moment,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    force: Force = False,
    max_speed: MaxSpeed = False,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Merge the rows of [start, end) in event time; older than what is stored loses, the watermark stays."""
    options = Options(config, store, as_json, verbose, max_speed)
    do = partial(_plan, options) if dry_run else partial(_run, options, force=force)
    for_each(options, [view], partial(do, "backfill", interval=interval(start, end)))


def plan(
    views: Views = None,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    sizing: Annotated[bool, typer.Option("--sizing", help="Say what the view takes and costs in its stores.")] = False,
    entities: Entities = None,
    changes_per_day: ChangesPerDay = None,
    reads_per_second: ReadsPerSecond = 100.0,
    node_price: NodePrice = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say what an incremental run would do, and why; with --sizing, what memory and money the view needs. Changes nothing."""
    options = Options(config, store, as_json, verbose)
    if sizing:
        asked = Asked(entities, changes_per_day, reads_per_second, node_price)
        for_each(options, views, partial(show_size, options, asked))
        return
    if entities is not None or changes_per_day is not None or node_price is not None:
        usage_error("found --entities, --changes-per-day or --node-price, expected them with --sizing")
    for_each(options, views, partial(_plan, options, "incremental"))


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


# --- what a command does for one target; heavy imports are inside, so that --help is quick ---------------------------------


def _run(
    options: Options, kind: Literal["incremental", "backfill", "rebuild", "bulk_load"], target: Target, **more: Any
) -> None:
    """*more*: what this kind of run wants beside view, store and run."""
    from materialize import pipeline

    line = watched(f"{kind} {target.view.name} -> {target.store_name}")
    with metrics.observed(target.view.name, target.store_name, now), line as progress:
        run = new_run(target, progress, wait=more.pop("wait", 0.0), force=more.pop("force", False))
        report = getattr(pipeline, kind)(target.view, target.store, run, **more)
    print_report(report, as_json=options.as_json, verbose=options.verbose > 0)


def _verify(options: Options, target: Target, *, sample: int | None, repair: bool, keys: bool) -> None:
    from materialize.verify import mismatch, verify

    with watched(f"verify {target.view.name} in {target.store_name}") as progress:
        report = verify(target.view, target.store, new_run(target, progress), sample=sample, repair=repair)
    print_facts(report.to_dict(), as_json=options.as_json)
    if keys:
        for problem, those in report.keys.items():
            for key in those:
                print_facts({**target.names, "problem": problem, "key": key.decode()}, as_json=options.as_json)
    if message := mismatch(report, target.view.verify.max_mismatched):
        raise MismatchError(message)


def _plan(options: Options, mode: Mode, target: Target, *, interval: Interval | None = None) -> None:
    from materialize import pipeline

    made = pipeline.make_plan(
        target.view, target.store, mode=mode, store_name=target.store_name, run_id="plan", interval=interval
    )
    facts = {name: value for name, value in made.to_dict().items() if name not in INTERNAL}
    facts |= {"shares": made.shares} if made.shares > 1 else {}
    cost = target.store.estimate(target.view, made.rows, mode, first=made.watermark is None)
    print_facts(facts | cost, as_json=options.as_json)


@contextmanager
def watched(doing: str) -> Iterator[Callable[[int], None]]:
    """A line on the terminal that says how many entities are done, which is told by what this gives; and an orderly end on a signal."""
    line = _line(doing) if talk.is_terminal else nullcontext(no_progress)
    with line as shown, stop_on(SIGINT, SIGTERM) as count:

        def progress(entities: int) -> None:
            count(entities)
            shown(entities)

        yield progress


@contextmanager
def _line(doing: str) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} entities"), TimeElapsedColumn())
    with Progress(SpinnerColumn(), *columns, console=talk.console, transient=True) as bar:
        yield partial(bar.advance, bar.add_task(doing, total=None))


def new_run(target: Target, progress: Callable[[int], None], *, wait: float = 0.0, force: bool = False) -> Run:
    """A run of its own id."""
    from materialize.lease import Terms
    from materialize.pipeline import Run

    return Run(target.store_name, f"cli-{uuid.uuid4().hex[:12]}", now, progress, Terms(wait=wait), force)


def now() -> datetime:
    return datetime.now(timezone.utc)
