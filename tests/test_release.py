"""A release reads the entities of quarantined rows again: what can be stored now is online by the order rule, and its rows are marked."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from deltalake import DeltaTable

from materialize import codec, pipeline
from materialize.decoder import Header
from materialize.errors import OfflineStoreError, OnlineStoreError, UnavailableError, WatermarkError
from materialize.model import Retention
from materialize.offline import erase, held_rows
from materialize.order import ERASED
from materialize.release import ReleaseReport, release
from materialize.testing import CrashingStore
from tests.stepping import Stepper, amounts, incremental, plan_of, position, records, run
from tests.tables import NOW, Table, kept_rows, row

if TYPE_CHECKING:
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

#: Minutes after the first event time that are in the future until LATER.
FUTURE, LATER = 60 * 24 * 20, NOW + timedelta(days=20)
FOR_EVER = Retention(ttl_us=None, keep_until_us=253_402_300_799_000_000)


def released(
    table: Table, store: OnlineStore, run_id: str = "release", now: Any = LATER, **which: Any
) -> ReleaseReport:
    return release(table.view, store, run(run_id, now), **which)


def counts(report: ReleaseReport) -> tuple[int, int, int, int]:
    return report.released, report.held, report.waiting, report.written


def waiting(table: Table) -> list[str]:
    return sorted(str(entity) for entity in held_rows(table.view, "default")["entity"])


def marks(table: Table) -> dict[str, str | None]:
    """By which run each row in the quarantine table was released."""
    rows = kept_rows(table.view)
    assert all((one["released_by"] is None) == (one["released_at"] is None) for one in rows)
    return {one["entity"]: one["released_by"] for one in rows}


# --- what comes online -------------------------------------------------------------------------------------------------


def test_a_row_that_can_be_stored_now_is_online_and_marked(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("a", FUTURE, 2.0), row("b", FUTURE, 3.0), row("c", None))
    incremental(table, any_store)
    before = position(table, any_store)
    assert amounts(table, any_store) == {"a": 1.0}

    report = released(table, any_store)

    assert amounts(table, any_store) == {"a": 2.0, "b": 3.0}
    assert (counts(report), report.reasons) == ((2, 1, 0, 2), {"null event timestamp": 1})
    assert (waiting(table), marks(table)) == (["c"], {"a": "release", "b": "release", "c": None})
    assert position(table, any_store)[1] == before[1]


def test_nothing_is_released_that_still_cannot_be_stored(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0), row("a", FUTURE, 2.0), row(None, 1), row("", 2))
    incremental(table, store)

    report = released(table, store, now=NOW)

    assert counts(report) == (0, 3, 0, 0)
    assert sum(report.reasons.values()) == 3
    assert set(marks(table).values()) == {None}
    assert amounts(table, store) == {"a": 1.0}


def test_the_source_decides_and_not_the_copy(table: Table, any_store: OnlineStore) -> None:
    """Deleted: stays away. Corrected: as corrected. Overtaken by a row with a later event: the later one."""
    table.append(*(row(name, FUTURE, 1.0) for name in ("deleted", "corrected", "overtaken")), row("deleted", 1, 0.5))
    incremental(table, any_store)
    table.delta.delete("user_id = 'deleted'")
    table.delta.update(new_values={"amount": 7.0}, predicate="user_id = 'corrected'")
    table.append(row("overtaken", FUTURE + 1, 9.0))
    incremental(table, any_store)
    assert amounts(table, any_store) == {}

    report = released(table, any_store)

    assert amounts(table, any_store) == {"corrected": 7.0, "overtaken": 9.0}
    assert waiting(table) == []
    assert report.released == 5  # the corrected and the overtaking row were quarantined, too


def test_an_expired_row_is_released_and_not_served(table: Table, store: OnlineStore) -> None:
    table.change_view(ttl=timedelta(hours=1))
    table.append(row("a", FUTURE, 1.0))
    incremental(table, store)

    report = released(table, store, now=LATER)

    assert (counts(report), amounts(table, store), waiting(table)) == ((1, 0, 0, 0), {}, [])


def test_a_row_after_the_watermark_waits_for_the_next_run(table: Table, store: OnlineStore) -> None:
    table.append(row("a", FUTURE, 1.0))
    incremental(table, store)
    table.append(row("b", FUTURE, 2.0))
    plan = pipeline.begin(table.view, store, plan_of(table, store))
    pipeline.write_piece(table.view, store, plan, 0, now=NOW)

    report = released(table, store)

    assert counts(report) == (1, 0, 1, 1)
    assert (amounts(table, store), waiting(table)) == ({"a": 1.0}, ["b"])


def test_some_rows_can_be_chosen(table: Table, store: OnlineStore) -> None:
    table.append(row("a", FUTURE, 1.0), row("b", None))
    incremental(table, store, "first")
    table.append(row("c", FUTURE, 3.0))
    incremental(table, store, "second")

    assert counts(released(table, store, reason="null event")) == (0, 1, 0, 0)
    assert counts(released(table, store, met_by="second")) == (1, 0, 0, 1)
    assert (amounts(table, store), waiting(table)) == ({"c": 3.0}, ["a", "b"])


# --- beside other runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["incremental", "rebuild"])
def test_a_release_after_a_rebuild_gets_past_its_floor(table: Table, store: OnlineStore, mode: Any) -> None:
    """A rebuild wrote these entities at the very version that the release reads."""
    table.append(row("a", 1, 1.0), row("a", FUTURE, 2.0))
    incremental(table, store)
    if mode == "rebuild":
        pipeline.rebuild(table.view, store, run())
    generation, version = position(table, store)

    released(table, store)

    assert amounts(table, store) == {"a": 2.0}
    assert position(table, store) == (generation + 1, version)
    table.append(row("a", FUTURE + 1, 3.0))
    pipeline.incremental(table.view, store, run("next", LATER))
    assert amounts(table, store) == {"a": 3.0}


@pytest.mark.parametrize("commits", [0, 1])
def test_what_a_newer_run_wrote_stays(table: Table, any_store: OnlineStore, commits: int) -> None:
    """It is not done yet: its rows are newer than the watermark, and than the release. Whether the watermark is where the first
    run wrote all entities (no *commits*), or further, the newer run finishes as if there was no release.
    """
    table.append(row("a", FUTURE, 1.0))
    incremental(table, any_store)
    for _ in range(commits):
        table.append(row(None, 1))
        incremental(table, any_store)
    table.append(row("a", FUTURE + 5, 2.0))
    newer = Stepper(table, any_store, "incremental", "newer")
    newer.advance()
    newer.advance()
    pipeline.write_piece(table.view, any_store, newer.plan, 0, now=LATER)  # type: ignore[arg-type]
    assert amounts(table, any_store) == {"a": 2.0}

    report = released(table, any_store)

    assert amounts(table, any_store) == {"a": 2.0}
    assert counts(report) == ((1, 1, 0, 0) if commits else (0, 0, 1, 0))
    newer.advance()
    newer.advance()
    assert (newer.error, position(table, any_store)) == (None, (1, 1 + commits))
    released(table, any_store, "after it")
    assert amounts(table, any_store) == {"a": 2.0}
    assert "a" not in waiting(table)


def test_a_run_of_before_brings_no_released_entity_back(table: Table, store: OnlineStore) -> None:
    """A zombie pinned at a version with the row, a release after the row was deleted."""
    table.append(row("a", 1, 1.0))
    incremental(table, store)
    table.append(row("b", 2, 2.0), row("b", FUTURE, 3.0))
    zombie = pipeline.begin(table.view, store, plan_of(table, store))
    incremental(table, store)
    table.delta.delete("user_id = 'b'")
    incremental(table, store)
    released(table, store)

    pipeline.write_piece(table.view, store, zombie, 0, now=LATER)
    with pytest.raises(WatermarkError):
        pipeline.commit(
            table.view, store, zombie, [pipeline.write_piece(table.view, store, zombie, 0, now=LATER)], now=LATER
        )

    assert amounts(table, store) == {"a": 1.0}


def test_an_erased_entity_stays_erased_and_out_of_the_quarantine(table: Table, any_store: OnlineStore) -> None:
    table.append(row("gone", FUTURE, 1.0), row("gone", None), row("kept", FUTURE, 2.0), row(None, 1))
    incremental(table, any_store)
    any_store.replace("spending", codec.tombstones([b"gone"], ERASED), at=ERASED, retention=FOR_EVER)
    assert erase(table.view, "default", b"gone") == 2
    generation, _ = position(table, any_store)

    pipeline.rebuild(table.view, any_store, run("replay"))
    assert waiting(table) == ["None", "kept"]
    released(table, any_store)

    assert amounts(table, any_store) == {"kept": 2.0}
    assert "gone" not in marks(table)
    assert Header.unpack(records(table.view, any_store)[b"gone"]).floor == ERASED
    assert position(table, any_store)[0] <= generation + 2  # the floor for ever asks for no generation of its own


# --- again, and killed in between --------------------------------------------------------------------------------------


def test_a_release_that_is_run_twice_does_nothing_more(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", FUTURE, 2.0), row("b", None))
    incremental(table, any_store)
    released(table, any_store, "first")
    before = records(table.view, any_store), position(table, any_store), marks(table)

    report = released(table, any_store, "second")

    assert counts(report) == (0, 1, 0, 0)
    assert (records(table.view, any_store), position(table, any_store), marks(table)) == before


@pytest.mark.parametrize("effect", [False, True])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_release_killed_at_any_write_leaves_every_row_waiting_and_is_done_by_the_next(
    table: Table, any_store: OnlineStore, after: int, *, effect: bool
) -> None:
    """Its writes: a generation, tombstones or records in two batches; the marks come after them all."""
    table.append(row("a", 1, 1.0), row("a", FUTURE, 2.0), row("b", FUTURE, 3.0))
    incremental(table, any_store)
    expected = {"a": 2.0, "b": 3.0}
    dying = CrashingStore(any_store, after=after, effect=effect, error=OnlineStoreError)

    try:
        released(table, dying)
    except OnlineStoreError:
        assert waiting(table) == ["a", "b"]
        assert amounts(table, any_store).items() <= (expected | {"a": amounts(table, any_store)["a"]}).items()
    report = released(table, any_store, "again")

    assert amounts(table, any_store) == expected
    assert (report.held, report.waiting, waiting(table)) == (0, 0, [])


def test_a_row_that_is_met_again_after_its_release_waits_again(table: Table, store: OnlineStore) -> None:
    """As when the clock was wrong at the release."""
    table.append(row("a", FUTURE, 1.0))
    incremental(table, store)
    released(table, store)

    pipeline.rebuild(table.view, store, run("rebuild", NOW))

    assert (waiting(table), amounts(table, store)) == (["a"], {})
    released(table, store, "second")
    assert (waiting(table), amounts(table, store)) == ([], {"a": 1.0})


# --- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_release_needs_a_finished_run(table: Table, store: OnlineStore) -> None:
    table.append(row("a", FUTURE, 1.0))
    with pytest.raises(OnlineStoreError, match="never loaded"):
        released(table, store)

    pipeline.begin(table.view, store, plan_of(table, store, "rebuild"))
    with pytest.raises(OnlineStoreError, match="did not finish"):
        released(table, store)


def test_a_release_without_a_quarantine_table_finds_nothing(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    incremental(table, store)

    assert counts(released(table, store)) == (0, 0, 0, 0)


# --- erased rows -------------------------------------------------------------------------------------------------------


def files_with(view: FeatureView, word: str) -> list[str]:
    """The files of the quarantine table, live or not, that hold *word* in any column or as bytes."""
    files = [file for file in Path(str(view.quarantine_table)).rglob("*") if file.is_file()]
    return [file.name for file in files if word in text_of(file)]


def text_of(file: Path) -> str:
    if file.suffix != ".parquet":
        return file.read_text()
    return file.read_text(errors="replace") + json.dumps(pl.read_parquet(file).to_dicts(), default=str)


def test_an_erased_entity_is_in_no_file_of_the_quarantine_table(table: Table, store: OnlineStore) -> None:
    table.append(
        row("secret-key", FUTURE, country="secret-value"), row("other", FUTURE), row("it's", None), row(None, 1)
    )
    incremental(table, store)
    table.append(row("secret-key", None, country="secret-value"))
    incremental(table, store)
    released(table, store)  # released rows are in the table still
    assert files_with(table.view, "secret")

    assert erase(table.view, "elsewhere", b"secret-key") == 0
    assert erase(table.view, "default", b"secret-key") == 2

    assert files_with(table.view, "secret") == []
    assert sorted(marks(table), key=str) == [None, "it's", "other"]
    assert (erase(table.view, "default", b"secret-key"), erase(table.view, "default", b"it's")) == (0, 1)
    assert waiting(table) == ["None"]


def test_an_erasure_cut_off_before_the_files_is_finished_by_the_next(table: Table, store: OnlineStore) -> None:
    table.append(row("secret", None), row("other", None))
    incremental(table, store)
    DeltaTable(str(table.view.quarantine_table)).delete("entity >= 's'")
    assert files_with(table.view, "secret")

    assert erase(table.view, "default", b"secret") == 0

    assert files_with(table.view, "secret") == []


def test_there_is_nothing_to_erase_without_a_table(table: Table) -> None:
    assert erase(table.view, "default", b"a") == 0
    table.change_view(quarantine="none")
    assert erase(table.view, "default", b"a") == 0


def test_a_quarantine_that_cannot_be_read_is_told_without_keys(table: Table, store: OnlineStore) -> None:
    other = Table(table.path.parent / "table_quarantine")
    other.append(row("theirs", 1))
    table.append(row("a", 1))
    incremental(table, store)

    for act in (lambda: erase(table.view, "default", b"secret"), lambda: released(table, store)):
        with pytest.raises(OfflineStoreError, match=r"'spending'.*quarantine table") as failed:
            act()
        assert "secret" not in str(failed.value)
    assert (other.version, issubclass(UnavailableError, OnlineStoreError)) == (0, True)
