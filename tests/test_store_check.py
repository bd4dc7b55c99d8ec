"""Before and after its writes a run asks the store's servers what happened, and reads some entities back: real servers throughout."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import OutOfMemoryError
from typer.testing import CliRunner

from materialize import pipeline, readback
from materialize.cli import app
from materialize.errors import OnlineStoreError, StoreChangedError
from materialize.online.redis import RedisStore
from tests.projects import PAST, Project
from tests.proofs.data_files import Oracle
from tests.stepping import incremental, plan_of, position, records, run, served
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests import servers

pytestmark = pytest.mark.server

#: Free bytes that no test needs.
PLENTY = 200 * 2**20


@pytest.fixture
def limited(server: servers.Server) -> Iterator[servers.Server]:
    """A server with a limit of memory, far away; without one again after the test."""
    server.client.config_resetstat()
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + PLENTY)
    try:
        yield server
    finally:
        server.client.config_set("maxmemory", 0)
        server.client.config_set("maxmemory-policy", "noeviction")


@pytest.fixture
def store(server: servers.Server) -> Iterator[RedisStore]:
    with RedisStore(server.url) as opened:
        yield opened


def users(first: int, last: int, **others: object) -> list[dict[str, object]]:
    return [row(f"user{number}", number, float(number), **others) for number in range(first, last)]


# --- the entities that are read back ------------------------------------------------------------------------------------


def test_every_entity_of_a_small_run_is_remembered(table: Table, store: RedisStore) -> None:
    table.append(*users(0, 40))
    incremental(table, store)
    assert sorted(readback.remembered(table.view, store)) == sorted(b"user%d" % number for number in range(40))


def test_sixty_four_entities_are_remembered_whatever_the_order_of_runs_and_pieces(
    table: Table, store: RedisStore
) -> None:
    table.append(*users(0, 50))
    incremental(table, store, "first")
    table.append(*users(50, 90))
    incremental(table, store, "second")
    first = readback.remembered(table.view, store)

    readback.forget(table.view, store, first)
    assert readback.remembered(table.view, store) == {}
    plan = replace(plan_of(table, store, "rebuild"), pieces=3)
    plan = pipeline.begin(table.view, store, plan, now=NOW)
    pipeline.commit(
        table.view,
        store,
        plan,
        [pipeline.write_piece(table.view, store, plan, piece, now=NOW) for piece in (2, 0, 1)],
        now=NOW,
    )

    assert len(first) == readback.REMEMBERED == 64
    assert readback.remembered(table.view, store) == first


def test_remembered_entities_that_are_missing_are_said_and_repaired(
    table: Table, store: RedisStore, server: servers.Server
) -> None:
    table.append(*users(0, 64))
    incremental(table, store)
    server.client.delete("fs:spending:{user7}", "fs:spending:{user50}")

    report = incremental(table, store, "second")

    assert "2 of the records that earlier runs wrote and that were read back are missing" in report.reason
    assert "compared all 64 entities with version 0: missing 2, repaired 2" in report.reason
    assert report.written == 2
    assert served(table.view, store) == Oracle(table).expected()
    assert incremental(table, store, "third").reason == "from the watermark at version 0"


def test_a_repair_that_needs_a_new_generation_is_done_under_the_lease_of_the_run(
    table: Table, store: RedisStore, server: servers.Server
) -> None:
    table.append(*users(0, 20))
    incremental(table, store)
    wrong = b"fs:spending:{user8}"
    record = server.client.get(wrong)
    server.client.set(wrong, record[:-1] + bytes([record[-1] ^ 1]))
    server.client.delete("fs:spending:{user7}")
    table.append(row("user9", 99, 9.9))

    report = incremental(table, store, "second")

    assert "missing 1, wrong 1, repaired 2" in report.reason
    assert position(table, store) == (2, 1)
    assert served(table.view, store) == Oracle(table).expected()


def test_an_entity_that_is_gone_from_the_table_too_is_asked_for_once(
    table: Table, store: RedisStore, server: servers.Server
) -> None:
    table.append(*users(0, 20))
    incremental(table, store)
    table.delta.delete("user_id = 'user7'")
    incremental(table, store, "tombstone")
    server.client.delete("fs:spending:{user7}")  # as its tombstone leaves after 14 days

    assert "1 of the records" in incremental(table, store, "found").reason
    assert incremental(table, store, "again").reason == f"from the watermark at version {table.version}"


def test_what_expired_meanwhile_is_not_missed(table: Table, store: RedisStore, server: servers.Server) -> None:
    table.change_view(
        ttl=timedelta(days=9, hours=5)
    )  # ends five hours after NOW for user0, and a minute later for the next
    table.append(*users(0, 20))
    incremental(table, store)
    assert len(readback.remembered(table.view, store)) == 20
    server.client.delete("fs:spending:{user0}")

    assert readback.missing_since(table.view, store, NOW) == [b"user0"]
    assert readback.missing_since(table.view, store, NOW + timedelta(hours=5)) == []
    assert sorted(readback.remembered(table.view, store)) == sorted(b"user%d" % number for number in range(1, 20))


def test_rows_that_are_gone_before_the_commit_are_written_again(
    table: Table, store: RedisStore, server: servers.Server
) -> None:
    table.append(*users(0, 30))
    incremental(table, store)
    table.append(*users(20, 40, country="FR"))
    plan = pipeline.begin(table.view, store, plan_of(table, store), now=NOW)
    piece = pipeline.write_piece(table.view, store, plan, 0, now=NOW)

    report = pipeline.commit(table.view, store, plan, [replace_lost(piece, 3)], now=NOW)

    assert (
        "written again, 0 of 20 entities differed, because it found that 3 rows that were written and read back are missing"
        in report.reason
    )
    assert report.written == 20
    assert served(table.view, store) == Oracle(table).expected()
    assert server.client.info("stats")["evicted_keys"] == 0


def replace_lost(piece: pipeline.PieceReport, lost: int) -> pipeline.PieceReport:
    return pipeline.PieceReport.from_dict(piece.to_dict() | {"lost": lost})


# --- a server that may evict ---------------------------------------------------------------------------------------------


def test_a_server_that_may_evict_is_refused_before_the_first_write(table: Table, limited: servers.Server) -> None:
    limited.client.config_set("maxmemory-policy", "allkeys-lru")
    table.append(*users(0, 10))
    with RedisStore(limited.url) as store:
        with pytest.raises(OnlineStoreError) as refused:
            incremental(table, store)
        text = str(refused.value)
        assert "feature view 'spending': could not begin to write" in text
        assert "found maxmemory-policy 'allkeys-lru'" in text
        assert "expected 'noeviction'" in text
        assert "CONFIG SET maxmemory-policy noeviction" in text
        assert "--force" in text
        assert limited.client.keys() == [b"fs:spending:lease"]


@pytest.mark.parametrize("how", ["force", "option", "no limit"])
def test_an_evicting_server_is_loaded_when_that_is_accepted_or_cannot_happen(
    table: Table, limited: servers.Server, how: str
) -> None:
    limited.client.config_set("maxmemory-policy", "allkeys-lru")
    if how == "no limit":
        limited.client.config_set("maxmemory", 0)
    table.append(*users(0, 10))
    with RedisStore(limited.url + ("?eviction=allow" if how == "option" else "")) as store:
        pipeline.incremental(table.view, store, replace(run(), force=how == "force"))
        assert served(table.view, store) == Oracle(table).expected()


@pytest.mark.parametrize(
    "command",
    [
        ("incremental", "spending"),
        ("rebuild", "spending"),
        ("backfill", "spending", "--start", "2000-01-01T00:00Z", "--end", "2100-01-01T00:00Z"),
    ],
    ids=lambda command: command[0],
)
def test_force_on_the_command_line(tmp_path: Path, limited: servers.Server, command: tuple[str, ...]) -> None:
    project = Project(tmp_path, limited.url)
    project.table.append(row("user", PAST + 1, 1.0))
    limited.client.config_set("maxmemory-policy", "allkeys-lru")
    environment = {"MATERIALIZE_CONFIG": str(project.config), "NO_COLOR": "1"}

    refused = CliRunner().invoke(app, command, env=environment)
    assert refused.exit_code == 1
    assert "found maxmemory-policy 'allkeys-lru'" in refused.stderr
    assert set(limited.client.keys()) <= {b"fs:spending:lease"}  # a backfill has none

    forced = CliRunner().invoke(app, [*command, "--force"], env=environment)
    assert forced.exit_code == 0, forced.output
    assert limited.client.exists("fs:spending:{user}")


# --- evictions and losses while a run writes -----------------------------------------------------------------------------


def shrink(server: servers.Server, keys: int) -> None:
    """Let the server remove at least *keys* keys, as one does whose memory is taken from it, and give it all back."""
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    less = 4_000
    while server.client.info("stats")["evicted_keys"] < keys:
        server.client.config_set("maxmemory", max(server.client.info("memory")["used_memory"] - less, 1))
        with suppress(OutOfMemoryError):  # buffers of clients can take more than is left when every key is gone
            server.client.set("other", b"x" * 100)
        server.client.delete("other")
        less *= 2
    server.client.config_set("maxmemory", 0)
    server.client.config_set("maxmemory-policy", "noeviction")


@pytest.mark.parametrize(
    ("loaded", "when"),
    [
        pytest.param(False, 1, id="first load, between pieces"),
        pytest.param(False, 2, id="first load, before the commit"),
        pytest.param(True, 0, id="before the pieces"),
        pytest.param(True, 1, id="between pieces"),
        pytest.param(True, 2, id="before the commit"),
    ],
)
def test_evictions_during_a_run_are_noticed_before_it_claims_success(
    table: Table, limited: servers.Server, when: int, *, loaded: bool
) -> None:
    oracle = Oracle(table)
    table.append(*users(0, 500))
    with RedisStore(limited.url) as store:
        if loaded:
            incremental(table, store, "before")
            table.append(*users(300, 700, country="x" * 50))
            table.append(*users(600, 900, country="x" * 50))
        before = position(table, store) if loaded else None
        plan = pipeline.begin(table.view, store, replace(plan_of(table, store, run_id="evicted"), pieces=2), now=NOW)
        pieces = []
        for piece in range(3):
            if piece == when:
                shrink(limited, 5)
            if piece < 2:
                pieces.append(pipeline.write_piece(table.view, store, plan, piece, now=NOW))

        with pytest.raises(
            (OnlineStoreError, StoreChangedError), match=r"the server evicted \d+ keys|watermark is gone"
        ) as refused:
            pipeline.commit(table.view, store, plan, pieces, now=NOW)

        assert not isinstance(refused.value, StoreChangedError)
        assert "run again: it repairs" in str(refused.value)
        if limited.client.exists("fs:spending:watermark"):
            assert position(table, store) == (before or (1, None))
        again = incremental(table, store, "again")
        assert served(table.view, store) == oracle.expected()
        assert again.written > 0
        assert incremental(table, store, "third").written == 0
        assert len(records(table.view, store)) == len(oracle.expected())
