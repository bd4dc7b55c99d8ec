"""The tasks: what Airflow knows about a run goes in, one call of the pipeline is made, small JSON comes out.

Heavy imports are inside the functions, so that parsing a DAG file stays cheap. A task may be killed and run again at any
point; what its first try wrote does no harm.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, AssetAlias, BaseHook, get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException, AirflowSkipException

from materialize.config import load
from materialize.errors import ConfigError
from materialize.model import Interval, RunReport, mask_credentials
from materialize.stop import stop_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.model import FeatureView, Mode
    from materialize.online.base import OnlineStore
    from materialize.plan import Plan

__all__ = [
    "BACKFILLED",
    "CONFIG_VARIABLE",
    "EVERY_STORE",
    "FORM_FIELDS",
    "MODES",
    "PIECE_TEMPLATE",
    "PLAN",
    "asset",
    "check_form",
    "commit",
    "config_dir",
    "plan",
    "plan_backfill",
    "publish",
    "request",
    "table",
    "write",
    "write_backfill",
]

log = logging.getLogger(__name__)

#: The environment variable that names the configuration folder; without it, ``config`` beside the folder of DAGs.
CONFIG_VARIABLE = "MATERIALIZE_CONFIG"
#: The XCom key of a plan. The return value of the task is the list of its pieces, over which `write` is mapped.
PLAN = "plan"
#: What a written piece is called in the UI. Undefined renders as its number: a template that fails would fail a task whose work is done.
PIECE = "materialize_piece"
PIECE_TEMPLATE = f"{{{{ {PIECE} | default(ti.map_index) }}}}"
#: The event times that the partition of a schedule's run covers.
PERIODS = {"hourly": timedelta(hours=1), "daily": timedelta(days=1)}
#: Runs of these types go from the watermark to the head, although a scheduled one carries a partition key as its label.
INCREMENTAL_RUN_TYPES = ("scheduled", "asset_triggered")
#: The choice in the backfill form that stands for every online store of a view.
EVERY_STORE = "every store of the view"
#: What the backfill form can do, by the names that it shows.
MODES: dict[str, Mode] = {"interval backfill": "backfill", "rebuild": "rebuild"}
#: The fields of the backfill form.
FORM_FIELDS = ("views", "mode", "start", "end", "store", "dry_run")
#: The backfill form's events reach the assets of its views through this alias.
BACKFILLED = AssetAlias("materialize_backfill")


def config_dir(dags_folder: Path) -> Path:
    """The configuration folder for the DAG files in *dags_folder*."""
    return Path(os.environ.get(CONFIG_VARIABLE) or dags_folder.parent / "config")


def asset(view: str, store: str) -> Asset:
    """The feature view *view* in the online store *store*, for DAGs that wait for fresh features."""
    return Asset(name=f"{store}/{view}", uri=f"materialize://{store}/{view}")


def table(view: FeatureView) -> Asset:
    """The Delta table of *view*, as the lineage of its online views shows it."""
    source = mask_credentials(view.source)
    return Asset(name=source, uri=source if "://" in source else f"file://{source}")


# The hourly and daily DAGs ---------------------------------------------------------------------------------------------


def plan(view: str, store: str) -> list[int]:
    """Pin the table's head, plan the run and begin it. Returns the pieces; the plan itself is the XCom `PLAN`."""
    from materialize.pipeline import begin, make_plan

    context = get_current_context()
    with opened(view, store) as (feature_view, online):
        mode, interval = request(context["dag_run"], PERIODS[feature_view.schedule])
        planned = make_plan(feature_view, online, mode=mode, store_name=store, run_id=run_id(), interval=interval)
        log_plan(planned)
        planned = begin(feature_view, online, planned)
    context["ti"].xcom_push(key=PLAN, value=planned.to_dict())
    return list(range(planned.pieces))


def write(view: str, store: str, plan: dict[str, Any], piece: int) -> dict[str, Any]:
    """Write one piece of the plan. Pieces may be written in any order, at the same time, and again."""
    from materialize.pipeline import write_piece
    from materialize.plan import Plan

    planned = Plan.from_dict(plan)
    context: Any = get_current_context()
    context[PIECE] = planned.piece_labels[piece]
    # Airflow forwards SIGTERM to a task, which ignores it and is killed seconds later, unless it says otherwise as here.
    with opened(view, store) as (feature_view, online), stop_on(SIGTERM) as count:
        return write_piece(feature_view, online, planned, piece, now=utcnow(), progress=count).to_dict()


def commit(view: str, store: str, plan: dict[str, Any], pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check that the store holds what the pieces wrote and move the watermark. Returns the run report."""
    from materialize.pipeline import PieceReport, commit as commit_plan
    from materialize.plan import Plan

    planned = Plan.from_dict(plan)
    # A slice is one request to Airflow; iterating is one for each piece and an error in the log at the end. Of a run that was
    # cleared and has fewer pieces now, Airflow still gives the others' values of then.
    reports = [PieceReport.from_dict(piece) for piece in pieces[: planned.pieces]]
    with opened(view, store) as (feature_view, online):
        return commit_plan(feature_view, online, planned, reports, now=utcnow()).to_dict()


def publish(report: dict[str, Any]) -> None:
    """Emit the asset event of the view and store, with the counts of the run. Skipped when readers see nothing new."""
    context = get_current_context()
    (outlet,) = context["task"].outlets
    context["outlet_events"][outlet].extra = event_extra(report)


def event_extra(report: dict[str, Any]) -> dict[str, Any]:
    """What an asset event tells about a run. Raises `AirflowSkipException` when the run changed nothing."""
    run = RunReport(**report)
    if not run.changed:
        raise AirflowSkipException(
            f"feature view {run.view!r}: the online store {run.store!r} holds nothing new for readers; no event is emitted."
        )
    told = ("view", "store", "mode", "from_version", "to_version", "event_us", "interval", "run_id", "seconds")
    return {name: report[name] for name in told} | run.counts


def request(dag_run: Any, period: timedelta) -> tuple[Mode, Interval | None]:
    """What an Airflow run asks for: the mode, and for a backfill its partition as an interval of event time.

    Progress is never read from a data interval: many runs have none, and a missed run would lose its rows.
    """
    if dag_run.run_type in INCREMENTAL_RUN_TYPES:
        return "incremental", None
    if dag_run.partition_date is not None:
        return "backfill", Interval(dag_run.partition_date, dag_run.partition_date + period)
    if dag_run.run_type == "backfill" or dag_run.partition_key is not None:
        raise AirflowFailException(
            f"could not tell the interval of the run {dag_run.run_id!r}: found the partition key {dag_run.partition_key!r} "
            "and no partition date. Nothing was written. Start the backfill again, or trigger the DAG without a key."
        )
    return "incremental", None


# The backfill form -----------------------------------------------------------------------------------------------------


def check_form() -> list[dict[str, Any]]:
    """Refuse a form that cannot be carried out, naming every problem. Returns one target for each view and store."""
    context = get_current_context()
    fields, problems = context["params"], []
    unknown = sorted(set(context["dag_run"].conf or {}) - set(FORM_FIELDS))
    if unknown:
        problems.append(f"unknown fields {', '.join(map(repr, unknown))}; the form has {', '.join(FORM_FIELDS)}")
    mode = MODES[fields["mode"]]
    start, end = (moment(name, fields[name], mode, problems) for name in ("start", "end"))
    if start and end and end <= start:
        problems.append(f"end: expected a time after the start {start.isoformat()}, found {end.isoformat()}")
    pairs = chosen(fields["views"], fields["store"], problems)
    if problems:
        raise AirflowFailException(
            f"could not start the backfill: {len(problems)} problem{'s' * (len(problems) > 1)}; nothing was read or written. "
            "Trigger the DAG again with the form corrected.\n  " + "\n  ".join(problems)
        )
    ends = [start.isoformat(), end.isoformat()] if start and end else None
    common = {"mode": mode, "interval": ends, "dry_run": fields["dry_run"]}
    return [{"view": view, "store": store, **common} for view, store in pairs]


def moment(name: str, text: str | None, mode: Mode, problems: list[str]) -> datetime | None:
    """The form field *name* as a time; adds to *problems* and returns None when it is not what *mode* wants."""
    if mode == "rebuild":
        if text:
            problems.append(f"{name}: expected nothing, because a rebuild takes the whole table, found {text!r}")
        return None
    if not text:
        problems.append(f"{name}: expected a time such as '2026-01-31T00:00:00Z', found nothing")
        return None
    try:
        # Python 3.10 does not read the Z.
        parsed = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        problems.append(f"{name}: expected a time such as '2026-01-31T00:00:00Z', found {text!r}")
        return None
    if parsed.tzinfo is None:
        problems.append(f"{name}: expected a time with a time zone such as '{parsed.isoformat()}Z', found {text!r}")
        return None
    return parsed


def chosen(views: list[str], store: str, problems: list[str]) -> list[tuple[str, str]]:
    """Each chosen view with each store to write to; adds to *problems* what the configuration does not have."""
    known = load(current_config_dir()).feature_views
    if not views:
        problems.append(f"views: expected at least one of {', '.join(sorted(known))}, found none")
    pairs = []
    for view in dict.fromkeys(views):
        if view not in known:
            problems.append(f"views: expected some of {', '.join(sorted(known))}, found {view!r}")
        elif store == EVERY_STORE:
            pairs += [(view, name) for name in known[view].online_stores]
        elif store not in known[view].online_stores:
            has = ", ".join(known[view].online_stores)
            problems.append(f"store: feature view {view!r} is served from {has}, found {store!r}")
        else:
            pairs.append((view, store))
    return pairs


def plan_backfill(target: dict[str, Any]) -> dict[str, Any]:
    """Plan what the form wants of one view and store, and show the plan and its costs in the log."""
    from materialize.pipeline import make_plan

    view, store, mode, ends = (target[name] for name in ("view", "store", "mode", "interval"))
    interval = ends and Interval(*map(datetime.fromisoformat, ends))
    with opened(view, store) as (feature_view, online):
        planned = make_plan(feature_view, online, mode=mode, store_name=store, run_id=run_id(), interval=interval)
        costs = online.estimate(feature_view, planned.rows, mode, first=planned.watermark is None)
    log_plan(planned)
    if costs:
        log.info("costs view=%s store=%s %s", view, store, " ".join(f"{name}={cost}" for name, cost in costs.items()))
    return planned.to_dict()


def write_backfill(target: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """Write every piece of the plan and commit; skipped in a dry run. Emits an asset event when readers see something new."""
    from materialize.pipeline import begin, commit as commit_plan, write_piece
    from materialize.plan import Plan

    view, store = target["view"], target["store"]
    if target["dry_run"]:
        raise AirflowSkipException(f"dry run: nothing was written to feature view {view!r} in online store {store!r}.")
    with opened(view, store) as (feature_view, online), stop_on(SIGTERM) as count:
        begun = begin(feature_view, online, Plan.from_dict(plan))
        pieces = [
            write_piece(feature_view, online, begun, piece, now=utcnow(), progress=count)
            for piece in range(begun.pieces)
        ]
        report = commit_plan(feature_view, online, begun, pieces, now=utcnow())
    if report.changed:
        event = get_current_context()["outlet_events"][BACKFILLED]
        event.add(asset(view, store), extra=event_extra(report.to_dict()))
    return report.to_dict()


# What the tasks share --------------------------------------------------------------------------------------------------


def utcnow() -> datetime:
    """The time of the run; nothing below the tasks looks at a clock."""
    return datetime.now(timezone.utc)


def run_id() -> str:
    """The name of the Airflow run, unique over all DAGs."""
    run = get_current_context()["dag_run"]
    return f"{run.dag_id}/{run.run_id}"


def current_config_dir() -> Path:
    """The configuration folder of the running task's DAG. It is found again on the worker, where folders may differ."""
    return config_dir(Path(get_current_context()["dag"].fileloc).parent)


@contextmanager
def opened(view: str, store: str) -> Iterator[tuple[FeatureView, OnlineStore]]:
    """The feature view with its credentials and its online store, open. Airflow connections are read here and nowhere else."""
    from materialize.online import open_store

    config = load(current_config_dir(), connections=connection)
    with open_store(config.online_store(store)) as online:
        yield config.feature_view(view), online


def connection(conn_id: str) -> Any:
    """The Airflow connection *conn_id*, which may come from a secrets backend. Raises ConfigError when there is none."""
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        raise ConfigError(
            f"could not find the Airflow connection {conn_id!r}: expected it among Airflow's connections, found none with this id. "
            "Add it under Admin, Connections or in the secrets backend. Nothing was read or written."
        ) from None


def log_plan(planned: Plan) -> None:
    """Say what will be read, where from, and why; in a dry run this is all that is done."""
    log.info(
        "planned view=%s store=%s mode=%s versions=%s..%s interval=%s rows=%s pieces=%s reason=%s",
        planned.view,
        planned.store,
        planned.mode,
        planned.from_version,
        planned.to_version,
        planned.interval,
        planned.rows,
        planned.pieces,
        planned.reason,
    )
