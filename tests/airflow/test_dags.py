"""The DAG files: what they contain, what they cost, and how a wrong configuration shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from materialize.airflow.tasks import config_dir
from tests.airflow.runs import load_dags

if TYPE_CHECKING:
    from tests.airflow.project import Project

ROOT = Path(__file__).parents[2]
DAG_IDS = {
    "example_score_when_fresh",
    "materialize_backfill",
    "materialize_daily",
    "materialize_hourly",
    "materialize_verify",
}
HEAVY = ("polars", "deltalake", "pyarrow", "redis", "boto3", "numpy")
#: CPU seconds that parsing a DAG file may take beyond importing airflow, with so many views.
PARSE_BUDGET, VIEWS = 0.5, 200

#: Airflow parses each DAG file in a process of its own, forked from one that has imported airflow.
PARSE = """
import json, os, sys, time
from airflow.dag_processing.dagbag import BundleDagBag
import airflow.sdk
from airflow.sdk import DAG, Asset, AssetAlias, BaseHook, CronPartitionTimetable, Param, TaskGroup, TriggerRule, task, task_group

@task
def nothing():
    pass

with DAG("warm"):
    nothing()
before = set(sys.modules)
# Each five times: what else the machine does costs CPU seconds too, by emptied caches.
for file in sorted(os.listdir(sys.argv[1])) * 5:
    if not file.endswith(".py"):
        continue
    if os.fork():
        os.wait()
        continue
    started = time.process_time()
    bag = BundleDagBag(os.path.join(sys.argv[1], file), bundle_path=sys.argv[1], bundle_name="dags-folder")
    print(json.dumps({
        "file": file,
        "seconds": time.process_time() - started,
        "errors": bag.import_errors,
        "dags": sorted(bag.dags),
        "loaded": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    }), flush=True)
    os._exit(0)
"""


def test_every_view_and_store_has_its_own_chain_of_tasks(project: Project, metadata_database: None) -> None:
    project.set_stores(default="sqlite:///a.db", second="sqlite:///b.db")
    project.set_view("risk", store="default, second")

    bag = load_dags()

    assert bag.import_errors == {}
    assert set(bag.dags) == DAG_IDS
    chains = {name: {task.task_id.rpartition(".")[0] for task in dag.tasks} for name, dag in bag.dags.items()}
    assert chains["materialize_hourly"] == {"spending__default", "risk__default", "risk__second"}
    assert chains["materialize_daily"] == {"profile__default"}
    hourly = bag.dags["materialize_hourly"]
    order = [task.task_id for task in hourly.topological_sort() if task.task_id.startswith("risk__second.")]
    assert order == [f"risk__second.{name}" for name in ("plan", "write", "commit", "publish")]
    for task in hourly.tasks:
        other = {one.rpartition(".")[0] for one in task.upstream_task_ids} - {task.task_id.rpartition(".")[0]}
        assert not other, f"{task.task_id} waits for another view"


def test_lineage_leads_from_the_delta_table_to_the_online_view(project: Project, metadata_database: None) -> None:
    project.set_view("risk", source="s3://lake/risk table")

    tasks = load_dags().dags["materialize_hourly"].task_dict

    ends = {
        view: [[(one.name, one.uri) for one in side] for side in (task.inlets, task.outlets)]
        for view in ("spending", "risk")
        for task in [tasks[f"{view}__default.publish"]]
    }
    folder = str(project.root / "spending")
    assert ends == {
        "spending": [[(folder, f"file://{folder}")], [("default/spending", "materialize://default/spending")]],
        "risk": [
            [("s3://lake/risk table", "s3://lake/risk table")],
            [("default/risk", "materialize://default/risk")],
        ],
    }


def test_tasks_use_the_pool_of_their_store_and_the_default_one_without(
    project: Project, metadata_database: None
) -> None:
    (project.root / "config" / "online_stores.yaml").write_text(
        'default: {url: "sqlite:///a.db"}\nsecond: {url: "sqlite:///b.db", pool: small}\n'
    )
    project.set_view("risk", store="default, second")

    hourly = load_dags().dags["materialize_hourly"]

    assert {task.pool for task in hourly.tasks if task.task_id.startswith("risk__second.")} == {"small"}
    assert {task.pool for task in hourly.tasks if "__default." in task.task_id} == {"default_pool"}


def test_pools_that_are_shipped_are_what_airflow_imports() -> None:
    pools = json.loads((ROOT / "pools.json").read_text())

    assert pools
    for name, pool in pools.items():
        assert name.startswith("materialize_")
        assert pool.keys() == {"slots", "description", "include_deferred"}
        assert pool["slots"] > 0


def test_schedules_are_partitioned_and_never_catch_up(project: Project, metadata_database: None) -> None:
    bag = load_dags()

    for name, cron, key_format in (
        ("materialize_hourly", "0 * * * *", "%Y-%m-%dT%H"),
        ("materialize_daily", "0 0 * * *", "%Y-%m-%d"),
    ):
        dag = bag.dags[name]
        assert (dag.timetable.expression, dag.timetable.key_format, dag.timetable.run_offset) == (cron, key_format, -1)
        assert dag.catchup is False
        assert dag.max_active_runs == 1


def test_a_config_error_is_the_import_error_of_every_dag_file(project: Project, metadata_database: None) -> None:
    path = project.root / "config" / "feature_views" / "risk.yaml"
    path.write_text(path.read_text() + "ttl: 24\n")

    bag = load_dags()

    assert len(bag.import_errors) == 5
    assert all("ConfigError" in text and "ttl" in text and "risk.yaml" in text for text in bag.import_errors.values())


def test_parsing_the_dag_files_is_cheap_and_loads_nothing_heavy(project: Project) -> None:
    for number in range(VIEWS - 3):
        project.set_view(f"view_{number}")
        project.say(f"view_{number}", "on_commit: true")

    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT / "dags")],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )

    files = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {dag for found in files for dag in found["dags"]} == DAG_IDS | {"materialize_on_commit"}
    for found in files:
        assert found["errors"] == {}
        assert not set(HEAVY) & set(found["loaded"])
    for file in {found["file"] for found in files}:
        assert min(found["seconds"] for found in files if found["file"] == file) < PARSE_BUDGET, file


def test_config_folder_is_beside_the_dags_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATERIALIZE_CONFIG", raising=False)
    assert config_dir(Path("/srv/dags")) == Path("/srv/config")

    monkeypatch.setenv("MATERIALIZE_CONFIG", "/etc/features")
    assert config_dir(Path("/srv/dags")) == Path("/etc/features")
