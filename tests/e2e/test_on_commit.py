"""Commits that reach the online store by themselves, and a sensor that waits for them, under a real scheduler and triggerer."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.airflow.project import Project
from tests.e2e.stack import ROOT, AirflowStack

pytestmark = [pytest.mark.e2e, pytest.mark.airflow]

ON_COMMIT, WAITS = "materialize_on_commit", "waits"
#: Seconds from a commit to the values online, on two busy cores: the promise is "seconds".
SOON = 60.0
SENSOR = """\
from airflow.sdk import DAG
from materialize.airflow.sensors import FreshnessSensor

with DAG("waits", schedule=None, params={"version": 0}):
    FreshnessSensor(task_id="wait", view="spending", version="{{ params.version }}", poke_interval=1, timeout=300)
"""


def test_commits_reach_the_store_within_seconds_coalesced_and_over_a_killed_triggerer(tmp_path: Path) -> None:
    # No other DAG that could do the work is there.
    dags = tmp_path / "dags"
    dags.mkdir()
    shutil.copy(ROOT / "dags" / f"{ON_COMMIT}.py", dags)
    (dags / "waits.py").write_text(SENSOR)
    project = Project(tmp_path / "project")
    project.say("spending", "on_commit: true")
    for view in ("spending", "risk"):
        project.load(view)

    with AirflowStack(
        tmp_path / "airflow",
        dags,
        triggerer=True,
        MATERIALIZE_CONFIG=str(project.root / "config"),
        # How long a dead triggerer counts as alive; 30 unless set.
        AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD="8",
    ) as airflow:
        airflow.parsed(ON_COMMIT, WAITS)

        # One commit. A view that does not say on_commit stays as it is.
        project.add("risk", 1, event=1, amount=1.5)
        project.add("spending", 1, event=1, amount=2.0)
        committed = time.monotonic()
        airflow.wait_until(lambda: project.amount("spending", 1) == 2.0, "the commit to be online")
        print(f"online {time.monotonic() - committed:.1f} s after the commit")
        assert time.monotonic() - committed < SOON
        assert project.amount("risk", 1) == 1.0

        # Many commits, during a run too: they coalesce, and the last one arrives.
        before, commits = len(airflow.runs(ON_COMMIT)), 12
        for commit in range(commits):
            project.add("spending", 1, event=2 + commit / 100, amount=float(commit))
            time.sleep(1)
        committed = time.monotonic()
        airflow.wait_until(lambda: project.amount("spending", 1) == commits - 1.0, "the last commit to be online")
        print(f"last online {time.monotonic() - committed:.1f} s after the commit")
        assert time.monotonic() - committed < SOON
        airflow.wait_until(lambda: airflow.idle(ON_COMMIT), "the runs to end")
        runs = airflow.runs(ON_COMMIT)
        assert {run["state"] for run in runs} == {"success"}, airflow.logs()
        assert 0 < len(runs) - before < commits / 2

        # A sensor waits, the triggerer dies, a commit is made meanwhile.
        version = commits + 2
        waiting = airflow.trigger(WAITS, conf={"version": version})
        airflow.wait_until(lambda: airflow.tasks(WAITS, waiting) == {"wait": "deferred"}, "the sensor to wait")
        airflow.kill("triggerer")
        project.add("spending", 2, event=3, amount=3.0)
        assert airflow.tasks(WAITS, waiting) == {"wait": "deferred"}
        airflow.start("triggerer")
        committed = time.monotonic()
        airflow.wait_until(lambda: project.amount("spending", 2) == 3.0, "the commit to be online")
        print(f"online {time.monotonic() - committed:.1f} s after the restart")
        assert airflow.finished(WAITS, waiting) == "success", airflow.logs()
        assert airflow.returned(WAITS, waiting, "wait")["version"] == version
