"""Write-through and write-behind: pushed rows are in the table in one commit, online as a run would write them, or nowhere at all."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pytest

from materialize import pipeline, push as pushing, watermark
from materialize.decoder import Header
from materialize.errors import OnlineStoreError, RowsError, StoreFullError
from materialize.forget import erased, forget
from materialize.freshness import freshness
from materialize.metrics import write_to
from materialize.model import Interval
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.memory import MemoryStore
from materialize.online.sqlite import SqliteStore
from materialize.order import GENERATION
from materialize.push import Pusher, PushReport, push
from materialize.testing import CrashingStore
from materialize.verify import verify
from tests.stepping import amounts, incremental, plan_of, position, records, run
from tests.tables import NOW, SCHEMA, T0, Table, at, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.online.base import EncodedBatch, OnlineStore, Outcomes
    from tests.dynamodb_local import DynamoDbLocal

PROJECT = Path(__file__).parents[1]
VIEW = "spending"
SECRET = "s3cret-value"


def pushed(table: Table, store: OnlineStore | None, *rows: Any, **options: Any) -> PushReport:
    return push(table.view, store, list(rows), run("push"), **options)


def counts(report: PushReport) -> tuple[int, int, int, int]:
    assert report.entities == report.written + report.stale + report.unchanged + report.expired
    return report.written, report.stale, report.unchanged, report.expired


def brought(table: Table, store: OnlineStore) -> dict[bytes, bytes]:
    """The records after a run, which must not have found anything to write."""
    before = records(table.view, store)
    report = incremental(table, store, "follows")
    assert (report.written, report.deleted) == (0, 0)
    assert records(table.view, store) == before
    return before


@pytest.fixture
def loaded(table: Table, any_store: OnlineStore) -> OnlineStore:
    table.append(row("a", 1, 1.0), row("b", 5, 2.0))
    incremental(table, any_store)
    return any_store


@pytest.fixture
def ready(table: Table, store: OnlineStore) -> OnlineStore:
    """As `loaded`, in memory."""
    table.append(row("a", 1, 1.0), row("b", 5, 2.0))
    incremental(table, store)
    return store


class Meddling(MemoryStore):
    """Does something just before its next merge."""

    meddle: Callable[[], Any] | None = None

    def merge(self, view: str, batch: EncodedBatch, **how: Any) -> Outcomes:
        meddle, self.meddle = self.meddle, None
        if meddle is not None:
            meddle()
        return super().merge(view, batch, **how)


@pytest.fixture
def meddling(table: Table) -> Iterator[Meddling]:
    table.append(row("a", 1, 1.0), row("b", 5, 2.0))
    with Meddling() as store:
        incremental(table, store)
        yield store


# --- write-through -----------------------------------------------------------------------------------------------------


def test_pushed_rows_are_in_the_table_and_online_as_a_run_would_write_them(table: Table, loaded: OnlineStore) -> None:
    mark = watermark.read(loaded, VIEW)

    report = pushed(table, loaded, row("a", 2, 3.0), row("c", 1, None, country=None))

    assert (report.version, table.version, report.rows, report.online, report.online_version) == (1, 1, 2, True, 0)
    assert counts(report) == (2, 0, 0, 0)
    assert amounts(table, loaded) == {"a": 3.0, "b": 2.0, "c": None}
    assert watermark.read(loaded, VIEW) == mark
    with MemoryStore() as fresh:  # what the run alone would have written
        incremental(table, fresh)
        assert amounts(table, fresh) == amounts(table, loaded)
    brought(table, loaded)
    assert position(table, loaded) == (1, 1)


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
def test_pushed_rows_are_online_on_dynamodb(table: Table, dynamodb_local: DynamoDbLocal) -> None:
    dynamodb_local.drop_tables()
    address = f"dynamodb://key:secret@eu-central-1/fs?endpoint_url={dynamodb_local.endpoint}"
    table.append(row("a", 1, 1.0), row("b", 5, 2.0))
    with DynamoDbStore(address) as store:
        store.setup(VIEW)
        incremental(table, store)

        assert counts(pushed(table, store, row("a", 2, 3.0), row("b", 1, 9.0), push_id="one")) == (1, 1, 0, 0)
        assert pushed(table, store, row("a", 2, 3.0), row("b", 1, 9.0), push_id="one").again

        assert amounts(table, store) == {"a": 3.0, "b": 2.0}
        brought(table, store)


def test_older_rows_lose_and_the_later_of_two_equal_times_wins(table: Table, loaded: OnlineStore) -> None:
    report = pushed(table, loaded, row("b", 4, 9.0), row("a", 1, 7.0), row("c", 3, 1.0), row("c", 2, 2.0))

    assert counts(report) == (2, 1, 0, 0)
    assert amounts(table, loaded) == {"a": 7.0, "b": 2.0, "c": 1.0}
    brought(table, loaded)


def test_a_run_that_reads_the_commit_first_leaves_nothing_to_write(table: Table, meddling: Meddling) -> None:
    meddling.meddle = lambda: incremental(table, meddling, "faster")

    report = pushed(table, meddling, row("a", 2, 3.0))

    assert (counts(report), report.online, report.online_version) == ((0, 0, 1, 0), True, 1)
    assert amounts(table, meddling) == {"a": 3.0, "b": 2.0}


def test_a_row_that_was_deleted_before_it_came_online_stays_away(table: Table, meddling: Meddling) -> None:
    def delete() -> None:
        table.delta.delete("user_id = 'c'")
        incremental(table, meddling, "faster")

    meddling.meddle = delete

    report = pushed(table, meddling, row("c", 2, 3.0))

    assert counts(report)[0] == 0
    assert amounts(table, meddling) == {"a": 1.0, "b": 2.0}
    brought(table, meddling)


def test_an_entity_that_lost_a_row_meanwhile_is_exact_after_the_run(table: Table, ready: OnlineStore) -> None:
    """The pushed row is older than the one that was deleted: it waits online for the run that reads both commits."""
    table.delta.delete("user_id = 'b'")

    assert counts(pushed(table, ready, row("b", 4, 9.0))) == (0, 1, 0, 0)
    incremental(table, ready)

    assert amounts(table, ready) == {"a": 1.0, "b": 9.0}


@pytest.mark.parametrize("source", ["arrow", "polars", "batches"])
def test_rows_may_come_in_any_arrow(table: Table, ready: OnlineStore, source: str) -> None:
    given: Any = table.arrow([row("a", 2, 3.0), row("c", 1, 4.0)])
    if source == "polars":
        given = pl.DataFrame(given)
    elif source == "batches":
        given = pa.RecordBatchReader.from_batches(given.schema, given.to_batches())

    push(table.view, ready, given, run("push"))

    assert amounts(table, ready) == {"a": 3.0, "b": 2.0, "c": 4.0}
    brought(table, ready)


def test_expired_rows_are_committed_and_not_shown(table: Table, store: OnlineStore) -> None:
    table.change_view(ttl=NOW - T0 - timedelta(hours=1))
    table.append(row("a", 120, 1.0))
    incremental(table, store)

    report = pushed(table, store, row("b", 30, 1.0), row("c", 90, 1.0))

    assert (counts(report), table.version) == ((1, 0, 0, 1), 1)
    assert amounts(table, store) == {"a": 1.0, "c": 1.0}
    brought(table, store)


def test_no_rows_are_no_commit(table: Table, ready: OnlineStore) -> None:
    report = pushed(table, ready)

    assert (report.rows, report.version, table.version) == (0, None, 0)


def test_a_pusher_goes_on_with_what_others_committed_meanwhile(table: Table, ready: OnlineStore) -> None:
    pusher = Pusher(table.view, ready, run("push"))

    versions = [pusher.push([row("a", 10, 1.0)]).version]
    table.append(row("b", 20, 5.0))
    versions += [pusher.push([row("a", 11 + number, float(number))]).version for number in range(3)]

    assert versions == [1, 3, 4, 5]
    incremental(table, ready)
    assert amounts(table, ready) == {"a": 2.0, "b": 5.0}


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"user_id": None}, "null join key"),
        ({"user_id": ""}, "empty join key"),
        ({"user_id": SECRET * 500}, "entity key longer than"),
        ({"event_timestamp": None}, "null event timestamp"),
        ({"event_timestamp": at(60 * 24 * 30)}, "in the future"),
        ({"event_timestamp": at(1).replace(tzinfo=None)}, "a time without a zone"),
        ({"amount": SECRET}, "column 'amount': found str"),
        ({"amount": 2**53 + 1}, "column 'amount': found int"),
        ({"count": 1.5}, "column 'count': does not fit into long"),
        ({"count": True}, "column 'count': found bool"),
        ({"country": SECRET * 100_000}, "record longer than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_row_that_cannot_be_stored_refuses_all_by_its_index(
    table: Table, ready: OnlineStore, wrong: dict[str, Any], told: str
) -> None:
    before = records(table.view, ready)

    with pytest.raises(RowsError) as refused:
        pushed(table, ready, row("a", 9), row("c", 9) | wrong, row("d", 9), row("e", 9) | wrong)

    assert list(refused.value.rows) == [1, 3]
    assert told in str(refused.value)
    assert "row 1, 3" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert isinstance(refused.value, ValueError)
    assert (table.version, records(table.view, ready)) == (0, before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda given: given.drop_columns(["amount"]), "'amount': found no such column in the rows"),
        (lambda given: given.append_column("more", given["count"]), "'more': found no such column in the table"),
        (lambda given: given.append_column("count", given["count"]), "'count': found it twice"),
        (
            lambda given: given.set_column(3, "amount", given["country"]),
            "'amount': found string, expected double",
        ),
        (
            lambda given: given.set_column(1, "event_timestamp", given["event_timestamp"].cast(pa.timestamp("us"))),
            "'event_timestamp': found timestamp[us], expected timestamp",
        ),
    ],
)
def test_columns_that_do_not_fit_are_told_at_once(table: Table, ready: OnlineStore, change: Any, told: str) -> None:
    with pytest.raises(RowsError, match="1 problem with their columns") as refused:
        push(table.view, ready, change(table.arrow([row("a", 9)])), run("push"))

    assert told in str(refused.value)
    assert table.version == 0


def test_a_mapping_that_lacks_a_column_is_told_by_its_index(table: Table, ready: OnlineStore) -> None:
    short = {name: value for name, value in row("a", 9).items() if name != "amount"}

    with pytest.raises(RowsError, match="column 'amount' is not there: 1, row 1"):
        pushed(table, ready, row("a", 9), short)


def test_columns_that_the_view_does_not_read_may_be_left_out(table: Table, store: OnlineStore) -> None:
    table.schema = SCHEMA.append(pa.field("note", pa.string())).append(
        pa.field("tags", pa.map_(pa.string(), pa.int8()))
    )
    table.append(row("a", 1, 1.0, note="x", tags=[("k", 1)]))
    incremental(table, store)

    pushed(table, store, row("a", 2, 2.0), row("b", 2, 2.0))
    pushed(table, store, row("a", 3, 3.0, tags=[("z", 2)]))

    assert amounts(table, store) == {"a": 3.0, "b": 2.0}
    brought(table, store)


def test_rows_of_an_erased_entity_are_refused_and_not_committed(table: Table, loaded: OnlineStore) -> None:
    forget(loaded, VIEW, b"b")

    with pytest.raises(RowsError, match="of an entity that was erased: 1, row 1"):
        pushed(table, loaded, row("a", 9, 9.0), row("b", 9, 9.0))

    assert (table.version, amounts(table, loaded)) == (0, {"a": 1.0})


def test_an_entity_that_is_erased_meanwhile_stays_erased(table: Table, meddling: Meddling) -> None:
    meddling.meddle = lambda: forget(meddling, VIEW, b"b")

    report = pushed(table, meddling, row("b", 9, 9.0))

    assert counts(report) == (0, 1, 0, 0)
    (found,) = meddling.read(VIEW, [b"b"])
    assert found is not None
    assert erased(found)


def test_a_view_that_was_never_loaded_is_refused_before_the_commit(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))

    with pytest.raises(
        OnlineStoreError, match=r"never loaded there.*Nothing was written.*materialize incremental spending"
    ):
        pushed(table, any_store, row("a", 2, 2.0))

    assert (table.version, records(table.view, any_store)) == (0, {})


@pytest.mark.parametrize("other", ["table", "features", "fewer features", "keys", "head"])
def test_a_view_that_was_loaded_differently_is_refused_before_the_commit(
    table: Table, ready: OnlineStore, tmp_path: Path, other: str
) -> None:
    if other == "table":
        table.path = tmp_path / "other"
        table.append(row("a", 1, 1.0))
        table.change_view(source=str(table.path))
    elif other == "features":
        table.change_view(features={"amount": "float64", "count": "int32", "country": "string"})
    elif other == "fewer features":  # as a service with yesterday's configuration sees it
        table.change_view(features={"amount": "float64"})
    elif other == "keys":
        table.change_view(created_timestamp=None)
    else:
        mark = watermark.read_text(ready, VIEW)
        assert mark is not None
        watermark.move(ready, VIEW, mark, replace(watermark.Watermark.from_json(mark), version=7, run_id="x"))

    with pytest.raises(OnlineStoreError, match=r"Nothing was written\. Run: materialize incremental spending"):
        pushed(table, ready, row("a", 2, 2.0))

    assert table.version == 0
    assert pushed(table, None, row("a", 2, 2.0), to="offline").version == 1


# --- beside runs over the whole snapshot --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
@pytest.mark.parametrize("written", ["before", "after"])
def test_a_push_while_a_snapshot_is_written_is_exact_at_once(
    table: Table, store: OnlineStore, mode: Any, written: str
) -> None:
    table.append(row("a", 1, 1.0), row("b", 5, 2.0))
    if mode == "rebuild":
        incremental(table, store)
    plan = pipeline.begin(table.view, store, plan_of(table, store, mode), now=NOW)
    pieces = [pipeline.write_piece(table.view, store, plan, 0, now=NOW)] if written == "after" else []

    report = pushed(table, store, row("a", 2, 3.0), row("b", 4, 9.0), row("c", 1, 4.0))

    assert (report.online, report.online_version) == (True, None)
    pieces = pieces or [pipeline.write_piece(table.view, store, plan, 0, now=NOW)]
    pipeline.commit(table.view, store, plan, pieces, now=NOW)
    assert amounts(table, store) == {"a": 3.0, "b": 2.0, "c": 4.0}
    brought(table, store)


def test_rows_are_written_again_in_a_generation_that_began_meanwhile(table: Table, meddling: Meddling) -> None:
    """Planned before the commit: the snapshot lacks the rows, and refuses those of the old generation."""
    plan = plan_of(table, meddling, "rebuild")

    def rebuild() -> None:
        begun = pipeline.begin(table.view, meddling, plan, now=NOW)
        pieces = [pipeline.write_piece(table.view, meddling, begun, 0, now=NOW)]
        pipeline.commit(table.view, meddling, begun, pieces, now=NOW)

    meddling.meddle = rebuild

    report = pushed(table, meddling, row("a", 2, 3.0), row("c", 1, 4.0))

    assert (report.online, counts(report)) == (True, (2, 0, 0, 0))
    assert amounts(table, meddling) == {"a": 3.0, "b": 2.0, "c": 4.0}
    assert {Header.unpack(record).version // GENERATION for record in records(table.view, meddling).values()} == {2}
    brought(table, meddling)


def test_a_rebuild_planned_before_and_begun_after_takes_rows_back_until_the_next_run(
    table: Table, ready: OnlineStore
) -> None:
    plan = plan_of(table, ready, "rebuild")
    assert pushed(table, ready, row("a", 2, 3.0), row("c", 1, 4.0)).online
    begun = pipeline.begin(table.view, ready, plan, now=NOW)
    pipeline.commit(table.view, ready, begun, [pipeline.write_piece(table.view, ready, begun, 0, now=NOW)], now=NOW)

    assert amounts(table, ready) == {"a": 1.0, "b": 2.0}
    incremental(table, ready)
    assert amounts(table, ready) == {"a": 3.0, "b": 2.0, "c": 4.0}


def test_rows_beside_a_changed_view_are_left_to_the_next_run(table: Table, meddling: Meddling) -> None:
    old = table.view
    changed = replace(old, features={**old.features, "more": old.features["count"]})
    table.schema = SCHEMA.append(pa.field("more", pa.int64()))
    table.append(row("z", 1, 1.0, more=1), schema_mode="merge")
    incremental(table, meddling)
    meddling.meddle = lambda: pipeline.incremental(changed, meddling, run("changed"))

    report = push(old, meddling, [row("a", 2, 3.0)], run("push"))
    pipeline.incremental(changed, meddling, run("next"))

    assert (report.online, report.online_version) == (False, None)
    with MemoryStore() as fresh:
        pipeline.incremental(changed, fresh, run("fresh"))
        assert amounts(table, meddling) == amounts(table, fresh)
        assert all(len(one) == len(records(changed, fresh)[key]) for key, one in records(changed, meddling).items())


# --- write-behind ------------------------------------------------------------------------------------------------------


def test_write_behind_asks_no_store_and_the_lag_is_told(table: Table, ready: OnlineStore) -> None:
    before = records(table.view, ready)

    reports = [pushed(table, None, row("a", 2 + number, 3.0), to="offline") for number in range(2)]

    assert [(report.version, report.online, report.entities) for report in reports] == [(1, False, 0), (2, False, 0)]
    found = freshness(table.view, ready)
    assert (found.state, found.behind, found.table_version) == ("behind", 2, 2)
    assert found.waiting_since is not None
    assert records(table.view, ready) == before
    incremental(table, ready)
    assert amounts(table, ready)["a"] == 3.0
    assert freshness(table.view, ready).behind == 0


def test_write_through_needs_a_store(table: Table) -> None:
    table.append(row("a", 1))

    with pytest.raises(ValueError, match="found no online store"):
        pushed(table, None, row("a", 2))


def test_another_way_is_a_mistake(table: Table, ready: OnlineStore) -> None:
    with pytest.raises(ValueError, match="found a push to 'online', expected one to both or offline"):
        pushed(table, ready, row("a", 2), to="online")

    assert table.version == 0


# --- again -------------------------------------------------------------------------------------------------------------


def test_a_push_with_an_id_is_committed_once(table: Table, loaded: OnlineStore) -> None:
    rows = [row("a", 2, 3.0), row("c", 1, float("nan"))]

    first, second = (pushed(table, loaded, *rows, push_id="id-1") for _ in range(2))
    table.append(row("b", 6, 6.0))
    third = pushed(table, loaded, *rows, push_id="id-1")
    other = pushed(table, loaded, *rows, push_id="id-2")

    assert [(report.version, report.again) for report in (first, second, third, other)] == [
        (1, False),
        (1, True),
        (1, True),
        (3, False),
    ]
    assert counts(second) == (0, 0, 2, 0)
    incremental(table, loaded)
    assert amounts(table, loaded)["b"] == 6.0


def test_an_id_is_of_its_rows_alone(table: Table, ready: OnlineStore) -> None:
    pushed(table, ready, row("a", 2, 3.0), push_id="id-1")

    with pytest.raises(RowsError, match="their push_id was committed with other rows"):
        pushed(table, ready, row("a", 2, 4.0), push_id="id-1")

    assert (table.version, amounts(table, ready)["a"]) == (1, 3.0)


def test_an_id_whose_commit_file_is_gone_commits_nothing(table: Table, ready: OnlineStore) -> None:
    pushed(table, ready, row("a", 2, 3.0), push_id="id-1")
    table.append(row("b", 9, 9.0))
    table.delta.create_checkpoint()
    incremental(table, ready)
    for version in (0, 1):
        table.log_file(version).unlink()

    report = pushed(table, ready, row("a", 2, 3.0), push_id="id-1")

    assert (report.version, report.again, report.online, table.version) == (None, True, False, 2)


def test_a_push_without_an_id_that_is_repeated_changes_nothing_for_readers(table: Table, ready: OnlineStore) -> None:
    reports = [pushed(table, ready, row("a", 2, 3.0)) for _ in range(2)]

    assert [report.version for report in reports] == [1, 2]
    assert amounts(table, ready)["a"] == 3.0
    brought(table, ready)


# --- what dies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effect", [False, True], ids=["before the merge", "after it, unanswered"])
@pytest.mark.parametrize("then", ["run", "the same push"])
def test_what_dies_after_the_commit_is_brought_by_the_next_run_or_the_same_push(
    table: Table, loaded: OnlineStore, then: str, *, effect: bool
) -> None:
    rows = [row("a", 2, 3.0), row("c", 1, 4.0)]

    with pytest.raises(OnlineStoreError, match=r"The 2 rows are in the table since version 1.*materialize incremental"):
        pushed(table, CrashingStore(loaded, after=1, effect=effect, error=OnlineStoreError), *rows, push_id="id-1")

    assert amounts(table, loaded) == ({"a": 3.0, "b": 2.0, "c": 4.0} if effect else {"a": 1.0, "b": 2.0})
    if then == "run":
        incremental(table, loaded)
    else:
        assert pushed(table, loaded, *rows, push_id="id-1").again
    assert (amounts(table, loaded), table.version) == ({"a": 3.0, "b": 2.0, "c": 4.0}, 1)
    brought(table, loaded)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_what_dies_in_the_middle_of_the_merge_is_brought_by_the_next_run(
    table: Table, ready: OnlineStore, after: int
) -> None:
    rows = [row(f"user-{number}", 2, float(number), country="x" * 900_000) for number in range(12)]

    with pytest.raises(KeyboardInterrupt):
        pushed(table, CrashingStore(ready, after=after, effect=False, error=KeyboardInterrupt), *rows)  # type: ignore[arg-type]

    there = len(amounts(table, ready)) - 2
    assert (there > 0) == (after > 1)
    assert there < len(rows)
    incremental(table, ready)
    assert amounts(table, ready) == {"a": 1.0, "b": 2.0} | {f"user-{number}": float(number) for number in range(12)}


KILLED = """\
import os, pathlib, sys
from materialize.online.sqlite import SqliteStore
from materialize.push import push
from tests.stepping import run
from tests.tables import Table, row
class Killed(SqliteStore):
    def merge(self, *_, **__):
        os.kill(os.getpid(), 9)
with Killed(sys.argv[2]) as store:
    push(Table(pathlib.Path(sys.argv[1])).view, store, [row("a", 2, 3.0), row("c", 1, 4.0)], run("killed"), push_id="id-1")
"""


def test_a_process_that_is_killed_after_the_commit_leaves_the_rows_to_the_next_run(
    table: Table, tmp_path: Path
) -> None:
    table.append(row("a", 1, 1.0), row("b", 5, 2.0))
    url = f"sqlite:///{tmp_path}/killed.db"
    with SqliteStore(url) as store:
        incremental(table, store)

        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(table.path), url], cwd=PROJECT, check=False, timeout=180
        )

        assert (done.returncode, table.version) == (-9, 1)
        assert amounts(table, store) == {"a": 1.0, "b": 2.0}
        assert pushed(table, store, row("a", 2, 3.0), row("c", 1, 4.0), push_id="id-1").again
        assert amounts(table, store) == {"a": 3.0, "b": 2.0, "c": 4.0}
        brought(table, store)


class Silent(MemoryStore):
    """Does not answer when it is read."""

    silent = False

    def read_cell(self, view: str, name: str) -> bytes | None:
        if self.silent:
            raise OnlineStoreError("no answer")
        return super().read_cell(view, name)


def test_nothing_is_committed_where_the_store_does_not_answer_before(table: Table) -> None:
    table.append(row("a", 1, 1.0))
    with Silent() as store:
        incremental(table, store)
        store.silent = True

        with pytest.raises(OnlineStoreError, match="no answer"):
            pushed(table, store, row("a", 2, 2.0))

    assert table.version == 0


def test_the_class_of_the_error_says_what_the_store_said(table: Table, ready: OnlineStore) -> None:
    class Full(StoreFullError):
        patience = 0.0

    with pytest.raises(StoreFullError, match="are in the table since version 1"):
        pushed(table, CrashingStore(ready, after=1, effect=False, error=Full), row("a", 2, 2.0))


def test_the_example_in_the_documentation_runs(
    table: Table, ready: OnlineStore, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PROJECT / "docs" / "push.md").read_text(encoding="utf-8")
    example = text.partition("```python\n")[2].partition("```")[0]

    exec(example, {"view": table.view, "store": ready, "message_id": "id-1"})

    assert capsys.readouterr().out == "1 1 True\n"
    assert amounts(table, ready)["4711"] == 12.5


# --- beside it ---------------------------------------------------------------------------------------------------------


def test_logs_and_metrics_count_rows_and_name_none(
    table: Table, ready: OnlineStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics").mkdir()
    write_to(tmp_path / "metrics")
    try:
        with caplog.at_level(logging.DEBUG, "materialize"):
            pushed(table, ready, row(SECRET, 2, 3.0), row("b", 9), push_id="once")
            pushed(table, ready, row(SECRET, 2, 3.0), row("b", 9), push_id="once")
            pushed(table, None, row(SECRET, 2, 3.0), to="offline")
    finally:
        write_to(None)

    text = (tmp_path / "metrics" / "materialize.spending.default.prom").read_text()
    assert 'materialize_rows_pushed_total{mode="both",store="default",view="spending"} 2.0' in text
    assert 'materialize_rows_pushed_total{mode="offline",store="default",view="spending"} 1.0' in text
    assert "pushed view=spending store=default to=both version=1 rows=2" in caplog.text
    assert SECRET not in caplog.text + text
    assert pushing.__all__ == ["PushReport", "Pusher", "Where", "push"]


def test_verify_takes_pushed_rows_for_newer_and_a_repair_leaves_them(table: Table, ready: OnlineStore) -> None:
    pushed(table, ready, row("a", 2, 3.0), row("c", 1, 4.0))

    report = verify(table.view, ready, run("verify"), repair=True)

    assert (report.mismatched, report.repaired, report.newer) == (0, 0, 2)
    assert amounts(table, ready) == {"a": 3.0, "b": 2.0, "c": 4.0}


def test_a_backfill_beside_pushes_brings_nothing_older(table: Table, ready: OnlineStore) -> None:
    pushed(table, ready, row("a", 2, 3.0))

    pipeline.backfill(table.view, ready, run("backfill"), Interval(T0, T0 + timedelta(days=1)))

    assert amounts(table, ready) == {"a": 3.0, "b": 2.0}
    incremental(table, ready)
    assert amounts(table, ready) == {"a": 3.0, "b": 2.0}
