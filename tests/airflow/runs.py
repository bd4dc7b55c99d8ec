"""Runs one DAG of ``dags/`` to its end in this process, on a real metadata database, as the scheduler would.

``DAG.test()`` cannot give a run a partition key or a type; everything else here is what it does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import BundleDagBag, sync_bag_to_db
from airflow.models.asset import AssetEvent, AssetModel
from airflow.models.xcom import XComModel
from airflow.sdk.definitions.dag import _run_task
from airflow.sdk.execution_time.comms import DeferTask
from airflow.serialization.definitions.dag import SerializedDAG
from airflow.serialization.encoders import coerce_to_core_timetable
from airflow.serialization.serialized_objects import DagSerialization
from airflow.utils.session import create_session
from airflow.utils.state import DagRunState, State, TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType, DagRunType
from sqlalchemy import select

__all__ = ["DAGS", "Run", "load_dags", "run_dag"]

#: The DAG files under test.
DAGS = Path(__file__).parents[2] / "dags"
BUNDLE = "dags-folder"


@dataclass
class Run:
    """What a run left behind: states by ``task`` or ``task[map index]``, errors, return values, asset event extras, labels in the UI, what a task that waits in the triggerer left."""

    state: str
    run_id: str
    tasks: dict[str, str] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    event_keys: dict[str, str | None] = field(default_factory=dict)
    labels: dict[str, str | None] = field(default_factory=dict)
    deferred: dict[str, DeferTask] = field(default_factory=dict)


def load_dags(folder: Path = DAGS) -> BundleDagBag:
    """Parse the DAG files as the dag processor does."""
    return BundleDagBag(folder, bundle_path=folder, bundle_name=BUNDLE)


def run_dag(
    dag_id: str,
    *,
    folder: Path = DAGS,
    run_type: str = "manual",
    partition_key: str | None = None,
    conf: dict[str, Any] | None = None,
    triggerer: bool = False,
    first_try: int = 1,
) -> Run:
    """Run a DAG until nothing can start any more: to its end, or until a task waits for its retry or, without *triggerer*, for its trigger.

    *first_try* above 1: the tasks take themselves for retries.
    """
    bag = load_dags(folder)
    assert not bag.import_errors, bag.import_errors
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, BUNDLE, None)
    dag = bag.dags[dag_id]
    serialized = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
    assert isinstance(serialized, SerializedDAG)
    # The dag processor replaces them by the ids of their rows; nothing here watches them.
    serialized.deadline = None
    now = datetime.now(timezone.utc)
    run = Run(state="", run_id=f"{run_type}__{uuid4()}")
    with create_session() as session:
        dag_run = serialized.create_dagrun(
            run_id=run.run_id,
            run_after=now,
            start_date=now,
            run_type=DagRunType(run_type),
            state=DagRunState.RUNNING,
            triggered_by=DagRunTriggeredByType.TEST,
            conf=conf,
            partition_key=partition_key,
            partition_date=coerce_to_core_timetable(dag.timetable).resolve_partition_date(partition_key),
            session=session,
        )
        session.commit()
        while dag_run.state == DagRunState.RUNNING:
            session.expire_all()
            before = states(dag_run, session)
            ready, _ = dag_run.update_state(session=session)
            session.commit()
            if not ready and states(dag_run, session) == before:
                break
            for instance in ready:
                instance.try_number = max(instance.try_number + 1, first_try)
                instance.state = TaskInstanceState.SCHEDULED
            session.commit()
            for instance in ready:
                result = _run_task(ti=instance, task=dag.task_dict[instance.task_id], run_triggerer=triggerer)
                if result is not None and result.error is not None:
                    run.errors[name_of(instance)] = result.error
                if result is not None and isinstance(result.msg, DeferTask):
                    run.deferred[name_of(instance)] = result.msg
        session.expire_all()
        run.state = str(dag_run.state)
        for instance in dag_run.get_task_instances(session=session):
            run.tasks[name_of(instance)] = str(instance.state)
            run.labels[name_of(instance)] = instance.rendered_map_index
            if instance.state == State.SUCCESS:
                run.values[name_of(instance)] = returned(instance, session)
        events = select(AssetModel.name, AssetEvent.extra, AssetEvent.partition_key).join(
            AssetEvent, AssetEvent.asset_id == AssetModel.id
        )
        for name, extra, key in session.execute(events.where(AssetEvent.source_run_id == run.run_id)):
            run.events[name], run.event_keys[name] = extra, key
    return run


def states(dag_run: Any, session: Any) -> set[tuple[str, str]]:
    """The run's and its tasks' states; a task can be skipped or held back without ever being ready."""
    instances = dag_run.get_task_instances(session=session)
    return {(name_of(instance), str(instance.state)) for instance in instances} | {("", str(dag_run.state))}


def name_of(instance: Any) -> str:
    return instance.task_id if instance.map_index < 0 else f"{instance.task_id}[{instance.map_index}]"


def returned(instance: Any, session: Any) -> Any:
    row = session.scalar(
        select(XComModel.value).where(
            XComModel.dag_id == instance.dag_id,
            XComModel.run_id == instance.run_id,
            XComModel.task_id == instance.task_id,
            XComModel.map_index == instance.map_index,
            XComModel.key == "return_value",
        )
    )
    return json.loads(row) if isinstance(row, str) else row
