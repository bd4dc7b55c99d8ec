"""A server without memory under noeviction: a run waits, gives up with figures, and the next one goes on exactly. Real servers.

FULLS sets how many limits are tried on each server, SEED which.
"""

from __future__ import annotations

import collections
import os
import random
import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from materialize import pipeline
from materialize.errors import StoreFullError
from materialize.model import RunReport
from materialize.online.redis import RedisStore
from tests.proofs.data_files import Oracle
from tests.proofs.replicated import Pair
from tests.stepping import adds_up, incremental, position, run, served
from tests.tables import Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests import servers

pytestmark = [pytest.mark.e2e, pytest.mark.server]

FULLS = int(os.environ.get("FULLS", "5"))
SEED = int(os.environ.get("SEED", "20261126"))
ROWS = 1_500
#: Bytes by which a row's text is longer than in the commit before: a run is some megabytes, and so several write calls.
LONGER = 3_000
#: Seconds that a run waits for memory, and script calls that the server may have to refuse meanwhile. Without waits it is thousands.
PATIENCE, REFUSALS = 1.0, 500
FIGURES = re.compile(
    r"uses ([\d,]+) of ([\d,]+) bytes, ([\d,]+) are free.*Of this piece ([\d,]+) rows are known to be written; up to ([\d,]+) more need about ([\d,]+) bytes"
)


@pytest.fixture
def limited(server: servers.Server) -> Iterator[servers.Server]:
    """A server under noeviction that a test may give less memory; without a limit again after it."""
    server.client.config_set("maxmemory-policy", "noeviction")
    try:
        yield server
    finally:
        server.client.config_set("maxmemory", 0)


def free(server: servers.Server, nbytes: int) -> None:
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + nbytes)


def refusals(server: servers.Server) -> int:
    """Calls that the server refused for want of memory."""
    told = server.client.info("errorstats").get("errorstat_OOM", {})
    return int(told.get("count", 0))


def fill(table: Table, rng: random.Random, moment: int) -> None:
    texts = (rng.randbytes(moment * LONGER // 2).hex() for _ in range(ROWS))
    table.append(*(row(f"user{number}", moment, rng.random(), country=text) for number, text in enumerate(texts)))


def test_a_full_server_is_waited_for_named_with_figures_and_loaded_exactly_afterwards(
    table: Table, limited: servers.Server
) -> None:
    rng, oracle, counted = random.Random(SEED), Oracle(table), collections.Counter[str]()
    with RedisStore(f"{limited.url}?patience={PATIENCE}") as store:
        table.append(*(row(f"user{number}", 0, 1.0, country="") for number in range(ROWS)))
        incremental(table, store, "first")
        for number in range(1, FULLS + 1):
            held, before = served(table.view, store), position(table, store)
            fill(table, rng, number)
            limited.client.config_resetstat()
            free(limited, rng.randrange(200_000, ROWS * LONGER * 3 // 4))

            with pytest.raises(StoreFullError) as full:
                pipeline.incremental(table.view, store, replace(run(f"full {number}"), force=True))

            figures = FIGURES.search(str(full.value))
            assert figures is not None, str(full.value)
            used, limit, left, written, more, needed = (int(figure.replace(",", "")) for figure in figures.groups())
            assert left == max(limit - used, 0)
            assert 0 < more <= ROWS
            assert needed == pytest.approx(more * number * LONGER, rel=0.2)
            assert needed > left
            assert 1 < refusals(limited) <= REFUSALS
            counted["refusals"] += refusals(limited)
            assert position(table, store) == before
            expected = oracle.expected()
            partly = served(table.view, store)
            assert all(partly[user] in (held[user], expected[user]) for user in held)
            counted["full runs"] += 1
            counted["rows stored then"] += sum(partly[user] != held[user] for user in held)
            counted["rows told as written"] += written

            limited.client.config_set("maxmemory", 0)
            report = incremental(table, store, f"after {number}")

            assert adds_up(report)
            assert report.written == sum(partly[user] != expected[user] for user in expected)
            assert served(table.view, store) == expected
            assert position(table, store) == (1, table.version)
    print(f"{limited.kind}, seed {SEED}: {dict(counted)}")


def test_a_run_goes_on_by_itself_when_memory_comes_while_it_waits(table: Table, limited: servers.Server) -> None:
    rng = random.Random(SEED)
    fill(table, rng, 2)
    free(limited, 2_000_000)
    limited.client.config_resetstat()
    reports: list[RunReport] = []

    def load() -> None:
        with RedisStore(f"{limited.url}?patience=60") as store:
            reports.append(pipeline.incremental(table.view, store, replace(run(), force=True)))

    thread = threading.Thread(target=load)
    thread.start()
    Pair.poll(lambda: refusals(limited) > 1)
    limited.client.config_set("maxmemory", 0)
    thread.join(60)

    assert not thread.is_alive()
    assert [adds_up(report) for report in reports] == [True]
    with RedisStore(limited.url) as store:
        assert served(table.view, store) == Oracle(table).expected()
        assert position(table, store) == (1, table.version)
