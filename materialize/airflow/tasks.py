"""The tasks: what Airflow knows about a run goes in, one call of the pipeline is made, small JSON comes out.

Heavy imports are inside the functions, so that parsing a DAG file stays cheap. A task may be killed and run again at any
point; what its first try wrote does no harm.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import structlog
from airflow.sdk import Asset, BaseHook, get_current_context
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException, AirflowSkipException

from materialize.config import load
from materialize.errors import ConfigError, WatermarkError
from materialize.model import COUNTERS, Interval, from_us, mask_credentials
from materialize.stop import stop_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from materialize.model import FeatureView, Mode, RunReport, Watermark
    from materialize.online.base import OnlineStore
    from materialize.plan import Plan

__all__ = [
    "CONFIG_VARIABLE",
    "PIECE_TEMPLATE",
    "PLAN",
    "asset",
    "commit",
    "config_dir",
    "plan",
    "publish",
    "request",
    "table",
    "write",
]

# What it is given by name is shown as fields of the line, in the UI too.
log = structlog.get_logger(__name__)

#: The environment variable that names the configuration folder; without it, ``config`` beside the folder of DAGs.
CONFIG_VARIABLE = "MATERIALIZE_CONFIG"
#: The XCom key of a plan. The return value of the task is the list of its pieces, over which `write` is mapped.
PLAN = "plan"
#: The key of the watermark's copy in the state of an asset.
WATERMARK = "watermark"
#: What a written piece is called in the UI. Undefined renders as its number: a template that fails would fail a task whose work is done.
PIECE = "materialize_piece"
PIECE_TEMPLATE = f"{{{{ {PIECE} | default(ti.map_index) }}}}"
#: The event times that the partition of a schedule's run covers.
PERIODS = {"hourly": timedelta(hours=1), "daily": timedelta(days=1)}
#: Runs of these types go from the watermark to the head, although a scheduled one carries a partition key as its label.
INCREMENTAL_RUN_TYPES = ("scheduled", "asset_triggered")


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
        planned = begin(feature_view, online, planned, now=utcnow())
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
        report = write_piece(feature_view, online, planned, piece, now=utcnow(), progress=count)
    return {"report": report.to_dict(), "tried_again": context["ti"].try_number > 1}


def commit(view: str, store: str, plan: dict[str, Any], pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Check that the store holds what the pieces wrote and move the watermark. Returns the run report, as `told` has it."""
    from materialize.pipeline import PieceReport, commit as commit_plan
    from materialize.plan import Plan

    planned = Plan.from_dict(plan)
    # A slice is one request to Airflow; iterating is one for each piece and an error in the log at the end. Of a run that was
    # cleared and has fewer pieces now, Airflow still gives the others' values of then.
    written = pieces[: planned.pieces]
    reports = [PieceReport.from_dict(one["report"]) for one in written]
    with opened(view, store) as (feature_view, online):
        try:
            report = commit_plan(feature_view, online, planned, reports, now=utcnow())
        except WatermarkError as error:
            if not feature_view.on_commit:
                raise
            # The run that a commit started was faster, which is ordinary here; what it left over is announced again.
            raise AirflowSkipException(str(error)) from None
        return told(report, online, tried_again=any(one["tried_again"] for one in written))


def publish(report: dict[str, Any]) -> None:
    """Emit the asset event of the view and store, with the counts of the run. Skipped when readers see nothing new."""
    context = get_current_context()
    (outlet,) = context["task"].outlets
    mirror(report)
    if not report["news"]:
        raise AirflowSkipException(
            f"feature view {report['view']!r}: the online store {report['store']!r} holds nothing new for readers; no event is emitted."
        )
    context["outlet_events"][outlet].extra = event_extra(report)


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


# What the tasks share --------------------------------------------------------------------------------------------------


def utcnow() -> datetime:
    """The time of the run; nothing below the tasks looks at a clock."""
    return datetime.now(timezone.utc)


def run_id(task_id: str | None = None) -> str:
    """The name of the Airflow run, unique over all DAGs; with *task_id*, of a run that one task of it does by itself."""
    run = get_current_context()["dag_run"]
    return "/".join([run.dag_id, run.run_id, *([task_id] if task_id else [])])


def current_config_dir(config: str | Path | None = None) -> Path:
    """The configuration folder of the running task: *config*, or its DAG's, found again on the worker, where folders may differ."""
    return config_dir(Path(get_current_context()["dag"].fileloc).parent) if config is None else Path(config)


@contextmanager
def opened(view: str, store: str, folder: Path | None = None) -> Iterator[tuple[FeatureView, OnlineStore]]:
    """The feature view with its credentials and its online store, open, as the configuration in *folder* has them.

    Without *folder*: the running task's. Airflow connections are read here and nowhere else.
    """
    from materialize.online import open_store

    config = load(current_config_dir() if folder is None else folder, connections=connection)
    known = config.feature_view(view)
    with open_store(config.online_store(store)) as online:
        yield known, online


def moment(name: str, text: str | None, mode: str, problems: list[str]) -> datetime | None:
    """The form field *name* as a time; adds to *problems* and returns None when it is not what *mode* wants."""
    if mode != "backfill":
        if text:
            problems.append(f"{name}: expected nothing, because a {mode} takes the whole table, found {text!r}")
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
        "planned",
        view=planned.view,
        store=planned.store,
        mode=planned.mode,
        from_version=planned.from_version,
        to_version=planned.to_version,
        interval=planned.interval and str(planned.interval),
        rows=planned.rows,
        pieces=planned.pieces,
        reason=planned.reason,
    )


# What a run tells ------------------------------------------------------------------------------------------------------


def told(report: RunReport, online: OnlineStore, *, tried_again: bool = False) -> dict[str, Any]:
    """The report of a finished run as JSON, with where the view stands now as ``watermark`` (None if it was never loaded).

    ``news``: whether readers see something new, or may: a task that was *tried_again* counts what its first try wrote as unchanged.
    """
    from materialize import watermark

    news = report.changed or (tried_again and report.unchanged > 0)
    return report.to_dict() | {"watermark": position(watermark.read(online, report.view)), "news": news}


def position(mark: Watermark | None) -> dict[str, Any] | None:
    """What people want to know of a watermark, as JSON; times in ISO format."""
    if mark is None:
        return None
    times = {"event": mark.event_us, "finished": mark.finished_us}
    return {
        "table_id": mark.table_id,
        "version": mark.version,
        "generation": mark.generation,
        "run_id": mark.run_id,
    } | {name: None if us is None else from_us(us).isoformat() for name, us in times.items()}


def event_extra(report: dict[str, Any]) -> dict[str, Any]:
    """What an asset event tells about a run; *report* is what `told` returned."""
    names = ("view", "store", "mode", "from_version", "to_version", "event_us", "interval", "run_id", "seconds")
    return {name: report[name] for name in (*names, *COUNTERS, "watermark")}


def mirror(report: dict[str, Any]) -> None:
    """Copy the watermark that the run moved to Airflow's asset state, where people and other DAGs may read it; this package never does.

    A run that moved none copies none. When Airflow does not take it, that is a warning: the watermark itself is in the store.
    """
    from airflow.sdk.execution_time.context import AssetStateStoreAccessor

    mark = report["watermark"]
    if mark is None or mark["run_id"] != report["run_id"]:
        return
    try:
        # By name: the context has the assets of a task's own outlets only, which the form's, behind an alias, are not.
        AssetStateStoreAccessor(name=asset(report["view"], report["store"]).name).set(WATERMARK, mark)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run is finished and well
        log.warning("not mirrored", view=report["view"], store=report["store"], error=str(error))
