"""The command line: exit codes, JSON, and a clear word for everything that can be wrong with the input."""

from __future__ import annotations

import json
import math
import os
import pty
import sys
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from materialize.cli import app
from tests import servers
from tests.projects import PAST, Project
from tests.tables import SCHEMA, T0, Table, row

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

PASSWORD = "s3cret-p4ss"
REPORT_KEYS = {
    *("view", "store", "mode", "from_version", "to_version", "rows_read", "entities", "written"),
    *("stale", "expired", "quarantined", "deleted", "bytes", "seconds"),
}
DAY = 24 * 60


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", f"sqlite:///{tmp_path}/online.db")


def cli(project: Project, *arguments: str) -> Result:
    """The command line in this process; fast, with the same outermost frame."""
    result = CliRunner().invoke(app, list(arguments), env={"MATERIALIZE_CONFIG": str(project.config), "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output or "-vv" in arguments
    return result


def reports(project: Project, *arguments: str) -> list[dict[str, Any]]:
    result = cli(project, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(project: Project, *arguments: str) -> str:
    """What a command that has to fail says; on one line, on standard error, and in JSON if asked for."""
    result = cli(project, *(arguments or ("incremental",)))
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    as_json = cli(project, *(arguments or ("incremental",)), "--json")
    assert as_json.exit_code == 1
    for line in as_json.stdout.splitlines():
        told = json.loads(line)
        assert {"view", "store", "error", "message"} <= told.keys()
    return str(result.stderr)


def past(user: str | None, minutes: float = 1, amount: float | None = 0.0, **others: Any) -> dict[str, Any]:
    return row(user, PAST + minutes, amount, **others)


# --- what commands print -----------------------------------------------------------------------------------------------


def test_incremental_reports_one_json_object_per_view_and_store(project: Project) -> None:
    project.table.append(past("a", 1, 1.5), past("a", 2, 2.5), past("b"))

    (report,) = reports(project, "incremental")

    assert report.keys() >= REPORT_KEYS
    assert (report["view"], report["store"], report["mode"]) == ("spending", "default", "incremental")
    assert (report["from_version"], report["to_version"], report["rows_read"], report["entities"]) == (None, 0, 3, 2)
    assert report["written"] == 2
    assert report["bytes"] > 0
    assert report["seconds"] >= 0


def test_json_is_alone_on_standard_output(project: Project) -> None:
    project.table.append(past("a"), past(None))

    ended = project.run("incremental", "spending", "--json", "-v")

    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert json.loads(line)["quarantine_reasons"] == {"null join key": 1}
    assert "wrote piece" in ended.stderr


def test_report_for_people_names_the_counts_and_each_reason(project: Project) -> None:
    project.table.append(past("a"), past(None), past(""))

    result = cli(project, "incremental")

    assert result.exit_code == 0
    assert result.stdout.startswith("spending -> default: incremental to version 0: rows_read 3, entities 1, written 1")
    assert "quarantined 1 rows: null join key" in result.stderr
    assert "quarantined 1 rows: empty join key" in result.stderr


def test_lookup_tells_present_missing_and_expired(project: Project) -> None:
    project.configure(extra="ttl: 30d\n")
    project.table.append(past("a", 1, 1.5), past("old", -31 * DAY))
    reports(project, "incremental")

    found = {one["key"]: one for one in reports(project, "lookup", "spending", "a", "nobody", "old")}

    assert found["a"]["status"] == "present"
    assert found["a"]["features"] == {"amount": 1.5, "count": 1, "country": "DE"}
    assert datetime.fromisoformat(found["a"]["event_timestamp"]) == T0 + timedelta(minutes=PAST + 1)
    assert (found["nobody"]["status"], found["nobody"]["features"], found["nobody"]["event_timestamp"]) == (
        "missing",
        {},
        None,
    )
    assert found["old"]["status"] in {"missing", "expired"}


def test_lookup_of_some_features_in_the_order_asked_for(project: Project) -> None:
    project.table.append(past("a", 1, 1.5))
    reports(project, "incremental")

    (found,) = reports(project, "lookup", "spending", "a", "--features", "country,amount")

    assert list(found["features"].items()) == [("country", "DE"), ("amount", 1.5)]
    assert "amount = 1.5" in cli(project, "lookup", "spending", "a").stdout


def test_composite_keys_are_written_with_a_bar(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.configure(keys="user_id, shop, day", features={"amount": "float64"})
    schema = pa.schema([*SCHEMA, ("shop", pa.int64()), ("day", pa.date32())])
    project.table = Table(project.table.path, schema)
    day = datetime(2024, 2, 29, tzinfo=timezone.utc).date()
    project.table.append(past("a|b", 1, 1.0, shop=-7, day=day), past("x", 1, 2.0, shop=8, day=day))
    reports(project, "incremental")

    found = reports(project, "lookup", "spending", "a%7Cb|-7|2024-02-29", "x|8|2024-02-29", "x|9|2024-02-29")

    assert [one["features"].get("amount") for one in found] == [1.0, 2.0, None]
    assert cli(project, "lookup", "spending", "x|8").exit_code == 2
    assert "user_id, shop, day" in cli(project, "lookup", "spending", "x|8").stderr


def test_backfill_dry_run_prints_a_plan_and_writes_nothing(project: Project) -> None:
    project.table.append(past("a"), past("b", -3 * DAY))
    start, end = ((T0 + timedelta(minutes=PAST + minutes)).isoformat() for minutes in (-DAY, DAY))

    (planned,) = reports(project, "backfill", "spending", "--start", start, "--end", end, "--dry-run")

    assert (planned["mode"], planned["snapshot"], planned["to_version"]) == ("backfill", False, 0)
    assert [one["status"] for one in reports(project, "lookup", "spending", "a")] == ["missing"]
    (report,) = reports(project, "backfill", "spending", "--start", start, "--end", end)
    assert (report["written"], report["rows_read"]) == (1, 1)
    assert [one["status"] for one in reports(project, "lookup", "spending", "a", "b")] == ["present", "missing"]


def test_plan_status_doctor_and_rebuild(project: Project) -> None:
    project.table.append(past("a"))
    assert reports(project, "plan")[0]["reason"].startswith("first run")
    assert reports(project, "status")[0]["state"] == "never loaded"
    reports(project, "incremental")
    project.table.append(past("b"))

    (status,) = reports(project, "status")
    assert (status["watermark_version"], status["table_version"], status["behind"]) == (0, 1, 1)
    assert "behind" in cli(project, "status").stdout
    assert reports(project, "plan")[0]["rows"] == 1
    assert reports(project, "rebuild")[0]["written"] == 2
    assert reports(project, "status")[0]["behind"] == 0
    assert [one["check"] for one in reports(project, "doctor")] == ["table", "online store"]


def test_failing_view_does_not_hold_back_the_others(project: Project) -> None:
    project.table.append(past("a"))
    text = (project.config / "feature_views" / "spending.yaml").read_text()
    (project.config / "feature_views" / "broken.yaml").write_text(
        text.replace(str(project.table.path), "/nowhere/at/all")
    )

    result = cli(project, "incremental", "--json")

    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert {one["view"]: one.get("error") for one in told} == {"broken": "OfflineStoreError", "spending": None}


# --- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("incremental", "nobody"), "expected one of spending"),
        (("incremental", "--store", "nobody"), "expected one of default"),
        (("backfill", "spending", "--start", "2025-01-01T00:00", "--end", "2025-01-02T00:00Z"), "without a time zone"),
        (("backfill", "spending", "--start", "2025-01-01", "--end", "2025-01-02"), "without a time zone"),
        (("backfill", "spending", "--start", "today", "--end", "2025-01-02T00:00Z"), "found 'today'"),
        (
            ("backfill", "spending", "--start", "2025-01-02T00:00Z", "--end", "2025-01-02T00:00Z"),
            "a start before the end",
        ),
        (("backfill", "spending", "--start", "2025-01-02T00:00Z"), "end"),
        (("lookup", "spending", "a", "--features", "amount,nothing"), "'nothing'"),
        (("lookup", "spending", "a|b"), "user_id"),
        (("lookup", "spending"), "KEY"),
        (("materialise",), "materialise"),
        (("incremental", "--colour"), "colour"),
    ],
)
def test_wrong_usage_ends_with_2(project: Project, arguments: tuple[str, ...], told: str) -> None:
    project.table.append(past("a"))

    result = cli(project, *arguments)

    assert result.exit_code == 2, result.output
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_exit_codes_of_the_real_program(project: Project) -> None:
    project.table.append(past("a"))

    assert project.run("incremental").returncode == 0
    assert project.run("incremental", "nobody").returncode == 2
    project.configure(source="/nowhere")
    failed = project.run("incremental")
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "Traceback" in project.run("incremental", "-vv").stderr


def test_missing_config_folder_is_told(project: Project, tmp_path: Path) -> None:
    result = cli(project, "incremental", "--config", str(tmp_path / "nowhere"))

    assert result.exit_code == 1
    assert "--config DIR or MATERIALIZE_CONFIG" in result.stderr


# --- bad input: the table ----------------------------------------------------------------------------------------------


def test_missing_table(project: Project) -> None:
    message = refused(project)

    assert f"could not read Delta table {project.table.path}" in message
    assert "found no readable table there" in message


def test_table_without_read_access(project: Project) -> None:
    """Root reads everything, so as root the command drops that right first."""
    project.table.append(past("a"))
    for path in (project.table.log_file(0), *project.table.path.glob("*.parquet")):
        mode = path.stat().st_mode
        path.chmod(0)
        try:
            ended = run_as_user(project, "incremental")
        finally:
            path.chmod(mode)
        assert ended[0] == 1, path
        assert str(project.table.path) in ended[1]
        assert "Permission denied" in ended[1]
        assert "Traceback" not in ended[1]


def run_as_user(project: Project, *arguments: str) -> tuple[int, str]:
    if os.geteuid() == 0 and not sys.platform.startswith("linux"):
        pytest.skip("NOT TESTED: as root every file can be read, and there is no way to give that up here")
    ended = project.run(*arguments, as_user=True)
    return ended.returncode, ended.stderr


def test_missing_columns_and_wrong_types_are_told_at_once(project: Project) -> None:
    project.table.append(past("a"))
    project.configure(features={"amount": "string", "nothing": "int64", "count": "float64"})

    message = refused(project)

    assert "3 problems" in message
    for name in ("amount", "nothing", "count"):
        assert f"feature '{name}'" in message


def test_naive_timestamps_are_refused(project: Project) -> None:
    naive = pa.schema(
        [field.with_type(pa.timestamp("us")) if pa.types.is_timestamp(field.type) else field for field in SCHEMA]
    )
    Table(project.table.path, naive).create()

    message = refused(project)
    assert "event_timestamp 'event_timestamp': found a column of type timestamp_ntz" in message
    assert "say timestamp_ntz: UTC in the feature view's YAML" in message


def test_rows_that_cannot_be_stored_are_quarantined_with_their_reason(project: Project) -> None:
    future = (datetime.now(timezone.utc) + timedelta(days=400) - T0) / timedelta(minutes=1)
    project.table.append(
        past("good", 1, 1.0),
        past(None),
        past(""),
        row("null time", None),
        row("far", future),
        past("huge", country="x" * 2 * 2**20),
    )

    (report,) = reports(project, "incremental")

    assert (report["rows_read"], report["written"], report["quarantined"]) == (6, 1, 5)
    reasons = sorted(report["quarantine_reasons"])
    assert [reason.split(" more ")[0].split(" longer ")[0] for reason in reasons] == [
        "empty join key",
        "event timestamp",
        "null event timestamp",
        "null join key",
        "record",
    ]


def test_nan_and_infinities_are_stored_exactly(project: Project) -> None:
    values = {
        "nan": math.nan,
        "inf": math.inf,
        "minus inf": -math.inf,
        "minus zero": -0.0,
        "tiny": 5e-324,
        "null": None,
    }
    project.table.append(*(past(name, 1, value) for name, value in values.items()))
    reports(project, "incremental")

    found = {one["key"]: one["features"]["amount"] for one in reports(project, "lookup", "spending", *values)}

    as_json = {"nan": "NaN", "inf": "Infinity", "minus inf": "-Infinity"}  # what strict JSON has no numbers for
    assert {name: repr(value) for name, value in found.items()} == {
        name: repr(as_json.get(name, value)) for name, value in values.items()
    }


def test_long_and_awkward_keys_are_found(project: Project) -> None:
    keys = ["|{}%" * 75, "ü€😀" * 100, "k" * 300, "%7C", "a b\tc\nd", "'\"\\", "-1"]
    project.table.append(*(past(key, 1, float(index)) for index, key in enumerate(keys)))
    (report,) = reports(project, "incremental")
    typed = [key.replace("%", "%25").replace("|", "%7C") for key in keys]

    result = cli(project, "lookup", "spending", "--json", "--", *typed)

    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert report["written"] == len(keys)
    assert [one["features"]["amount"] for one in found] == [float(index) for index in range(len(keys))]


def test_empty_table_is_no_error(project: Project) -> None:
    project.table.create()

    (report,) = reports(project, "incremental")

    assert (report["rows_read"], report["entities"], report["to_version"]) == (0, 0, 0)


def test_deleted_entity_is_gone_after_the_next_run(project: Project) -> None:
    project.table.append(past("a"), past("b"))
    reports(project, "incremental")
    project.table.delta.delete("user_id = 'a'")

    (report,) = reports(project, "incremental")

    assert (report["deleted"], report["written"]) == (1, 0)
    assert [one["status"] for one in reports(project, "lookup", "spending", "a", "b")] == ["missing", "present"]


def test_change_that_needs_a_rebuild_names_the_command(project: Project) -> None:
    project.table.append(past("a"), past("b"))
    reports(project, "incremental")
    project.table.delta.delete("user_id = 'a'")
    project.table.delta.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)

    assert "Run: materialize rebuild spending" in refused(project)
    assert reports(project, "rebuild")[0]["deleted"] == 1
    assert [one["status"] for one in reports(project, "lookup", "spending", "a", "b")] == ["missing", "present"]


def test_added_feature_is_announced_by_the_plan_and_filled_by_the_next_run(project: Project) -> None:
    project.table.append(past("a"), past("b"))
    project.configure(features={"amount": "float64"})
    reports(project, "incremental")
    project.configure(features={"amount": "float64", "count": "int64"})

    assert reports(project, "plan")[0]["reason"].startswith("features: added count since version 0")
    assert reports(project, "incremental")[0]["written"] == 2
    (found,) = reports(project, "lookup", "spending", "a")
    assert found["features"] == {"amount": 0.0, "count": 1}


# --- bad input: the store ----------------------------------------------------------------------------------------------


def test_store_that_is_down(project: Project) -> None:
    project.table.append(past("a"))
    project.configure(url=f"redis://user:{PASSWORD}@127.0.0.1:{servers.free_port()}/0?timeout=1")

    message = refused(project)

    assert "redis://***@127.0.0.1" in message
    assert "Nothing is lost: the watermark stays. Run again when the store answers." in message
    assert PASSWORD not in message
    assert (
        PASSWORD
        not in cli(project, "doctor").output + cli(project, "status").output + cli(project, "incremental", "-vv").output
    )


@pytest.mark.usefixtures("valkey")
def test_wrong_password(project: Project) -> None:
    project.table.append(past("a"))
    with servers.running("valkey", password="right") as server:
        project.configure(url=f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0")

        message = refused(project)

        assert "the password" in message
        assert PASSWORD not in message
        assert PASSWORD not in cli(project, "incremental", "-vv").output
        assert PASSWORD not in project.run("incremental", "-vv", "--json").stderr


def test_password_in_a_broken_url_is_not_shown(project: Project) -> None:
    project.table.append(past("a"))
    for url in (
        f"redis://:{PASSWORD}/x@127.0.0.1:6379/0",
        f"nosuch://u:{PASSWORD}@h/0",
        f"redis://:{PASSWORD}@127.0.0.1:port/0",
    ):
        project.configure(url=url)
        result = cli(project, "incremental")
        assert result.exit_code in {1, 2}
        assert PASSWORD not in result.output
        assert "s3cret" not in result.output


def test_read_only_directory(project: Project, tmp_path: Path) -> None:
    project.table.append(past("a"))
    folder = tmp_path / "closed"
    folder.mkdir()
    project.configure(url=f"sqlite:///{folder}/online.db")
    folder.chmod(0o500)
    try:
        code, err = run_as_user(project, "incremental")
    finally:
        folder.chmod(0o700)

    assert code == 1
    assert f"sqlite:///{folder}/online.db" in err
    assert "Let this user write" in err
    assert "Traceback" not in err


def test_read_only_database_file(project: Project, tmp_path: Path) -> None:
    project.table.append(past("a"))
    reports(project, "incremental")
    project.table.append(past("b"))
    (tmp_path / "online.db").chmod(0o400)

    code, err = run_as_user(project, "incremental")

    assert code == 1
    assert "Let this user write" in err
    assert "Traceback" not in err


# --- talk --------------------------------------------------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_only(project: Project) -> None:
    project.table.append(*(past(f"u{index}") for index in range(100)))

    quiet = project.run("incremental")
    ours, theirs = pty.openpty()
    with project.start("rebuild", stderr=theirs, env={"TERM": "xterm-256color"}) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65_536)
            except OSError:  # the other end is closed
                break
            if not block:
                break
            shown += block
        assert process.wait(60) == 0
    os.close(ours)

    assert quiet.stderr == ""
    assert b"rebuild spending -> default" in shown
    assert b"entities" in shown


def test_help_is_complete(project: Project) -> None:
    result = cli(project, "--help")

    assert result.exit_code == 0
    for command in ("incremental", "backfill", "rebuild", "plan", "status", "lookup", "doctor"):
        assert command in result.output
