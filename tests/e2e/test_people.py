"""What Airflow asks people and tells people, under a real scheduler and triggerer: approval of a large run, and a missed freshness target."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.project import Project
from tests.e2e.stack import ROOT, AirflowStack

pytestmark = [pytest.mark.e2e, pytest.mark.airflow]

HOURLY, FORM = "materialize_hourly", "materialize_backfill"

#: A deployment's own DAG file, and its own module with the function that is told.
PAGING = """\
from pathlib import Path

from materialize.airflow.dags import materialize_dag

dag = materialize_dag("hourly", Path(__file__).parent, on_late="paging.page")
"""
PAGER = """\
import json, os
from pathlib import Path


async def page(late):
    Path(os.environ["PAGES"]).write_text(json.dumps(late))
"""


def small_project(root: Path, **store: Any) -> Project:
    """One view in one store, with these keys in the store's entry."""
    project = Project(root)
    for view in ("risk", "profile"):
        (project.root / "config" / "feature_views" / f"{view}.yaml").unlink()
    entry = {"url": f"sqlite:///{project.root}/online.db"} | store
    (project.root / "config" / "online_stores.yaml").write_text(json.dumps({"default": entry}))
    return project


def seen_by_scheduler(airflow: AirflowStack, run: str, task: str) -> bool:
    """Whether the scheduler knows that the worker is done with a task, or waits no more."""
    lines = (airflow.home / "scheduler.log").read_text().splitlines()
    return any("Received executor event" in line and f"'{task}'" in line and run in line for line in lines)


def test_large_run_waits_for_a_person_and_does_what_the_person_says(tmp_path: Path) -> None:
    project = small_project(tmp_path / "project", approve_above_rows=1)
    project.add("spending", 2, event=1.0, amount=2.0)
    form = {"views": ["spending"], "mode": "rebuild", "dry_run": False}

    # In the first minutes of an hour the schedule would start a run that loads the view.
    environment = {
        "MATERIALIZE_CONFIG": str(project.root / "config"),
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "True",
    }
    with AirflowStack(tmp_path / "airflow", ROOT / "dags", **environment) as airflow:
        airflow.parsed(FORM)
        airflow.request("PATCH", f"/api/v2/dags/{FORM}", {"is_paused": False})

        def answer(run: str, option: str) -> dict[str, Any]:
            path = f"/api/v2/dags/{FORM}/dagRuns/{urllib.parse.quote(run)}/taskInstances/approve/-1/hitlDetails"
            airflow.wait_until(lambda: airflow.tasks(FORM, run)["approve"] == "awaiting_input", "the question")
            # Airflow 3.3.2 asks again after an answer that comes before its scheduler has seen the worker leave the task.
            airflow.wait_until(lambda: seen_by_scheduler(airflow, run, "approve"), "the scheduler")
            question = airflow.request("GET", path)
            airflow.request("PATCH", path, {"chosen_options": [option]})
            return question

        rejected = airflow.trigger(FORM, conf=form)
        question = answer(rejected, "Reject")
        assert airflow.finished(FORM, rejected) == "success", airflow.logs()
        states = airflow.tasks(FORM, rejected)
        assert question["subject"] == "Load feature views: 2 rows"
        assert "default: 2 rows, more than approve_above_rows: 1" in question["body"]
        assert "\n| spending | default | rebuild | 1 | 2 | 1 |" in question["body"]
        assert {state for name, state in states.items() if name.startswith("to_default.")} == {"skipped"}
        assert project.watermark("spending") is None

        approved = airflow.trigger(FORM, conf=form)
        answer(approved, "Approve")
        assert airflow.finished(FORM, approved) == "success", airflow.logs()
        assert [project.amount("spending", user) for user in (1, 2)] == [1.0, 2.0]
        mark = project.watermark("spending")
        assert mark is not None
        assets = airflow.request("GET", "/api/v2/assets?uri_pattern=materialize://default/spending")["assets"]
        (asset,) = [one for one in assets if one["name"] == "default/spending"]
        (event,) = airflow.request("GET", f"/api/v2/assets/events?asset_id={asset['id']}")["asset_events"]
        assert (event["extra"]["watermark"]["version"], event["extra"]["watermark"]["run_id"]) == (1, mark.run_id)


def test_missed_freshness_target_is_logged_and_told(tmp_path: Path) -> None:
    # Given a view with a commit that is not online, and a run that cannot go on: its store's pool does not exist.
    project = small_project(tmp_path / "project", pool="nowhere")
    project.set_view("spending", freshness="5s")
    dags, pages = tmp_path / "dags", tmp_path / "pages.json"
    dags.mkdir()
    (dags / "hourly.py").write_text(PAGING)
    # The triggerer has this folder on its path, and not that of the DAGs.
    (tmp_path / "airflow" / "config").mkdir(parents=True)
    (tmp_path / "airflow" / "config" / "paging.py").write_text(PAGER)
    environment = {"MATERIALIZE_CONFIG": str(project.root / "config"), "PAGES": str(pages)}

    with AirflowStack(tmp_path / "airflow", dags, triggerer=True, **environment) as airflow:
        airflow.parsed(HOURLY)
        run = airflow.trigger(HOURLY)

        def told_of_run() -> list[dict[str, Any]]:
            """In the first minutes of an hour there is a scheduled run too, which is told first."""
            text = pages.read_text() if pages.exists() else ""
            return [one for one in json.loads(text) if one["run"] == f"{HOURLY}/{run}"] if text.endswith("]") else []

        airflow.wait_until(told_of_run, "somebody to be told")
        told = told_of_run()
        assert [(one["view"], one["store"], one["target"]) for one in told] == [("spending", "default", "0:00:05")]
        log = (tmp_path / "airflow" / "triggerer.log").read_text()
        assert "[error    ] late" in log
        assert "feature view 'spending' is late in online store 'default'" in log

        # What was told late is done as ever once it can go on.
        airflow.request("POST", "/api/v2/pools", {"name": "nowhere", "slots": 4})
        assert airflow.finished(HOURLY, run) == "success", airflow.logs()
        assert project.amount("spending", 1) == 1.0
