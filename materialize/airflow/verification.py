"""Configuration in, the DAG ``materialize_verify`` out: every day each feature view in each online store is compared with its table."""

from __future__ import annotations

from signal import SIGTERM
from typing import TYPE_CHECKING, Any

import structlog
from airflow.sdk import DAG, Asset, TaskGroup, get_current_context, task

from materialize.airflow import tasks
from materialize.airflow.dags import TASK_DEFAULTS, group_defaults
from materialize.config import load
from materialize.errors import MismatchError
from materialize.stop import stop_on

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from materialize.model import FeatureView, VerifySettings

__all__ = ["compare", "judge", "verified", "verify_dag", "verify_view"]

log = structlog.get_logger(__name__)

#: Every night (UTC), when the hourly and daily runs of midnight are long done.
CRON = "30 3 * * *"

DOC = """\
Compares what readers see in the online stores with the Delta tables, at the version of each watermark: a sample of the entities, or all
where the view's YAML says `verify: {compare: full}`. `verify` emits the report as the event of the asset `STORE/VIEW/verified`, which the
freshness page shows; `judge` is red when a greater share differs than `max_mismatched` (default 0 %).

A red `judge` means that readers get wrong features now. `materialize verify VIEW --repair`, or the mode *verify and repair* of
`materialize_backfill`, writes the entities that differ again and no other; with `verify: {repair: true}` this DAG has done it already.
Then find out what the store lost, or who else writes to it. A red `verify` could not compare; its last sentence says why.
"""


def verified(view: str, store: str) -> Asset:
    """What is known about the feature view *view* in the online store *store*: its events are the reports of comparisons."""
    return Asset(name=f"{store}/{view}/verified", uri=f"materialize://{store}/{view}/verified")


def verify_dag(dags_folder: Path) -> DAG:
    """The DAG that compares every feature view in every store: one group of tasks for each.

    Raises `ConfigError` when the configuration is wrong, which Airflow shows as the import error of the DAG file.
    """
    config = load(tasks.config_dir(dags_folder))
    with DAG(
        "materialize_verify",
        description="Compare the online stores with the Delta tables",
        doc_md=DOC,
        schedule=CRON,
        catchup=False,
        max_active_runs=1,
        default_args=TASK_DEFAULTS,
        tags=["materialize", "verify"],
    ) as dag:
        for view in config.feature_views.values():
            for store in view.online_stores:
                add_view(view, store, config.online_stores[store].pool)
    return dag


def add_view(view: FeatureView, store: str, pool: str | None) -> None:
    """The tasks of one feature view and store: verify -> judge, in the store's *pool*."""
    defaults = group_defaults(pool, view.owner)
    with TaskGroup(f"{view.name}__{store}", tooltip=view.description, default_args=defaults):
        read, told = [tasks.table(view), tasks.asset(view.name, store)], [verified(view.name, store)]
        # Any: while a DAG is built, Airflow's XComArg stands for the value that a task will return.
        report: Any = COMPARE.override(inlets=read, outlets=told)(view=view.name, store=store)
        JUDGE([report])


def compare(view: str, store: str) -> dict[str, Any]:
    """Compare one feature view in one store as its YAML says. Returns the report, which is the asset event's extra too."""
    report = verify_view(view, store)
    context = get_current_context()
    (outlet,) = context["task"].outlets
    context["outlet_events"][outlet].extra = report
    return report


def verify_view(view: str, store: str, settings: VerifySettings | None = None) -> dict[str, Any]:
    """Compare one feature view in one store; *settings* instead of those of its YAML. Returns the report as JSON."""
    from materialize.pipeline import Run
    from materialize.verify import sample_size, verify

    context = get_current_context()
    with tasks.opened(view, store) as (feature_view, online), stop_on(SIGTERM) as count:
        wanted = feature_view.verify if settings is None else settings
        run = Run(store, tasks.run_id(context["ti"].task_id), tasks.utcnow, count)
        sample = sample_size() if wanted.compare == "sample" else None
        report = verify(feature_view, online, run, sample=sample, repair=wanted.repair).to_dict()
    log.info("verified", **report)
    return report


def judge(reports: Sequence[dict[str, Any]]) -> None:
    """Fail when a greater share of the compared entities differs than the view's YAML tolerates, naming each such view."""
    from materialize.verify import VerifyReport, mismatch

    views = load(tasks.current_config_dir()).feature_views
    found = [VerifyReport(**report, keys={}) for report in reports[:]]
    messages = [mismatch(report, views[report.view].verify.max_mismatched) for report in found]
    if any(messages):
        raise MismatchError("\n".join(filter(None, messages)))


#: What every view and store has, made once, as in `materialize.airflow.dags`.
COMPARE, JUDGE = task(task_id="verify")(compare), task(judge)
