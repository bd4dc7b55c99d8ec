"""The command line: exit codes, JSON, and a clear word for everything that can be wrong with the input."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import sqlite3
import sys
from contextlib import closing
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

    from tests.dynamodb_local import DynamoDbLocal

PASSWORD = "s3cret-p4ss"
REPORT_KEYS = {
    *("view", "store", "mode", "from_version", "to_version", "rows_read", "entities", "written"),
    *("stale", "expired", "quarantined", "deleted", "bytes", "seconds", "held_back", "probe", "timings"),
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


# --- verify ------------------------------------------------------------------------------------------------------------


def damage(project: Project) -> None:
    """Three entities online, of which one is lost and one has another value."""
    project.table.append(*(past(name, 1, 1.5) for name in "abc"))
    assert cli(project, "incremental").exit_code == 0
    with closing(sqlite3.connect(project.folder.parent / "online.db")) as connection, connection:
        connection.execute("DELETE FROM records WHERE entity_key = ?", (b"a",))
        connection.execute("UPDATE records SET payload = zeroblob(length(payload)) WHERE entity_key = ?", (b"b",))


def test_verify_of_what_a_run_wrote_ends_well(project: Project) -> None:
    project.table.append(past("a"), past("b"))
    cli(project, "incremental")

    (report,) = reports(project, "verify")
    (full,) = reports(project, "verify", "--full")

    counters = ("compared", "missing", "extra", "stale", "wrong", "newer", "repaired")
    assert [report[name] for name in counters] == [2, 0, 0, 0, 0, 0, 0]
    assert (report["compare"], full["compare"], report["version"]) == ("sample", "full", 0)


def test_verify_tells_what_differs_and_ends_with_1(project: Project) -> None:
    damage(project)

    result = cli(project, "verify", "--full")

    assert result.exit_code == 1
    assert "missing=1  extra=0  stale=0  wrong=1" in result.stdout
    assert (
        "2 of 3 compared entities differ (missing 1, extra 0, stale 0, wrong 1), expected at most 0.0000%"
        in result.stderr
    )
    assert "Run: materialize verify spending --store default --repair" in result.stderr
    assert "problem" not in result.stdout


def test_verify_prints_entity_keys_only_when_asked(project: Project) -> None:
    damage(project)

    result = cli(project, "verify", "--full", "--keys", "--json")

    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["problem"], one["key"]) for one in told if "problem" in one] == [("missing", "a"), ("wrong", "b")]
    assert told[-1]["error"] == "MismatchError"


def test_repair_mends_and_still_tells_that_something_was_lost(project: Project) -> None:
    damage(project)

    first = cli(project, "verify", "--repair")
    (second,) = reports(project, "verify", "--full")

    assert first.exit_code == 1
    assert "All of them are repaired" in first.stderr
    assert (second["missing"], second["wrong"]) == (0, 0)


def test_a_view_may_tolerate_a_share_that_differs(project: Project) -> None:
    damage(project)
    project.configure(extra="verify: {max_mismatched: 67%}")

    assert cli(project, "verify", "--full").exit_code == 0


@pytest.mark.parametrize("option", ["--confidence", "--smallest"])
def test_a_share_outside_0_to_1_is_a_usage_error(project: Project, option: str) -> None:
    assert cli(project, "verify", option, "1").exit_code == 2


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


def test_max_speed_measures_no_reads(tmp_path: Path, valkey: servers.Server) -> None:
    (tmp_path / "project").mkdir()
    project = Project(tmp_path / "project", valkey.url)
    project.table.append(past("a"))

    (paced,) = reports(project, "incremental")
    (unpaced,) = reports(project, "rebuild", "--max-speed")

    assert paced["probe"]["before"]["reads"] > 0
    assert (unpaced["probe"], unpaced["held_back"], unpaced["written"]) == ({}, 0.0, 1)


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
    assert status["late"] is None
    assert re.fullmatch(r"\d+[smhd]", status["waiting"])
    assert "behind" in cli(project, "status").stdout
    assert reports(project, "plan")[0]["rows"] == 1
    assert reports(project, "rebuild")[0]["written"] == 2
    assert reports(project, "status")[0]["behind"] == 0
    assert [one["check"] for one in reports(project, "doctor")] == ["table", "online store"]


@pytest.mark.parametrize(("wanted", "late"), [("1h", False), ("1s", True)])
def test_status_says_whether_a_view_is_later_than_it_wants_to_be(project: Project, wanted: str, late: bool) -> None:  # noqa: FBT001
    view = project.config / "feature_views" / "spending.yaml"
    view.write_text(f"{view.read_text()}freshness: {wanted}\n")
    project.table.append(past("a"))
    log = project.table.log_file(0)
    made = round((datetime.now(timezone.utc).timestamp() - 60) * 1000)
    log.write_text(re.sub(r'"timestamp":\d+', f'"timestamp":{made}', log.read_text()))

    before = reports(project, "status")[0]
    reports(project, "incremental")
    after = reports(project, "status")[0]

    assert (before["state"], before["late"]) == ("never loaded", late)
    assert (after["state"], after["late"], after["waiting"]) == ("up to date", False, None)


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


def test_verbose_says_where_the_seconds_went(project: Project) -> None:
    project.table.append(past("a"))

    quiet, told = project.run("incremental"), project.run("rebuild", "-v")

    assert "seconds:" not in quiet.stderr
    line = next(line for line in told.stderr.splitlines() if line.startswith("seconds: plan "))
    for stage in ("read", "winners", "wait_read", "encode", "wait_store", "rest", "send", "server", "commit"):
        assert re.search(rf"\b{stage} \d+\.\d{{3}}", line)
    assert len(told.stdout.splitlines()) == 1


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


#: Sorted; a new command is added here and in the documentation.
COMMANDS = "acl backfill bulk-load doctor explain forget iam-policy incremental lookup plan push quarantine rebuild release serve setup status verify"


def test_help_is_complete(project: Project) -> None:
    result = cli(project, "--help")

    assert result.exit_code == 0
    for command in COMMANDS.split():
        assert re.search(rf"^\W+{command}\s", result.output, flags=re.MULTILINE), command
    shown = [(one.name or one.callback.__name__).replace("_", "-") for one in app.registered_commands if one.callback]
    assert sorted([*shown, "quarantine"]) == COMMANDS.split()


# --- setup, and what DynamoDB alone has ----------------------------------------------------------------------------------


@pytest.fixture
def local(dynamodb_local: DynamoDbLocal) -> DynamoDbLocal:
    dynamodb_local.drop_tables()
    return dynamodb_local


@pytest.fixture
def cloud(tmp_path: Path, local: DynamoDbLocal) -> Project:
    """A project over DynamoDB without a table."""
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project", dynamodb_url(local))


def dynamodb_url(local: DynamoDbLocal, options: str = "&write_units=1000000") -> str:
    return f"dynamodb://key:{PASSWORD}@eu-central-1/fs?endpoint_url={local.endpoint}{options}"


def store_settings(project: Project, url: str, **settings: str) -> None:
    """Write ``online_stores.yaml`` with more keys, as YAML."""
    lines = [f"  {name}: {text}" for name, text in settings.items()]
    (project.config / "online_stores.yaml").write_text("\n".join(["default:", f"  url: {json.dumps(url)}", *lines, ""]))


def features(project: Project, *users: str) -> dict[str, dict[str, Any]]:
    return {one["key"]: one["features"] for one in reports(project, "lookup", "spending", *users)}


def test_setup_of_a_store_that_needs_none_has_nothing_to_do(project: Project) -> None:
    assert reports(project, "setup") == [{"view": "spending", "store": "default", "setup": "nothing to do"}]
    assert cli(project, "setup", "spending").stdout == "view=spending  store=default  setup=nothing to do\n"


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_setup_makes_the_table_and_has_nothing_to_do_the_second_time(cloud: Project, local: DynamoDbLocal) -> None:
    first = cli(cloud, "setup")
    again = reports(cloud, "setup")

    assert first.stdout == "view=spending  store=default  setup=created, on demand; time to live by x\n"
    assert again == [{"view": "spending", "store": "default", "setup": "nothing to do"}]
    assert local.client.list_tables()["TableNames"] == ["fs.spending"]


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_setup_makes_the_table_as_it_is_configured_and_leaves_it_so(cloud: Project, local: DynamoDbLocal) -> None:
    store_settings(cloud, cloud.url, tables="{write_units: 7, read_units: 3}")
    assert reports(cloud, "setup")[0]["setup"] == "created, provisioned; time to live by x"
    store_settings(cloud, cloud.url, tables="{write_units: 70, read_units: 30}")

    assert reports(cloud, "setup")[0]["setup"] == "nothing to do"

    units = local.client.describe_table(TableName="fs.spending")["Table"]["ProvisionedThroughput"]
    assert (units["WriteCapacityUnits"], units["ReadCapacityUnits"]) == (7, 3)


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_setup_of_a_shared_table_serves_every_view(cloud: Project, local: DynamoDbLocal) -> None:
    cloud.configure(url=dynamodb_url(local, "&table=shared"))
    view = (cloud.config / "feature_views" / "spending.yaml").read_text()
    (cloud.config / "feature_views" / "copy.yaml").write_text(view)
    cloud.table.append(past("a", 1, 1.5))

    done = {one["view"]: one["setup"] for one in reports(cloud, "setup")}
    written = {one["view"]: one["written"] for one in reports(cloud, "incremental")}

    assert done == {"copy": "created, on demand; time to live by x", "spending": "nothing to do"}
    assert written == {"copy": 1, "spending": 1}
    assert local.client.list_tables()["TableNames"] == ["fs-features"]


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
@pytest.mark.parametrize(
    "arguments", [("incremental",), ("rebuild",), ("plan",), ("status",), ("lookup", "spending", "a")], ids=" ".join
)
def test_before_setup_the_command_that_is_lacking_is_named(cloud: Project, arguments: tuple[str, ...]) -> None:
    cloud.table.append(past("a"))

    message = refused(cloud, *arguments)

    assert "found no table fs.spending, expected one." in message
    assert "Run: materialize setup spending" in message
    assert "dynamodb://eu-central-1/fs at http://127.0.0.1:" in message
    assert PASSWORD not in message
    reports(cloud, "setup")
    assert cli(cloud, *arguments).exit_code == 0


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_doctor_names_the_tables_of_the_store_or_what_makes_them(cloud: Project, local: DynamoDbLocal) -> None:
    cloud.table.append(past("a"))
    before = cli(cloud, "doctor")
    reports(cloud, "setup")
    with_others = local.client.describe_table(TableName="fs.spending")["Table"]
    local.client.create_table(
        TableName="other.spending",
        KeySchema=with_others["KeySchema"],
        AttributeDefinitions=with_others["AttributeDefinitions"],
        BillingMode="PAY_PER_REQUEST",
    )

    after = reports(cloud, "doctor")[1]

    assert before.exit_code == 1
    assert "found no table fs.spending, expected one" in before.stderr
    assert "materialize setup spending" in before.stderr
    assert (after["check"], after["kind"], after["tables"]) == ("online store", "dynamodb", "fs.spending")


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_a_day_with_dynamodb(cloud: Project, local: DynamoDbLocal) -> None:
    """From the first load over newer, older and deleted rows to a rebuild; what is online is what the table says, after each."""
    users = [f"u{number}" for number in range(70)]
    cloud.table.append(*(past(user, 5, float(number), count=number) for number, user in enumerate(users)))
    reports(cloud, "setup")
    assert (reports(cloud, "status")[0]["state"], features(cloud, "u1")) == ("never loaded", {"u1": {}})

    (first,) = reports(cloud, "incremental")

    assert (first["from_version"], first["to_version"], first["written"]) == (None, 0, 70)
    assert features(cloud, *users) == {
        user: {"amount": float(number), "count": number, "country": "DE"} for number, user in enumerate(users)
    }
    (status,) = reports(cloud, "status")
    assert (status["state"], status["watermark_version"], status["behind"]) == ("up to date", 0, 0)

    cloud.table.append(past("u0", 9, -1.0), past("u1", 1, -1.0), past("new", 3, 3.0))
    assert reports(cloud, "status")[0]["behind"] == 1
    (second,) = reports(cloud, "incremental")

    assert (second["from_version"], second["written"], second["stale"]) == (0, 2, 1)
    amounts = {user: found["amount"] for user, found in features(cloud, "u0", "u1", "new").items()}
    assert amounts == {"u0": -1.0, "u1": 1.0, "new": 3.0}

    cloud.table.delta.delete("user_id = 'u2'")
    (third,) = reports(cloud, "incremental")

    assert (third["deleted"], third["written"]) == (1, 0)
    assert features(cloud, "u2", "u3") == {"u2": {}, "u3": {"amount": 3.0, "count": 3, "country": "DE"}}

    for item in local.items("fs.spending")[:40]:  # somebody's accident
        if not item["k"]["S"].startswith("{"):
            local.client.delete_item(TableName="fs.spending", Key={"k": item["k"]})
    (rebuilt,) = reports(cloud, "rebuild")

    assert (rebuilt["mode"], rebuilt["entities"]) == ("rebuild", 70)
    assert features(cloud, *users, "new") == {
        **{user: {"amount": float(number), "count": number, "country": "DE"} for number, user in enumerate(users)},
        "u0": {"amount": -1.0, "count": 1, "country": "DE"},
        "u2": {},
        "new": {"amount": 3.0, "count": 1, "country": "DE"},
    }
    assert [one["check"] for one in reports(cloud, "doctor")] == ["table", "online store"]


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_backfill_into_dynamodb_never_replaces_what_is_newer(cloud: Project) -> None:
    cloud.table.append(past("a", -3 * DAY, 1.0), past("b", -3 * DAY, 2.0))
    reports(cloud, "setup")
    reports(cloud, "incremental")
    cloud.table.append(past("a", 1, 9.0))
    reports(cloud, "incremental")
    start, end = ((T0 + timedelta(minutes=PAST + minutes)).isoformat() for minutes in (-4 * DAY, -2 * DAY))

    (planned,) = reports(cloud, "backfill", "spending", "--start", start, "--end", end, "--dry-run")
    (report,) = reports(cloud, "backfill", "spending", "--start", start, "--end", end)

    assert planned["way"] == "reads, conditional updates of what is older"
    assert planned["read_units"] == planned["write_units"] == planned["rows"]
    assert (report["written"], report["stale"], report["unchanged"]) == (0, 1, 1)
    assert features(cloud, "a")["a"]["amount"] == 9.0


# --- plan ----------------------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_plan_says_way_units_minutes_and_cost(cloud: Project, local: DynamoDbLocal) -> None:
    prices = (
        "{as_of: 2026-11-01, currency: EUR, million_write_units: 20000, million_read_units: 10000, bulk_gigabyte: 0}"
    )
    url = dynamodb_url(local, "&share=0.25")
    store_settings(cloud, url, tables="{write_units: 4, read_units: 1}", prices=prices)
    cloud.table.append(*(past(f"u{number}") for number in range(90)))
    reports(cloud, "setup")

    (planned,) = reports(cloud, "plan")

    assert {name: planned[name] for name in ("rows", "snapshot", "to_version")} == {
        "rows": 90,
        "snapshot": True,
        "to_version": 0,
    }
    assert {
        name: planned[name] for name in ("way", "write_units", "read_units", "write_units_a_second", "minutes")
    } == {
        "way": "conditional updates, inserts where most entities are new",
        "write_units": 90,
        "read_units": 0,
        "write_units_a_second": 1.0,
        "minutes": 1.5,
    }
    assert planned["cost"] == "1.80 EUR by the prices of 2026-11-01"
    assert planned["instead"].startswith("materialize bulk-load spending s3://BUCKET/PREFIX, ")
    assert planned["instead"].endswith("GB of items, 0.90 EUR by the prices of 2026-11-01")
    for_people = cli(cloud, "plan").stdout
    assert "  write_units=90  " in for_people
    assert "  minutes=1.5  " in for_people
    assert "  cost=1.80 EUR by the prices of 2026-11-01  " in for_people


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_plan_of_a_view_that_is_online_offers_no_bulk_load_and_without_prices_no_cost(cloud: Project) -> None:
    cloud.table.append(past("a"))
    reports(cloud, "setup")
    assert "instead" in reports(cloud, "plan")[0]
    reports(cloud, "incremental")
    cloud.table.append(past("b"), past("c"))

    (planned,) = reports(cloud, "plan")

    assert (planned["rows"], planned["write_units"]) == (2, 2)
    assert not {"instead", "cost"} & planned.keys()


def test_plan_of_another_store_says_nothing_of_units(project: Project) -> None:
    project.table.append(past("a"))

    (planned,) = reports(project, "plan")

    assert planned["rows"] == 1
    assert not {"way", "write_units", "read_units", "minutes", "cost", "instead"} & planned.keys()


# --- what a role needs on AWS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["reader", "writer", "setup", "bulk"])
def test_iam_policy_prints_a_document_and_nothing_else(project: Project, role: str) -> None:
    project.configure(url=f"dynamodb://key:{PASSWORD}@eu-west-1/team")

    result = cli(project, "iam-policy", role, "--bucket", "landing")

    document = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    assert document["Version"] == "2012-10-17"
    assert "arn:aws:dynamodb:eu-west-1:*:table/team.*" in json.dumps(document)
    assert ("arn:aws:s3:::landing/*" in json.dumps(document)) == (role == "bulk")
    assert PASSWORD not in result.output


def test_iam_policy_is_that_of_the_chosen_store(project: Project) -> None:
    (project.config / "online_stores.yaml").write_text(
        "default: {url: 'memory://'}\nshared: {url: 'dynamodb://eu-west-1/team?table=shared'}\n"
        "airflow: {connection: dynamo}\n"
    )

    shared = cli(project, "iam-policy", "reader", "--store", "shared")
    airflow = CliRunner().invoke(
        app,
        ["iam-policy", "reader", "--store", "airflow"],
        env={"MATERIALIZE_CONFIG": str(project.config), "AIRFLOW_CONN_DYNAMO": "aws://?region_name=us-east-2"},
    )

    assert "arn:aws:dynamodb:eu-west-1:*:table/team-features" in shared.stdout
    assert "arn:aws:dynamodb:us-east-2:*:table/fs.*" in airflow.stdout


@pytest.mark.parametrize(
    ("url", "arguments", "told"),
    [
        ("dynamodb://eu-west-1", ("boss",), "found the role 'boss', expected reader, writer, setup, bulk"),
        ("dynamodb://eu-west-1", ("Reader",), "found the role 'Reader', expected reader, writer, setup, bulk"),
        ("dynamodb://eu-west-1", (), "Missing argument 'ROLE'"),
        (
            "dynamodb://eu-west-1",
            ("reader", "--store", "nobody"),
            "found the online store 'nobody', expected one of default",
        ),
        (
            "memory://",
            ("reader",),
            "found the online store 'default' at memory://, expected one with a dynamodb:// URL",
        ),
        (
            f"redis://u:{PASSWORD}@cache:6379/0",
            ("writer",),
            "found the online store 'default' at redis://***@cache:6379/0, expected one with a dynamodb:// URL",
        ),
    ],
)
def test_wrong_usage_of_iam_policy_ends_with_2(
    project: Project, url: str, arguments: tuple[str, ...], told: str
) -> None:
    project.configure(url=url)

    result = cli(project, "iam-policy", *arguments)

    assert result.exit_code == 2, result.output
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
    assert PASSWORD not in result.output


def test_iam_policy_of_a_wrong_url_is_an_error_of_the_configuration(project: Project) -> None:
    project.configure(url=f"dynamodb://key:{PASSWORD}@eu-west-1/team?tabel=shared")

    result = cli(project, "iam-policy", "reader")

    assert (result.exit_code, result.stdout) == (1, "")
    assert "online store dynamodb://***@eu-west-1/team: found unknown options: tabel, expected table" in result.stderr
    assert PASSWORD not in result.output


# --- credentials of DynamoDB ---------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_airflow_connection_of_type_aws_serves_as_a_store(
    cloud: Project, local: DynamoDbLocal, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"region_name": "eu-central-1", "endpoint_url": local.endpoint, "aws_session_token": PASSWORD}
    given = {"conn_type": "aws", "login": "key", "password": PASSWORD, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_DYNAMO", json.dumps(given))
    (cloud.config / "online_stores.yaml").write_text("default: {connection: dynamo}\n")
    cloud.table.append(past("a", 1, 1.5))

    reports(cloud, "setup")
    reports(cloud, "incremental")

    assert features(cloud, "a")["a"]["amount"] == 1.5
    assert local.client.list_tables()["TableNames"] == ["fs.spending"]


@pytest.mark.parametrize(
    "url",
    [
        f"dynamodb://key:{PASSWORD}@eu-central-1/fs?share=2",
        f"dynamodb://key:{PASSWORD}@eu-central-1/fs?secret=x",
        f"dynamodb://key:{PASSWORD}@EU/fs",
        f"dynamodb://key:x/{PASSWORD}@eu-central-1/fs",
        f"dynamodb://eu-central-1/fs?aws_session_token={PASSWORD}&requests=0",
    ],
)
def test_wrong_dynamodb_url_is_told_without_its_secret(project: Project, url: str) -> None:
    project.table.append(past("a"))
    project.configure(url=url)

    for command in ("incremental", "plan", "doctor", "setup"):
        result = cli(project, command, "-vv")
        assert result.exit_code == 1
        assert "error: online store dynamodb://" in result.stderr
        assert PASSWORD not in result.output


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_log_for_people_has_no_credential_no_key_and_no_value(cloud: Project, local: DynamoDbLocal) -> None:
    cloud.configure(url=dynamodb_url(local, f"&aws_session_token=token-{PASSWORD}"))
    cloud.table.append(past("somebody@example.com", 1, 1.5, country="Atlantis"))
    reports(cloud, "setup")

    ended = cloud.run("incremental", "-v")

    assert ended.returncode == 0, ended.stderr
    assert "wrote piece" in ended.stderr
    for secret in (PASSWORD, "somebody", "Atlantis"):
        assert secret not in ended.stderr


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_log_for_developers_has_no_credential_no_key_and_no_value(cloud: Project, local: DynamoDbLocal) -> None:
    cloud.configure(url=dynamodb_url(local, f"&aws_session_token=token-{PASSWORD}"))
    cloud.table.append(past("somebody@example.com", 1, 1.5, country="Atlantis"))
    reports(cloud, "setup")

    ended = cloud.run("incremental", "-vv")

    assert ended.returncode == 0, ended.stderr
    for secret in (PASSWORD, "somebody", "Atlantis"):
        assert secret not in ended.stderr


# --- bulk-load -----------------------------------------------------------------------------------------------------------


def test_bulk_load_into_another_store_is_refused_with_the_way_to_go(project: Project) -> None:
    project.table.append(past("a"))

    message = refused(project, "bulk-load", "spending", "s3://bucket/first")

    assert "only DynamoDB reads files. Nothing was read or written. Run: materialize incremental spending" in message


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_bulk_load_to_no_bucket_is_refused(cloud: Project) -> None:
    cloud.table.append(past("a"))

    message = refused(cloud, "bulk-load", "spending", "lake/first")

    assert "feature view 'spending'" in message
    assert "s3://BUCKET/PREFIX. Nothing was written." in message
