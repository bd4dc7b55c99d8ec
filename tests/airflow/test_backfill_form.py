"""The backfill form: what it refuses, what a dry run leaves alone, what a real run does."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError
from deltalake import DeltaTable
from jsonschema import FormatChecker

from materialize.airflow.form_tasks import FORM_FIELDS
from materialize.errors import QuarantineError
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


@pytest.mark.parametrize("parallel", [0, 65, "many"])
def test_number_of_tasks_is_refused_before_the_run_exists(project: Project, parallel: Any) -> None:
    with pytest.raises(ParamValidationError, match="parallel"):
        run_dag(FORM, conf=filled(parallel=parallel))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"views": []}, "views: expected at least one of profile, risk, spending, found none"),
        ({"start": None}, "start: expected a time such as '2026-01-31T00:00:00Z', found nothing"),
        ({"end": "tomorrow"}, "end: expected a time such as '2026-01-31T00:00:00Z', found 'tomorrow'"),
        ({"start": "2026-01-31T00:00:00"}, "start: expected a time with a time zone such as '2026-01-31T00:00:00Z'"),
        ({"end": START.isoformat()}, "end: expected a time after the start"),
        (
            {"dryrun": True},
            "unknown fields 'dryrun'; the form has views, mode, start, end, store, dry_run, parallel, force",
        ),
        ({"mode": "verify", "start": None}, "end: expected nothing, because a verify takes the whole table, found"),
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


def test_dry_run_is_the_default_and_writes_nothing(project: Project) -> None:
    form = filled()
    del form["dry_run"]

    run = run_dag(FORM, conf=form)

    assert run.state == "success"
    assert {name: state for name, state in run.tasks.items() if state == "success"} == {
        "check": "success",
        "plan[0]": "success",
        "summary": "success",
    }
    assert run.tasks["approve"] == run.tasks["to_default.targets"] == run.tasks["to_default.commit"] == "skipped"
    assert run.values["plan[0]"]["rows"] == 1
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


def test_verify_reports_each_view_and_is_red_where_one_differs(project: Project) -> None:
    run_dag("materialize_hourly")
    project.lose("spending", 1)

    run = run_dag(FORM, conf={"views": ["spending", "risk"], "mode": "verify", "dry_run": False})

    assert run.state == "failed"
    assert {name for name, state in run.tasks.items() if state == "failed"} == {"to_default.judge"}
    assert "1 of 1 compared entities differ (missing 1" in str(run.errors["to_default.judge"])
    assert {name: extra["missing"] for name, extra in run.events.items()} == {
        "default/spending/verified": 1,
        "default/risk/verified": 0,
    }
    assert project.vector("spending", 1).status == "missing"
    assert run.tasks["to_default.begin"] == run.tasks["approve"] == "skipped"
    assert run.labels["to_default.verify[0]"] == "spending"


def test_verify_and_repair_mends_and_a_view_that_cannot_be_compared_holds_back_no_other(project: Project) -> None:
    run_dag("materialize_hourly")
    project.lose("spending", 1)
    everything = {"views": ["profile", "spending"], "mode": "verify and repair", "dry_run": False}

    run = run_dag(FORM, conf=everything)
    again = run_dag(FORM, conf=everything)

    assert project.amount("spending", 1) == 1.0
    assert (run.tasks["plan[0]"], run.tasks["to_default.judge"]) == ("failed", "failed")
    assert "All of them are repaired" in str(run.errors["to_default.judge"])
    assert "could not compare profile: found no report" in str(again.errors["to_default.judge"])
    assert "it never loaded" in str(again.errors["plan[0]"])
    assert again.state == "failed"


def test_a_dry_run_of_a_comparison_shows_its_rows_and_compares_nothing(project: Project) -> None:
    run_dag("materialize_hourly")
    project.lose("spending", 1)

    run = run_dag(FORM, conf={"views": ["spending"], "mode": "verify and repair"})

    assert run.state == "success"
    assert (run.values["plan[0]"]["mode"], run.values["plan[0]"]["rows"]) == ("repair", 1)
    assert run.tasks["to_default.verify"] == "skipped"
    assert project.vector("spending", 1).status == "missing"


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


def test_a_table_that_became_empty_is_rebuilt_only_by_force(project: Project) -> None:
    run_dag("materialize_hourly")
    DeltaTable(str(project.root / "spending")).delete()
    before, form = project.watermark("spending"), {"views": ["spending"], "mode": "rebuild", "dry_run": False}

    refused = run_dag(FORM, conf=form)
    assert (refused.state, refused.tasks["plan[0]"]) == ("failed", "failed")
    assert "found 0 live rows, where there were 1" in str(refused.errors["plan[0]"])
    assert (project.amount("spending", 1), project.watermark("spending")) == (1.0, before)

    forced = run_dag(FORM, conf=form | {"force": True})
    assert forced.state == "success"
    assert project.vector("spending", 1).status == "missing"


def test_too_many_quarantined_rows_are_committed_only_by_force(project: Project) -> None:
    project.say("spending", "max_quarantined: 10%")
    run_dag("materialize_hourly")
    project.add("spending", 2, event=40, amount=2.0)
    form = {"views": ["spending"], "mode": "rebuild", "dry_run": False}

    refused = run_dag(FORM, conf=form)
    assert isinstance(refused.errors["to_default.write[0]"], QuarantineError)
    assert project.watermark("spending").version is None

    assert run_dag(FORM, conf=form | {"force": True}).state == "success"
    assert project.watermark("spending").version == 1


def test_dry_run_of_a_rebuild_writes_nothing(project: Project) -> None:
    run = run_dag(FORM, conf={"views": ["spending"], "mode": "rebuild"})

    assert (run.state, run.tasks["to_default.write"]) == ("success", "skipped")
    assert run.values["plan[0]"]["mode"] == "rebuild"
    assert project.watermark("spending") is None


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_dry_run_says_what_a_store_that_bills_by_the_row_costs(project: Project, dynamodb_local: DynamoDbLocal) -> None:
    dynamodb_local.drop_tables()
    url = f"dynamodb://key:secret@{REGION}/fs?endpoint_url={dynamodb_local.endpoint}"
    project.set_stores(default=url)
    with open_store(OnlineStoreConfig("default", url)) as store:
        store.setup("spending")

    run = run_dag(FORM, conf={"views": ["spending"], "mode": "rebuild"})

    told = run.values["summary"]["markdown"]
    assert run.state == "success"
    assert "| spending | default | rebuild | 0 | 1 | 1 | 0.0 | 0.0 | way conditional updates" in told
    assert "; write_units 1; read_units 0;" in told
    assert "secret" not in told


def test_pieces_of_all_views_are_written_by_as_many_tasks_as_the_form_says(project: Project) -> None:
    project.add("spending", 2, event=0.5, amount=2.0)
    pretend_rows(project, "spending", 45_000_000)

    run = run_dag(FORM, conf=filled(views=["spending", "risk"], parallel=2))

    assert run.state == "success"
    assert {run.labels[name] for name in run.tasks if ".write" in name} == {
        "spending in default: part 1-3 of 5",
        "spending in default: part 4-5 of 5, risk in default: part 1 of 1",
    }
    assert {run.labels[name] for name in run.tasks if ".commit" in name} == {"spending", "risk"}
    assert [project.amount("spending", user) for user in (1, 2)] == [1.0, 2.0]
    assert project.amount("risk", 1) == 1.0
    assert {name: extra["written"] for name, extra in run.events.items()} == {"default/spending": 2, "default/risk": 1}


def test_a_failing_piece_holds_back_its_own_view_only(project: Project) -> None:
    pretend_rows(project, "risk", 25_000_000)
    for file in (project.root / "risk").glob("*.parquet"):
        file.unlink()

    run = run_dag(FORM, conf=filled(views=["risk", "spending"], parallel=1))

    assert run.state == "failed"
    assert run.tasks["to_default.write[0]"] == "failed"
    assert "found 0 written pieces, expected 3" in str(run.errors["to_default.commit[0]"])
    assert run.tasks["to_default.commit[1]"] == "success"
    assert project.amount("spending", 1) == 1.0


def test_each_store_has_its_own_tasks_in_its_own_pool(project: Project) -> None:
    (project.root / "config" / "online_stores.yaml").write_text(
        f'default: {{url: "sqlite:///{project.root}/online.db", pool: small}}\n'
        f'second: {{url: "sqlite:///{project.root}/second.db"}}\nunused: {{url: "memory://"}}\n'
    )
    project.set_view("risk", store="default, second")

    dag = load_dags().dags[FORM]
    run = run_dag(FORM, conf=filled(views=["risk"], store="second"))

    pools = {task.task_id: task.pool for task in dag.tasks}
    assert {name.partition(".")[0] for name in pools if "." in name} == {"to_default", "to_second"}
    assert (pools["to_default.write"], pools["to_second.write"]) == ("small", "default_pool")
    assert run.state == "success"
    assert run.tasks["to_default.targets"] == run.tasks["to_default.commit"] == "skipped"
    assert project.vector("risk", 1, store="second").status == "present"
    assert project.vector("risk", 1).status == "missing"


def pretend_rows(project: Project, view: str, rows: int) -> None:
    """Have the table's log say that its first file has so many rows, which is what pieces are cut by."""
    path = project.root / view / "_delta_log" / f"{0:020}.json"
    path.write_text(path.read_text().replace('\\"numRecords\\":1,', f'\\"numRecords\\":{rows},'))


def test_unknown_mode_is_refused_before_the_run_exists(project: Project) -> None:
    with pytest.raises(ParamValidationError, match="'replay' is not one of"):
        run_dag(FORM, conf=filled(mode="replay"))


def test_a_failing_view_does_not_hold_back_the_other(project: Project) -> None:
    project.set_view("risk", source=str(project.root / "nowhere"))

    run = run_dag(FORM, conf=filled(views=["risk", "spending"]))

    assert run.state == "failed"
    assert (run.tasks["plan[0]"], run.tasks["to_default.begin[0]"]) == ("failed", "failed")
    assert "found no plan, expected the one of the task plan" in str(run.errors["to_default.begin[0]"])
    assert "its run was not begun" in str(run.errors["to_default.commit[0]"])
    assert run.tasks["to_default.commit[1]"] == "success"
    assert project.amount("spending", 1) == 1.0
    assert list(run.events) == ["default/spending"]


def test_backfill_that_changes_nothing_emits_no_event(project: Project) -> None:
    run_dag("materialize_hourly")

    run = run_dag(FORM, conf=filled())

    assert run.values["to_default.commit[0]"]["unchanged"] == 1
    assert run.events == {}


def test_interval_without_rows_is_committed_all_the_same(project: Project) -> None:
    empty = {"start": (START + timedelta(days=40)).isoformat(), "end": (START + timedelta(days=41)).isoformat()}

    run = run_dag(FORM, conf=filled(**empty))

    assert run.state == "success"
    assert run.values["plan[0]"]["pieces"] == 0
    assert run.values["to_default.commit[0]"]["entities"] == 0


def test_summary_is_a_table_with_sums(project: Project) -> None:
    pretend_rows(project, "spending", 25_000_000)

    run = run_dag(FORM, conf=filled(views=["spending", "risk"], dry_run=True, parallel=2))

    total = run.values["summary"]
    assert (total["rows"], total["pieces"], total["minutes"]) == (25_000_001, 4, 2.1)
    lines = total["markdown"].splitlines()
    assert lines[2].startswith("| spending | default | backfill | 0 | 25,000,000 | 3 | 2.1 | ")
    assert lines[4] == f"| all | | | | 25,000,001 | 4 | 2.1 | {total['gigabytes']} | |"


def test_task_that_was_tried_again_emits_an_event_in_doubt(project: Project) -> None:
    # What its first try wrote is unchanged for the second.
    run_dag("materialize_hourly")

    run = run_dag(FORM, conf=filled(), first_try=2)

    assert run.values["to_default.commit[0]"]["unchanged"] == 1
    assert list(run.events) == ["default/spending"]


def test_nobody_is_asked_about_a_run_that_is_not_large(project: Project) -> None:
    project.set_stores(default=f"sqlite:///{project.root}/online.db")
    with (project.root / "config" / "online_stores.yaml").open("a") as file:
        file.write(f'second: {{url: "sqlite:///{project.root}/second.db", approve_above_rows: 1}}\n')
    project.set_view("risk", store="default, second")
    project.add("risk", 2, event=0.5, amount=2.0)

    run = run_dag(FORM, conf=filled(views=["risk"], store="default"))
    large = run_dag(FORM, conf=filled(views=["risk"], dry_run=True))

    assert (run.state, run.tasks["approve"]) == ("success", "skipped")
    assert large.tasks["approve"] == "skipped"
    assert large.values["summary"]["approval"] == ["second: 2 rows, more than approve_above_rows: 1"]


def test_form_offers_the_configured_views_and_stores(project: Project) -> None:
    params = load_dags().dags[FORM].params

    assert list(params) == list(FORM_FIELDS)
    assert params.get_param("views").schema["examples"] == ["profile", "risk", "spending"]
    assert params["dry_run"] is True
