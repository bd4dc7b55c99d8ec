"""Runs in real processes, killed with SIGKILL at many moments and run again, end as if nothing had happened."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from materialize import watermark
from materialize.model import OnlineStoreConfig
from materialize.online import open_store
from tests.projects import Project
from tests.tables import SCHEMA, UTC_TIME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from materialize.online.base import OnlineStore
    from tests import servers

pytestmark = [pytest.mark.e2e, pytest.mark.server]

ENTITIES = 40_000
#: Kills of a first run and of an incremental run, each half by time and half by what is already written.
KILLS = 10
SECONDS = 60.0


def rows(commit: int) -> pa.Table:
    """One row for each of most entities, of about 500 bytes: several write calls of a run."""
    chance = np.random.default_rng(commit)
    users = chance.permutation(ENTITIES)[: ENTITIES * 9 // 10]
    base = int(datetime(2025, 1, 1, tzinfo=timezone.utc).timestamp() * 1e6)
    events = pa.array(base + chance.integers(0, 10**9, len(users)), pa.int64()).cast(UTC_TIME)
    columns = {
        "user_id": pa.array([f"user{number}" for number in users]),
        "event_timestamp": events,
        "created": events,
        "amount": pa.array(chance.random(len(users))),
        "count": pa.array(np.full(len(users), commit)),
        "country": pa.array([f"{number:0500}" for number in users]),
    }
    return pa.table(columns, schema=SCHEMA)


@dataclass(frozen=True, slots=True)
class Target:
    """A store of its own for each history: its URL, and how many records it holds while another process writes."""

    url: str
    records: Callable[[], int]


def sqlite_target(folder: Path) -> Target:
    file = folder / "online.db"

    def records() -> int:
        if not file.exists():
            return 0
        reader = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=5)
        try:
            return int(reader.execute("SELECT count(*) FROM records").fetchone()[0])
        except sqlite3.OperationalError:  # no table yet
            return 0
        finally:
            reader.close()

    return Target(f"sqlite:///{file}", records)


def valkey_target(server: servers.Server, database: int) -> Target:
    client = redis.Redis(port=server.port, db=database)

    def records() -> int:
        return int(client.dbsize())

    return Target(f"redis://127.0.0.1:{server.port}/{database}", records)


def state(url: str) -> tuple[dict[bytes, bytes], tuple[Any, ...], bytes | None]:
    """Every record byte by byte, the watermark without what names the run, and the schemas."""
    with open_store(OnlineStoreConfig("default", url)) as store:
        found = watermark.read(store, "spending")
        assert found is not None
        place = (found.generation, found.table_id, found.version, found.schema, found.event_us)
        return all_records(store), place, store.read_cell("spending", "schemas")


def all_records(store: OnlineStore) -> dict[bytes, bytes]:
    return {key: record for keys, found in store.scan("spending") for key, record in zip(keys, found, strict=True)}


def timed(project: Project) -> float:
    started = time.monotonic()
    project.json("incremental")
    return time.monotonic() - started


def kill_some(project: Project, target: Target, seconds: float, seed: int) -> list[str]:
    """Start the run again and again and kill it, half of the times by the clock, half of the times by its progress."""
    chance, told = random.Random(seed), []
    before = target.records()
    for number in range(KILLS):
        share = (number // 2 + chance.random()) / (KILLS // 2)
        process = project.start("incremental", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        wanted = seconds * (0.3 + 0.55 * share) if number % 2 else SECONDS
        level = before + 1 + share * (ENTITIES * 0.9 if before == 0 else ENTITIES * 0.05)
        while process.poll() is None and time.monotonic() - started < wanted:
            if number % 2 == 0 and target.records() >= level:
                break
            time.sleep(0.005)
        process.kill()
        told.append(f"{time.monotonic() - started:.2f} s, {target.records()} records, ended {process.wait(30)}")
    return told


@pytest.mark.parametrize("kind", ["valkey", "sqlite"])
def test_killed_and_repeated_runs_end_as_an_uninterrupted_one(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "sqlite":
        (tmp_path / "calm").mkdir()
        calm, killed = sqlite_target(tmp_path / "calm"), sqlite_target(tmp_path)
    else:
        server = request.getfixturevalue("valkey")
        calm, killed = valkey_target(server, 1), valkey_target(server, 2)
    project = Project(tmp_path / "project", calm.url)
    told = []
    for commit in range(3):
        project.table.append_table(rows(commit))
        if commit == 1:
            continue  # the incremental run covers two commits
        project.configure(url=calm.url)
        seconds = timed(project)

        project.configure(url=killed.url)
        told += kill_some(project, killed, seconds, commit)
        (report,) = project.json("incremental")

        assert report["to_version"] == commit, told
        assert state(killed.url) == state(calm.url), told
    assert sum("ended -9" in moment for moment in told) >= 15, told
