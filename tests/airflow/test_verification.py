"""The daily comparison: what it reports, when it is red, what it repairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from materialize.airflow.verification import verified
from materialize.errors import MismatchError, OnlineStoreError
from tests.airflow.runs import load_dags, run_dag

if TYPE_CHECKING:
    from tests.airflow.project import Project

pytestmark = pytest.mark.usefixtures("metadata_database")

VERIFY = "materialize_verify"
COUNTERS = ("compared", "missing", "extra", "stale", "wrong", "newer", "repaired")


@pytest.fixture
def loaded(project: Project) -> Project:
    """Three views online, of which spending has two entities."""
    project.add("spending", 2, event=1, amount=2.0)
    for schedule in ("hourly", "daily"):
        assert run_dag(f"materialize_{schedule}").state == "success"
    return project


def test_what_agrees_is_reported_as_an_event_of_each_view(loaded: Project) -> None:
    run = run_dag(VERIFY)

    assert run.state == "success"
    assert run.events.keys() == {f"default/{view}/verified" for view in ("spending", "risk", "profile")}
    report = run.events["default/spending/verified"]
    assert [report[name] for name in COUNTERS] == [2, 0, 0, 0, 0, 0, 0]
    assert (report["view"], report["store"], report["compare"], report["version"]) == (
        "spending",
        "default",
        "sample",
        1,
    )
    assert report["run_id"] == f"{VERIFY}/{run.run_id}/spending__default.verify"


def test_more_difference_than_is_tolerated_is_red_and_holds_back_no_other_view(loaded: Project) -> None:
    loaded.lose("spending", 2)

    run = run_dag(VERIFY)

    assert run.state == "failed"
    assert run.events["default/spending/verified"]["missing"] == 1
    assert {name for name, state in run.tasks.items() if state == "failed"} == {"spending__default.judge"}
    error = run.errors["spending__default.judge"]
    assert isinstance(error, MismatchError)
    assert "1 of 2 compared entities differ" in str(error)
    assert "Run: materialize verify spending --store default --repair" in str(error)
    assert loaded.vector("spending", 2).status == "missing"


def test_a_share_that_the_view_tolerates_is_not_red(loaded: Project) -> None:
    loaded.lose("spending", 2)
    loaded.say("spending", "verify: {max_mismatched: 50%}")

    run = run_dag(VERIFY)

    assert run.state == "success"
    assert run.events["default/spending/verified"]["missing"] == 1


def test_a_view_that_says_so_is_repaired_and_still_red(loaded: Project) -> None:
    loaded.lose("spending", 2)
    loaded.say("spending", "verify: {repair: true}")

    first = run_dag(VERIFY)
    second = run_dag(VERIFY)

    assert loaded.amount("spending", 2) == 2.0
    assert (first.state, second.state) == ("failed", "success")
    assert "All of them are repaired" in str(first.errors["spending__default.judge"])
    assert [first.events["default/spending/verified"][name] for name in ("compare", "repaired")] == ["full", 1]


def test_a_view_that_cannot_be_compared_is_red_without_a_report(project: Project) -> None:
    run_dag("materialize_hourly")

    run = run_dag(VERIFY)

    assert run.tasks["profile__default.verify"] == "failed"
    assert run.tasks["profile__default.judge"] == "upstream_failed"
    assert isinstance(run.errors["profile__default.verify"], OnlineStoreError)
    assert "default/profile/verified" not in run.events


def test_each_view_is_compared_in_each_store_in_the_pool_of_that_store(project: Project) -> None:
    (project.root / "config" / "online_stores.yaml").write_text(
        'default: {url: "sqlite:///a.db"}\nsecond: {url: "sqlite:///b.db", pool: small}\n'
    )
    project.set_view("risk", store="default, second")
    project.say("risk", "owner: risk-team")

    tasks = load_dags().dags[VERIFY].task_dict

    assert {name.partition(".")[0] for name in tasks} == {
        *("spending__default", "profile__default", "risk__default", "risk__second"),
    }
    assert (tasks["risk__second.verify"].pool, tasks["risk__default.verify"].pool) == ("small", "default_pool")
    assert tasks["risk__second.judge"].owner == "risk-team"
    assert [one.uri for one in tasks["risk__second.verify"].outlets] == [verified("risk", "second").uri]
