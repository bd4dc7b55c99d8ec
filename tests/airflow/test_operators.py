"""`MaterializeOperator` in other people's DAGs: real runs on a real metadata database, real Delta tables and an SQLite online store."""

from __future__ import annotations

import socket
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk import DAG

from materialize.airflow.dags import TASK_DEFAULTS
from materialize.airflow.operators import MaterializeOperator
from materialize.airflow.tasks import asset
from materialize.errors import ConfigError, UnavailableError
from materialize.model import Interval
from tests.airflow.project import START
from tests.airflow.runs import load_dags, run_dag

if TYPE_CHECKING:
    from pathlib import Path

    from tests.airflow.project import Project

pytestmark = pytest.mark.usefixtures("metadata_database")

DAG_FILE = """\
from datetime import timedelta
from airflow.sdk import DAG, Param
from materialize.airflow.operators import MaterializeOperator

with DAG("theirs", schedule=None, default_args={default_args}, params={params}):
    {tasks}
"""


def write(
    folder: Path, tasks: str, *, default_args: dict[str, Any] | None = None, params: dict[str, Any] | None = None
) -> Path:
    """A folder with one DAG, ``theirs``."""
    folder.mkdir(exist_ok=True)
    text = DAG_FILE.format(tasks=tasks, default_args=default_args or {}, params=params or {})
    (folder / "theirs.py").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "their_dags"


def test_one_task_does_a_whole_run_and_returns_its_report(project: Project, folder: Path) -> None:
    write(folder, 'MaterializeOperator(task_id="load", view="spending")')

    run = run_dag("theirs", folder=folder)

    assert run.state == "success"
    assert project.amount("spending", 1) == 1.0
    report = run.values["load"]
    assert (report["view"], report["store"], report["mode"], report["written"]) == (
        "spending",
        "default",
        "incremental",
        1,
    )
    assert report["run_id"] == f"theirs/{run.run_id}/load"


def test_event_is_the_one_of_the_hourly_dag_and_there_is_none_when_readers_see_nothing_new(
    project: Project, folder: Path
) -> None:
    write(folder, 'MaterializeOperator(task_id="load", view="spending")')

    first, second = run_dag("theirs", folder=folder), run_dag("theirs", folder=folder)
    project.add("spending", 1, event=1, amount=2.0)
    third = run_dag("theirs", folder=folder)

    hourly = load_dags().dags["materialize_hourly"].task_dict["spending__default.publish"]
    assert (
        load_dags(folder).dags["theirs"].task_dict["load"].outlets == hourly.outlets == [asset("spending", "default")]
    )
    assert (first.tasks, second.tasks, third.tasks) == ({"load": "success"},) * 3
    assert second.values["load"]["written"] == 0
    assert (set(first.events), second.events, set(third.events)) == ({"default/spending"}, {}, {"default/spending"})
    extra = third.events["default/spending"]
    assert (extra["view"], extra["from_version"], extra["to_version"], extra["written"]) == ("spending", 0, 1, 1)


def test_other_outlets_of_the_task_stay(project: Project, folder: Path) -> None:
    write(
        folder, 'from airflow.sdk import Asset; MaterializeOperator(task_id="load", view="risk", outlets=[Asset("a")])'
    )

    first, second = run_dag("theirs", folder=folder), run_dag("theirs", folder=folder)

    assert set(first.events) == {"a", "default/risk"}
    assert set(second.events) == {"a"}


def test_rebuild_replaces_what_is_online(project: Project, folder: Path) -> None:
    write(folder, 'MaterializeOperator(task_id="load", view="spending", mode="rebuild")')

    run_dag("theirs", folder=folder)
    before = project.watermark("spending").generation
    run = run_dag("theirs", folder=folder)

    assert (run.values["load"]["mode"], run.values["load"]["written"]) == ("rebuild", 1)
    assert project.watermark("spending").generation == before + 1


def test_backfill_loads_its_templated_interval_and_leaves_the_watermark(project: Project, folder: Path) -> None:
    project.add("spending", 2, event=5, amount=2.0)
    project.add("spending", 3, event=6, amount=3.0)
    write(
        folder,
        'MaterializeOperator(task_id="load", view="{{ params.view }}", mode="backfill", '
        'start="{{ params.start }}", end="{{ params.end }}")',
        params={"view": "spending", "start": "", "end": ""},
    )
    start, end = START + timedelta(hours=5), START + timedelta(hours=6)
    conf = {"start": start.isoformat(), "end": end.isoformat()}

    run = run_dag("theirs", folder=folder, conf=conf)

    assert run.values["load"]["interval"] == str(Interval(start, end))
    assert [project.amount("spending", user) for user in (1, 2, 3)] == [None, 2.0, None]
    assert project.watermark("spending") is None


def test_backfill_takes_datetimes(project: Project, folder: Path) -> None:
    project.add("spending", 2, event=5, amount=2.0)
    ends = [START + timedelta(hours=hour) for hour in (5, 6)]
    write(
        folder,
        "import datetime; "
        f'MaterializeOperator(task_id="load", view="spending", mode="backfill", start={ends[0]!r}, end={ends[1]!r})',
    )

    run = run_dag("theirs", folder=folder)

    assert run.values["load"]["interval"] == str(Interval(*ends))
    assert project.amount("spending", 2) == 2.0


def test_interval_may_be_what_another_task_returns(project: Project, folder: Path) -> None:
    project.add("spending", 2, event=5, amount=2.0)
    ends = [(START + timedelta(hours=hour)).isoformat() for hour in (5, 6)]
    write(
        folder,
        "from airflow.sdk import task; "
        f'asked = task(task_id="ask", multiple_outputs=True)(lambda: {{"start": {ends[0]!r}}})(); '
        f'MaterializeOperator(task_id="load", view="spending", mode="backfill", start=asked["start"], end={ends[1]!r})',
    )

    run = run_dag("theirs", folder=folder)

    assert run.tasks == {"ask": "success", "load": "success"}
    assert project.amount("spending", 2) == 2.0


def test_template_that_renders_to_no_time_fails_at_once(project: Project, folder: Path) -> None:
    write(
        folder,
        'MaterializeOperator(task_id="load", view="spending", mode="backfill", start="{{ params.start }}", end="{{ params.start }}")',
        params={"start": "yesterday"},
    )

    run = run_dag("theirs", folder=folder)

    assert run.tasks == {"load": "failed"}
    assert isinstance(run.errors["load"], ConfigError)
    assert "start: expected a time such as '2026-01-31T00:00:00Z', found 'yesterday'" in str(run.errors["load"])


def test_templated_view_emits_the_event_of_the_view_that_ran(project: Project, folder: Path) -> None:
    load_dags()  # the hourly DAG makes the assets known
    run_dag("materialize_hourly")
    project.add("risk", 1, event=1, amount=2.0)
    write(folder, 'MaterializeOperator(task_id="load", view="{{ params.view }}")', params={"view": "risk"})

    run = run_dag("theirs", folder=folder)

    assert set(run.events) == {"default/risk"}


def test_mapped_tasks_each_run_one_view_with_its_event(project: Project, folder: Path) -> None:
    run_dag("materialize_daily")  # makes the assets of this view known
    project.add("profile", 1, event=1, amount=1.0)
    write(
        folder,
        "from materialize.airflow.dags import TASK_DEFAULTS; "
        'MaterializeOperator.partial(task_id="load", **TASK_DEFAULTS).expand(view=["spending", "profile"])',
    )

    run = run_dag("theirs", folder=folder)

    assert run.tasks == {"load[0]": "success", "load[1]": "success"}
    assert [project.amount(view, 1) for view in ("spending", "profile")] == [1.0, 1.0]
    assert "default/profile" in run.events
    assert load_dags(folder).dags["theirs"].task_dict["load"].retries == TASK_DEFAULTS["retries"]


def test_store_that_does_not_answer_is_tried_again_and_a_wrong_view_is_not(project: Project, folder: Path) -> None:
    write(
        folder,
        "[MaterializeOperator(task_id=view, view=view, store=store) "
        'for view, store in (("risk", "away"), ("nobody", "default"), ("spending", "nowhere"))]',
    )
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        project.set_stores(
            default=f"sqlite:///{project.root}/online.db", away=f"redis://127.0.0.1:{closed.getsockname()[1]}/0"
        )

        run = run_dag("theirs", folder=folder)

    assert run.tasks == {"risk": "up_for_retry", "nobody": "failed", "spending": "failed"}
    assert isinstance(run.errors["risk"], UnavailableError)
    assert isinstance(run.errors["nobody"], ConfigError)
    assert "could not find the online store 'nowhere'" in str(run.errors["spending"])


def test_default_args_of_the_dag_win_over_ours_and_lose_to_the_task(project: Project, folder: Path) -> None:
    write(
        folder,
        'MaterializeOperator(task_id="a", view="risk"); MaterializeOperator(task_id="b", view="risk", retries=9)',
        default_args={"retries": 7},
    )

    tasks = load_dags(folder).dags["theirs"].task_dict

    assert [(task.retries, task.retry_delay) for task in tasks.values()] == [
        (7, timedelta(seconds=30)),
        (9, timedelta(seconds=30)),
    ]


def test_config_folder_can_be_named(project: Project, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATERIALIZE_CONFIG")
    write(folder, f'MaterializeOperator(task_id="load", view="risk", config={str(project.root / "config")!r})')

    run = run_dag("theirs", folder=folder)

    assert run.state == "success"


NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"mode": "all"}, "mode: expected one of incremental, backfill, rebuild, found 'all'"),
        ({"start": NOON}, "start: expected nothing, because only a backfill takes an interval"),
        ({"mode": "rebuild", "end": "{{ ds }}"}, "end: expected nothing, because only a backfill takes an interval"),
        ({"mode": "backfill", "start": NOON}, "end: expected a time such as '2026-01-31T00:00:00Z', found nothing"),
        (
            {"mode": "backfill", "start": NOON.replace(tzinfo=None), "end": NOON},
            "start: expected a time with a time zone",
        ),
        ({"mode": "backfill", "start": NOON, "end": "tomorrow"}, "end: expected a time such as"),
        ({"mode": "backfill", "start": NOON, "end": NOON}, "end: expected a time after the start"),
    ],
)
def test_wrong_arguments_are_refused_when_the_dag_is_parsed(arguments: dict[str, Any], problem: str) -> None:
    with (
        DAG("theirs", schedule=None),
        pytest.raises(ConfigError, match="arguments of task 'load': 1 problem;") as caught,
    ):
        MaterializeOperator(task_id="load", view="risk", **arguments)

    assert problem in str(caught.value)
    assert str(caught.value).count("\n") == 1
