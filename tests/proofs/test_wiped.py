"""A store that is wiped, restarted empty or from an old file, or evicts, between runs at random: the next run says so and repairs it.

LOSSES sets how many, SEED which. Every key is compared with the table afterwards.
"""

from __future__ import annotations

import collections
import os
import random
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from materialize.online.redis import RedisStore
from materialize.verify import verify
from tests import servers
from tests.proofs.data_files import Oracle
from tests.proofs.restartable import Restartable
from tests.stepping import adds_up, incremental, run, served
from tests.tables import Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.e2e, pytest.mark.server]

LOSSES = int(os.environ.get("LOSSES", "40"))
SEED = int(os.environ.get("SEED", "20261126"))
USERS, ROWS = 1_000, 200
#: What the next run must say.
SAYS = {
    "nothing": "from the watermark at version",
    "flush": "new to it or was wiped",
    "empty restart": "new to it or was wiped",
    "old file": "restarted",
    "file of now": "restarted",
    "eviction": "evicted",
    "eviction, counter reset": "missing",
    "deleted keys": "missing",
}
#: What only the sample that is read back can tell.
MAYBE = {"eviction, counter reset", "deleted keys"}


def evict(own: Restartable, policy: str, rng: random.Random) -> None:
    """Let the server remove keys to make room, as one does whose memory became too small; then give it room again."""
    before = own.client.info("stats")["evicted_keys"]
    own.client.config_set("maxmemory-policy", policy)
    own.client.config_set("maxmemory-samples", rng.randrange(1, 10))
    less = 4_000
    while own.client.info("stats")["evicted_keys"] - before < rng.randrange(1, 30):
        own.client.config_set("maxmemory", max(own.client.info("memory")["used_memory"] - less, 1))
        own.client.set("other", b"x" * 100)
        own.client.delete("other")
        less *= 2
    own.client.config_set("maxmemory", 0)
    own.client.config_set("maxmemory-policy", "noeviction")


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.server) for kind in servers.KINDS])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Restartable]:
    if servers.binary(request.param) is None:
        pytest.skip(f"NOT TESTED: no {request.param} server")
    (tmp_path / "server").mkdir()
    server = Restartable(request.param, tmp_path / "server")
    try:
        yield server
    finally:
        server.stop()


def append(table: Table, rng: random.Random, commit: int, rows: int = ROWS) -> None:
    users = rng.sample(range(USERS), rows)
    columns = [
        row(f"user{user}", commit + rng.random(), rng.random(), country="x" * rng.randrange(99)) for user in users
    ]
    table.append(*columns)


def lose(own: Restartable, what: str, rng: random.Random, old: Path) -> int:
    """Do *what* to the server. Returns: how many of the view's records it removed."""
    records = list(own.client.scan_iter(match="fs:spending:{*", count=10_000))
    if what == "flush":
        own.client.flushall()
    elif what == "empty restart":
        own.restart(None)
    elif what == "old file":
        own.restart(old)
    elif what == "file of now":
        own.restart(own.saved())
    elif what.startswith("eviction"):
        # Cells have no expiry, and records have when their view has a ttl: the watermark stays where records go.
        evict(own, "volatile-random", rng)
        if what != "eviction":
            own.client.config_resetstat()
    elif what == "deleted keys":
        own.client.delete(*rng.sample(records, len(records) // 10))
    return len(records) - len(list(own.client.scan_iter(match="fs:spending:{*", count=10_000)))


def test_what_happened_between_two_runs_is_said_and_repaired(table: Table, own: Restartable) -> None:
    rng, oracle, counted = random.Random(SEED), Oracle(table), collections.Counter[str]()
    table.change_view(ttl=timedelta(days=30))
    append(table, rng, 0, USERS)
    with RedisStore(own.url) as store:
        incremental(table, store, "first")
        old = own.saved()
        for commit in range(1, LOSSES + 1):
            append(table, rng, commit)
            incremental(table, store, f"before {commit}")
            what = list(SAYS)[commit % len(SAYS)]
            removed = lose(own, what, rng, old)
            if rng.random() < 0.5:
                append(table, rng, commit)

            report = incremental(table, store, f"after {commit}")

            where = (commit, what, removed, report)
            counted[what] += 1
            counted["records removed"] += removed
            if what not in MAYBE or SAYS[what] in report.reason:
                assert SAYS[what] in report.reason, where
                assert served(table.view, store) == oracle.expected(), where
            else:
                counted["not noticed by the sample"] += 1
                verify(table.view, store, run("verify"), repair=True)
            assert adds_up(report), where
            if what == "nothing":
                assert all(words not in report.reason for words in ("evicted", "restarted", "missing", "compared")), (
                    where
                )
            if removed and what not in MAYBE:
                assert report.written >= removed, where
            again = incremental(table, store, f"again {commit}")
            assert (again.written, again.reason) == (0, f"from the watermark at version {table.version}"), where
            old = own.saved() if rng.random() < 0.3 else old
    print(f"seed {SEED}: {dict(counted)}")
