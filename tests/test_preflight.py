"""A run that cannot fit into the store's memory is refused with figures before its first write: real servers throughout."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.errors import OnlineStoreError, StoreFullError
from materialize.online.redis import RedisStore
from tests.proofs.data_files import Oracle
from tests.stepping import incremental, run, served
from tests.tables import Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests import servers

pytestmark = pytest.mark.server

ROWS = 3_000


@pytest.fixture
def server(fresh_server: servers.Server) -> servers.Server:
    """A server of each kind whose memory nobody else has touched."""
    return fresh_server


@pytest.fixture
def limited(server: servers.Server) -> Iterator[servers.Server]:
    """A server that a test may give less memory; without a limit again after it."""
    server.client.config_set("maxmemory-policy", "noeviction")
    try:
        yield server
    finally:
        server.client.config_set("maxmemory", 0)


def free(server: servers.Server, nbytes: int) -> None:
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + nbytes)


def fill(table: Table, first: int, last: int) -> None:
    table.append(
        *(row(f"user{number}", number, float(number), country=f"{number:020}") for number in range(first, last))
    )


def figures(error: OnlineStoreError) -> list[int]:
    found = re.search(
        r"about ([\d,]+) new entities of ([\d,]+) rows, which need about ([\d,]+) bytes \(([\d,]+) each\), expected at most ([\d,]+) bytes",
        str(error),
    )
    assert found is not None, error
    return [int(figure.replace(",", "")) for figure in found.groups()]


def test_a_first_load_that_cannot_fit_is_refused_with_figures_before_the_first_write(
    table: Table, limited: servers.Server
) -> None:
    fill(table, 0, ROWS)
    free(limited, 300_000)
    with RedisStore(limited.url) as store:
        with pytest.raises(
            OnlineStoreError, match=r"(?s)feature view 'spending'.*Nothing was written.*--force"
        ) as refused:
            incremental(table, store)

        new, rows, needed, each, left = figures(refused.value)
        assert (new, rows) == (ROWS, ROWS)
        assert needed == pytest.approx(new * each, rel=0.01)
        assert left <= 300_000 < needed
        assert limited.client.keys() == [b"fs:spending:lease"]


def test_force_begins_all_the_same(table: Table, limited: servers.Server) -> None:
    fill(table, 0, ROWS)
    with RedisStore(f"{limited.url}?patience=0.2") as store:
        free(limited, 300_000)
        with pytest.raises(StoreFullError, match="are free"):
            pipeline.incremental(table.view, store, replace(run(), force=True))
        assert limited.client.exists("fs:spending:watermark")

        limited.client.config_set("maxmemory", 0)
        incremental(table, store, "with room")
        assert served(table.view, store) == Oracle(table).expected()


def test_only_new_entities_count(table: Table, limited: servers.Server) -> None:
    fill(table, 0, ROWS)
    with RedisStore(limited.url) as store:
        incremental(table, store)
        free(limited, 500_000)  # connections need some too
        table.append(*(row(f"user{number}", number + 1, 0.5, country=f"{number:020}") for number in range(ROWS)))

        report = incremental(table, store, "all known")
        assert report.written == ROWS

        fill(table, ROWS, 3 * ROWS)
        free(limited, 200_000)
        with pytest.raises(OnlineStoreError) as refused:
            incremental(table, store, "new ones")
        new, rows, _, _, _ = figures(refused.value)
        assert (new, rows) == (2 * ROWS, 2 * ROWS)
        limited.client.config_set("maxmemory", 0)
        incremental(table, store, "with room")
        assert served(table.view, store) == Oracle(table).expected()


@pytest.mark.parametrize("layout", ["vector", "hash"])
def test_the_estimate_is_near_what_the_server_takes(table: Table, server: servers.Server, layout: Any) -> None:
    fill(table, 0, ROWS)
    free(server, 200_000)
    table.view = replace(table.view, layout=layout)
    with RedisStore(server.url) as store:
        store.hashed = frozenset({"spending"} if layout == "hash" else ())
        try:
            with pytest.raises(OnlineStoreError) as refused:
                incremental(table, store)
        finally:
            server.client.config_set("maxmemory", 0)
        before = server.client.info("memory")["used_memory"]
        incremental(table, store)
        took = server.client.info("memory")["used_memory"] - before

    estimated = figures(refused.value)[2]
    print(f"{server.kind}: estimated {estimated:,}, took {took:,}")
    assert 0.6 < estimated / took < 1.6
