"""The backfill form: what it refuses, what a dry run leaves alone, what a real run does."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError
from jsonschema import FormatChecker

from materialize.airflow.tasks import FORM_FIELDS
from tests.airflow.project import START
from tests.airflow.runs import load_dags, run_dag

if TYPE_CHECKING:
    from tests.airflow.project import Project

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
        ({"dryrun": True}, "unknown fields 'dryrun'; the form has views, start, end, store, dry_run"),
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
