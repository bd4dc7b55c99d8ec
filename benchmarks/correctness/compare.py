"""Three writers through the same cases over a Delta table, and how many keys each leaves wrong: a table in Markdown out.

    .venv/bin/python benchmarks/correctness/compare.py

The oracle is the one of tests/proofs: the Delta log and the data files, read by plain Python and pyarrow, every key compared.
Feast has a virtual environment of its own in the user's cache folder, made on the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1])]

import pyarrow as pa  # noqa: E402 - after the path
import pyarrow.parquet as pq  # noqa: E402

from materialize.model import from_us  # noqa: E402
from tests import servers  # noqa: E402
from tests.fault_proxy import Fault, FaultProxy  # noqa: E402
from tests.projects import Project  # noqa: E402
from tests.proofs.oracle import Fact, Lake, facts_in_redis, wrong_keys  # noqa: E402
from tests.proofs.story import FIRST_US, UPDATED  # noqa: E402
from tests.tables import SCHEMA  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEED, ENTITIES = 1, 2_000
HOUR_US = 3_600_000_000
#: Where in the bytes of a run's requests a kill comes: alone, and in pairs with the one after it.
KILLS = (0.02, 0.3, 0.6, 0.95)
#: Seconds that a run may take, and that a scheduler tries again for.
SECONDS = 180.0


class World:
    """A table, its oracle, and an empty server. Hours count from the first event time; a row's event is within its hour."""

    def __init__(self, folder: Path, server: servers.Server) -> None:
        self.folder, self.server, self.rng = folder, server, random.Random(SEED)
        self.project = Project(folder, server.url)
        self.rows = 0
        self.lake: Lake | None = None

    def append(self, users: range, hour: float, *, created: float | None = None) -> None:
        """A newer row of each user, at its own microsecond after *hour*; *created* likewise."""
        numbers = range(self.rows, self.rows + len(users))
        self.rows += len(users)
        times = [
            pa.array([FIRST_US + int(one * HOUR_US) + user for user in users], pa.int64()).cast(SCHEMA.field(1).type)
            for one in (hour, hour if created is None else created)
        ]
        columns = [
            pa.array([f"u{user}" for user in users]),
            *times,
            pa.array([number / 8 for number in numbers]),
            pa.array(list(numbers), pa.int64()),
            pa.array([f"{number:0100}" for number in numbers]),
        ]
        self.project.table.append_table(pa.table(columns, schema=SCHEMA))

    def update(self, users: range) -> None:
        """Other values at the same times."""
        self.project.table.delta.update(predicate=among(users), updates={"count": f"count + {UPDATED}"})

    def delete(self, users: range) -> None:
        self.project.table.delta.delete(among(users))

    def snapshot(self) -> None:
        """The live rows in one file, for writers that do not read Delta."""
        pq.write_table(self.project.table.delta.to_pyarrow_dataset().to_table(), self.folder / "next.parquet")
        (self.folder / "next.parquet").rename(self.folder / "source.parquet")

    def wrong(self, online: dict[str, list[Any]]) -> Counter[str]:
        """*online*: amount, count and country by user, as the writer's own readers get them."""
        self.lake = self.lake.refresh() if self.lake else Lake(self.project.table.path)
        born = {fact.count: fact for fact in self.lake.born}
        facts = {user.encode(): same_row(born.get(row[1]), row) for user, row in online.items()}
        return wrong_keys(self.lake, facts)


def same_row(fact: Fact | None, row: list[Any]) -> Fact:
    """The row that the features are of; one of no row at all is told by its times."""
    mixed = Fact(-1, -1, *row)
    return fact if fact is not None and fact[2:] == mixed[2:] else mixed


def among(users: range) -> str:
    return f"user_id IN ({', '.join(repr(f'u{user}') for user in users)})"


# --- the writers -------------------------------------------------------------------------------------------------------


class Materialize:
    """The command line, one process for each run."""

    def __init__(self, world: World) -> None:
        self.world = world

    def start(self, port: int, *, hour: float) -> subprocess.Popen[str]:  # noqa: ARG002 - it reads the log, not the clock
        self.world.project.configure(url=f"redis://127.0.0.1:{port}/0")
        return self.world.project.start("incremental")

    def end(self, process: subprocess.Popen[str]) -> int:
        process.communicate(timeout=SECONDS)
        return process.returncode

    def backfill(self, hours: tuple[float, float]) -> None:
        ends = (from_us(FIRST_US + int(hour * HOUR_US)).isoformat() for hour in hours)
        ended = self.world.project.run("backfill", "spending", "--start", next(ends), "--end", next(ends))
        assert ended.returncode == 0, ended.stderr

    def read(self) -> dict[str, list[Any]]:
        client = self.world.server.client
        keys = list(client.scan_iter(match="fs:spending:{*"))
        facts = facts_in_redis(dict(zip(keys, client.mget(keys), strict=True)), "spending", "fs")
        return {key.decode(): list(fact[2:]) for key, fact in facts.items() if fact is not None}

    def close(self) -> None:
        pass


class Driven:
    """A writer that is driven line by line. Runs of its own process, which lasts; of another one where it may be killed."""

    def __init__(self, world: World, python: str, script: str) -> None:
        self.world, self.command = world, [python, str(HERE / script), str(world.folder)]
        self.mine: subprocess.Popen[str] | None = None

    def started(self, port: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.world.folder / "talk").open("a"),
            text=True,
            env=os.environ | {"FEAST_USAGE": "False"},
        )

    def tell(self, process: subprocess.Popen[str], **command: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()

    def ask(self, **command: Any) -> Any:
        self.world.snapshot()
        if self.mine is None:
            self.mine = self.started(self.world.server.port)
        self.tell(self.mine, **command)
        assert self.mine.stdout is not None
        answer = self.mine.stdout.readline()
        assert answer, (self.world.folder / "talk").read_text()[-3000:]
        return json.loads(answer)

    def start(self, port: int, *, hour: float) -> subprocess.Popen[str]:
        self.world.snapshot()
        process = self.started(port)
        self.tell(process, do="run", end=FIRST_US + int(hour * HOUR_US))
        return process

    def end(self, process: subprocess.Popen[str]) -> int:
        process.communicate(timeout=SECONDS)  # its input ends, and so does it
        return process.returncode

    def backfill(self, hours: tuple[float, float]) -> None:
        start, end = (FIRST_US + int(hour * HOUR_US) for hour in hours)
        self.ask(do="backfill", start=start, end=end)

    def read(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = self.ask(do="read", users=[f"u{user}" for user in range(ENTITIES)])
        return found

    def close(self) -> None:
        if self.mine is not None:
            self.mine.communicate(timeout=SECONDS)


Writer = Materialize | Driven


def run(writer: Writer, hour: float) -> None:
    """A scheduled run at *hour*, tried again until it succeeds, as a scheduler does."""
    if isinstance(writer, Driven):
        writer.ask(do="run", end=FIRST_US + int(hour * HOUR_US))
        return
    deadline = time.monotonic() + SECONDS
    while (code := writer.end(writer.start(writer.world.server.port, hour=hour))) != 0:
        assert time.monotonic() < deadline, f"{type(writer).__name__} ended with {code}"
        time.sleep(1)


def killed(writer: Writer, hour: float, at: int) -> None:
    """A run that is killed before byte *at* of its requests passes, if it sends so many."""
    started = threading.Event()
    process: list[subprocess.Popen[str]] = []

    def kill() -> None:
        started.wait()
        process[0].kill()

    with FaultProxy(writer.world.server.port, [Fault("up", at, "call", call=kill)]) as proxy:
        process.append(writer.start(proxy.port, hour=hour))
        started.set()
        assert writer.end(process[0]) == (-signal.SIGKILL if proxy.fired else 0)


def size(writer: Writer, hour: float) -> int:
    """The bytes of the requests of a run that finishes."""
    with FaultProxy(writer.world.server.port) as proxy:
        assert writer.end(writer.start(proxy.port, hour=hour)) == 0
        return proxy.passed["up"]


# --- the cases: a world and a writer in, with which the table and the store end up at odds or not ------------------------

HALF, TENTH = range(ENTITIES // 2), range(ENTITIES // 10)
EVERYONE, LAST_TENTH = range(ENTITIES), range(ENTITIES * 9 // 10, ENTITIES)


def kills(world: World, writer: Writer) -> None:
    """Proofs 1 and 2: killed at each of some points, once and in pairs, then finished; a new hour each time."""
    world.append(EVERYONE, 0)
    sent = size(writer, 1)
    for number, at in enumerate((*((one,) for one in KILLS), *pairwise(KILLS)), start=1):
        world.append(EVERYONE, number)
        for one in at:
            killed(writer, number + 1, int(sent * one))
        run(writer, number + 1)


def zombie(world: World, writer: Writer) -> None:
    """Proof 3: a run is stopped half way, the next hour's run finishes, the stopped one goes on."""
    world.append(EVERYONE, 0)
    sent = size(writer, 1)
    world.append(EVERYONE, 1)
    started = threading.Event()
    process: list[subprocess.Popen[str]] = []

    def stop() -> None:
        started.wait()
        os.kill(process[0].pid, signal.SIGSTOP)
        world.append(EVERYONE, 2)
        run(writer, 3)
        os.kill(process[0].pid, signal.SIGCONT)

    with FaultProxy(world.server.port, [Fault("up", sent * 3 // 4, "call", call=stop)]) as proxy:
        process.append(writer.start(proxy.port, hour=2))
        started.set()
        writer.end(process[0])
        assert proxy.fired


def late(world: World, writer: Writer) -> None:
    """Rows of an hour that is done already, the newest of their entities."""
    world.append(EVERYONE, 0)
    run(writer, 1)
    world.append(HALF, 1)
    run(writer, 2)
    world.append(LAST_TENTH, 1.5)
    world.append(HALF, 2)
    run(writer, 3)


def late_again(world: World, writer: Writer) -> None:
    """The same, and the hour is loaded again."""
    late(world, writer)
    writer.backfill((1, 2))


def older(world: World, writer: Writer) -> None:
    """An older hour is loaded again."""
    for hour in range(3):
        world.append(EVERYONE, hour)
        run(writer, hour + 1)
    writer.backfill((0, 1))


def corrected(world: World, writer: Writer) -> None:
    """A tenth has new rows with the same event time and a later created time, another tenth is updated in place; then the hour is
    loaded again.
    """
    world.append(EVERYONE, 0)
    run(writer, 1)
    world.append(TENTH, 0, created=1.5)
    world.update(LAST_TENTH)
    run(writer, 2)
    writer.backfill((0, 1))


def deleted(world: World, writer: Writer) -> None:
    """A tenth of the entities is deleted, and of another tenth the newest row."""
    world.append(EVERYONE, 0)
    run(writer, 1)
    world.append(TENTH, 1)
    run(writer, 2)
    world.delete(LAST_TENTH)
    world.project.table.delta.delete(f"{among(TENTH)} AND count >= {ENTITIES}")
    run(writer, 3)


CASES: dict[str, Callable[[World, Writer], None]] = {
    "killed at 4 points and 3 pairs of them, then finished": kills,
    "stopped half way, the next run finishes, then it goes on": zombie,
    "late rows": late,
    "late rows, their hour loaded again": late_again,
    "an older hour loaded again": older,
    "corrections, their hour loaded again": corrected,
    "deletes": deleted,
}


def feast_python() -> str:
    """The Python of Feast's environment, made with uv when it is not there."""
    wanted = (HERE / "requirements.txt").read_text()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    venv = cache / "materialize-benchmarks" / "correctness"
    python, marker = venv / "bin" / "python", venv / "installed"
    if not marker.exists() or marker.read_text() != wanted:
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(venv)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(HERE / "requirements.txt")]
        subprocess.run(install, check=True)
        marker.write_text(wanted)
    return str(python)


@contextmanager
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="correctness-") as folder, servers.running("valkey") as server:
        yield World(Path(folder), server)


def main() -> None:
    """Print the table; exit code 1 if our own column is not 0 everywhere."""
    parser = argparse.ArgumentParser(description="Count the keys that writers leave wrong.")
    parser.add_argument("--case", nargs="*", default=[""], help="only cases with one of these in their name")
    words = parser.parse_args().case
    chosen = {name: case for name, case in CASES.items() if any(word in name for word in words)}
    makers: dict[str, Callable[[World], Writer]] = {
        "materialize": Materialize,
        "Feast 0.67.0": lambda one: Driven(one, feast_python(), "feast_writer.py"),
        "plain pipeline": lambda one: Driven(one, sys.executable, "plain_writer.py"),
    }
    print(f"| wrong keys of {ENTITIES:,} | {' | '.join(makers)} |\n|---|{'---|' * len(makers)}", flush=True)
    bad = 0
    for name, case in chosen.items():
        cells = []
        for who, make in makers.items():
            with world() as one:
                writer = make(one)
                try:
                    case(one, writer)
                    wrong = one.wrong(writer.read())
                finally:
                    writer.close()
            bad += wrong.total() * (who == "materialize")
            cells.append(f"{wrong.total():,}" + "".join(f", {what}" for what in wrong))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    sys.exit(int(bad > 0))


if __name__ == "__main__":
    main()
