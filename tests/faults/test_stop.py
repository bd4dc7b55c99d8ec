"""Runs in real processes that are asked to stop: what is under way is finished and counted, nothing else is begun, the next run heals."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from materialize import watermark
from materialize.model import OnlineStoreConfig
from materialize.online import open_store
from tests.faults.test_kill import ENTITIES, all_records, rows
from tests.projects import Project
from tests.valve import Valve, hears

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests import servers

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.server,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux which signals a process hears"),
]

ROWS = ENTITIES * 9 // 10
#: Bytes after which each connection stands still: within the first batch, which has 4 MiB.
PART = 10**6


@dataclass(slots=True)
class World:
    """A project whose store is behind a valve; `start` gives a run that stands still in the middle of two write calls."""

    project: Project
    server: servers.Server
    valve: Valve
    running: list[subprocess.Popen[str]]

    def start(self) -> subprocess.Popen[str]:
        self.valve.limit(PART)
        # A shell may have started the tests with SIGINT ignored, which would be inherited.
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
        process = self.project.start("incremental", "--json", **heard)
        self.running.append(process)
        self.wait_until(lambda: self.valve.stuck() == 2, process)
        return process

    def stop(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Ask it to stop; it has heard when this returns."""
        process.send_signal(number)
        self.wait_until(lambda: not hears(process.pid, number), process)

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def records(self) -> dict[bytes, bytes]:
        with open_store(OnlineStoreConfig("default", self.server.url)) as store:
            return all_records(store)

    def version(self) -> int | None:
        with open_store(OnlineStoreConfig("default", self.server.url)) as store:
            found = watermark.read(store, "spending")
            return None if found is None else found.version


@pytest.fixture
def world(tmp_path: Path, valkey: servers.Server) -> Iterator[World]:
    with Valve(valkey.port) as valve:
        project = Project(tmp_path, f"redis://127.0.0.1:{valve.port}/0?timeout=60")
        project.table.append_table(rows(0))
        made = World(project, valkey, valve, [])
        try:
            yield made
        finally:
            for process in made.running:
                process.kill()
                process.communicate()


def heal(world: World) -> dict[str, Any]:
    world.valve.open()
    (report,) = world.project.json("incremental")
    assert len(world.records()) == ROWS
    assert world.version() == 0
    return report


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_finishes_what_is_under_way_and_tells_how_far_it_came(
    world: World, number: signal.Signals, code: int
) -> None:
    process = world.start()

    world.stop(process, number)
    world.valve.open()
    out, err = process.communicate(timeout=10)

    stored = len(world.records())
    assert process.returncode == code, err
    assert 0 < stored < ROWS
    (line,) = err.splitlines()
    assert f"stopped by {number.name} after {stored:,} rows. The watermark stays" in line
    assert json.loads(out)["error"] == "Stopped"
    assert world.version() is None
    assert heal(world)["unchanged"] == stored


def test_a_second_signal_kills_at_once(world: World) -> None:
    process = world.start()

    world.stop(process, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)

    assert process.wait(10) == -signal.SIGTERM
    assert world.version() is None
    heal(world)


def test_a_stop_does_not_wait_for_attempts_to_come(world: World) -> None:
    world.project.configure(url=f"redis://127.0.0.1:{world.valve.port}/0?timeout=1")
    process = world.start()

    world.stop(process, signal.SIGTERM)
    started = time.monotonic()
    process.communicate(timeout=10)

    assert process.returncode == 143
    assert time.monotonic() - started < 3
    heal(world)
