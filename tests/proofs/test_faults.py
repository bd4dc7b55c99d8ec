"""Runs through a proxy that cuts, delays and swallows at random bytes, repeated until they succeed: exact, and counts right."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from materialize import pipeline
from materialize.errors import OnlineStoreError, UnavailableError
from materialize.model import Retention
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisStore
from materialize.order import UNCHANGED, WRITTEN
from materialize.retry import with_retry
from materialize.testing import Row, make_batch
from tests.fault_proxy import KINDS, Fault, FaultProxy
from tests.proofs.oracle import Lake, unpacked, wrong_keys
from tests.proofs.story import Story
from tests.stepping import adds_up, incremental, position, records, run
from tests.tables import row

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.model import FeatureView, RunReport
    from materialize.online.base import OnlineStore
    from tests import servers
    from tests.tables import Table

pytestmark = [pytest.mark.e2e, pytest.mark.server]

#: Histories of a first load and an incremental run through a bad network; more with MATERIALIZE_FAULT_SEEDS=10000.
SEEDS = int(os.environ.get("MATERIALIZE_FAULT_SEEDS", "200"))
SEED = int(os.environ.get("MATERIALIZE_SEED", "1"))
#: Tables, each with many seeds; histories at once, most of which wait for something.
STORIES, AT_ONCE = 8, 8
#: Seconds until a client of the proxy gives up waiting.
TIMEOUT = 0.4
#: Runs that may fail before one must have succeeded: every fault happens once, and a run has four attempts for each call.
RUNS = 12
#: Connections of a run that never had to connect again.
CONNECTIONS = 3
FOREVER = Retention(ttl_us=None, keep_until_us=2**53 - 1)


@dataclass(frozen=True, slots=True)
class Chapter:
    """A table at an earlier and at its newest version, as views and as the oracle sees it, and what must be sent for each."""

    views: tuple[FeatureView, FeatureView]
    lakes: tuple[Lake, Lake]
    entities: tuple[int, int]


def chapter(folder: Path, seed: int) -> Chapter:
    story = Story(folder / "new", seed, entities=250, padding=60)
    story.grow(3)
    shutil.copytree(folder / "new", folder / "old")
    story.append(0.5)
    story.update()
    story.delete()
    story.delete_entities()
    story.grow(2)
    lakes = Lake(folder / "old"), Lake(folder / "new")
    new = story.table.view
    return Chapter((replace(new, source=str(folder / "old")), new), lakes, (len(lakes[0].latest[-1]), touched(*lakes)))


def touched(old: Lake, new: Lake) -> int:
    """The entities with a row that got or lost one in any commit between the two, and still have one."""
    some = {
        key
        for version in range(old.head + 1, new.head + 1)
        for key in {*new.live[version], *new.live[version - 1]}
        if new.live[version].get(key) != new.live[version - 1].get(key)
    }
    return len(some & new.latest[-1].keys())


def harmful(rng: random.Random, sent: int) -> list[Fault]:
    """One to four faults within the *sent* bytes of a run, and the fewer bytes of its replies."""
    return [
        Fault(way, rng.randint(0, sent if way == "up" else 1_500), rng.choice(KINDS))  # type: ignore[arg-type]
        for way in rng.choices(["up", "down"], k=rng.randint(1, 4))
    ]


def until_done(view: FeatureView, store: OnlineStore, proxy: FaultProxy) -> tuple[RunReport, dict[bytes, bytes], bool]:
    """Run again and again. Returns: the report of the run that succeeded, what the store held before it, whether it was calm."""
    told = []
    for number in range(RUNS):
        before = records(view, store)
        links, faults = len(proxy.links), len(proxy.fired)
        try:
            with RedisStore(f"redis://127.0.0.1:{proxy.port}/0?prefix={store.prefix}&timeout={TIMEOUT}") as through:  # type: ignore[attr-defined]
                report = pipeline.incremental(view, through, run(f"run-{number}"))
        except UnavailableError as error:
            told.append(str(error))
            continue
        return report, before, len(proxy.links) - links <= CONNECTIONS and len(proxy.fired) == faults
    raise AssertionError(f"no run of {RUNS} succeeded: {told}")


def play(chapter: Chapter, server: servers.Server, seed: int) -> Counter[str]:
    """A first load and an incremental run; beside them the same in memory, without harm. Returns: the faults that happened."""
    rng, fired = random.Random(seed), Counter[str]()
    with MemoryStore() as calm, RedisStore(f"{server.url}?prefix=f{seed}") as store:
        for view, lake, entities in zip(chapter.views, chapter.lakes, chapter.entities, strict=True):
            expected = pipeline.incremental(view, calm, run("calm"))
            with FaultProxy(server.port, harmful(rng, expected.bytes + 20 * expected.entities)) as proxy:
                report, before, quiet = until_done(view, store, proxy)
                fired.update(f"{fault.kind} {fault.way}" for fault in proxy.fired)
            after = records(view, store)

            assert not wrong_keys(lake, {key: unpacked(record) for key, record in after.items()})
            assert after == records(view, calm), "other bytes than a calm run"
            assert adds_up(report), report
            assert report.entities == expected.entities == entities
            assert report.rows_read == expected.rows_read
            assert report.deleted <= expected.deleted
            assert (report.stale, report.expired) == (expected.stale, expected.expired)
            assert report.written + report.unchanged == expected.written + expected.unchanged
            changed = sum(before.get(key) != record for key, record in after.items())
            assert report.written + report.deleted <= changed <= report.entities + len(after), report
            if quiet:
                assert report.written == sum(
                    before.get(key) != record and unpacked(record) is not None for key, record in after.items()
                )
    server.client.delete(*server.client.keys(f"f{seed}:*"))
    return fired


def test_runs_through_a_bad_network_are_exact_and_count_right(tmp_path: Path, valkey: servers.Server) -> None:
    chapters = [chapter(tmp_path / str(number), SEED + number) for number in range(STORIES)]

    def one(seed: int) -> Counter[str]:
        try:
            return play(chapters[seed % STORIES], valkey, seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error

    with ThreadPoolExecutor(AT_ONCE) as pool:
        fired = sum(pool.map(one, range(SEED, SEED + SEEDS)), Counter[str]())

    print(f"\n{SEEDS} histories from seed {SEED}, {fired.total()} faults: {dict(sorted(fired.items()))}")
    assert fired.total() > SEEDS * 2
    assert SEEDS < 100 or len(fired) == 2 * len(KINDS), fired


@pytest.mark.parametrize("reply", range(4))
def test_a_reply_that_comes_too_late_never_answers_a_later_request(valkey: servers.Server, reply: int) -> None:
    """The client gave up waiting; the reply arrives when the next request is sent, as it would on the same connection."""
    rows = [
        Row(b"%d" % number, event_us=5) for number in range(100)
    ]  # one request, so that nothing else frees the reply
    newer = [Row(b"%d" % number, event_us=6 if number % 3 else 4) for number in range(150)]
    with FaultProxy(valkey.port) as proxy, RedisStore(f"redis://127.0.0.1:{proxy.port}/0?timeout={TIMEOUT}") as store:
        store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)
        proxy.faults.append(Fault("down", proxy.passed["down"] + (0, 1, 43, 60)[reply], "late"))

        with pytest.raises(UnavailableError):
            store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)

        assert proxy.fired
        outcomes = store.merge("view", make_batch(newer), tie_wins=True, retention=FOREVER).tolist()
        assert outcomes == [int(number % 3 > 0 or number >= 100) for number in range(150)]
        assert [record is not None for record in store.read("view", [b"0", b"absent", b"149"])] == [True, False, True]
        assert store.read_cell("view", "watermark") is None


def test_replies_behind_an_error_never_answer_a_later_request(valkey: servers.Server) -> None:
    """The first of two requests is refused, so the client leaves; the second one's reply arrives when it asks again."""
    rows = [Row(b"%d" % number, event_us=5) for number in range(150)]
    line = "-NOPERM User default has no permissions to run the 'evalsha' command\r\n"

    with FaultProxy(valkey.port) as proxy, RedisStore(f"redis://127.0.0.1:{proxy.port}/0?timeout={TIMEOUT}") as store:
        # With absent keys no script is called.
        store.merge("view", make_batch(rows[:1]), tie_wins=True, retention=FOREVER)
        rows = [row._replace(event_us=6) for row in rows]

        def refuse() -> None:
            valkey.client.execute_command("ACL", "SETUSER", "default", "-evalsha")
            proxy.faults.append(Fault("down", proxy.passed["down"] + len(line), "late"))

        proxy.faults.append(Fault("up", 0, "call", seen=b"EVALSHA", call=refuse))
        try:
            with pytest.raises(OnlineStoreError, match="no permissions to run the 'evalsha'"):
                store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER)
        finally:
            valkey.client.execute_command("ACL", "SETUSER", "default", "+@all")

        assert [fault.kind for fault in proxy.fired] == ["call", "late"]
        assert store.merge("view", make_batch(rows), tie_wins=True, retention=FOREVER).tolist() == [WRITTEN] * 150


# --- what is counted when a write took effect and its reply was lost ---


@pytest.mark.parametrize("cut", [0, 50, 150, 249])
def test_rows_of_a_lost_reply_are_unchanged_when_they_are_sent_again(valkey: servers.Server, cut: int) -> None:
    """The connection ends within the request that brings row *cut*: the requests before it took effect, a hundred rows each."""
    batch = make_batch([Row(b"%d" % number, payload=b"payload <%d>" % number) for number in range(250)])
    with FaultProxy(valkey.port, [Fault("up", 0, "cut", seen=b"payload <%d>" % cut)]) as proxy:
        with RedisStore(f"redis://127.0.0.1:{proxy.port}/0?timeout={TIMEOUT}") as store:
            outcomes = with_retry(partial(store.merge, "view", batch, tie_wins=True, retention=FOREVER)).tolist()

        assert len(proxy.fired) == 1
    done = cut // 100 * 100
    assert outcomes == [UNCHANGED] * done + [WRITTEN] * (250 - done)


@dataclass(frozen=True, slots=True)
class Lost:
    """Which reply never arrives, and what the report then counts (written, unchanged, deleted)."""

    fault: Fault
    counts: tuple[int, int, int]


#: A window of 23 users with newer rows, 8 with other values, 5 that are deleted. A reply has one digit for each row of a request, 1 for written.
LOST = {
    "nothing": Lost(Fault("down", 0, "delay"), (31, 0, 5)),
    "merge": Lost(Fault("down", 0, "cut", seen=b"$23\r\n" + b"1" * 23), (8, 23, 5)),
    "replace": Lost(Fault("down", 0, "cut", seen=b"$8\r\n" + b"1" * 8), (23, 8, 5)),
    "tombstones": Lost(Fault("down", 0, "cut", seen=b"$5\r\n" + b"1" * 5), (31, 0, 0)),
    "watermark": Lost(Fault("up", 0, "call", seen=b'{"counts":{"'), (31, 0, 5)),
}


@pytest.mark.parametrize("reply", LOST)
def test_rows_of_a_lost_reply_count_as_unchanged_and_removals_not_at_all(
    table: Table, valkey: servers.Server, reply: str
) -> None:
    """The store is as after a calm run, and so is the sum of what was written and what was there already."""
    table.append(*(row(f"u{number:02}", 1, float(number)) for number in range(40)))
    lost = LOST[reply]
    with FaultProxy(valkey.port) as proxy, RedisStore(valkey.url) as store, MemoryStore() as calm:
        for one in (store, calm):
            incremental(table, one, "before")
        table.append(*(row(f"u{number:02}", 2, 1.5) for number in range(23)))
        table.delta.update(predicate="user_id >= 'u23' AND user_id < 'u31'", updates={"amount": "2.5"})
        table.delta.delete("user_id >= 'u35'")
        expected = incremental(table, calm)
        proxy.faults.append(replace(lost.fault, call=lambda: proxy.faults.append(cut_here(proxy))))

        with RedisStore(f"redis://127.0.0.1:{proxy.port}/0?timeout={TIMEOUT}") as through:
            report = incremental(table, through)

        assert "cut" in [fault.kind for fault in proxy.fired] or reply == "nothing"
        assert not proxy.faults
        assert records(table.view, store) == records(table.view, calm)
        assert position(table, store) == position(table, calm)
    assert (report.written, report.unchanged, report.deleted) == lost.counts
    assert (expected.written, expected.unchanged, expected.deleted) == LOST["nothing"].counts
    assert report.entities == expected.entities == 31
    assert report.rows_read == expected.rows_read


def cut_here(proxy: FaultProxy) -> Fault:
    return Fault("down", proxy.passed["down"], "cut")
