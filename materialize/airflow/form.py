"""Configuration in, the DAG ``materialize_backfill`` out: a form to load a past range of event time again, or to rebuild."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import DAG, Param, TaskGroup, TriggerRule, task
from airflow.sdk.exceptions import AirflowSkipException

from materialize.airflow import form_tasks, tasks
from materialize.airflow.dags import TASK_DEFAULTS, group_defaults
from materialize.config import load

if TYPE_CHECKING:
    from pathlib import Path

    from airflow.sdk import Context

    from materialize.config import Config

__all__ = ["Approval", "backfill_dag"]

#: How long a plan waits for a person. After it the run fails, with nothing written; table and watermark have gone on far.
PATIENCE = timedelta(days=7)
#: Runs of the form at once: one that waits for a person must not hold back the others, and runs do each other no harm.
ACTIVE_RUNS = 8
#: One task of the form may have all pieces of several views to write, where others have one: longer than TASK_DEFAULTS allows.
WRITE_TIMEOUT = timedelta(days=4)

DOC = """\
| mode | what it does with the chosen feature views |
|---|---|
| interval backfill | loads the rows with event times in `[start, end)` again, at each table's current version; an older value never replaces a newer one, and the watermark stays |
| rebuild | replaces everything online by the table's newest snapshot, whatever the store holds, and moves the watermark; for recovery, and where an error says `RebuildNeeded` |
| verify | compares every entity online with the table at the watermark's version; `judge` is red when more differ than the view tolerates |
| verify and repair | the same, and writes the entities that differ again, and no other |

A dry run, which is the default, ends after `summary`, whose log shows the plan as a table - rows, pieces, minutes, gigabytes, and what it
costs where a store bills by the row - and writes nothing.

Where a run brings more rows to an online store than `approve_above_rows` of that store in `online_stores.yaml`, `approve` waits until
somebody approves the same table under *Required actions*; a rejected run ends with everything after it skipped, and nothing written.

*Force* lets this one run pass a check that stopped one: a table that is suddenly empty or lost 60 % of its rows, or more rows that cannot be stored
than the view's `max_quarantined`. Look at the table first. A comparison has no such checks.

Each store has a group of tasks, in the pool of that store. `write` is mapped: at most *pieces in parallel* tasks for each store, each
doing its pieces one after another. A view that fails holds back no other; its own `commit` is red and says what is missing.
"""


class Approval(ApprovalOperator):
    """Waits until a person approves or rejects the plan; skipped where nobody has to. A rejection skips what follows."""

    def execute(self, context: Context) -> Any:
        needed = context["ti"].xcom_pull(task_ids="summary")["approval"]
        if context["params"]["dry_run"]:
            raise AirflowSkipException("dry run: nothing will be written, so there is nothing to approve.")
        if not needed:
            raise AirflowSkipException("no online store gets more rows than its approve_above_rows allows.")
        return super().execute(context)


def backfill_dag(dags_folder: Path) -> DAG:
    """The form for loading a past range of event time again or rebuilding, for chosen feature views and one or all of their stores."""
    config = load(tasks.config_dir(dags_folder))
    stores = {store for view in config.feature_views.values() for store in view.online_stores}
    with DAG(
        "materialize_backfill",
        description="Load a past range of event time again, or rebuild",
        doc_md=DOC,
        schedule=None,
        catchup=False,
        max_active_runs=ACTIVE_RUNS,
        max_active_tasks=form_tasks.PARALLEL[-1] * len(stores),
        default_args=TASK_DEFAULTS,
        params=form(config),
        tags=["materialize", "backfill"],
    ) as dag:
        # Any: while a DAG is built, Airflow's XComArg stands for the value that a task will return.
        targets: Any = task(task_id="check")(form_tasks.check_form)()
        plans: Any = task(map_index_template=tasks.PIECE_TEMPLATE)(form_tasks.plan).expand(target=targets)
        # A view that cannot be planned holds back no other.
        summed: Any = task(trigger_rule=TriggerRule.ALL_DONE_MIN_ONE_SUCCESS)(form_tasks.summary)(targets, plans)
        approval = Approval(
            task_id=form_tasks.APPROVE,
            subject="Load feature views: {{ '{:,}'.format(ti.xcom_pull(task_ids='summary')['rows']) }} rows",
            body="{{ ti.xcom_pull(task_ids='summary')['approval'] | join('\n\n') }}\n\n{{ ti.xcom_pull(task_ids='summary')['markdown'] }}",
            execution_timeout=None,
            response_timeout=PATIENCE,
        )
        summed >> approval
        for store in sorted(stores):
            add_store(store, config.online_stores[store].pool, targets, summed, approval)
    return dag


def add_store(store: str, pool: str | None, chosen: Any, summed: Any, approval: Approval) -> None:
    """The tasks of one store: targets -> begin (one per view) -> batches -> write (one per batch) -> commit (one per view), or
    compared -> verify (one per view) -> judge.
    """
    with TaskGroup(f"to_{store}", default_args=group_defaults(pool)):
        # NONE_FAILED: mostly nobody has to approve.
        gate = task(trigger_rule=TriggerRule.NONE_FAILED)(form_tasks.targets)
        targets: Any = gate(store=store, targets=chosen, summed=summed, compare=False)
        approval >> targets
        # What has failed for one view is told by its own commit.
        go_on = TriggerRule.ALL_DONE_MIN_ONE_SUCCESS
        begun: Any = task(map_index_template=tasks.PIECE_TEMPLATE)(form_tasks.begin).expand(target=targets)
        cut: Any = task(trigger_rule=go_on)(form_tasks.batches)(begun)
        targets >> cut
        labelled = task(map_index_template=tasks.PIECE_TEMPLATE, execution_timeout=WRITE_TIMEOUT)
        written: Any = labelled(form_tasks.write).expand(batch=cut)
        last = task(trigger_rule=go_on, outlets=[form_tasks.BACKFILLED], map_index_template=tasks.PIECE_TEMPLATE)
        begun >> last(form_tasks.commit).partial(written=written[form_tasks.REPORTS]).expand(target=targets)
        named = task(outlets=[form_tasks.BACKFILLED], map_index_template=tasks.PIECE_TEMPLATE)
        compared: Any = gate.override(task_id="compared")(store=store, targets=chosen, summed=summed, compare=True)
        approval >> compared
        reports: Any = named(form_tasks.verify).expand(target=compared)
        task(trigger_rule=go_on)(form_tasks.judge)(compared, reports)


def form(config: Config) -> dict[str, Param]:
    """The fields of the form. A choice outside the list is refused by Airflow, the rest by `form_tasks.check_form`."""
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
            default=next(iter(form_tasks.MODES)),
            type="string",
            enum=list(form_tasks.MODES),
            title="Mode",
            description="All but an interval backfill take the whole table: leave start and end empty.",
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
            default=form_tasks.EVERY_STORE,
            type="string",
            enum=[form_tasks.EVERY_STORE, *stores],
            title="Online store",
            description="One online store, or every store of the chosen feature views.",
        ),
        "dry_run": Param(
            default=True,
            type="boolean",
            title="Dry run",
            description="Show the plan and write nothing.",
        ),
        "parallel": Param(
            default=form_tasks.PARALLEL[1],
            type="integer",
            minimum=form_tasks.PARALLEL[0],
            maximum=form_tasks.PARALLEL[-1],
            title="Pieces in parallel",
            description="How many pieces are written at once to each online store.",
        ),
        "force": force(),
    }


def force() -> Param:
    """The field for the run after one that a check stopped; in a part of the form that is closed at first."""
    return Param(
        default=False,
        type="boolean",
        title="Force",
        description="Go on although a check says no, such as a table that is suddenly empty. For this run alone.",
        section="Where a check stopped a run",
    )
