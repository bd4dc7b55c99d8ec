"""A lease has one holder, ends with its time or its process, and whoever lost it stops before the next write."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import pytest

from materialize import lease, pipeline, process, watermark
from materialize.errors import BusyError, OnlineStoreError, UnavailableError, WatermarkError
from materialize.lease import LASTING, Lease, Terms, current, free, holding
from materialize.model import Interval
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisStore
from materialize.online.sqlite import SqliteStore
from materialize.pipeline import Run
from materialize.stop import Stopped
from materialize.testing import CrashingStore
from materialize.verify import verify
from tests.projects import PAST, Project
from tests.stepping import amounts, incremental, position
from tests.tables import NOW, T0, Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests import servers
    from tests.dynamodb_local import DynamoDbLocal

VIEW = "spending"
SHORT = Terms(seconds=0.3)


class Clocked(MemoryStore):
    """A store whose clock is moved by hand, in seconds."""

    seconds = 1_000.0

    def now_us(self, view: str) -> int:  # noqa: ARG002 - one clock for all
        return int(self.seconds * 1e6)


@pytest.fixture
def store() -> Clocked:
    return Clocked()


@pytest.fixture
def table(tmp_path: Path) -> Table:
    made = Table(tmp_path / "table")
    made.append(row("a", 1, 1.0))
    return made


def put(store: MemoryStore, found: Lease) -> None:
    held = store.read_cell(VIEW, "lease")
    assert store.compare_and_set_cell(VIEW, "lease", held, found.to_json())


def of_another_host(until_us: int = 2_000_000_000) -> Lease:
    return Lease("theirs", "db7/12", "rebuild", 1, until_us, "token", "boot/pid:[1]/12/99")


def test_second_run_is_told_who_is_at_it_and_writes_nothing(table: Table, store: Clocked) -> None:
    with holding(store, VIEW, "first", "rebuild", Terms()), pytest.raises(BusyError) as caught:
        incremental(table, store, "second")

    assert "feature view 'spending': could not begin the run second in memory://" in str(caught.value)
    assert f"the run first (rebuild, on {process.here()}, since 1970-01-01T00:16:40+00:00" in str(caught.value)
    assert "materialize release spending" in str(caught.value)
    assert (watermark.read(store, VIEW), amounts(table, store)) == (None, {})


def test_lease_is_given_back_and_the_next_run_takes_it_at_once(table: Table, store: Clocked) -> None:
    incremental(table, store, "first")

    assert current(store, VIEW) is None
    incremental(table, store, "second")


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
def test_run_that_moves_the_watermark_holds_the_lease(table: Table, store: Clocked, mode: str) -> None:
    held = []
    run = Run("default", "mine", lambda: NOW, lambda _: held.append(current(store, VIEW)))

    getattr(pipeline, mode)(table.view, store, run)

    assert [(found.holder, found.mode) for found in held] == [("mine", mode)]


def test_backfill_goes_on_beside_another_run(table: Table, store: Clocked) -> None:
    incremental(table, store)
    put(store, of_another_host())

    report = pipeline.backfill(
        table.view, store, Run("default", "b", lambda: NOW), Interval(T0, T0 + timedelta(days=1))
    )

    assert report.unchanged == 1
    assert current(store, VIEW) == of_another_host()


def test_repair_in_a_new_generation_waits_its_turn(table: Table, store: Clocked) -> None:
    incremental(table, store)
    (key,) = store.content.records
    held = store.content.records[key]
    store.content.records[key] = replace(held, payload=held.payload[:-1] + b"?")
    put(store, of_another_host())

    with pytest.raises(BusyError):
        verify(table.view, store, Run("default", "v", lambda: NOW), repair=True)

    assert position(table, store) == (1, 0)
    free(store, VIEW)
    assert verify(table.view, store, Run("default", "v", lambda: NOW), repair=True).repaired == 1


def test_lease_of_another_host_ends_by_time_alone(store: Clocked) -> None:
    put(store, of_another_host(until_us=1_000_000_001))

    with pytest.raises(BusyError), holding(store, VIEW, "mine", "incremental", Terms()):
        pass
    store.seconds = 1_000.000001
    with holding(store, VIEW, "mine", "incremental", Terms()) as held:
        assert current(store, VIEW) == held.lease


def test_lease_of_a_dead_process_of_this_host_is_free_at_once(store: Clocked) -> None:
    program = "from materialize import process; print(process.name(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as other:
        theirs = Lease("theirs", "here/1", "incremental", 1, 2_000_000_000, "token", other.stdout.readline().strip())
        put(store, theirs)

        assert current(store, VIEW) == theirs
        other.kill()
    assert current(store, VIEW) is None


def test_process_whose_pid_was_used_again_is_over() -> None:
    mine = process.name()

    assert mine is not None
    assert not process.gone(mine)
    assert process.gone(mine + "0")
    assert process.gone(mine.replace(f"/{os.getpid()}/", "/4194999/"))
    assert not process.gone("another boot" + mine)


def test_lease_that_this_process_does_not_hold_any_more_is_free(table: Table, store: Clocked) -> None:
    dying = CrashingStore(store, after=1, effect=False, error=OnlineStoreError)
    with pytest.raises(OnlineStoreError):
        incremental(table, dying, "dies")
    assert json.loads(store.read_cell(VIEW, "lease"))["until_us"] > 0

    incremental(table, store, "next")

    assert amounts(table, store) == {"a": 1.0}


def test_run_that_waits_goes_on_when_the_lease_is_free(store: Clocked) -> None:
    put(store, of_another_host())
    later = threading.Timer(0.2, free, (store, VIEW))
    later.start()

    with holding(store, VIEW, "mine", "incremental", Terms(wait=30.0)):
        later.join()


def test_lease_is_renewed_while_the_run_lasts() -> None:
    store = MemoryStore()
    with holding(store, VIEW, "mine", "incremental", SHORT) as held:
        deadline = time.monotonic() + 30
        while (found := current(store, VIEW)) is None or found.until_us <= held.lease.until_us:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held.check()


def test_run_whose_lease_was_taken_over_stops_before_its_next_write(table: Table, store: Clocked) -> None:
    incremental(table, store)
    table.append(row("a", 2, 2.0))
    table.append(row("b", 2, 2.0))

    def taken(_: int) -> None:
        """After the first write; it returns when the thread that renews has seen it and ended."""
        put(store, of_another_host())
        for thread in threading.enumerate():
            if thread.name == "materialize-lease":
                thread.join(30)

    run = Run("default", "loses", lambda: NOW, taken, SHORT)
    with pytest.raises(BusyError, match=r"could not go on with the run loses .* the run theirs"):
        pipeline.incremental(table.view, store, run)

    assert position(table, store) == (1, 0)
    assert current(store, VIEW) == of_another_host()


def test_process_that_stood_still_asks_before_it_goes_on(store: Clocked) -> None:
    with holding(store, VIEW, "mine", "incremental", Terms()) as held:
        held.check()
        put(store, of_another_host())
        held.renewed -= 61

        with pytest.raises(BusyError):
            held.check()


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_run_that_stands_still_at_the_watermark_overwrites_nothing(table: Table, mode: str, when: str) -> None:
    """*when*: a successor finishes before or after the run looks at the watermark."""
    store = Meanwhile()
    incremental(table, store)
    table.append(row("a", 2, 2.0), row("b", 2, 2.0))

    def successor() -> None:
        free(store, VIEW)
        table.append(row("a", 3, 3.0), row("c", 3, 3.0))
        table.delta.delete("user_id = 'b'")
        incremental(table, store, "successor")

    setattr(store, when, [successor])
    with suppress(BusyError, WatermarkError):
        getattr(pipeline, mode)(table.view, store, Run("default", "zombie", lambda: NOW))

    assert (store.before, store.after) == ([], [])
    assert amounts(table, store) == {"a": 3.0, "c": 3.0}
    if when == "after":
        assert json.loads(store.read_cell(VIEW, "watermark"))["run_id"] == "successor"


class Meanwhile(MemoryStore):
    """A store with something to happen once, before or after the next look at the watermark."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[Any] = []
        self.after: list[Any] = []

    def read_cell(self, view: str, name: str) -> bytes | None:
        looked = name == "watermark"
        if looked and self.before:
            self.before.pop()()
        found = super().read_cell(view, name)
        if looked and self.after:
            self.after.pop()()
        return found


def test_lasting_lease_stays_between_tasks_and_is_taken_again_by_the_same_run_only(store: Clocked) -> None:
    with holding(store, VIEW, "dag/run", "incremental", LASTING, last=False):
        pass
    store.seconds += 899

    at_once = replace(LASTING, wait=0.0)
    with pytest.raises(BusyError), holding(store, VIEW, "dag/other", "incremental", at_once):
        pass
    with holding(store, VIEW, "dag/run", "incremental", LASTING, last=False) as one:
        with holding(store, VIEW, "dag/run", "incremental", LASTING, last=False) as other:
            one.renew()
            other.renew()
        one.renew()
        one.check()
    with holding(store, VIEW, "dag/run", "incremental", LASTING):
        pass
    assert current(store, VIEW) is None


@pytest.mark.parametrize("error", [UnavailableError("it"), OnlineStoreError("it"), Stopped(15)], ids=repr)
def test_lasting_lease_of_a_task_that_fails_is_free_and_its_second_try_takes_it_again(
    store: Clocked, error: BaseException
) -> None:
    with pytest.raises(type(error)), holding(store, VIEW, "dag/run", "incremental", LASTING, last=False):
        raise error

    assert current(store, VIEW) is None
    with holding(store, VIEW, "dag/run", "incremental", LASTING, last=False):
        pass
    assert str(current(store, VIEW)).startswith("the run dag/run ")


def test_operator_frees_a_lease_and_the_run_that_had_it_stops(store: Clocked) -> None:
    with holding(store, VIEW, "mine", "incremental", Terms()) as held:
        freed = free(store, VIEW)
        held.renew()

        assert freed == held.lease
        with pytest.raises(BusyError, match="freed by"):
            held.check()
    assert free(store, VIEW) is None


def test_cell_that_is_no_lease_is_refused_and_can_be_freed(store: Clocked) -> None:
    store.compare_and_set_cell(VIEW, "lease", None, b"[]")

    with pytest.raises(OnlineStoreError, match="materialize release spending"):
        current(store, VIEW)
    assert free(store, VIEW) is None
    assert current(store, VIEW) is None


def test_finished_run_that_cannot_give_its_lease_back_is_finished(
    table: Table, store: Clocked, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, lease.__name__), holding(store, VIEW, "mine", "rebuild", Terms()):
        store.compare_and_set_cell = refusing  # type: ignore[method-assign]

    assert "could not give the lease back" in caplog.text


def refusing(*_: object) -> bool:
    raise UnavailableError("no answer")


# Servers' clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_clock_of_redis_is_the_servers(server: servers.Server) -> None:
    with RedisStore(server.url) as asked:
        before, now, after = server.client.time(), asked.now_us(VIEW), server.client.time()

    assert before[0] * 1_000_000 + before[1] <= now <= after[0] * 1_000_000 + after[1]


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_lease_on_dynamodb_goes_by_the_date_of_its_answers(dynamodb_local: DynamoDbLocal) -> None:
    dynamodb_local.drop_tables()
    told: list[int] = []
    address = f"dynamodb://key:secret@eu-central-1/fs?endpoint_url={dynamodb_local.endpoint}"
    with DynamoDbStore(address) as first, DynamoDbStore(address) as second:
        first.setup(VIEW)
        first.client.api.meta.events.register("after-call.dynamodb.GetItem", lambda **found: told.append(date(found)))

        with holding(first, VIEW, "mine", "rebuild", Terms(seconds=30.0)) as held:
            assert held.lease.taken_us in told
            assert held.lease.taken_us % 1_000_000 == 0
            assert held.lease.until_us == held.lease.taken_us + 30_000_000
            assert current(second, VIEW) == held.lease
            with pytest.raises(BusyError), holding(second, VIEW, "other", "rebuild", Terms()):
                pass
            held.renew()
            held.check()
        with holding(second, VIEW, "other", "rebuild", Terms()) as after:
            assert free(first, VIEW) == after.lease
            after.renew()
            with pytest.raises(BusyError, match="freed by"):
                after.check()


def date(answer: dict[str, Any]) -> int:
    told = answer["parsed"]["ResponseMetadata"]["HTTPHeaders"]["date"]
    return int(parsedate_to_datetime(told).timestamp() * 1e6)


# Commands --------------------------------------------------------------------------------------------------------------


@contextmanager
def held_elsewhere(project: Project) -> Iterator[Lease]:
    """The lease of a run of another host, in the project's store."""
    with SqliteStore(project.url) as there:
        until = there.now_us(VIEW) + 3_600_000_000
        theirs = of_another_host(until)
        assert there.compare_and_set_cell(VIEW, "lease", there.read_cell(VIEW, "lease"), theirs.to_json())
        yield theirs


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("a", PAST, 1.0))
    project.json("incremental")
    return project


def test_command_says_who_holds_a_view_and_stops_until_it_is_released(project: Project) -> None:
    with held_elsewhere(project) as theirs:
        (status,) = project.json("status")
        refused = project.run("incremental")

        assert status["held_by"] == str(theirs)
        assert refused.returncode == 1
        assert f"found that {theirs} is writing there" in " ".join(refused.stderr.split())
        assert project.json("release", VIEW)[0]["lease"] == f"freed from {theirs}"
        assert project.json("status")[0]["held_by"] is None
        assert project.run("incremental").returncode == 0


def test_command_that_waits_begins_when_the_view_is_free(project: Project) -> None:
    project.table.append(row("a", PAST + 1, 2.0))
    with held_elsewhere(project), SqliteStore(project.url) as there:
        waiting = project.start("incremental", "--wait", "1m", "--json", "-v")
        with waiting:
            assert waiting.stderr is not None
            for line in waiting.stderr:
                if "waiting view=spending for the run theirs" in line:
                    break
            free(there, VIEW)
            out, err = waiting.communicate(timeout=60)

    assert waiting.returncode == 0, err
    assert json.loads(out)["written"] == 1


def test_wait_is_a_duration(project: Project) -> None:
    ended = project.run("incremental", "--wait", "soon")

    assert ended.returncode == 2
    assert "expected a duration such as 90s, 5m or 1h" in " ".join(ended.stderr.split())
