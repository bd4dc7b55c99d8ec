"""A missed freshness target: which runs are looked at, what is late, and who is told."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from materialize.airflow.alerts import freshness_missed
from materialize.airflow.dags import materialize_dag
from tests.airflow.runs import DAGS, load_dags, run_dag

if TYPE_CHECKING:
    from tests.airflow.project import Project

pytestmark = pytest.mark.usefixtures("metadata_database")

#: What Airflow tells a callback, as far as it is used.
CONTEXT = {"dag_run": {"dag_id": "materialize_hourly", "dag_run_id": "scheduled__1"}}


def missed(view: str = "spending", **kwargs: Any) -> list[dict[str, Any]]:
    """What the triggerer does at the deadline of a run: the errors that it logs."""
    with capture_logs() as lines:
        said = asyncio.run(freshness_missed(view=view, dags_folder=str(DAGS), context=CONTEXT, **kwargs))
    late = [line for line in lines if line["event"] == "late"]
    assert {line["log_level"] for line in late} <= {"error"}
    assert said == "\n".join(line["says"] for line in late) or "no commit waits for longer than it may" in said
    return late


def committed_hours_ago(project: Project, view: str, hours: float) -> None:
    """Have the table's log say that its first commit was made then."""
    path = project.root / view / "_delta_log" / f"{0:020}.json"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "commitInfo" in line:
            line["commitInfo"]["timestamp"] -= round(hours * 3_600_000)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    moment = path.stat().st_mtime - hours * 3_600
    os.utime(path, (moment, moment))


def test_each_view_with_a_target_has_a_deadline_of_its_own(project: Project) -> None:
    project.set_view("spending", freshness="2h")
    project.set_view("profile", schedule="daily", freshness="1d")

    bag = load_dags()

    deadlines = {
        name: [(one.name, one.interval, one.callback.kwargs["view"]) for one in bag.dags[name].deadline or []]
        for name in ("materialize_hourly", "materialize_daily", "materialize_backfill")
    }
    assert deadlines == {
        "materialize_hourly": [("freshness of spending", timedelta(hours=2), "spending")],
        "materialize_daily": [("freshness of profile", timedelta(days=1), "profile")],
        "materialize_backfill": [],
    }


def test_commit_that_waits_for_longer_than_the_target_is_an_error_with_fields(project: Project) -> None:
    project.set_view("spending", freshness="2h")
    committed_hours_ago(project, "spending", 3)

    (one,) = missed()

    assert (one["view"], one["store"], one["state"], one["target"]) == (
        "spending",
        "default",
        "never loaded",
        "2:00:00",
    )
    assert (one["run"], one["next"]) == ("materialize_hourly/scheduled__1", "materialize status spending")
    assert "feature view 'spending' is late in online store 'default': a commit of" in one["says"]


def test_what_is_online_or_does_not_wait_long_enough_is_not_late(project: Project) -> None:
    project.set_view("spending", freshness="2h")
    project.set_view("risk", freshness="4h")
    for view in ("spending", "risk"):
        committed_hours_ago(project, view, 3)
    run_dag("materialize_hourly")
    project.add("risk", 2, event=1.0, amount=2.0)

    assert missed("spending") == missed("risk") == []


def test_store_that_cannot_be_asked_is_told_beside_the_one_that_is_late(project: Project) -> None:
    project.set_stores(default=f"sqlite:///{project.root}/online.db", second=f"sqlite:///{project.root}/no/where.db")
    project.set_view("spending", freshness="2h", store="default, second")
    committed_hours_ago(project, "spending", 3)

    late = missed()

    assert [one["store"] for one in late] == ["default", "second"]
    assert "could not tell how fresh feature view 'spending' is in online store 'second'" in late[1]["says"]


def test_function_that_the_dag_file_names_is_told_once_and_only_what_is_late(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set_view("spending", freshness="2h")
    (tmp_path / "their_paging.py").write_text("told = []\n\nasync def page(late):\n    told.append(late)\n")
    monkeypatch.syspath_prepend(tmp_path)

    dag = materialize_dag("hourly", DAGS, on_late="their_paging.page")
    (deadline,) = dag.deadline or []
    known = {name: value for name, value in deadline.callback.kwargs.items() if name != "dags_folder"}
    missed(**known)
    committed_hours_ago(project, "spending", 3)
    late = missed(**known)

    (told,) = sys.modules["their_paging"].told
    assert [{"event": "late", "log_level": "error"} | one for one in told] == late
