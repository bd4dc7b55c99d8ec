"""Configuration in, DAGs out: ``materialize_hourly``, ``materialize_daily`` and the ``materialize_backfill`` form.

Importing this file loads airflow and the configuration and nothing heavy; what a task needs is imported when it runs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import DAG, CronPartitionTimetable, Param, TaskGroup, TriggerRule, task, task_group
from airflow.sdk.definitions.retry_policy import ExceptionRetryPolicy, RetryAction, RetryRule

from materialize.airflow import tasks
from materialize.config import load
from materialize.errors import UnavailableError
from materialize.stop import Stopped

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.config import Config
    from materialize.model import FeatureView

__all__ = ["TASK_DEFAULTS", "backfill_dag", "materialize_dag"]

#: When a schedule runs (UTC), and how the label of its partition is written. The label is a handle for backfills only.
CRONS = {"hourly": "0 * * * *", "daily": "0 0 * * *"}
KEY_FORMATS = {"hourly": "%Y-%m-%dT%H", "daily": "%Y-%m-%d"}

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
            RetryRule(Stopped, RetryAction.RETRY, reason="the worker was asked to stop; nothing is lost"),
        ],
        default=RetryAction.FAIL,
    ),
}

DOC = """\
Moves what changed in the Delta tables of the {schedule} feature views to their online stores.

| run | work |
|---|---|
| scheduled, asset-triggered, manual without a partition key | from the watermark to the table's head, however many runs were missed |
| Airflow backfill, manual with a partition key | rows with event times in that {period}, at the table's current version; the watermark stays |

Runs may be cleared, repeated, overlapped or killed: an older value never replaces a newer one. Each feature view and store
has its own group of tasks and fails alone. The last task, `publish`, emits an asset event with the counts of the run as its
extra, and is skipped when readers see nothing new.

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

`materialize status` and `materialize doctor` show where every view stands, and what is wrong with it.
"""

BACKFILL_DOC = """\
| mode | what it does with the chosen feature views |
|---|---|
| interval backfill | loads the rows with event times in `[start, end)` again, at each table's current version; an older value never replaces a newer one, and the watermark stays |
| rebuild | replaces everything online by the table's newest snapshot, whatever the store holds, and moves the watermark; for recovery, and where an error says `RebuildNeeded` |

A dry run, which is the default, shows the plan in the log of `plan` - rows, pieces, and what it costs where a store bills by the row -
and writes nothing.
"""


def materialize_dag(schedule: Literal["hourly", "daily"], dags_folder: Path) -> DAG:
    """The DAG of every feature view with this *schedule*: one group of tasks for each view and store.

    Raises `ConfigError` when the configuration is wrong, which Airflow shows as the import error of the DAG file.
    """
    config = load(tasks.config_dir(dags_folder))
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
        tags=["materialize", schedule],
    ) as dag:
        for view in config.feature_views.values():
            if view.schedule == schedule:
                for store in view.online_stores:
                    add_view(view, store, config.online_stores[store].pool)
    return dag


def add_view(view: FeatureView, store: str, pool: str | None) -> None:
    """The tasks of one feature view and store: plan -> write (one per piece) -> commit -> publish, in the store's *pool*."""
    target = {"view": view.name, "store": store}
    # Any: while a DAG is built, Airflow's XComArg stands for the value that a task will return; TaskGroup has poor types too.
    own: Any = ({"owner": view.owner} if view.owner else {}) | ({"pool": pool} if pool else {})
    with TaskGroup(f"{view.name}__{store}", tooltip=view.description, default_args=own):
        pieces: Any = task(tasks.plan)(**target)
        plan = pieces[tasks.PLAN]
        labelled = task(map_index_template=tasks.PIECE_TEMPLATE)(tasks.write)
        written: Any = labelled.partial(**target, plan=plan).expand(piece=pieces)
        # NONE_FAILED: without pieces `write` is skipped, and the watermark has to move all the same.
        report: Any = task(trigger_rule=TriggerRule.NONE_FAILED)(tasks.commit)(**target, plan=plan, pieces=written)
        task(inlets=[tasks.table(view)], outlets=[tasks.asset(view.name, store)])(tasks.publish)(report)


def backfill_dag(dags_folder: Path) -> DAG:
    """The form for loading a past range of event time again or rebuilding, for chosen feature views and one or all of their stores."""
    config = load(tasks.config_dir(dags_folder))
    with DAG(
        "materialize_backfill",
        description="Load a past range of event time again, or rebuild",
        doc_md=BACKFILL_DOC,
        schedule=None,
        catchup=False,
        max_active_runs=1,
        default_args=TASK_DEFAULTS,
        params=form(config),
        tags=["materialize", "backfill"],
    ) as dag:
        targets = task(task_id="check")(tasks.check_form)()

        @task_group
        def backfill(target: dict[str, Any]) -> None:
            plan: Any = task(task_id="plan")(tasks.plan_backfill)(target)
            task(task_id="write", outlets=[tasks.BACKFILLED])(tasks.write_backfill)(target, plan)

        backfill.expand(target=targets)
    return dag


def form(config: Config) -> dict[str, Param]:
    """The fields of the backfill form. A choice outside the list is refused by Airflow, the rest by `tasks.check_form`."""
    views, stores = sorted(config.feature_views), sorted(config.online_stores)
    return {
        "views": Param(
            default=[],
            type="array",
            title="Feature views",
            description="One or more feature views.",
            examples=views,
            items={"type": "string", "enum": views},
        ),
        "mode": Param(
            default=next(iter(tasks.MODES)),
            type="string",
            enum=list(tasks.MODES),
            title="Mode",
            description="A rebuild takes the whole table: leave start and end empty.",
        ),
        "start": Param(
            default=None,
            type=["null", "string"],
            format="date-time",
            title="Start",
            description="The first event time to load.",
        ),
        "end": Param(
            default=None,
            type=["null", "string"],
            format="date-time",
            title="End",
            description="The event time to stop before.",
        ),
        "store": Param(
            default=tasks.EVERY_STORE,
            type="string",
            enum=[tasks.EVERY_STORE, *stores],
            title="Online store",
            description="One online store, or every store of the chosen feature views.",
        ),
        "dry_run": Param(
            default=True,
            type="boolean",
            title="Dry run",
            description="Show the plan and write nothing.",
        ),
    }
