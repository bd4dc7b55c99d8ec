"""The backfill form: what it refuses, what a dry run leaves alone, what a real run does."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError
from jsonschema import FormatChecker

from materialize.airflow.tasks import FORM_FIELDS
from materialize.model import OnlineStoreConfig
from materialize.online import open_store
from tests.airflow.project import START
from tests.airflow.runs import load_dags, run_dag
from tests.dynamodb_local import REGION

if TYPE_CHECKING:
    from tests.airflow.project import Project
    from tests.dynamodb_local import DynamoDbLocal

pytestmark = pytest.mark.usefixtures("metadata_database")

FORM = "materialize_backfill"


def filled(**changes: Any) -> dict[str, Any]:
    """A form that is accepted, for the first hour of the story, with *changes*."""
    start = START.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    end = (START + timedelta(hours=1)).isoformat()
    return {"views": ["spending"], "start": start, "end": end, "dry_run": False} | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"views": []}, "views: expected at least one of profile, risk, spending, found none"),
        ({"start": None}, "start: expected a time such as '2026-01-31T00:00:00Z', found nothing"),
        ({"end": "tomorrow"}, "end: expected a time such as '2026-01-31T00:00:00Z', found 'tomorrow'"),
        ({"start": "2026-01-31T00:00:00"}, "start: expected a time with a time zone such as '2026-01-31T00:00:00Z'"),
        ({"end": START.isoformat()}, "end: expected a time after the start"),
        ({"dryrun": True}, "unknown fields 'dryrun'; the form has views, mode, start, end, store, dry_run"),
        ({"mode": "rebuild", "end": None}, "start: expected nothing, because a rebuild takes the whole table, found"),
        ({"store": "second"}, "store: feature view 'spending' is served from default, found 'second'"),
    ],
)
def test_first_task_refuses_with_a_sentence(
    project: Project, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    # Airflow itself looks at times only where the package rfc3339-validator happens to be installed.
    monkeypatch.delitem(FormatChecker.checkers, "date-time", raising=False)
    project.set_stores(default=f"sqlite:///{project.root}/online.db", second="sqlite:///second.db")

    run = run_dag(FORM, conf=filled(**changes))

    assert run.state == "failed"
    assert run.tasks["check"] == "failed"
    assert isinstance(run.errors["check"], AirflowFailException)
    assert sentence in str(run.errors["check"])
    assert "1 problem;" in str(run.errors["check"])
    assert project.watermark("spending") is None


def test_every_problem_is_named_at_once(project: Project) -> None:
    run = run_dag(FORM, conf={"view": "spending"})

    text = str(run.errors["check"])
    assert "4 problems;" in text
    assert [name for name in ("unknown fields 'view'", "views:", "start:", "end:") if name not in text] == []


def test_unknown_view_is_refused_before_the_run_exists(project: Project) -> None:
    with pytest.raises(ParamValidationError, match="'nobody' is not one of"):
        run_dag(FORM, conf=filled(views=["nobody"]))


def test_dry_run_is_the_default_and_writes_nothing(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    form = filled()
    del form["dry_run"]

    run = run_dag(FORM, conf=form)

    assert run.state == "success"
    assert run.tasks == {"check": "success", "backfill.plan[0]": "success", "backfill.write[0]": "skipped"}
    assert run.values["backfill.plan[0]"]["rows"] == 1
    assert project.vector("spending", 1).status == "missing"
    assert run.events == {}


def test_chosen_views_are_loaded_and_the_watermark_stays(project: Project) -> None:
    run_dag("materialize_hourly")
    project.add("spending", 5, event=0.5, amount=5.0)
    project.add("risk", 6, event=0.5, amount=6.0)
    project.add("spending", 7, event=1.0, amount=7.0)
    before = project.watermark("spending")

    run = run_dag(FORM, conf=filled(views=["spending", "risk"]))

    assert run.state == "success"
    assert project.amount("spending", 5) == 5.0
    assert project.amount("risk", 6) == 6.0
    assert project.amount("spending", 7) is None, "the end is not part of the interval"
    assert project.watermark("spending") == before
    assert {name: extra["written"] for name, extra in run.events.items()} == {"default/spending": 1, "default/risk": 1}


def test_rebuild_replaces_what_is_online_and_moves_the_watermark(project: Project) -> None:
    project.add("spending", 2, event=1.0, amount=2.0)
    run_dag("materialize_hourly")
    before = project.watermark("spending")
    project.add("spending", 3, event=1.0, amount=3.0)

    run = run_dag(FORM, conf={"views": ["spending"], "mode": "rebuild", "dry_run": False})

    assert run.state == "success"
    assert [project.amount("spending", user) for user in (1, 2, 3)] == [1.0, 2.0, 3.0]
    after = project.watermark("spending")
    assert (after.version, after.generation) == (2, before.generation + 1)
    assert run.events["default/spending"]["mode"] == "rebuild"


def test_dry_run_of_a_rebuild_writes_nothing(project: Project) -> None:
    run = run_dag(FORM, conf={"views": ["spending"], "mode": "rebuild"})

    assert (run.state, run.tasks["backfill.write[0]"]) == ("success", "skipped")
    assert run.values["backfill.plan[0]"]["mode"] == "rebuild"
    assert project.watermark("spending") is None


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_dry_run_says_what_a_store_that_bills_by_the_row_costs(
    project: Project, dynamodb_local: DynamoDbLocal, caplog: pytest.LogCaptureFixture
) -> None:
    dynamodb_local.drop_tables()
    url = f"dynamodb://key:secret@{REGION}/fs?endpoint_url={dynamodb_local.endpoint}"
    project.set_stores(default=url)
    with open_store(OnlineStoreConfig("default", url)) as store:
        store.setup("spending")

    with caplog.at_level(logging.INFO, logger="materialize"):
        run = run_dag(FORM, conf={"views": ["spending"], "mode": "rebuild"})

    (told,) = [record.message for record in caplog.records if record.message.startswith("costs ")]
    assert run.state == "success"
    assert told.startswith("costs view=spending store=default way=conditional updates")
    assert "write_units=1 read_units=0 minutes=0.0" in told
    assert "secret" not in told


def test_unknown_mode_is_refused_before_the_run_exists(project: Project) -> None:
    with pytest.raises(ParamValidationError, match="'replay' is not one of"):
        run_dag(FORM, conf=filled(mode="replay"))


def test_a_failing_view_does_not_hold_back_the_other(project: Project) -> None:
    project.set_view("risk", source=str(project.root / "nowhere"))

    run = run_dag(FORM, conf=filled(views=["risk", "spending"]))

    assert run.tasks["backfill.plan[0]"] == "failed"
    assert run.tasks["backfill.write[1]"] == "success"
    assert project.amount("spending", 1) == 1.0


def test_backfill_that_changes_nothing_emits_no_event(project: Project) -> None:
    run_dag("materialize_hourly")

    run = run_dag(FORM, conf=filled())

    assert run.values["backfill.write[0]"]["unchanged"] == 1
    assert run.events == {}


def test_form_offers_the_configured_views_and_stores(project: Project) -> None:
    params = load_dags().dags[FORM].params

    assert list(params) == list(FORM_FIELDS)
    assert params.get_param("views").schema["examples"] == ["profile", "risk", "spending"]
    assert params["dry_run"] is True
