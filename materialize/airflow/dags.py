"""Configuration in, DAGs out: ``materialize_hourly`` and ``materialize_daily``.

Importing this file loads airflow and the configuration and nothing heavy; what a task needs is imported when it runs.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import DAG, CronPartitionTimetable, TaskGroup, TriggerRule, task
from airflow.sdk.definitions.callback import AsyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule

from materialize.airflow import alerts, tasks
from materialize.config import load
from materialize.errors import BusyError, UnavailableError
from materialize.stop import Stopped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.model import FeatureView

__all__ = ["TASK_DEFAULTS", "materialize_dag"]

#: When a schedule runs (UTC), and how the label of its partition is written. The label is a handle for backfills only.
CRONS = {"hourly": "0 * * * *", "daily": "0 0 * * *"}
KEY_FORMATS = {"hourly": "%Y-%m-%dT%H", "daily": "%Y-%m-%d"}

#: Three tries last as long as the lease of a run that was lost between two of its tasks (`materialize.lease.LASTING`).
BUSY_DELAY = timedelta(minutes=5)
#: Every task: a store that does not answer is tried again after 30 s, 1 min and 2 min; any other error needs somebody to
#: act, so it fails at once. A worker that dies is retried by Airflow itself. A piece has at most 10 million rows, which take
#: some minutes, and an hour or two where a store is paced; what takes longer hangs.
TASK_DEFAULTS: dict[str, Any] = {
    "execution_timeout": timedelta(hours=6),
    "retries": 3,
    "retry_delay": timedelta(seconds=30),
    "retry_exponential_backoff": 2.0,
    "max_retry_delay": timedelta(minutes=10),
    "retry_policy": ExceptionRetryPolicy(
        [
            RetryRule(UnavailableError, RetryAction.RETRY, reason="the online store did not answer; nothing is lost"),
            RetryRule(BusyError, RetryAction.RETRY, BUSY_DELAY, "another run writes to the store; it is waited for"),
            RetryRule(Stopped, RetryAction.RETRY, reason="the worker was asked to stop; nothing is lost"),
        ],
        default=RetryAction.FAIL,
    ),
}

#: What every view and store has. Made once: with 200 views that is a fifth of the time that the DAG takes.
PLAN, WRITE = task(tasks.plan), task(map_index_template=tasks.PIECE_TEMPLATE)(tasks.write)
#: NONE_FAILED: without pieces `write` is skipped, and the watermark has to move all the same.
COMMIT, PUBLISH = task(trigger_rule=TriggerRule.NONE_FAILED)(tasks.commit), task(tasks.publish)

DOC = """\
Moves what changed in the Delta tables of the {schedule} feature views to their online stores.

| run | work |
|---|---|
| scheduled, asset-triggered, manual without a partition key | from the watermark to the table's head, however many runs were missed |
| Airflow backfill, manual with a partition key | rows with event times in that {period}, at the table's current version; the watermark stays |

Runs may be cleared, repeated, overlapped or killed: an older value never replaces a newer one. Each feature view and store
has its own group of tasks and fails alone. The last task, `publish`, emits an asset event with the counts of the run as its
extra, and is skipped when readers see nothing new.

A view with `freshness` in its YAML has a deadline: when a run has not succeeded by then and a commit of that view waits for longer, the
triggerer logs an ERROR and tells whom the DAG file names.

### When a task is red

After an outage of any length nothing has to be cleared: the next run brings everything since the watermark. The error's last
sentence says what to do; its class says who acts:

| error | who acts, and how |
|---|---|
| `ConfigError` | the author of the YAML: the message has file and key |
| `OfflineStoreError` | the owner of the Delta table: a column is missing, a file is gone or damaged |
| `RebuildNeeded` | the operator: `materialize rebuild VIEW`, or `on_rebuild_needed: auto` in the view's YAML |
| `UnavailableError` | nobody yet: it was retried three times; look after the store, the next run heals |
| `OnlineStoreError` | the operator of the store: memory, rights, a missing table |
| `WatermarkError` | nobody: another run finished first |
| `BusyError` | nobody: another run writes to the store, which the message names; it was waited for three times; `materialize release VIEW` if it is dead |

`materialize status` and `materialize doctor` show where every view stands, and what is wrong with it.
"""


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage is looked for meanwhile: with 200 views that takes a third of the time, for nothing of a DAG is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collection()
def materialize_dag(schedule: Literal["hourly", "daily"], dags_folder: Path, *, on_late: str | None = None) -> DAG:
    """The DAG of every feature view with this *schedule*: one group of tasks for each view and store.

    *on_late* names a coroutine function, such as ``my_alerts.page``, that the triggerer can import; it is awaited with what
    `alerts.freshness_missed` found late, and nothing else than this argument names it.

    Raises `ConfigError` when the configuration is wrong, which Airflow shows as the import error of the DAG file.
    """
    config = load(tasks.config_dir(dags_folder))
    views = [view for view in config.feature_views.values() if view.schedule == schedule]
    with DAG(
        f"materialize_{schedule}",
        description=f"Delta Lake to the online store: the {schedule} feature views",
        doc_md=DOC.format(schedule=schedule, period="hour" if schedule == "hourly" else "day"),
        schedule=CronPartitionTimetable(
            CRONS[schedule], timezone="UTC", run_offset=-1, key_format=KEY_FORMATS[schedule]
        ),
        catchup=False,
        max_active_runs=1,
        default_args=TASK_DEFAULTS,
        deadline=[deadline(view, dags_folder, on_late) for view in views if view.freshness is not None],
        tags=["materialize", schedule],
    ) as dag:
        for view in views:
            for store in view.online_stores:
                add_view(view, store, config.online_stores[store].pool)
    return dag


def deadline(view: FeatureView, dags_folder: Path, on_late: str | None) -> DeadlineAlert:
    """Looks at *view* when a run that has not succeeded was queued as long ago as the view's ``freshness``.

    Every commit that the run found when it was queued is late by then, unless it is online.
    """
    known = {"view": view.name, "dags_folder": str(dags_folder), "on_late": on_late}
    return DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=view.freshness or timedelta(0),
        callback=AsyncCallback(alerts.freshness_missed, kwargs=known),
        name=f"freshness of {view.name}",
    )


def add_view(view: FeatureView, store: str, pool: str | None) -> None:
    """The tasks of one feature view and store: plan -> write (one per piece) -> commit -> publish, in the store's *pool*."""
    target = {"view": view.name, "store": store}
    with TaskGroup(f"{view.name}__{store}", tooltip=view.description, default_args=group_defaults(pool, view.owner)):
        # Any: while a DAG is built, Airflow's XComArg stands for the value that a task will return.
        pieces: Any = PLAN(**target)
        plan = pieces[tasks.PLAN]
        written: Any = WRITE.partial(**target, plan=plan).expand(piece=pieces)
        report: Any = COMMIT(**target, plan=plan, pieces=written)
        PUBLISH.override(inlets=[tasks.table(view)], outlets=[tasks.asset(view.name, store)])(report)


def group_defaults(pool: str | None, owner: str = "") -> Any:
    """What the tasks of a group have of their own: the *pool* of their store, and an *owner*. Any, because TaskGroup has poor types."""
    return ({"owner": owner} if owner else {}) | ({"pool": pool} if pool else {})
