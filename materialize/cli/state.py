"""The commands that say how things are: status, lookup, doctor; and setup, which makes what a store lacks."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Annotated, Any

import typer

from materialize import metrics
from materialize.cli.options import DEFAULT_CONFIG, AsJson, ConfigDir, Keys, StoreName, Verbose, View, Views
from materialize.cli.show import print_facts, print_table, print_vector, talk
from materialize.cli.targets import Options, Target, for_each, usage_error
from materialize.model import duration_text, from_us

__all__ = ["doctor", "lookup", "setup", "status"]

#: Facts of a view's state that do not fit on a screen.
DETAILS = ("behind", "event_timestamp", "finished", "run_id")


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


def lookup(
    view: View,
    keys: Keys,
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


def _setup(target: Target, *, as_json: bool) -> None:
    done = target.store.setup(target.view.name)
    print_facts({**target.names, "setup": "; ".join(done) or "nothing to do"}, as_json=as_json)


def _status(target: Target) -> dict[str, Any]:
    from materialize.freshness import freshness

    found, wanted, now = freshness(target.view, target.store), target.view.freshness, datetime.now(timezone.utc)
    mark, age = found.watermark, found.age(now)
    version = None if mark is None else mark.version
    metrics.looked_at(target.view, target.store_name, found, now)
    return {
        **target.names,
        "state": found.state,
        "watermark_version": version,
        "table_version": found.table_version,
        "behind": found.behind,
        "waiting": None if age is None else duration_text(timedelta(seconds=round(age.total_seconds()))),
        "late": None if wanted is None else found.late(now, wanted),
        "event_timestamp": _iso(None if mark is None else mark.event_us),
        "finished": _iso(None if mark is None else mark.finished_us),
        "run_id": None if mark is None else mark.run_id,
        "held_by": _holder(target),
    }


def _holder(target: Target) -> str | None:
    """The run that holds the view in the store now, for people; None: nobody."""
    from materialize.lease import current

    held = current(target.store, target.view.name)
    return None if held is None else str(held)


def _lookup(keys: list[str], names: list[str] | None, target: Target, *, as_json: bool) -> None:
    from materialize.entity_key import parse_key
    from materialize.serving import OnlineFeatures

    try:
        entity_keys = [parse_key(key, target.view.join_keys) for key in keys]
        vectors = OnlineFeatures.over([target.view], target.store).batch_read(target.view.name, entity_keys, names)
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
