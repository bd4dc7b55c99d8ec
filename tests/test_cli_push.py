"""``materialize push``: rows of files in every format arrive exactly, and what is wrong with them is told without their values."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from materialize.cli import app
from tests.projects import Project
from tests.tables import UTC_TIME

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SECRET = "s3cret-value"
HOUR_AGO = (datetime.now(timezone.utc) - timedelta(hours=1)).replace(microsecond=123_000)
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("event_timestamp", UTC_TIME),
        ("created", UTC_TIME),
        ("amount", pa.float64()),
        ("count", pa.int64()),
        ("price", pa.decimal128(10, 2)),
        ("day", pa.date32()),
        ("raw", pa.binary()),
        ("flag", pa.bool_()),
        ("vector", pa.list_(pa.float32())),
    ]
)
FEATURES = {"amount": "float64", "count": "int64", "price": "decimal(10,2)", "day": "date", "raw": "binary"}
TIMES = {"event_timestamp": HOUR_AGO.isoformat(), "created": HOUR_AGO.isoformat().replace("+00:00", "Z")}
ROW: dict[str, Any] = {"amount": 1.5, "count": 2**53 + 1, "price": "1.20", "day": "2024-01-31", "raw": "00ff"}
ONLINE = ROW | {"flag": True, "vector": [0.5, 2.0]}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    made = Project(tmp_path / "project", f"sqlite:///{tmp_path}/online.db")
    made.table.schema = SCHEMA
    made.configure(features=FEATURES | {"flag": "bool", "vector": "list<float32>"})
    made.table.create(schema=SCHEMA)
    assert cli(made, "incremental").exit_code == 0
    return made


def cli(project: Project, *arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"MATERIALIZE_CONFIG": str(project.config), "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def pushed(project: Project, file: Path, *options: str) -> dict[str, Any]:
    result = cli(project, "push", "spending", str(file), "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def looked_up(project: Project, *keys: str) -> list[dict[str, Any]]:
    result = cli(project, "lookup", "spending", *keys, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line)["features"] for line in result.stdout.splitlines()]


def ndjson(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def one(user: str, **others: Any) -> dict[str, Any]:
    return {"user_id": user, **TIMES, **ONLINE, **others}


def test_ndjson_arrives_exactly(project: Project, tmp_path: Path) -> None:
    nothing = dict.fromkeys(ONLINE)
    file = ndjson(tmp_path / "rows.ndjson", one("a"), one("b", **nothing), one("c", amount="NaN", price=1.25))

    report = pushed(project, file)

    assert (report["rows"], report["version"], report["written"], report["online"]) == (3, 1, 3, True)
    assert looked_up(project, "a", "b", "c") == [ONLINE, nothing, ONLINE | {"amount": "NaN", "price": "1.25"}]


def test_csv_arrives_exactly(project: Project, tmp_path: Path) -> None:
    project.configure(features=FEATURES | {"flag": "bool"})
    assert cli(project, "incremental").exit_code == 0
    names = ["user_id", *TIMES, *ROW, "flag"]
    texts = [str(one("a")[name]) for name in names]
    (tmp_path / "rows.csv").write_text(
        "\n".join(map(",".join, [names, texts, ["b", *texts[1:3], "", "", "", "", "", ""]]))
    )

    pushed(project, tmp_path / "rows.csv")

    assert looked_up(project, "a", "b") == [ROW | {"flag": True}, dict.fromkeys([*ROW, "flag"])]


def test_parquet_arrives_exactly_and_the_line_for_people_names_what_was_done(project: Project, tmp_path: Path) -> None:
    pushed(project, ndjson(tmp_path / "rows.ndjson", one("a")))
    rows = pa.Table.from_pylist([{"user_id": "b", "event_timestamp": HOUR_AGO, "count": 7}], schema=SCHEMA)
    pq.write_table(rows, tmp_path / "rows.parquet")

    result = cli(project, "push", "spending", str(tmp_path / "rows.parquet"))

    assert result.exit_code == 0
    assert result.stdout.startswith("view=spending  store=default  to=both  version=2  rows=1  written=1  stale=0")
    assert "state=online  seconds=" in result.stdout
    assert looked_up(project, "b") == [dict.fromkeys(ONLINE) | {"count": 7}]


def test_write_behind_leaves_the_store_and_status_shows_the_lag(project: Project, tmp_path: Path) -> None:
    report = pushed(project, ndjson(tmp_path / "rows.jsonl", one("a")), "--to", "offline")

    assert (report["version"], report["online"], report["entities"]) == (1, False, 0)
    assert looked_up(project, "a") == [{}]
    status = json.loads(cli(project, "status", "--json").stdout)
    assert (status["state"], status["behind"], status["table_version"]) == ("behind", 1, 1)


def test_a_view_in_several_stores_is_committed_once(project: Project, tmp_path: Path) -> None:
    yaml = project.config / "feature_views" / "spending.yaml"
    yaml.write_text(yaml.read_text().replace("online_stores: [default]", "online_stores: [default, other]"))
    stores = project.config / "online_stores.yaml"
    stores.write_text(stores.read_text() + f'other: {{url: "sqlite:///{tmp_path}/other.db"}}\n')
    assert cli(project, "incremental").exit_code == 0
    file = ndjson(tmp_path / "rows.ndjson", one("a"))

    result = cli(project, "push", "spending", str(file), "--json")
    behind = cli(project, "push", "spending", str(file), "--to", "offline", "--json")

    assert [
        (told["store"], told["version"], told["again"]) for told in map(json.loads, result.stdout.splitlines())
    ] == [
        ("default", 1, False),
        ("other", 1, True),
    ]
    assert len(behind.stdout.splitlines()) == 1
    assert project.table.version == 2
    assert looked_up(project, "a") == [ONLINE, ONLINE]


def test_an_id_makes_a_second_push_harmless(project: Project, tmp_path: Path) -> None:
    file = ndjson(tmp_path / "rows.ndjson", one("a"))

    reports = [pushed(project, file, "--push-id", "night-1") for _ in range(2)]

    assert [(report["version"], report["again"]) for report in reports] == [(1, False), (1, True)]
    assert "again=committed before" in cli(project, "push", "spending", str(file), "--push-id", "night-1").stdout


def test_rows_that_cannot_be_stored_end_with_1_and_are_not_quoted(project: Project, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"event_timestamp": HOUR_AGO.replace(tzinfo=None).isoformat()},
        {"amount": SECRET},
        {"count": "1_000"},
        {"count": 1.5},
        {"price": "1.234"},
        {"day": SECRET},
        {"raw": SECRET},
        {"flag": "yes"},
        {"vector": [SECRET]},
        {"user_id": None},
    ]
    file = ndjson(tmp_path / "rows.ndjson", one("a"), *(one(SECRET, **change) for change in wrong))

    result = cli(project, "push", "spending", str(file), "--json")

    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["error"] == "RowsError"
    assert "found 10 that cannot be stored" in told["message"]
    for number in range(1, len(wrong) + 1):
        assert f"row {number}" in told["message"] or f", {number}" in told["message"]
    assert SECRET not in result.output
    assert project.table.version == 0


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("rows.txt", "", "expected one that ends with .parquet"),
        ("rows.parquet", SECRET, "ArrowInvalid"),
        ("rows.ndjson", f'{{"user_id": {SECRET}', "JSONDecodeError"),
        ("rows.ndjson", "[1]", "ValueError"),
        ("rows.csv", f"a,b\n{SECRET}", "ValueError"),
        ("rows.ndjson", None, "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_ends_with_2(
    project: Project, tmp_path: Path, name: str, text: str | None, told: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)

    result = cli(project, "push", "spending", str(tmp_path / name))

    assert result.exit_code == 2
    assert told in " ".join(result.stderr.replace("│", " ").split())
    assert SECRET not in result.output


def test_another_way_than_both_or_offline_ends_with_2(project: Project, tmp_path: Path) -> None:
    result = cli(project, "push", "spending", str(tmp_path / "rows.csv"), "--to", "online")

    assert result.exit_code == 2
    assert "expected both or offline" in result.stderr


def test_a_view_that_was_never_loaded_is_told_what_to_run(project: Project, tmp_path: Path) -> None:
    file = ndjson(tmp_path / "rows.ndjson", one("a"))
    project.configure(
        url=f"sqlite:///{tmp_path}/new.db", features=FEATURES | {"flag": "bool", "vector": "list<float32>"}
    )

    result = cli(project, "push", "spending", str(file))

    assert result.exit_code == 1
    assert "never loaded there" in result.stderr
    assert "Run: materialize incremental spending" in result.stderr
    assert project.table.version == 0
