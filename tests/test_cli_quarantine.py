"""``materialize quarantine list`` and ``release``, and ``--force``: what they print, and how they end."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from materialize.cli import app
from tests.projects import PAST, Project
from tests.tables import T0, row

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests import servers


@pytest.fixture(params=["sqlite", pytest.param("valkey", marks=pytest.mark.server)])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    if request.param == "sqlite":
        return Project(tmp_path / "project", f"sqlite:///{tmp_path}/online.db")
    server: servers.Server = request.getfixturevalue("valkey")
    return Project(tmp_path / "project", server.url)


def cli(project: Project, *arguments: str) -> Result:
    """The command line in this process."""
    result = CliRunner().invoke(app, list(arguments), env={"MATERIALIZE_CONFIG": str(project.config), "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def told(project: Project, *arguments: str) -> list[dict[str, Any]]:
    result = cli(project, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def past(user: str | None, minutes: float = 1, amount: float = 0.0, **others: Any) -> dict[str, Any]:
    return row(user, PAST + minutes, amount, **others)


def in_two_hours() -> float:
    """Minutes after the tables' first event time."""
    return (datetime.now(timezone.utc) + timedelta(hours=2) - T0) / timedelta(minutes=1)


def fill(project: Project) -> None:
    """Load one good row, one without a key and two in the future."""
    project.configure(extra="max_future: 1h\n")
    future = in_two_hours()
    project.table.append(past("a"), past(None), row("b", future, 2.0), row("c", future + 1, 3.0))
    assert cli(project, "incremental").exit_code == 0


FUTURE = "event timestamp more than 1h in the future"


def test_list_counts_by_reason(project: Project) -> None:
    fill(project)

    counted = told(project, "quarantine", "list")
    text = cli(project, "quarantine", "list").stdout

    assert [(one["view"], one["store"], one["reason"], one["rows"]) for one in counted] == [
        ("spending", "default", FUTURE, 2),
        ("spending", "default", "null join key", 1),
    ]
    assert all(one["run_id"].startswith("cli-") for one in counted)
    assert all(word in text for word in FUTURE.split())
    assert "country" not in text  # rows only where they are asked for


def test_list_shows_rows_when_asked(project: Project) -> None:
    fill(project)

    rows = told(project, "quarantine", "list", "spending", "--rows")
    one = told(project, "quarantine", "list", "spending", "--rows", "--limit", "1")

    assert sorted(str(each["entity"]) for each in rows) == ["None", "b", "c"]
    assert {each["entity"]: json.loads(each["row"])["amount"] for each in rows} == {None: 0.0, "b": 2.0, "c": 3.0}
    assert len(one) == 1
    assert cli(project, "quarantine", "list", "--rows").exit_code == 0


def test_list_of_a_view_without_quarantined_rows_is_empty(project: Project) -> None:
    project.table.append(past("a"))
    cli(project, "incremental")

    assert told(project, "quarantine", "list") == []
    assert cli(project, "quarantine", "list").exit_code == 0


def test_release_brings_online_what_can_be_stored_now(project: Project) -> None:
    fill(project)
    project.configure(extra="max_future: 1d\n")

    (report,) = told(project, "quarantine", "release", "spending", "--all")
    again = cli(project, "quarantine", "release", "spending", "--all")

    assert (report["released"], report["held"], report["waiting"], report["written"]) == (2, 1, 0, 2)
    assert report["reasons"] == {"null join key": 1}
    assert json.loads(cli(project, "lookup", "spending", "b", "--json").stdout)["features"]["amount"] == 2.0
    assert [one["reason"] for one in told(project, "quarantine", "list")] == ["null join key"]
    assert (again.exit_code, "released=0" in again.stdout.replace(" ", "")) == (0, True), again.stdout


def test_release_of_some_rows(project: Project) -> None:
    fill(project)
    project.configure(extra="max_future: 1d\n")
    run_id = told(project, "quarantine", "list")[0]["run_id"]

    (by_reason,) = told(project, "quarantine", "release", "spending", "--reason", "null join")
    (other_run,) = told(project, "quarantine", "release", "spending", "--run", "other")
    (by_run,) = told(project, "quarantine", "release", "spending", "--run", run_id)

    assert (by_reason["released"], by_reason["held"]) == (0, 1)
    assert (other_run["released"], other_run["held"]) == (0, 0)
    assert (by_run["released"], by_run["held"]) == (2, 1)


@pytest.mark.parametrize("options", [(), ("--all", "--run", "x"), ("--reason", "x", "--run", "x")])
def test_release_wants_to_know_which_rows(project: Project, options: tuple[str, ...]) -> None:
    result = cli(project, "quarantine", "release", "spending", *options)

    assert result.exit_code == 2
    assert "expected one of --all, --reason TEXT and --run RUN" in " ".join(result.stderr.replace("│", " ").split())


def test_release_of_a_view_that_never_loaded_says_what_to_run(project: Project) -> None:
    project.table.append(past("a"))

    result = cli(project, "quarantine", "release", "spending", "--all")

    assert result.exit_code == 1
    assert "it never loaded" in result.stderr
    assert "Run: materialize incremental spending" in result.stderr


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
def test_force_lets_one_run_pass(project: Project, mode: str) -> None:
    project.table.append(past("a"), past("b"))
    cli(project, "incremental")
    project.table.delta.delete()

    refused = cli(project, mode)
    forced = cli(project, mode, "--force")

    assert refused.exit_code == 1
    assert "found 0 live rows, where there were 2 at version 0" in refused.stderr
    assert f"materialize {mode} spending --store default --force" in refused.stderr
    assert forced.exit_code == 0, forced.stderr
    assert json.loads(cli(project, "lookup", "spending", "a", "--json").stdout)["status"] == "missing"


def test_too_many_quarantined_rows_end_a_run_with_1(project: Project) -> None:
    project.configure(extra="max_quarantined: 10%\n")
    project.table.append(past("a"), past(None))

    refused = cli(project, "incremental", "--json")
    (forced,) = told(project, "incremental", "--force")

    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["error"] == "QuarantineError"
    assert (forced["quarantined"], forced["written"] + forced["unchanged"]) == (1, 1)


def test_forget_erases_the_quarantined_rows_of_the_entity_and_no_others(project: Project) -> None:
    fill(project)

    (receipt,) = told(project, "forget", "spending", "b")

    assert receipt["stores"] == [{"store": "default", "outcome": "erased; nothing was there; quarantined rows: 1"}]
    left = told(project, "quarantine", "list", "--rows")
    assert sorted(str(held["entity"]) for held in left) == ["None", "c"]
    (again,) = told(project, "forget", "spending", "b")
    assert again["stores"] == [{"store": "default", "outcome": "erased before"}]
