"""`materialize explain` says why readers get what they get: each way in which a row can win or lose, on real tables and stores."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from materialize import pipeline
from materialize.errors import OfflineStoreError, OnlineStoreError
from materialize.explain import Explanation, explain
from materialize.forget import forget
from materialize.model import Interval
from materialize.offline import join_values, open_table, read_entity
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.order import ERASED, GENERATION, stamp
from materialize.verdicts import HeldRecord, TableRow, Times, disagreement, verdicts
from materialize.verify import verify
from tests.projects import PAST, Project
from tests.stepping import incremental, plan_of, run, vectors
from tests.tables import NOW, SCHEMA, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.online.base import OnlineStore
    from tests import servers


def told(table: Table, store: OnlineStore, key: str = "a", now: Any = NOW, **options: Any) -> Explanation:
    return explain(table.view, store, "default", key.encode(), now=now, **options)


def words(found: Explanation) -> list[tuple[Any, ...]]:
    """Each row's amount and verdict, in order."""
    return [(one["features"].get("amount"), one["verdict"]) for one in found.rows]


def test_record_order_commit_file_and_run_are_told(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("b", 1))
    incremental(table, any_store, "first")
    version = table.append(row("a", 5, 2.0, created=6), commit_properties=None)
    incremental(table, any_store, "second")

    found = told(table, any_store)

    assert (found.status, found.features["amount"]) == ("present", 2.0)
    assert found.record is not None
    assert (found.record["event_time"], found.record["created_time"]) == (at(5), at(6))
    assert (found.record["generation"], found.record["table_version"]) == (1, version)
    assert found.record["read_as"] == "a row that was added"
    assert found.commit is not None
    assert (found.commit["version"], found.commit["operation"]) == (1, "WRITE")
    assert found.brought_by is not None
    assert found.brought_by["file"] == next(one["add"]["path"] for one in table.actions(version) if "add" in one)
    assert found.watermark is not None
    assert (found.watermark["run_id"], found.watermark["version"]) == ("second", 1)
    assert words(found) == [(2.0, "served"), (1.0, "older")]
    assert (found.disagrees, found.next, found.notes) == (None, None, [])


def test_a_row_of_a_snapshot_is_traced_to_the_commit_that_brought_it(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    table.append(row("b", 1))
    table.append(row("c", 1))
    incremental(table, any_store)

    found = told(table, any_store)

    assert found.record is not None
    assert found.record["table_version"] == 2
    assert found.record["read_as"].startswith("the whole state")
    assert "generation 1, version 2" in found.record["floor"]
    assert found.brought_by is not None
    assert (found.brought_by["version"], found.brought_by.get("exact")) == (0, None)


def test_a_late_row_loses(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    incremental(table, any_store)
    table.append(row("a", 3, 2.0))
    incremental(table, any_store)

    found = told(table, any_store)

    assert words(found) == [(1.0, "served"), (2.0, "late but newer wins")]
    assert [one["commit"] for one in found.refused] == [1]


def test_a_correction_at_the_same_event_time_wins_by_commit(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    incremental(table, any_store)
    table.append(row("a", 5, 2.0))
    incremental(table, any_store)

    assert words(told(table, any_store)) == [(2.0, "served"), (1.0, "same order, later commit wins")]


def test_a_row_that_came_twice_is_served_from_the_later_commit(table: Table, any_store: OnlineStore) -> None:
    for _ in range(2):
        table.append(row("a", 5, 1.0))
        incremental(table, any_store)

    found = told(table, any_store)

    assert [(one["commit"], one["verdict"]) for one in found.rows] == [
        (1, "served"),
        (0, "same order, later commit wins"),
    ]


def test_a_row_in_a_file_that_was_rewritten_for_another_is_not_gone(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("b", 5, 2.0))
    incremental(table, any_store)
    table.delta.delete("user_id = 'b'")
    incremental(table, any_store)

    found = told(table, any_store)

    assert words(found) == [(1.0, "served")]
    assert "an earlier commit" in found.brought_by["exact"]  # type: ignore[index]
    assert words(told(table, any_store, "b")) == [(2.0, "gone: commit 1 removed it")]


def test_an_updated_row_is_gone_and_its_successor_served(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("b", 5, 2.0))
    incremental(table, any_store)
    table.delta.update(new_values={"amount": 7.0}, predicate="user_id = 'a'")
    incremental(table, any_store)

    assert words(told(table, any_store)) == [(7.0, "served"), (1.0, "gone: commit 1 removed it")]


def test_two_rows_of_one_commit_with_equal_times_are_told_as_such(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("a", 5, 2.0))
    incremental(table, store)

    verdicts_of = sorted(verdict for _, verdict in words(told(table, store)))

    assert verdicts_of == ["same order and commit: either may be served", "served"]
    assert told(table, store).disagrees is None


def test_a_deleted_entity_says_which_commit_removed_its_row(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("b", 1))
    incremental(table, any_store)
    table.delta.delete("user_id = 'a'")
    incremental(table, any_store)

    found = told(table, any_store)

    assert (found.status, found.features, found.disagrees) == ("deleted", {}, None)
    assert words(found) == [(1.0, "gone: commit 1 removed it")]
    assert found.commit is not None
    assert (found.commit["version"], found.commit["operation"]) == (1, "DELETE")
    assert "generation 1, version 1" in found.record["floor"]  # type: ignore[index]


def test_a_row_that_was_removed_after_the_watermark_is_still_served(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("b", 1))
    incremental(table, any_store)
    table.delta.delete("user_id = 'a'")

    found = told(table, any_store)

    assert words(found) == [(1.0, "served; gone: commit 1 removed it, which is after watermark 0")]
    assert (found.disagrees, found.next) == (None, "materialize incremental spending --store default")


def test_a_deletion_vector_removes_a_row(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("b", 1))
    path = next(one["add"]["path"] for one in table.actions(0) if "add" in one)
    incremental(table, store)
    table.delete_rows(path, [0])
    incremental(table, store)

    assert (told(table, store).status, words(told(table, store))) == ("deleted", [(1.0, "gone: commit 1 removed it")])
    assert words(told(table, store, "b")) == [(0.0, "served")]


def test_compaction_moves_rows_and_removes_none(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    table.append(row("a", 6, 2.0))
    incremental(table, any_store)
    table.delta.optimize.compact()
    incremental(table, any_store)

    found = told(table, any_store)

    assert words(found) == [(2.0, "served"), (1.0, "older")]
    assert "anew" in found.brought_by["exact"]  # type: ignore[index]


def test_a_backfill_is_told_by_the_row_that_it_brought(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    table.append(row("b", 1))
    interval = Interval(at(0), at(60))
    incremental(table, any_store)
    pipeline.backfill(table.view, any_store, run("backfill"), interval)

    found = told(table, any_store)

    assert (words(found), found.disagrees) == ([(1.0, "served")], None)
    assert found.brought_by["version"] == 0  # type: ignore[index]


def test_a_rebuild_gives_a_new_generation_and_a_floor(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    incremental(table, any_store)
    pipeline.rebuild(table.view, any_store, run("rebuild"))

    found = told(table, any_store)

    assert found.record["generation"] == 2  # type: ignore[index]
    assert found.watermark["run_id"] == "rebuild"  # type: ignore[index]
    assert (words(found), found.disagrees) == ([(1.0, "served")], None)


def test_a_forgotten_entity_is_erased(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    incremental(table, any_store)
    forget(any_store, "spending", b"a")

    found = told(table, any_store)

    assert (found.status, words(found), found.disagrees) == ("erased", [(None, "erased")], None)
    assert "erased for good" in found.record["floor"]  # type: ignore[index]


def test_quarantined_rows_are_told_with_their_reason(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0), row("a", 60 * 24 * 20, 2.0), row("b", None))
    incremental(table, any_store, "first")

    found = told(table, any_store)

    assert words(found) == [
        (2.0, "quarantined: event timestamp more than 1d in the future"),
        (1.0, "served"),
    ]
    assert [(one["reason"], one["run_id"]) for one in found.quarantined] == [
        ("event timestamp more than 1d in the future", "first")
    ]
    assert told(table, any_store, "c").quarantined == []


def test_a_commit_after_the_watermark_is_not_yet_online(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    incremental(table, any_store)
    table.append(row("a", 6, 2.0))

    found = told(table, any_store)

    assert words(found) == [(2.0, "not yet online: commit 1 is after watermark 0"), (1.0, "served")]
    assert (found.disagrees, found.next) == (None, "materialize incremental spending --store default")


def test_a_run_under_way_is_no_disagreement(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 5, 1.0))
    incremental(table, store)
    table.append(row("a", 6, 2.0))
    plan = pipeline.begin(table.view, store, plan_of(table, store))
    pipeline.write_piece(table.view, store, plan, 0, now=NOW)

    found = told(table, store)

    assert (words(found), found.disagrees) == ([(2.0, "served"), (1.0, "older")], None)


def test_an_expired_row_is_told(table: Table, any_store: OnlineStore) -> None:
    table.change_view(ttl=timedelta(days=365))
    table.append(row("a", 5, 1.0))
    incremental(table, any_store)

    found = told(table, any_store, now=NOW + timedelta(days=400))

    assert (found.status, found.features, found.disagrees) == ("expired", {}, None)
    assert words(found) == [(1.0, "expired by ttl")]


def test_a_null_and_an_absent_entity(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 5, None))
    incremental(table, any_store)

    assert told(table, any_store, feature="amount").status == "null"
    assert told(table, any_store, feature="count").features == {"count": 1}
    absent = told(table, any_store, "nobody")
    assert (absent.status, absent.record, absent.rows, absent.disagrees) == ("missing", None, [], None)


@pytest.mark.parametrize("damage", ["missing", "stale", "wrong", "extra"])
def test_a_disagreement_names_the_command_that_repairs(table: Table, valkey: servers.Server, damage: str) -> None:
    table.append(row("a", 5, 1.0), row("b", 1))
    with RedisStore(valkey.url) as store:
        incremental(table, store)
        old = valkey.client.get("fs:spending:{a}")
        table.append(row("a", 6, 2.0))
        incremental(table, store)
        new = valkey.client.get("fs:spending:{a}")
        if damage == "missing":
            valkey.client.delete("fs:spending:{a}")
        elif damage == "stale":
            valkey.client.set("fs:spending:{a}", old)
        elif damage == "wrong":
            valkey.client.set("fs:spending:{a}", new.replace(b"DE", b"XX"))
        else:
            valkey.client.set("fs:spending:{z}", new)

        found = told(table, store, "z" if damage == "extra" else "a")
        report = verify(table.view, store, run(), repair=True)
        after = told(table, store, "z" if damage == "extra" else "a")

    assert found.disagrees is not None
    assert found.disagrees.startswith(f"{damage}: ")
    assert found.next == "materialize verify spending --store default --repair"
    assert getattr(report, damage) == 1
    assert after.disagrees is None


@pytest.mark.parametrize("stored", ["redis", "cluster"])
def test_a_hash_is_explained_by_its_record(table: Table, request: pytest.FixtureRequest, stored: str) -> None:
    table.change_view(layout="hash")
    table.append(row("a", 5, 1.0))
    table.append(row("b", 1))
    with hash_store(table, request, stored) as store:
        incremental(table, store)
        table.append(row("a", 6, 2.0))
        table.delta.delete("user_id = 'b'")
        incremental(table, store)

        live, gone, absent = (told(table, store, key) for key in ("a", "b", "nobody"))

    assert (live.status, live.features["amount"], words(live)) == ("present", 2.0, [(2.0, "served"), (1.0, "older")])
    assert (gone.status, [verdict for _, verdict in words(gone)]) == ("deleted", ["gone: commit 3 removed it"])
    assert absent.status == "missing"
    assert [(one.disagrees, one.next, one.notes) for one in (live, gone, absent)] == [(None, None, [])] * 3


@pytest.mark.parametrize("stored", ["redis", "cluster"])
def test_a_changed_layout_is_told_with_the_command_until_a_rebuild(
    table: Table, request: pytest.FixtureRequest, stored: str
) -> None:
    table.append(row("a", 5, 1.0), row("b", 1))
    with hash_store(table, request, stored) as store:
        store.hashed = frozenset()
        incremental(table, store)
        table.change_view(layout="hash")
        store.hashed = frozenset({table.view.name})

        before = told(table, store)
        report = pipeline.rebuild(table.view, store, run())
        after = told(table, store)

    assert (before.status, words(before), before.disagrees) == ("present", [(1.0, "served")], None)
    assert [note.split(":")[0] for note in before.notes] == [
        "the layout changed from vector to hash since the last run"
    ]
    assert before.next == "materialize rebuild spending --store default"
    assert report.written == 2
    assert (after.status, words(after), after.notes, after.next) == ("present", [(1.0, "served")], [], None)


def hash_store(table: Table, request: pytest.FixtureRequest, stored: str) -> RedisStore | RedisClusterStore:
    """A store that keeps the table's view as hashes."""
    if stored == "cluster":
        store: RedisStore | RedisClusterStore = RedisClusterStore(request.getfixturevalue("cluster").url)
    else:
        store = RedisStore(request.getfixturevalue("valkey").url)
    store.hashed = frozenset({table.view.name})
    return store


def test_rows_are_bounded_and_newest_first(table: Table, store: OnlineStore) -> None:
    table.append(*(row("a", minute, float(minute)) for minute in range(30)))
    incremental(table, store)

    found = told(table, store, most=3)

    assert [amount for amount, _ in words(found)] == [29.0, 28.0, 27.0]
    assert found.more_rows == 27


def test_features_are_those_that_readers_get(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 5, float("nan"), country=None, count=2**62))
    incremental(table, store)

    found = told(table, store)

    vector = vectors(table.view, store, ["a"])[0]
    assert repr(found.features) == repr(vector.features)
    assert found.rows[0]["verdict"] == "served"


def test_files_without_the_key_are_not_opened(tmp_path: Path, store: OnlineStore) -> None:
    schema = SCHEMA.set(0, pa.field("user_id", pa.int64()))
    table = Table(tmp_path / "table", schema)
    for user in range(6):
        table.append(row(user, 1, float(user)))  # type: ignore[arg-type]
    incremental(table, store)
    opened = open_table(table.view)
    for file in opened.snapshot_files():
        if file.bounds["user_id"] != (4, 4):
            (table.path / file.path).write_bytes(b"no Parquet")

    found = told(table, store, "4")

    assert words(found) == [(4.0, "served")]
    with pytest.raises(OfflineStoreError):
        read_entity(opened, join_values(opened, ["3"]), most_gone=1)


def test_a_key_of_another_spelling_or_type(tmp_path: Path, store: OnlineStore) -> None:
    table = Table(tmp_path / "table", SCHEMA.set(0, pa.field("user_id", pa.int64())))
    table.append(row(7, 1, 1.0))  # type: ignore[arg-type]
    incremental(table, store)

    odd = told(table, store, "007")
    assert (odd.status, odd.rows) == ("missing", [])
    assert "one spelling" in odd.notes[0]
    with pytest.raises(ValueError, match="expected a value of type long"):
        told(table, store, "seven")
    with pytest.raises(ValueError, match="expected one of amount, count, country"):
        told(table, store, "7", feature="amuont")


def test_features_may_be_called_as_our_own_columns(tmp_path: Path, store: OnlineStore) -> None:
    names = ("version", "position", "event_us", "file")
    table = Table(tmp_path / "table", pa.schema([*SCHEMA, *((name, pa.float64()) for name in names)]))
    table.change_view(features=dict.fromkeys(names, "float64"))
    table.append(row("a", 1, **dict.fromkeys(names, 1.0)))
    table.append(row("a", 2, **dict.fromkeys(names, 2.0)))
    incremental(table, store)

    found = told(table, store)

    assert found.features == dict.fromkeys(names, 2.0)
    assert [(one["features"]["version"], one["verdict"]) for one in found.rows] == [(2.0, "served"), (1.0, "older")]


def test_partitions_and_keys_of_several_types(tmp_path: Path, store: OnlineStore) -> None:
    schema = pa.schema([*SCHEMA, ("day", pa.date32()), ("new", pa.bool_())])
    table = Table(tmp_path / "table", schema)
    table.change_view(join_keys=("user_id", "day", "new"))
    days = [at(0).date(), at(60 * 24).date()]
    table.append(
        *(row("a", 1, float(place), day=day, new=True) for place, day in enumerate(days)), partition_by=["day"]
    )
    incremental(table, store)

    assert words(told(table, store, f"a|{days[1]}|true")) == [(1.0, "served")]
    assert told(table, store, f"a|{days[1]}|false").status == "missing"
    with pytest.raises(ValueError, match="'day': expected a value of type date"):
        told(table, store, "a|yesterday|true")


def test_what_cannot_be_looked_at_is_a_note(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, store)
    for number in range(3):
        table.append(row("a", 2 + number, float(number)), mode="overwrite")
    table.delta.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    table.delta.create_checkpoint()
    table.log_file(0).unlink()
    quarantine = tmp_quarantine(table)
    quarantine.write_bytes(b"{")

    found = told(table, store)

    assert (found.status, found.disagrees) == ("present", None)
    assert any(note.startswith("not compared with the table at the watermark") for note in found.notes)
    assert any("data files that were removed" in note for note in found.notes)
    assert any(note.startswith("the quarantine was not looked at") for note in found.notes)


def tmp_quarantine(table: Table) -> Path:
    """A quarantine table's only log file, of which the content is up to the caller."""
    path = type(table.path)(str(table.view.quarantine_table)) / "_delta_log" / f"{0:020d}.json"
    path.parent.mkdir(parents=True)
    return path


def test_a_view_that_never_loaded_is_no_disagreement(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))

    found = told(table, store)

    assert (found.status, found.watermark, found.disagrees) == ("missing", None, None)
    assert "never loaded" in found.notes[0]
    assert found.next == "materialize incremental spending --store default"


def test_bytes_that_are_no_record_are_an_error(table: Table, valkey: servers.Server) -> None:
    table.append(row("a", 1))
    with RedisStore(valkey.url) as store:
        incremental(table, store)
        valkey.client.set("fs:spending:{a}", b"something else")
        with pytest.raises(OnlineStoreError, match="could not decode"):
            told(table, store)


# --- the rule alone ----------------------------------------------------------------------------------------------------


def held(event: int | None = 10, *, version: int = 3, floor: int = 0, amount: float = 1.0) -> HeldRecord:
    return HeldRecord(event, 0, stamp(1, version), floor, {"amount": amount})


def of_table(event: int, commit: int | None = 1, amount: float = 1.0) -> TableRow:
    return TableRow(
        event, 0, commit, exact=True, file="f", removed_by=None, unstorable=None, features={"amount": amount}
    )


TIMES = Times(version=5, generation=1, ttl_us=None, now_us=10**9)


def test_a_row_below_the_floor_is_refused() -> None:
    tombstone = held(None, floor=stamp(1, 3))
    assert verdicts([of_table(20, 2), of_table(20, 4)], tombstone, TIMES) == [
        "refused: at or below the floor",
        "not online, and should be",
    ]
    assert verdicts([of_table(20, 2)], held(floor=stamp(1, 3)), TIMES) == ["refused: at or below the floor"]


def test_what_is_newer_than_the_watermark_or_erased_never_disagrees() -> None:
    assert disagreement([of_table(20)], held(version=6), TIMES) is None
    assert disagreement([of_table(20)], HeldRecord(None, 0, ERASED, ERASED, {}), TIMES) is None
    assert disagreement([of_table(20)], held(), TIMES) is not None
    assert GENERATION == 2**40


# --- the command -------------------------------------------------------------------------------------------------------


def test_command_tells_people_and_machines(tmp_path: Path, valkey: servers.Server) -> None:
    project = Project(tmp_path, valkey.url)
    project.table.append(row("a|b", PAST + 1, 1.0))
    project.table.append(row("a|b", PAST, 2.0))
    project.json("incremental")

    (found,) = project.json("explain", "spending", "a%7Cb")
    text = project.run("explain", "spending", "a%7Cb", "--feature", "amount")

    assert [one["verdict"] for one in found["rows"]] == ["served", "late but newer wins"]
    assert found["features"] == {"amount": 1.0, "count": 1, "country": "DE"}
    assert text.stdout.startswith("spending in default, a%7Cb: present\n  amount = 1.0\n")
    assert "country" not in text.stdout
    assert "    late but newer wins: event 20" in text.stdout
    assert text.stderr == ""
    json.dumps(found)


@pytest.mark.parametrize("arguments", [("a|b",), ("a", "--feature", "nothing"), ("a", "--rows", "0")])
def test_wrong_usage_ends_with_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("a", PAST))
    assert project.run("explain", "spending", *arguments).returncode == 2


def test_nothing_of_the_entity_is_logged(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("very-secret", PAST, 1234.5))
    project.json("incremental")

    ended = project.run("explain", "spending", "very-secret", "-vv")

    assert "1234.5" in ended.stdout
    assert "very-secret" not in ended.stderr
    assert "1234.5" not in ended.stderr
