"""What every online store must do, as a test class."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from materialize.model import Retention
from materialize.online.base import HEADER, OnlineStore, unpack_order
from materialize.order import STALE, UNCHANGED, WRITTEN
from materialize.testing.batches import AT, FOREVER, Row, content, make_batch
from materialize.testing.histories import play_calls, play_history

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["OnlineStoreContract"]

#: Histories per store in one test run; more with the environment variable MATERIALIZE_HISTORIES.
HISTORIES = int(os.environ.get("MATERIALIZE_HISTORIES", "300"))


class OnlineStoreContract:
    """What every online store must do. A subclass gives the fixture ``store``, empty at the start of each test.

    ``histories``: how many random histories, and as many random calls, are played. ``purges``: whether `purge` is what
    removes records, and not the store's own clock.
    """

    histories: int = HISTORIES
    purges: bool = False

    @pytest.fixture
    def store(self) -> Iterator[OnlineStore]:
        raise NotImplementedError

    def merge(self, store: OnlineStore, *rows: Row, tie_wins: bool = True, view: str = "view") -> list[int]:
        outcomes: list[int] = store.merge(view, make_batch(rows), tie_wins=tie_wins, retention=FOREVER).tolist()
        return outcomes

    def replace(self, store: OnlineStore, *rows: Row, at: int) -> list[int]:
        batch = make_batch([row._replace(version=at) for row in rows], floor=at)
        outcomes: list[int] = store.replace("view", batch, at=at, retention=FOREVER).tolist()
        return outcomes

    def payload(self, store: OnlineStore, key: bytes) -> bytes | None:
        (record,) = store.read("view", [key])
        return None if record is None else record[HEADER.size :]

    def test_a_row_is_read_back_byte_by_byte(self, store: OnlineStore) -> None:
        batch = make_batch([Row(b"k", 5, -3, AT, bytes(range(256)))])

        store.merge("view", batch, tie_wins=True, retention=FOREVER)

        assert store.read("view", [b"k"]) == batch.values.to_pylist()

    def test_absent_keys_read_as_none_in_the_order_asked_for(self, store: OnlineStore) -> None:
        self.merge(store, Row(b"a"), Row(b"b"))

        found = store.read("view", [b"x", b"b", b"a", b"b", b"y"])

        assert [record is None for record in found] == [True, False, False, False, True]
        assert found[1] == found[3]

    def test_an_empty_batch_and_an_empty_read_do_nothing(self, store: OnlineStore) -> None:
        assert self.merge(store) == []
        assert store.read("view", []) == []
        assert content(store) == {}

    @pytest.mark.parametrize(
        ("event_us", "created_us", "outcome"),
        [(6, 0, WRITTEN), (5, 4, WRITTEN), (5, 3, UNCHANGED), (5, 2, STALE), (4, 9, STALE)],
    )
    def test_merge_keeps_the_greater_event_and_created_time(
        self, store: OnlineStore, event_us: int, created_us: int, outcome: int
    ) -> None:
        self.merge(store, Row(b"k", 5, 3, AT, b"old"))

        assert self.merge(store, Row(b"k", event_us, created_us, AT, b"new")) == [outcome]
        assert self.payload(store, b"k") == (b"new" if outcome == WRITTEN else b"old")

    def test_a_tie_goes_to_the_later_commit_of_an_incremental_run_only(self, store: OnlineStore) -> None:
        self.merge(store, Row(b"k", 5, 3, AT, b"old"))

        assert self.merge(store, Row(b"k", 5, 3, AT + 1, b"backfilled"), tie_wins=False) == [UNCHANGED]
        assert self.merge(store, Row(b"k", 5, 3, AT - 1, b"earlier")) == [UNCHANGED]
        assert self.payload(store, b"k") == b"old"
        assert self.merge(store, Row(b"k", 5, 3, AT + 1, b"later")) == [WRITTEN]
        assert self.payload(store, b"k") == b"later"

    def test_replace_wins_over_a_greater_order_of_an_older_version(self, store: OnlineStore) -> None:
        self.merge(store, Row(b"k", 9, 9, AT, b"retracted"))

        assert self.replace(store, Row(b"k", 1, payload=b"true"), at=AT + 1) == [WRITTEN]
        assert self.payload(store, b"k") == b"true"

    def test_a_retracted_row_never_comes_back(self, store: OnlineStore) -> None:
        retracted = Row(b"k", 9, 9, AT, b"retracted")
        self.merge(store, retracted)
        self.replace(store, Row(b"k", None, payload=b""), at=AT + 1)

        assert self.merge(store, retracted) == [STALE]
        assert self.replace(store, Row(b"k", 9, 9, payload=b"zombie"), at=AT) == [STALE]
        assert self.merge(store, retracted._replace(version=AT + 1)) == [STALE]
        assert self.payload(store, b"k") == b""
        assert self.merge(store, Row(b"k", 1, version=AT + 2, payload=b"born again")) == [WRITTEN]

    def test_replace_by_an_older_snapshot_keeps_a_newer_row_and_raises_its_floor(self, store: OnlineStore) -> None:
        self.merge(store, Row(b"k", 5, version=AT + 5, payload=b"newer"))

        assert self.replace(store, Row(b"k", 4, payload=b"older"), at=AT + 2) == [STALE]
        assert self.payload(store, b"k") == b"newer"
        assert self.merge(store, Row(b"k", 9, version=AT + 2, payload=b"below the floor")) == [STALE]

    def test_replace_by_an_older_snapshot_with_a_greater_order_keeps_the_newer_version(
        self, store: OnlineStore
    ) -> None:
        self.merge(store, Row(b"k", 5, version=AT + 5, payload=b"newer"))

        assert self.replace(store, Row(b"k", 6, payload=b"greater"), at=AT + 2) == [WRITTEN]

        (record,) = store.read("view", [b"k"])
        assert unpack_order(record or b"").version == AT + 5
        assert unpack_order(record or b"").floor == AT + 2

    def test_merge_keeps_the_floor(self, store: OnlineStore) -> None:
        self.replace(store, Row(b"k", 1), at=AT)
        self.merge(store, Row(b"k", 2, version=AT + 3))

        (record,) = store.read("view", [b"k"])
        assert unpack_order(record or b"").floor == AT

    def test_replacing_again_changes_nothing(self, store: OnlineStore) -> None:
        self.replace(store, Row(b"k", 1), Row(b"l", 2), at=AT)
        before = content(store)

        assert self.replace(store, Row(b"k", 1), Row(b"l", 2), at=AT) == [UNCHANGED, UNCHANGED]
        assert content(store) == before

    def test_outcomes_belong_to_their_rows(self, store: OnlineStore) -> None:
        self.merge(store, *(Row(b"%d" % number, 5) for number in range(0, 1000, 3)))

        outcomes = self.merge(store, *(Row(b"%d" % number, 4 + number % 2) for number in range(1000)))

        expected = [WRITTEN if number % 3 else UNCHANGED if number % 2 else STALE for number in range(1000)]
        assert outcomes == expected

    def test_keys_are_any_bytes(self, store: OnlineStore) -> None:
        keys = ["|{}%", "%7C", "a|b", "héß€🎉", "x" * 300, "new\nline", "*?[a]\\", "a", "A", "nul\0"]
        rows = [Row(key.encode(), payload=key.encode()) for key in keys]

        self.merge(store, *rows)

        assert [self.payload(store, row.key) for row in rows] == [row.payload for row in rows]
        assert sorted(content(store)) == sorted(row.key for row in rows)

    def test_values_may_be_large(self, store: OnlineStore) -> None:
        size = min(900 * 1024, store.max_value_bytes - HEADER.size)
        rows = [Row(b"%d" % number, payload=os.urandom(size)) for number in range(5)]

        assert self.merge(store, *rows, Row(b"small")) == [WRITTEN] * 6
        assert self.payload(store, b"3") == rows[3].payload

    def test_a_large_batch_and_its_scan_are_complete(self, store: OnlineStore) -> None:
        rows = [Row(b"%d" % number, payload=b"%d" % number) for number in range(25_000)]

        assert self.merge(store, *rows) == [WRITTEN] * len(rows)
        assert {key: record[HEADER.size :] for key, record in content(store).items()} == {
            row.key: row.key for row in rows
        }

    @pytest.mark.parametrize("start", [0.0, 0.37, 0.999])
    def test_a_scan_is_complete_wherever_it_starts(self, store: OnlineStore, start: float) -> None:
        keys = {b"%d" % number for number in range(2_500)}
        self.merge(store, *(Row(key) for key in keys))
        self.merge(store, Row(b"other"), view="view_2")

        assert {key for batch, _ in store.scan("view", start=start) for key in batch} == keys

    def test_views_do_not_see_each_other(self, store: OnlineStore) -> None:
        for view in ("view", "view_2", "vie"):
            self.merge(store, Row(b"k", payload=view.encode()), view=view)

        assert [content(store, view)[b"k"][HEADER.size :] for view in ("view", "view_2", "vie")] == [
            b"view",
            b"view_2",
            b"vie",
        ]
        assert content(store, "vi") == {}

    def test_a_cell_is_written_only_over_what_was_expected(self, store: OnlineStore) -> None:
        assert store.read_cell("view", "watermark") is None
        assert not store.compare_and_set_cell("view", "watermark", b"something", b"1")
        assert store.compare_and_set_cell("view", "watermark", None, b"1")
        assert not store.compare_and_set_cell("view", "watermark", None, b"2")
        assert not store.compare_and_set_cell("view", "watermark", b"0", b"2")
        assert store.compare_and_set_cell("view", "watermark", b"1", b"2")
        assert store.read_cell("view", "watermark") == b"2"
        assert store.read_cell("view", "other") is None
        assert store.read_cell("other", "watermark") is None
        assert content(store) == {}

    def test_of_two_writers_of_a_cell_exactly_one_wins(self, store: OnlineStore) -> None:
        turns = threading.Barrier(2, timeout=60)
        wins: list[list[bytes]] = [[] for _ in range(50)]

        def contend(name: bytes) -> None:
            held = None
            for turn in range(50):
                turns.wait()  # so that both really contend
                if store.compare_and_set_cell("view", "cell", held, b"%d %b" % (turn, name)):
                    wins[turn].append(name)
                turns.wait()
                held = store.read_cell("view", "cell")

        _together([partial(contend, name) for name in (b"one", b"two")])

        assert [len(winners) for winners in wins] == [1] * 50
        assert store.read_cell("view", "cell") == b"49 " + wins[-1][0]

    def test_writers_at_the_same_time_end_where_the_rule_says(self, store: OnlineStore) -> None:
        batches = [
            [Row(b"%d" % key, key * 7 % (writer + 3), writer, AT + writer, b"%d" % writer) for key in range(500)]
            for writer in range(4)
        ]

        _together([partial(self.merge, store, *rows) for rows in batches])

        for key, best in enumerate(max(rows) for rows in zip(*batches, strict=True)):
            assert self.payload(store, b"%d" % key) == best.payload

    @pytest.mark.parametrize("seed", range(5))
    def test_random_histories_end_in_the_latest_row_of_every_entity(self, store: OnlineStore, seed: int) -> None:
        share = self.histories // 5
        for number in range(seed * share, (seed + 1) * share):
            play_history(store, number, f"view{number}")

    @pytest.mark.parametrize("seed", range(5))
    def test_random_calls_end_where_the_rule_says(self, store: OnlineStore, seed: int) -> None:
        share = self.histories // 5
        for number in range(seed * share, (seed + 1) * share):
            play_calls(store, number, f"view{number}")

    @pytest.mark.parametrize("seconds", [1, 100])
    def test_a_refused_row_changes_nothing_of_the_record_and_its_retention(
        self, store: OnlineStore, seconds: int
    ) -> None:
        now_us = 4_000_000_000_000_000  # in 2096, as below
        first, other = (Retention(ttl_us=1, keep_until_us=now_us + end * 1_000_000) for end in (10, seconds))
        store.replace("view", make_batch([Row(b"k", None, payload=b"")], floor=AT), at=AT, retention=first)
        store.replace("view", make_batch([Row(b"l", now_us)], floor=AT), at=AT, retention=first)
        before = content(store)

        refused = make_batch([Row(b"k", 9, version=AT), Row(b"l", 9, version=AT)])
        assert store.merge("view", refused, tie_wins=True, retention=other).tolist() == [STALE, STALE]
        again = make_batch([Row(b"k", None, payload=b""), Row(b"l", None, payload=b"")], floor=AT)
        assert store.replace("view", again, at=AT, retention=other).tolist() == [UNCHANGED, UNCHANGED]

        store.purge("view", now_us + 9_999_999)
        assert content(store) == before
        store.purge("view", now_us + 10_000_000)
        assert content(store) == ({} if self.purges else before)

    def test_purge_and_expiry_follow_the_retention(self, store: OnlineStore) -> None:
        now_us = 4_000_000_000_000_000  # in 2096: stores that look at their own clock keep everything
        retention = Retention(ttl_us=1_000_000, keep_until_us=now_us + 10_000_000)
        store.merge("view", make_batch([Row(b"plain", now_us)]), tie_wins=True, retention=retention)
        store.replace("view", make_batch([Row(b"floor", now_us)], floor=AT), at=AT, retention=retention)
        store.replace("view", make_batch([Row(b"gone", None, payload=b"")], floor=AT), at=AT, retention=retention)

        store.purge("view", now_us + 999_999)

        assert set(content(store)) == {b"plain", b"floor", b"gone"}
        store.purge("view", now_us + 9_999_999)
        assert {b"floor", b"gone"} <= set(content(store))

    def test_describe_reaches_the_store_and_closing_twice_is_harmless(self, store: OnlineStore) -> None:
        assert store.describe()["kind"]
        store.close()
        store.close()


def _together(calls: Sequence[Callable[[], Any]]) -> None:
    """Run *calls* at the same time and raise what the first failing one raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls), timeout=60)

    def guarded(call: Callable[[], Any]) -> None:
        try:
            start.wait()
            call()
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
