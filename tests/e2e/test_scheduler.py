"""The DAGs under a real scheduler, API server and dag processor, driven through the REST API as the UI drives them."""

from __future__ import annotations

import os
import urllib.error
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.airflow.project import START, Project
from tests.e2e.stack import ROOT, AirflowStack

pytestmark = [pytest.mark.e2e, pytest.mark.airflow]

HOURLY, FORM = "materialize_hourly", "materialize_backfill"
CHAIN = "spending__default"


def key(hours: int) -> str:
    return (START + timedelta(hours=hours)).strftime("%Y-%m-%dT%H")


def test_hourly_runs_partition_keys_backfills_and_the_form_under_a_real_scheduler(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    (project.root / "config" / "feature_views" / "risk.yaml").unlink()
    (project.root / "config" / "feature_views" / "profile.yaml").unlink()
    project.add("spending", 1, event=3.5, amount=3.5)

    with AirflowStack(tmp_path / "airflow", ROOT / "dags", MATERIALIZE_CONFIG=str(project.root / "config")) as airflow:
        airflow.parsed(HOURLY, FORM)

        # Without a key: from the watermark to the head.
        first = airflow.trigger(HOURLY)
        assert airflow.finished(HOURLY, first) == "success", airflow.logs()
        assert project.amount("spending", 1) == 3.5
        (planned,) = [line for line in airflow.task_lines(HOURLY, first, f"{CHAIN}.plan") if line["event"] == "planned"]
        assert (planned["view"], planned["store"], planned["to_version"], planned["rows"]) == (
            "spending",
            "default",
            1,
            2,
        )
        # In the first minutes of an hour the schedule starts a run of its own; what follows must not meet it.
        airflow.wait_until(lambda: airflow.idle(HOURLY), "no run to be active")

        # With a key: that hour again; older values lose, entities that were missing arrive, the watermark stays.
        project.add("spending", 2, event=0.5, amount=0.5)
        keyed = airflow.trigger(HOURLY, partition_key=key(0))
        assert airflow.finished(HOURLY, keyed) == "success", airflow.logs()
        report = airflow.returned(HOURLY, keyed, "spending__default.commit")
        assert (report["mode"], report["rows_read"], report["written"], report["stale"]) == ("backfill", 2, 1, 1)
        assert (project.amount("spending", 1), project.amount("spending", 2)) == (3.5, 0.5)
        assert last_run(project) != f"{HOURLY}/{keyed}"
        with pytest.raises(urllib.error.HTTPError, match="400"):
            airflow.trigger(HOURLY, partition_key="yesterday")

        # Airflow's own backfill of two hours.
        created = airflow.request(
            "POST",
            "/api/v2/backfills",
            {"dag_id": HOURLY, "from_date": at(0), "to_date": at(1), "reprocess_behavior": "completed"},
        )
        airflow.wait_until(
            lambda: airflow.request("GET", f"/api/v2/backfills/{created['id']}")["completed_at"], "the backfill"
        )
        runs = airflow.ended(HOURLY, "backfill")
        assert {(run["partition_key"], run["state"]) for run in runs} == {(key(0), "success"), (key(1), "success")}
        assert last_run(project) not in {f"{HOURLY}/{run['dag_run_id']}" for run in runs}

        # The schedule goes on from a backfill at once, with the last hour. Its key is a label: the run goes to the head.
        airflow.wait_until(lambda: airflow.ended(HOURLY, "scheduled"), "the scheduled run")
        scheduled = airflow.ended(HOURLY, "scheduled")[-1]
        assert (scheduled["state"], bool(scheduled["partition_key"])) == ("success", True), airflow.logs()
        assert airflow.returned(HOURLY, scheduled["dag_run_id"], "spending__default.commit")["mode"] == "incremental"
        manual = airflow.trigger(HOURLY)
        assert airflow.finished(HOURLY, manual) == "success", airflow.logs()
        assert airflow.tasks(HOURLY, manual)["spending__default.publish"] == "skipped"

        # The form: refused with a sentence, then carried out.
        form = {"views": ["spending"], "start": at(0), "end": at(0), "dry_run": False}
        refused = airflow.trigger(FORM, conf=form)
        assert airflow.finished(FORM, refused) == "failed"
        assert "end: expected a time after the start" in airflow.task_log(FORM, refused, "check")
        accepted = airflow.trigger(FORM, conf=form | {"end": at(1)})
        assert airflow.finished(FORM, accepted) == "success", airflow.logs()
        assert airflow.tasks(FORM, accepted) == {
            "check": "success",
            "plan[0]": "success",
            "summary": "success",
            "approve": "skipped",
            "to_default.targets": "success",
            "to_default.begin[0]": "success",
            "to_default.batches": "success",
            "to_default.write[0]": "success",
            "to_default.commit[0]": "success",
            **dict.fromkeys(("to_default.compared", "to_default.verify", "to_default.judge"), "skipped"),
        }

        # Events: one for each run that changed what readers see, keyed like its run.
        events = {
            event["source_run_id"]: event for event in airflow.request("GET", "/api/v2/assets/events")["asset_events"]
        }
        assert events[keyed]["partition_key"] == key(0)
        assert events[keyed]["extra"]["written"] == 1
        assert [event["extra"]["mode"] for event in events.values()].count("incremental") == 1
        assert not {manual, accepted} & set(events)
        started = [process.pid for process in airflow.processes.values()]

    for pid in started:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)


def last_run(project: Project) -> str:
    """The run that moved the watermark."""
    mark = project.watermark("spending")
    assert mark is not None
    return mark.run_id


def at(hours: int) -> str:
    moment: datetime = START + timedelta(hours=hours)
    return moment.isoformat()
