"""What configuration may reach: paths below its roots, also through links, and the names that are safe wherever they end up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, strategies as st

from materialize.config import load
from materialize.config.document import Document
from materialize.config.limits import source_problem
from materialize.config.schema import stores_of, view_of
from materialize.errors import ConfigError
from materialize.online.dynamodb.address import Address
from materialize.online.redis.address import parse

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[1]
VIEW = "source: {source}\njoin_keys: [user_id]\nevent_timestamp: event_timestamp\nfeatures: {{total: float64}}\n"
#: Any text, and more often text that means something to somebody who reads a name.
NAMES = st.text(max_size=70) | st.text("ab_Z09 .:|{}%/\\\"'\n\r\t\0$*?[]-=,", max_size=70)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a lake, beside a folder that is none of its business."""
    monkeypatch.delenv("MATERIALIZE_ROOTS", raising=False)
    root = tmp_path / "project"
    for folder in (root / "config" / "feature_views", root / "lake" / "deep" / "deeper", tmp_path / "outside"):
        folder.mkdir(parents=True)
    (root / "config" / "online_stores.yaml").write_text('default: {url: "sqlite:///online.db"}\n')
    source(root, "lake/spending")
    return root


def source(root: Path, text: str) -> None:
    (root / "config" / "feature_views" / "spending.yaml").write_text(VIEW.format(source=f"'{text}'"))


def store(root: Path, url: str) -> None:
    (root / "config" / "online_stores.yaml").write_text(f"default: {{url: '{url}'}}\n")


def refusal(root: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(root / "config")
    _, problem = str(caught.value).splitlines()
    return problem.strip()


# Roots -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["lake/spending", "./lake/../lake/x", ".", "lake/not/there", "/mnt/lake/x", "s3://bucket/x", "file:///mnt/x"])  # fmt: skip
def test_without_a_setting_relative_paths_below_the_project_and_absolute_places_are_free(
    project: Path, text: str
) -> None:
    source(project, text)

    assert load(project / "config").feature_views


@pytest.mark.parametrize("text", ["../outside/x", "lake/../../outside", "..", "link/x", "lake/link", "link/../link"])
def test_relative_source_stays_below_the_project(project: Path, text: str) -> None:
    (project / "link").symlink_to(project.parent / "outside")
    (project / "lake" / "link").symlink_to("../../outside")
    source(project, text)

    assert refusal(project) == (
        "source: expected a path below the parent of the config folder or a folder of MATERIALIZE_ROOTS, or an "
        f"absolute one, found {text!r}"
    )


def test_step_up_behind_a_link_is_taken_as_the_path_that_is_opened_is(project: Path) -> None:
    """``short/../../outside``: behind the link it is lake/outside, but what is opened is beside the project."""
    (project / "short").symlink_to("lake/deep/deeper")
    source(project, "short/../../outside")

    assert refusal(project).startswith("source: expected a path below")


def test_project_behind_a_link_and_links_within_it_work(project: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(project)
    (project / "today").symlink_to("lake/deep")
    (project / "config" / "feature_views" / "linked.yaml").symlink_to("spending.yaml")
    source(project, "today/spending")

    assert set(load(tmp_path / "current" / "config").feature_views) == {"spending", "linked"}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("lake/spending", True),
        ("/mnt/lake/x", True),
        ("file:///mnt/lake/x", True),
        ("s3://bucket/team", True),
        ("s3://bucket/team/x", True),
        ("../outside/x", False),
        ("/mnt/lake2/x", False),
        ("/mnt/lake/../x", False),
        ("/etc", False),
        ("file:///mnt/lake/../x", False),
        ("file:///mnt/lake/%2e%2e/x", False),
        (r"file:///mnt/lake/\..\..\etc", False),
        ("file://host/mnt/lake/x", False),
        ("FILE:///mnt/lake/x", False),
        ("s3://bucket/teammate", False),
        ("s3://bucket/team/../x", False),
        ("s3://bucket/team/%2E%2E/x", False),
        ("s3://bucket/team/.%2e/x", False),
        ("s3://bucket/team/x?y", False),
        ("s3://bucket@other/team/x", False),
        ("s3://other/team/x", False),
        ("s3a://bucket/team/x", False),
        ("memory://x", False),
    ],
)
def test_with_roots_every_source_is_below_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, text: str, *, allowed: bool
) -> None:
    monkeypatch.setenv("MATERIALIZE_ROOTS", "/mnt/lake | s3://bucket/team/")
    source(project, text)

    if allowed:
        assert load(project / "config").feature_views
    else:
        assert re.match("source: expected a (path|URI) below .*MATERIALIZE_ROOTS", refusal(project))


@pytest.mark.parametrize(("text", "allowed"), [("none", True), ("lake/refused", True), ("../outside/refused", False)])
def test_quarantine_table_stays_below_the_project(project: Path, text: str, *, allowed: bool) -> None:
    with (project / "config" / "feature_views" / "spending.yaml").open("a") as file:
        file.write(f"quarantine: {text}\n")

    if allowed:
        assert load(project / "config").feature_views
    else:
        assert re.match("quarantine: expected a path below", refusal(project))


def test_root_that_is_a_link_and_a_link_into_a_root_are_followed(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").symlink_to("outside")
    (project / "link").symlink_to(tmp_path / "outside")
    monkeypatch.setenv("MATERIALIZE_ROOTS", str(tmp_path / "root"))
    source(project, "link/x")

    assert load(project / "config").feature_views


@pytest.mark.parametrize("roots", ["", " | ", ".", "..", "s3:"])
def test_setting_that_lists_no_place_opens_none(project: Path, monkeypatch: pytest.MonkeyPatch, roots: str) -> None:
    monkeypatch.setenv("MATERIALIZE_ROOTS", roots)
    monkeypatch.chdir(project.parent)
    assert load(project / "config").feature_views

    source(project, str(project.parent / "outside"))
    assert refusal(project).startswith("source: expected a path below")


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with links into itself, up, out and in circles."""
    root = tmp_path_factory.mktemp("linked") / "a" / "project"
    (root / "in" / "deep").mkdir(parents=True)
    for name, target in {"out": "../..", "deep": "in/deep", "in/up": "..", "in/out": "../../b", "turn": "turn"}.items():
        (root / name).symlink_to(target)
    return root


@given(st.lists(st.sampled_from(["..", ".", "", "in", "out", "deep", "up", "turn", "new"]), max_size=9).map("/".join))
@example("deep/../../a")
def test_no_accepted_path_leads_out(linked: Path, path: str) -> None:
    """What is opened is found by the kernel, which knows no roots: it walks there, and says where it is."""
    if not path.startswith("/") and source_problem(path, linked) is None:
        opened = Path(os.path.normpath(linked / path))
        while not opened.exists():
            opened = opened.parent
        handle = os.open(opened, os.O_PATH)
        try:
            assert Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(linked)
        finally:
            os.close(handle)


def test_sqlite_files_have_the_same_roots(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "link").symlink_to(project.parent / "outside")
    for url in ("sqlite:///../outside/x.db", "sqlite:///link/x.db"):
        store(project, url)
        assert refusal(project).startswith("default.url: expected sqlite:/// and a path below the parent")

    store(project, "sqlite:////var/lib/online.db")
    assert load(project / "config").online_stores
    monkeypatch.setenv("MATERIALIZE_ROOTS", "/srv/lake")
    assert refusal(project).startswith("default.url: expected sqlite:/// and a path below the parent")
    store(project, "sqlite:////srv/lake/online.db")
    assert load(project / "config").online_stores


def test_view_that_is_a_link_to_another_place_is_not_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = project.parent / "outside" / "secret.yaml"
    elsewhere.write_text("hunter2: [")
    (project / "config" / "feature_views" / "other.yaml").symlink_to(elsewhere)

    assert refusal(project) == (
        "other.yaml: expected a file, or a link to one, below the parent of the config folder or a folder of "
        "MATERIALIZE_ROOTS, found a link to another place"
    )
    elsewhere.write_text(VIEW.format(source="lake/x"))
    monkeypatch.setenv("MATERIALIZE_ROOTS", str(elsewhere.parent))
    assert set(load(project / "config").feature_views) == {"spending", "other"}


def test_connections_of_sources_are_those_that_the_setting_lists(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (project / "config" / "feature_views" / "spending.yaml").open("a") as file:
        file.write("source_connection: lake_of_another_team\n")
    assert load(project / "config").feature_views

    monkeypatch.setenv("MATERIALIZE_VIEW_CONNECTIONS", "lake, other")
    assert refusal(project) == (
        "source_connection: expected an Airflow connection that MATERIALIZE_VIEW_CONNECTIONS lists, found 'lake_of_another_team'"
    )
    monkeypatch.setenv("MATERIALIZE_VIEW_CONNECTIONS", "lake, lake_of_another_team")
    assert load(project / "config").feature_views


# Names -----------------------------------------------------------------------------------------------------------------


def sentence(problems: list[str], path: Path) -> None:
    """A refusal is text of lines that say what was expected, and nothing of a name makes a line of its own."""
    lines = Document(path, problems=problems).report().split("\n")
    assert len(lines) == 1 + len(problems)
    for line in lines[1:]:
        assert "expected" in line
    assert all(line.isprintable() for line in lines)


@given(NAMES)
@example("spending\n")
@example("\u017fpending")
def test_accepted_name_of_a_view_or_store_is_safe_everywhere(name: str) -> None:
    path = Path("feature_views") / f"{name}.yaml".replace("/", "_")
    data = {"source": "lake", "join_keys": ["k"], "event_timestamp": "t", "features": {"f": "int8"}}
    document, stores = Document(path, data), Document(Path("online_stores.yaml"), {name: {"url": "memory://"}})

    view, made = view_of(document, Path("/project"), None), stores_of(stores, Path("/project"))

    if view is None:
        sentence(document.problems, path)
    else:
        safe(view.name)
    if stores.problems:
        sentence(stores.problems, stores.path)
    else:
        assert list(made) == [name]
        safe(name)


def safe(name: str) -> None:
    assert not set(name) & set(":{}|%*?[]\\\r\n "), "a part of a Redis key, and of a pattern of SCAN and of ACL"
    assert re.fullmatch(r"[a-zA-Z0-9_.-]{3,255}", f"fs.{name}"), "a table or attribute of DynamoDB"
    assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name), "a label of Prometheus needs no escapes"
    assert len(f"{name}.yaml.part".encode()) <= 255, "a file's name"
    assert "/" not in name
    assert not name.startswith(".")
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,250}", f"write_{name}_{name}"), "an id of Airflow's"
    assert name.isprintable(), "a line of a log"
    assert name == name.lower(), "two names are two files also where case does not count"


@given(NAMES, st.sampled_from(["features", "join_keys", "event_timestamp", "created_timestamp", "source", "pool"]))
@example("total\nINFO all is well", "join_keys")
@example("\x1b[31mred", "event_timestamp")
@example("\0", "source")
@example("\ud800", "join_keys")
def test_accepted_column_place_or_pool_is_one_line_of_a_log(name: str, key: str) -> None:
    path = Path("feature_views/spending.yaml")
    data = {"source": "lake", "join_keys": ["k"], "event_timestamp": "t", "features": {"f": "int8"}}
    shaped = {"features": {name: "int8"}, "join_keys": [name]}
    document = Document(path, data | {key: shaped.get(key, name)})
    if key == "pool":
        document = Document(path, {"default": {"url": "memory://", "pool": name}}, secret=True)
        stores_of(document, Path("/project"))
    else:
        view_of(document, Path("/project"), None)

    if document.problems:
        sentence(document.problems, path)
    else:
        assert name
        assert name.isprintable()
    if key == "features" and not document.problems:
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_ .-]*", name, flags=re.ASCII)


@given(NAMES)
@example("fs\n")
def test_accepted_prefix_of_a_store_means_nothing_else_in_keys_and_patterns(prefix: str) -> None:
    redis = accepted(lambda: parse(f"redis://cache?prefix={prefix}").prefix)
    table = accepted(lambda: Address.parse(f"dynamodb://eu-central-1/{prefix}").table("u" * 63))

    assert redis is None or re.fullmatch(r"[A-Za-z0-9_.:-]+", redis)
    assert table is None or re.fullmatch(r"[A-Za-z0-9_.-]{3,255}", table)


def accepted(made: Callable[[], str]) -> str | None:
    """What was made; None when it was refused with a sentence."""
    try:
        return made()
    except ConfigError as error:
        told = str(error)
    assert "expected" in told
    return None


# Code that runs what it reads ------------------------------------------------------------------------------------------

#: exec, pickle, marshal, eval, mktemp, yaml.load, and everything that starts a shell or takes a command's text.
RULES = "S102,S301,S302,S307,S506,S602,S604,S605,S609"
PLANTED = """\
import os, pickle, subprocess, yaml
exec("1")
pickle.loads(b"")
eval("1")
yaml.load("", Loader=yaml.Loader)
subprocess.run("ls", shell=True)
os.system("ls " + os.name)
"""


def ruff(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--ignore-noqa", "--no-cache", "--select", RULES]
    return subprocess.run(
        [*command, "--output-format", "concise", *arguments], capture_output=True, text=True, check=False
    )


def test_package_runs_no_code_that_it_reads(tmp_path: Path) -> None:
    """No exception is granted: neither a comment nor the settings for a folder count."""
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED)

    found = ruff(*(str(REPOSITORY / folder) for folder in ("materialize", "dags", "plugins")))
    seen = ruff(str(planted))

    assert (found.returncode, found.stdout) == (0, "All checks passed!\n")
    assert set(re.findall(r"S\d{3}", seen.stdout)) == {"S102", "S301", "S307", "S506", "S602", "S605"}
