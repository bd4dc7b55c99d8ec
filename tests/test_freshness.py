"""How far a store is behind a table: since the oldest commit that is not online, by the log's own word."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from materialize import pipeline
from materialize.errors import OfflineStoreError
from materialize.freshness import freshness
from materialize.online.memory import MemoryStore
from tests.stepping import incremental, plan_of
from tests.tables import Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.online.base import OnlineStore

DAY = datetime(2030, 5, 1, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)


@pytest.fixture
def store() -> Iterator[OnlineStore]:
    with MemoryStore() as store:
        yield store


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Three commits, an hour apart."""
    table = Table(tmp_path / "t")
    for number in range(3):
        table.append(row(f"u{number}", number))
        said(table, number, DAY + number * HOUR)
    return table


def said(table: Table, version: int, moment: datetime | None, name: str = "timestamp") -> None:
    """Let the log say that a commit was made at *moment*."""
    file = table.log_file(version)
    lines = [line for line in file.read_text().splitlines() if '"commitInfo"' not in line]
    if moment is not None:
        lines.insert(0, f'{{"commitInfo":{{"{name}":{round(moment.timestamp() * 1000)},"operation":"WRITE"}}}}')
    file.write_text("\n".join(lines) + "\n")


def test_view_that_was_never_loaded_waits_since_the_first_commit(table: Table, store: OnlineStore) -> None:
    found = freshness(table.view, store)

    assert (found.state, found.watermark, found.table_version) == ("never loaded", None, 2)
    assert found.waiting_since == DAY


def test_view_at_the_head_is_fresh_however_old_its_events_are(table: Table, store: OnlineStore) -> None:
    incremental(table, store)

    found = freshness(table.view, store)

    assert (found.state, found.waiting_since, found.age(DAY + 1000 * HOUR)) == ("up to date", None, None)
    assert not found.late(DAY + 1000 * HOUR, HOUR)


def test_view_is_behind_since_the_oldest_commit_that_is_not_online(table: Table, store: OnlineStore) -> None:
    incremental(table, store)
    for number in (3, 4):
        table.append(row("u", number))
        said(table, number, DAY + number * HOUR)

    found = freshness(table.view, store)

    assert (found.state, found.table_version, found.waiting_since) == ("behind", 4, DAY + 3 * HOUR)
    assert found.behind == 2
    assert found.age(DAY + 5 * HOUR) == 2 * HOUR
    assert not found.late(DAY + 5 * HOUR, 2 * HOUR)
    assert found.late(DAY + 5 * HOUR, 2 * HOUR - timedelta(seconds=1))


def test_time_in_the_commit_goes_before_the_clock_of_the_writer(table: Table, store: OnlineStore) -> None:
    incremental(table, store)
    table.append(row("u", 3))
    said(table, 3, DAY + 7 * HOUR, "inCommitTimestamp")

    assert freshness(table.view, store).waiting_since == DAY + 7 * HOUR


def test_commit_that_does_not_say_its_time_has_the_time_of_its_file(table: Table, store: OnlineStore) -> None:
    incremental(table, store)
    table.append(row("u", 3))
    said(table, 3, None)
    os.utime(table.log_file(3), times=((DAY + 9 * HOUR).timestamp(),) * 2)

    assert freshness(table.view, store).waiting_since == DAY + 9 * HOUR


def test_commits_that_are_gone_count_by_the_next_one_that_is_left(table: Table, store: OnlineStore) -> None:
    incremental(table, store)
    for number in (3, 4):
        table.append(row("u", number))
        said(table, number, DAY + number * HOUR)
    table.delta.create_checkpoint()
    table.log_file(3).unlink()

    assert freshness(table.view, store).waiting_since == DAY + 4 * HOUR


def test_snapshot_run_that_did_not_finish_is_told(table: Table, store: OnlineStore) -> None:
    pipeline.begin(table.view, store, plan_of(table, store))

    found = freshness(table.view, store)

    assert (found.state, found.waiting_since) == ("snapshot run unfinished", DAY)


def test_table_that_was_made_anew_waits_since_its_first_commit(
    table: Table, store: OnlineStore, tmp_path: Path
) -> None:
    incremental(table, store)
    other = Table(tmp_path / "other")
    other.append(row("u", 1))
    said(other, 0, DAY + 20 * HOUR)

    found = freshness(replace(table.view, source=str(other.path)), store)

    assert (found.state, found.table_version, found.waiting_since) == ("behind", 0, DAY + 20 * HOUR)
    assert found.behind is None


def test_table_that_cannot_be_read_is_an_error(table: Table, store: OnlineStore) -> None:
    with pytest.raises(OfflineStoreError, match="feature view 'spending'"):
        freshness(replace(table.view, source=str(table.path / "nothing")), store)
