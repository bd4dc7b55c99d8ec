"""Feature views with ``on_commit: true`` in, the DAG ``materialize_on_commit`` out: an incremental run seconds after a commit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import structlog
from airflow.sdk import DAG, Asset, AssetAlias, AssetWatcher, TaskGroup, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException

from materialize.airflow import tasks
from materialize.airflow.dags import TASK_DEFAULTS, group_defaults
from materialize.config import load
from materialize.errors import BusyError, MaterializeError, WatermarkError
from materialize.stop import stop_on

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.model import FeatureView, RunReport
    from materialize.online.base import OnlineStore
    from materialize.pipeline import Run
    from materialize.plan import Plan

__all__ = ["COMMITS", "LOADED", "changed", "load_view", "on_commit_dag"]

log = structlog.get_logger(__name__)

#: The name and the URI of the asset whose watcher announces commits. The asset of a view in a store has a slash in its name.
COMMITS = ("materialize_commits", "materialize://commits")
#: The events of loaded views reach their assets through this alias.
LOADED = AssetAlias("materialize_on_commit")
#: Tables looked at at once by `changed`.
LOOKS = 16

DOC = """\
Loads the feature views that say `on_commit: true` seconds after a commit to their Delta table. Their schedule stays as it is.

A watcher in the triggerer looks at all tables every few seconds and starts a run; however many commits came meanwhile, the run
finds out by itself which views are behind in a store (`changed`) and brings each to the head of its table (`load`). What failed, or
was lost, is announced again while it stays behind, after 5, 10, 20 ... minutes, and the schedule takes it along too; so no task
here is tried again by itself, and a red one holds nobody back.

`load` is skipped when another run is at it or was faster, and when the view has to be read as a whole and is large or being loaded: that
is left to the view's schedule, which does it in pieces. The table of errors in the documentation of `materialize_hourly` says
what to do about a red task.
"""


def on_commit_dag(dags_folder: Path, **timing: float) -> DAG | None:
    """The DAG of every feature view that says ``on_commit: true``, None without one: then no table is looked at.

    *timing*: ``poll_interval`` and ``repeat`` of `materialize.airflow.watcher.CommitTrigger`, in seconds. Raises `ConfigError` when
    the configuration is wrong.
    """
    config = load(tasks.config_dir(dags_folder))
    views = [view for view in config.feature_views.values() if view.on_commit]
    if not views:
        return None
    from materialize.airflow.watcher import CommitTrigger

    watcher = AssetWatcher("materialize_commits", CommitTrigger(dags_folder=str(dags_folder), **timing))
    with DAG(
        "materialize_on_commit",
        description="Delta Lake to the online store: feature views seconds after a commit",
        doc_md=DOC,
        schedule=[Asset(*COMMITS, watchers=[watcher])],
        catchup=False,
        max_active_runs=1,
        # A try later would hold the next run back; the watcher announces what stays behind again.
        default_args=TASK_DEFAULTS | {"retries": 0},
        tags=["materialize", "on commit"],
    ) as dag:
        for store in dict.fromkeys(store for view in views for store in view.online_stores):
            add_store(store, [view for view in views if store in view.online_stores], config.online_stores[store].pool)
    return dag


def add_store(store: str, views: list[FeatureView], pool: str | None) -> None:
    """The tasks of one online store: changed -> load (one per view that is behind), in the store's *pool*.

    A group for each store, because a mapped task has one pool, and so that a store that hangs holds back no other.
    """
    owners = ", ".join(sorted({view.owner for view in views} - {""}))
    with TaskGroup(store, default_args=group_defaults(pool, owners)):
        found: Any = task(changed)(store)
        labelled = task(task_id="load", outlets=[LOADED], map_index_template=tasks.PIECE_TEMPLATE)(load_view)
        labelled.partial(store=store).expand(view=found)


def changed(store: str) -> list[str]:
    """The feature views that are behind their table in *store*, whatever the events say. One that cannot be looked at is left out."""
    from materialize.commits import behind
    from materialize.online import open_store

    for event in [one for events in get_current_context()["triggering_asset_events"].values() for one in events]:
        log.info("was asked to by an event", at=str(event.timestamp), told=event.extra.get("payload"))
    config = load(tasks.current_config_dir(), connections=tasks.connection)
    names = [view.name for view in config.feature_views.values() if view.on_commit and store in view.online_stores]
    with open_store(config.online_store(store)) as online:

        def look(name: str) -> bool:
            try:
                return behind(config.feature_view(name), online)
            except MaterializeError as error:
                log.warning("left to its schedule", view=name, store=store, error=str(error))
                return False

        with ThreadPoolExecutor(LOOKS) as pool:
            return [name for name, found in zip(names, pool.map(look, names), strict=True) if found]


def load_view(view: str, store: str) -> dict[str, Any]:
    """Bring one feature view to the head of its table. Emits an asset event when readers see something new.

    Skipped when another run is at it or was faster, and when the schedule has to do it.
    """
    from materialize import pipeline

    context: Any = get_current_context()
    context[tasks.PIECE] = f"{view} in {store}"
    with tasks.opened(view, store) as (feature_view, online), stop_on(SIGTERM) as count:
        run = pipeline.Run(store, tasks.run_id(), tasks.utcnow, count)
        try:
            done = load_leased(feature_view, online, run)
        except (BusyError, WatermarkError) as error:
            raise AirflowSkipException(str(error)) from None
        report = tasks.told(done, online)
    tasks.mirror(report)
    if report["news"]:
        context["outlet_events"][LOADED].add(tasks.asset(view, store), extra=tasks.event_extra(report))
    return report


def load_leased(view: FeatureView, online: OnlineStore, run: Run) -> RunReport:
    """The incremental run of `load_view`, with the lease of the view. Raises BusyError when another run holds it."""
    from materialize import lease, pipeline

    with lease.held_by(run, online, view.name, "incremental") as held:
        plan = pipeline.make_plan(view, online, mode="incremental", store_name=held.store_name, run_id=held.run_id)
        tasks.log_plan(plan)
        refuse_large_snapshot(plan, view.schedule)
        begun = pipeline.begin(view, online, plan, now=held.now())
        pieces = [
            pipeline.write_piece(view, online, begun, piece, now=held.now(), progress=held.progress)
            for piece in range(begun.pieces)
        ]
        return pipeline.commit(view, online, begun, pieces, now=held.now())


def refuse_large_snapshot(plan: Plan, schedule: str) -> None:
    """Raises `AirflowSkipException` for a run over a whole table that takes more than one piece.

    It would hold back every other view for as long as it takes, and race with the schedule, which writes pieces side by side.
    """
    if plan.snapshot and plan.pieces > 1:
        raise AirflowSkipException(
            f"feature view {plan.view!r}: {plan.reason}, which is a run over the whole table of about {plan.rows:,} rows. It is left to "
            f"the next run of the DAG materialize_{schedule}, which does it in {plan.pieces} pieces; the commits after it are loaded here again."
        )
