"""An erased entity is gone from the store, stays away whatever runs, and its receipt proves it without telling the key."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from materialize import pipeline, watermark
from materialize.forget import erased, forget, key_hash, receipt
from materialize.model import Interval, to_us
from materialize.online.dynamodb import DynamoDbStore
from materialize.order import ERASED, STALE, UNCHANGED
from materialize.testing import make_batch
from materialize.testing.batches import FOREVER, Row
from materialize.verify import verify
from tests.projects import PAST, Project
from tests.servers import free_port
from tests.stepping import amounts, incremental, plan_of, run
from tests.tables import NOW, T0, Table, row

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.online.base import OnlineStore
    from tests.dynamodb_local import DynamoDbLocal

VIEW = "spending"
DAY = Interval(T0, T0 + timedelta(days=1))


@pytest.fixture
def loaded(table: Table, any_store: OnlineStore) -> OnlineStore:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0, country="s3cret-value"))
    incremental(table, any_store)
    assert forget(any_store, VIEW, b"b") == "erased"
    return any_store


def record(store: OnlineStore, key: bytes = b"b") -> bytes:
    (found,) = store.read(VIEW, [key])
    assert found is not None
    return found


def test_erased_record_holds_nothing_of_the_entity(loaded: OnlineStore) -> None:
    assert erased(record(loaded))
    assert b"s3cret-value" not in record(loaded)
    assert not erased(record(loaded, b"a"))


@pytest.mark.parametrize("at", [ERASED - 1, ERASED])
def test_no_version_replaces_or_merges_over_an_erased_record(loaded: OnlineStore, at: int) -> None:
    before = record(loaded)
    late = Row(b"b", 2**52, 2**52, at, b"again")

    assert loaded.merge(VIEW, make_batch([late]), tie_wins=True, retention=FOREVER).tolist() == [STALE]
    outcome = loaded.replace(VIEW, make_batch([late], floor=at), at=at, retention=FOREVER).tolist()

    assert outcome == [UNCHANGED if at == ERASED else STALE]
    assert record(loaded) == before


def test_no_run_brings_it_back(table: Table, loaded: OnlineStore) -> None:
    table.append(row("b", 5, 5.0), row("a", 5, 5.0))
    incremental(table, loaded, "changes")
    pipeline.backfill(table.view, loaded, run("backfill"), DAY)
    pipeline.rebuild(table.view, loaded, run("rebuild"))
    report = verify(table.view, loaded, run("verify"), repair=True)

    assert amounts(table, loaded) == {"a": 5.0}
    assert (report.mismatched, report.newer) == (0, 1)
    table.delta.delete("user_id = 'b'")
    incremental(table, loaded, "deleted")
    pipeline.rebuild(table.view, loaded, run("again"))
    assert erased(record(loaded))


def test_neither_late_rows_nor_a_replay_nor_an_older_backfill_bring_it_back(
    table: Table, any_store: OnlineStore
) -> None:
    """What was planned before it was erased is written after it: whole, twice, and older."""
    table.append(row("a", 100, 1.0), row("b", 100, 2.0))
    first = pipeline.begin(table.view, any_store, plan_of(table, any_store, run_id="first"))
    old = pipeline.begin(table.view, any_store, plan_of(table, any_store, "backfill", "old", interval=DAY))
    incremental(table, any_store)
    table.append(row("b", 200, 3.0), row("a", 200, 3.0))
    planned = pipeline.begin(table.view, any_store, plan_of(table, any_store, run_id="planned"))

    forget(any_store, VIEW, b"b")
    before = record(any_store)
    for plan in (planned, first, planned, old):
        pieces = [pipeline.write_piece(table.view, any_store, plan, piece, now=NOW) for piece in range(plan.pieces)]
        if plan is planned:
            pipeline.commit(table.view, any_store, plan, pieces, now=NOW)
    table.append(row("b", 50, 9.0), row("c", 50, 4.0))
    incremental(table, any_store, "late")
    pipeline.backfill(table.view, any_store, run("backfill"), Interval(T0, T0 + timedelta(minutes=60)))

    assert record(any_store) == before
    assert amounts(table, any_store) == {"a": 3.0, "c": 4.0}


@pytest.mark.server
@pytest.mark.xdist_group("dynamodb")
@pytest.mark.parametrize("tables", ["per_view", "shared"])
def test_erased_entity_stays_away_on_dynamodb(table: Table, dynamodb_local: DynamoDbLocal, tables: str) -> None:
    dynamodb_local.drop_tables()
    address = f"dynamodb://key:secret@eu-central-1/fs?endpoint_url={dynamodb_local.endpoint}&table={tables}"
    table.append(row("a", 1, 1.0), row("b", 1, 2.0, country="s3cret-value"))
    with DynamoDbStore(address) as store:
        store.setup(VIEW)
        incremental(table, store)

        assert shows(dynamodb_local, "s3cret-value")
        assert forget(store, VIEW, b"b") == "erased"
        table.append(row("b", 5, 5.0), row("a", 5, 5.0))
        incremental(table, store, "changes")
        pipeline.rebuild(table.view, store, run("rebuild"))

        assert erased(record(store))
        assert amounts(table, store) == {"a": 5.0}
        assert not shows(dynamodb_local, "s3cret-value")


def shows(local: DynamoDbLocal, text: str) -> bool:
    """Whether any item of any table has *text* in an attribute."""
    return any(text in str(local.items(table)) for table in local.client.list_tables()["TableNames"])


def test_it_stays_when_what_is_due_is_purged(loaded: OnlineStore) -> None:
    loaded.purge(VIEW, to_us(datetime(9999, 1, 1, tzinfo=timezone.utc)))

    assert erased(record(loaded))


def test_lost_watermark_does_not_make_its_version_count(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    incremental(table, store)
    forget(store, VIEW, b"b")
    store.content.cells.clear()  # type: ignore[attr-defined]

    incremental(table, store, "again")

    found = watermark.read(store, VIEW)
    assert found is not None
    assert (found.generation, amounts(table, store)) == (2, {"a": 1.0})


def test_entity_that_was_never_there_stays_away_and_doing_it_again_is_harmless(
    table: Table, any_store: OnlineStore
) -> None:
    assert forget(any_store, VIEW, b"b") == "erased; nothing was there"
    assert forget(any_store, VIEW, b"b") == "erased before"

    table.append(row("a", 1, 1.0), row("b", 1, 2.0))
    incremental(table, any_store)

    assert amounts(table, any_store) == {"a": 1.0}


def test_receipt_proves_its_key_and_does_not_tell_it() -> None:
    made = receipt(VIEW, b"user-4711", {"default": "erased"}, when=NOW, by="me", host="here")
    other = receipt(VIEW, b"user-4711", {"default": "erased"}, when=NOW, by="me", host="here")

    assert made["key_sha256"] == key_hash(VIEW, b"user-4711", made["salt"])
    assert made["key_sha256"] != other["key_sha256"]
    assert "4711" not in json.dumps({name: made[name] for name in made if name not in {"key_sha256", "salt"}})
    assert made["stores"] == [{"store": "default", "outcome": "erased"}]


def test_command_erases_a_composite_key_and_appends_receipts(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.configure(keys="user_id, country", features={"amount": "float64", "count": "int64"})
    project.table.append(row("a", PAST, 1.0, country="de"), row("a", PAST, 2.0, country="fr"))
    project.json("incremental")
    file = tmp_path / "receipts.jsonl"

    ended = project.run("forget", "spending", "a|de", "--receipt", str(file))
    (again,) = project.json("forget", "spending", "a|de", "--receipt", str(file))

    assert ended.returncode == 0, ended.stderr
    assert "default: erased" in ended.stdout
    assert "a|de" not in ended.stdout + file.read_text()
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert (second, first["stores"]) == (again, [{"store": "default", "outcome": "erased"}])
    assert key_hash("spending", b"a|de", again["salt"]) == again["key_sha256"]
    gone, there = project.json("lookup", "spending", "a|de", "a|fr")
    assert (gone["status"], there["status"]) == ("missing", "present")
    project.json("rebuild")
    gone, there = project.json("lookup", "spending", "a|de", "a|fr")
    assert (gone["status"], there["status"]) == ("missing", "present")


def test_key_of_the_wrong_shape_and_a_file_that_cannot_be_written_erase_nothing(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("a", PAST, 1.0))
    project.json("incremental")

    assert project.run("forget", "spending", "a|b").returncode == 2
    assert project.run("forget", "spending", "a", "--receipt", str(tmp_path)).returncode == 2
    assert project.json("lookup", "spending", "a")[0]["status"] == "present"


def test_receipt_says_which_store_is_not_known_to_be_erased(tmp_path: Path) -> None:
    project = Project(tmp_path, f"redis://127.0.0.1:{free_port()}/0?timeout=0.2")
    project.table.append(row("a", PAST, 1.0))
    file = tmp_path / "receipts.jsonl"

    ended = project.run("forget", "spending", "secret-key", "--receipt", str(file))

    assert ended.returncode == 1
    assert "secret-key" not in ended.stdout + ended.stderr
    assert json.loads(file.read_text())["stores"] == [{"store": "default", "outcome": "not known to be erased"}]


def test_command_frees_a_view(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("a", PAST, 1.0))
    project.json("incremental")

    assert project.json("release", "spending")[0]["lease"] == "nobody held it"
    assert project.json("status")[0]["held_by"] is None
