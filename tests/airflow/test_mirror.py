"""The watermark in asset events and in Airflow's asset state: a copy for people, made when a run moved it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from airflow.models.asset import AssetModel
from airflow.models.asset_state_store import AssetStateStoreModel
from airflow.utils.session import create_session
from deltalake import DeltaTable
from sqlalchemy import delete, select
from structlog.testing import capture_logs

from materialize.model import from_us
from tests.airflow.runs import run_dag

if TYPE_CHECKING:
    from pathlib import Path

    from tests.airflow.project import Project

HOURLY, FORM = "materialize_hourly", "materialize_backfill"

THEIRS = """\
from airflow.sdk import DAG
from materialize.airflow.operators import MaterializeOperator

with DAG("theirs", schedule=None, params={{"store": "unheard_of"}}):
    MaterializeOperator(task_id="load", view="spending"{arguments})
"""


@pytest.fixture(autouse=True)
def _nothing_mirrored(metadata_database: None) -> None:
    with create_session() as session:
        session.execute(delete(AssetStateStoreModel))


def mirrored(name: str = "default/spending") -> dict[str, Any] | None:
    """The copy of the watermark in the state of this asset."""
    with create_session() as session:
        text = session.scalar(
            select(AssetStateStoreModel.value)
            .join(AssetModel, AssetModel.id == AssetStateStoreModel.asset_id)
            .where(AssetModel.name == name, AssetStateStoreModel.key == "watermark")
        )
    return None if text is None else json.loads(text)


def test_run_that_moved_the_watermark_copies_it(project: Project) -> None:
    run = run_dag(HOURLY)

    mark = project.watermark("spending")
    assert mirrored() == {
        "table_id": mark.table_id,
        "version": 0,
        "generation": 1,
        "run_id": f"{HOURLY}/{run.run_id}",
        "event": from_us(mark.event_us).isoformat(),
        "finished": from_us(mark.finished_us).isoformat(),
    }
    assert run.events["default/spending"]["watermark"] == mirrored()


def test_run_without_news_for_readers_copies_it_too_and_one_that_moved_nothing_does_not(project: Project) -> None:
    project.add("spending", 2, event=0.5, amount=2.0)
    first = run_dag(HOURLY)
    run_dag(HOURLY)
    unmoved = mirrored()
    DeltaTable(str(project.root / "spending")).optimize.compact()

    compacted = run_dag(HOURLY)

    assert (unmoved["version"], unmoved["run_id"]) == (1, f"{HOURLY}/{first.run_id}")
    assert compacted.tasks["spending__default.publish"] == "skipped"
    assert (mirrored()["version"], mirrored()["run_id"]) == (2, f"{HOURLY}/{compacted.run_id}")


def test_rebuild_by_the_form_copies_it(project: Project) -> None:
    run = run_dag(FORM, conf={"views": ["spending"], "mode": "rebuild", "dry_run": False})

    assert mirrored()["run_id"] == f"{FORM}/{run.run_id}"
    assert run.events["default/spending"]["watermark"] == mirrored()


def test_operator_copies_it(project: Project, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(THEIRS.format(arguments=""))

    run = run_dag("theirs", folder=tmp_path)

    assert mirrored()["run_id"] == f"theirs/{run.run_id}/load"
    assert run.values["load"]["watermark"] == mirrored()


def test_copy_that_airflow_does_not_take_is_a_warning(project: Project, tmp_path: Path) -> None:
    # An asset that no DAG names has no state.
    project.set_stores(unheard_of=f"sqlite:///{project.root}/online.db", default="sqlite:///other.db")
    project.set_view("spending", store="unheard_of")
    (tmp_path / "theirs.py").write_text(THEIRS.format(arguments=', store="{{ params.store }}"'))

    with capture_logs() as lines:
        run = run_dag("theirs", folder=tmp_path)

    assert run.state == "success"
    assert [line["store"] for line in lines if line["event"] == "not mirrored"] == ["unheard_of"]
