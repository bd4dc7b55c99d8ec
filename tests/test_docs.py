"""What the documentation says about tests and files is true."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", PROJECT / "benchmarks" / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
PAGES += sorted((PROJECT / "docs" / "benchmarks").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_every_heading_is_there(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, heading = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        if heading:
            lines = there.read_text(encoding="utf-8").splitlines()
            anchors = {
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line[:1] == "#"
            }
            assert heading in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_is_there(page):
    defined = set()
    for file in (PROJECT / "tests").rglob("test_*.py"):
        defined |= set(re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8")))

    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))

    assert named <= defined, f"{page.name} names {sorted(named - defined)}"


def test_every_row_of_the_tables_about_delta_has_a_test():
    rows = [
        line for line in (PROJECT / "docs" / "delta.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "
    ]

    untested = [row for row in rows if "`test_" not in row and not row.endswith("| test |")]

    assert len(rows) > 30
    assert untested == []


def test_the_runbook_has_every_error_class():
    from materialize import errors

    text = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^### (\w+)$", text, re.MULTILINE))

    assert set(errors.__all__) - {"MaterializeError"} <= headings
