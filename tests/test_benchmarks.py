"""The report of the benchmarks, run with tiny tables: it is complete, what fails or takes too long is in it, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

#: Together, because they read one report.
pytestmark = [pytest.mark.server, pytest.mark.xdist_group("benchmarks")]

PROJECT = Path(__file__).parent.parent
SUITES = ("encode", "small", "latest", "incremental", "reads", "load")
PNG = b"\x89PNG\r\n\x1a\n"
#: No picture is larger: they are committed.
PICTURE_BYTES = 100_000


def report(out: Path, *options: str, project: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    """Run the report at its tiny size, with what it makes for a while below *out* too."""
    (out / "tmp").mkdir()
    command = [sys.executable, "benchmarks/report.py", "--scale", "tiny", "--out", str(out / "report"), *options]
    environ = os.environ | {"TMPDIR": str(out / "tmp")}
    return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, check=False)


def figures(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report" / "tiny.json").read_text())
    return found


def left_of(out: Path) -> list[str]:
    """What is left of a report: files that were to be removed, and processes that were started with this folder for them."""
    found = [str(path) for path in (out / "tmp").iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if str(out / "tmp").encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One report of every suite."""
    out = tmp_path_factory.mktemp("benchmarks")
    done = report(out)
    assert done.returncode == 0, done.stderr[-5_000:]
    return out


def test_the_report_has_every_suite_with_samples_and_their_ratios(whole: Path) -> None:
    suites = figures(whole)["suites"]

    assert tuple(suites) == SUITES
    for name, suite in suites.items():
        assert (name, suite["state"], suite["why"]) == (name, "done", "")
        assert suite["samples"], name
        assert suite["headlines"], name
        whats = {(sample["case"], sample["what"]) for sample in suite["samples"]}
        for sample in suite["samples"]:
            assert sample["seconds"] > 0
            assert sample["limit"] is None or (sample["case"], sample["limit"]) in whats
            assert sample["ours"] is None or (sample["case"], sample["ours"]) in whats


def test_the_report_says_where_and_how_it_was_made(whole: Path) -> None:
    setting = figures(whole)["environment"]
    text = (whole / "report" / "tiny.md").read_text()

    assert setting["command"].startswith("python benchmarks/report.py --scale tiny")
    assert {"cpu", "cores", "memory_gib", "load_at_start", "python", "server", "packages", "commit", "day"} <= set(
        setting
    )
    for said in (setting["command"], str(setting["seed"]), setting["python"], setting["packages"]["polars"]):
        assert said in text


def test_every_table_of_the_report_is_a_table_and_every_picture_is_there(whole: Path) -> None:
    text = (whole / "report" / "tiny.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)

    assert {path.name for path in (whole / "report").glob("*.png")} == set(pictures)
    for picture in pictures:
        content = (whole / "report" / picture).read_bytes()
        assert content.startswith(PNG)
        assert len(content) < PICTURE_BYTES
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_what_is_not_measured_at_this_size_is_a_line(whole: Path) -> None:
    text = (whole / "report" / "tiny.md").read_text()

    assert "- Not measured, dynamodb: not at the size 'tiny'" in text
    assert "- Not measured, Spark, row_number() = 1: not at the size 'tiny'" in text


def test_nothing_is_left_of_a_report(whole: Path) -> None:
    assert left_of(whole) == []


def test_suite_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    done = report(tmp_path, "--suites", "small", "--rounds", "1000", "--suite-seconds", "20")

    assert done.returncode == 1, done.stderr[-5_000:]
    suite = figures(tmp_path)["suites"]["small"]
    assert (suite["state"], suite["why"]) == ("stopped", "its time of 20 s was over")
    assert suite["samples"]
    assert "**This suite was stopped**" in (tmp_path / "report" / "tiny.md").read_text()
    assert left_of(tmp_path) == []


def test_wrong_values_are_told_and_the_other_suites_run(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "materialize").symlink_to(PROJECT / "materialize")
    records = tmp_path / "benchmarks" / "records.py"
    records.write_text(records.read_text().replace('"int64": "q"', '"int64": "Q"'))  # as if another format was written

    done = report(tmp_path, "--suites", "encode", "reads", project=tmp_path)

    assert done.returncode == 1, done.stderr[-5_000:]
    suites = figures(tmp_path)["suites"]
    assert (suites["encode"]["state"], suites["reads"]["state"]) == ("failed", "done")
    assert suites["encode"]["why"].endswith("the records do not hold the rows that were encoded")
    assert "the records do not hold the rows" in (tmp_path / "report" / "tiny.md").read_text()
    assert left_of(tmp_path) == []
