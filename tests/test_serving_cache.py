"""What a reader remembers: never older than the ttl, never half right, one fetch at a time, and nothing that nobody asked to remember."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from materialize import codec, metrics, watermark
from materialize.config import load
from materialize.errors import ConfigError, OnlineStoreError, UnavailableError
from materialize.metrics.regular import Regularly
from materialize.model import FeatureView, to_us
from materialize.online.memory import MemoryStore
from materialize.online.reading import AsyncReader
from materialize.online.redis import RedisStore
from materialize.order import stamp
from materialize.serving import AsyncOnlineFeatures, CacheSettings, Lookup, OnlineFeatures
from materialize.serving.cache import RecordCache
from materialize.serving.caching import counted
from materialize.serving.core import Core
from materialize.testing import FOREVER
from tests import servers
from tests.projects import PAST, Project
from tests.stepping import PATIENT
from tests.tables import row
from tests.test_serving import NOW, bury, put, view
from tests.valve import Valve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from materialize.online.base import OnlineStore

SECOND = timedelta(seconds=1)
TTL = CacheSettings(ttl=10 * SECOND)
#: Seconds that a test waits for what takes milliseconds.
LONG = 20.0


class Clock:
    """Seconds since `NOW`, moved by hand: for the cache's monotonic clock and for the reader's, which tells the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def us(self) -> int:
        return to_us(NOW) + int(self.now * 1e6)

    def event(self, ago: float = 0.0) -> datetime:
        return NOW + timedelta(seconds=self.now - ago)


class Counting(MemoryStore):
    """A store in memory that counts reads, holds them while it is shut, and fails as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[dict[str, Sequence[bytes]]] = []
        self.open = threading.Event()
        self.open.set()
        self.errors: list[BaseException] = []

    def read_views(self, keys: Any) -> Any:
        self.asked.append({name: list(some) for name, some in keys.items()})
        found = super().read_views(keys)
        assert self.open.wait(LONG)
        if self.errors:
            raise self.errors.pop(0)
        return found


class CountingReader(AsyncReader):
    """The same for asyncio."""

    def __init__(self, store: Counting) -> None:
        self.store, self.location, self.open = store, store.location, asyncio.Event()
        self.open.set()

    async def read_views(self, keys: Any) -> Any:
        found = self.store.read_views(keys)
        await self.open.wait()
        return found

    async def read_cell(self, view: str, name: str) -> bytes | None:
        return self.store.read_cell(view, name)

    async def close(self) -> None:
        self.store.close()


def cached(
    store: OnlineStore, clock: Clock, *views: FeatureView, settings: CacheSettings = TTL, deadline: float = LONG
) -> OnlineFeatures:
    cache = RecordCache(views, settings, deadline=deadline, clock=clock)
    return OnlineFeatures(Core(views, "default", store.location, clock_us=clock.us), store, cache)


def awaiting(
    reader: AsyncReader, clock: Clock, *views: FeatureView, settings: CacheSettings = TTL, deadline: float = LONG
) -> AsyncOnlineFeatures:
    cache = RecordCache(views, settings, deadline=deadline, clock=clock)
    return AsyncOnlineFeatures(Core(views, "default", reader.location, clock_us=clock.us), reader, cache)


def in_threads(count: int, call: Callable[[], Any]) -> tuple[list[threading.Thread], list[Any]]:
    """Threads that have begun, and what each gave or failed with, when it has."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001 - is looked at
            results.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


def joined(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


async def reached(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0)


def counts(features: OnlineFeatures | AsyncOnlineFeatures, name: str = "v") -> tuple[int, int, int]:
    assert features.cache is not None
    found = features.cache.stats()[name]
    return found.hits, found.misses, found.waits


# --- how old --------------------------------------------------------------------------------------------------------------


def test_a_record_is_served_for_its_ttl_and_not_longer() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1, at=1)
    features = cached(store, clock, mine)
    assert features.read_features("v", 1)["a"] == 1
    put(store, mine, b"1", NOW, 2, at=2)

    clock.now = 9.999
    assert [features.read_features("v", 1)["a"], features.batch_read("v", [1])[0]["a"]] == [1, 1]
    clock.now = 10
    assert features.read_features("v", 1)["a"] == 2

    assert (len(store.asked), counts(features)) == (2, (2, 2, 0))


def test_age_counts_from_when_the_store_was_asked_not_from_when_it_answered() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1, at=1)
    features = cached(store, clock, mine)
    store.open.clear()
    threads, _ = in_threads(1, lambda: features.read_features("v", 1))
    until(lambda: store.asked)
    put(store, mine, b"1", NOW, 2, at=2)
    clock.now = 8
    store.open.set()
    joined(threads)

    clock.now = 10

    assert features.read_features("v", 1)["a"] == 2


@pytest.mark.parametrize("missing", [2, None, 60])
def test_what_is_not_there_is_remembered_too_for_a_time_of_its_own(missing: int | None) -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    bury(store, mine, b"2")
    settings = CacheSettings(ttl=10 * SECOND, missing_ttl=missing and missing * SECOND)
    features = cached(store, clock, mine, settings=settings)
    for _ in range(3):
        assert [vector.status for vector in features.batch_read("v", [1, 2])] == ["missing", "missing"]
        assert [features.read_features("v", key).status for key in (1, 2)] == ["missing", "missing"]
    assert len(store.asked) == 1

    put(store, mine, b"1", NOW, 1)
    clock.now = 1.9 if missing == 2 else 9.9
    assert features.read_features("v", 1).status == "missing"
    clock.now = 2 if missing == 2 else 10
    assert features.read_features("v", 1)["a"] == 1


def test_a_view_says_for_how_long_and_a_realtime_one_is_never_cached(tmp_path: Path) -> None:
    clock = Clock()
    store = Counting()
    slow = FeatureView(**{**fields_of(view(name="slow", a="int64")), "cache_ttl": 60 * SECOND})
    live = FeatureView(**{**fields_of(view(name="live", a="int64")), "realtime": True})
    usual = view(name="usual", a="int64")
    for mine in (slow, live, usual):
        put(store, mine, b"1", NOW, 1, at=1)
    features = cached(store, clock, slow, live, usual)
    lookups = [Lookup(name, [1, 1]) for name in ("slow", "live", "usual")]
    features.lookup(lookups)
    for mine in (slow, live, usual):
        put(store, mine, b"1", NOW, 2, at=2)

    clock.now = 5
    assert [batch[1]["a"] for batch in features.lookup(lookups)] == [1, 2, 1]
    assert features.read_features("live", 1)["a"] == 2
    clock.now = 20
    assert [batch[0]["a"] for batch in features.lookup(lookups)] == [1, 2, 2]

    assert [set(asked) for asked in store.asked] == [{"slow", "live", "usual"}, {"live"}, {"live"}, {"live", "usual"}]
    assert features.cache is not None
    assert set(features.cache.stats()) == {"slow", "usual"}
    only_named = RecordCache([slow, live, usual], CacheSettings(), deadline=1)
    assert set(only_named.stats()) == {"slow"}


def fields_of(mine: FeatureView) -> dict[str, Any]:
    return {name: getattr(mine, name) for name in FeatureView.__dataclass_fields__}


def test_whether_a_vector_is_expired_is_decided_by_each_read() -> None:
    store, clock, mine = Counting(), Clock(), view(ttl=8 * SECOND, a="int64")
    put(store, mine, b"1", clock.event(ago=3), 1)
    features = cached(store, clock, mine)

    assert features.read_features("v", 1).age == 3 * SECOND
    clock.now = 2
    young, old = (features.read_features("v", 1, max_age=age * SECOND) for age in (5, 4))
    clock.now = 5
    late = features.read_features("v", 1)
    batch = features.batch_read("v", [1])

    assert (young.status, young["a"], young.age) == ("present", 1, 5 * SECOND)
    assert (old.status, old.features, old.age, old.table_version) == ("expired", {"a": None}, 5 * SECOND, 1)
    assert (late.status, late.features, late.statuses, late.age) == (
        "expired",
        {"a": None},
        {"a": "expired"},
        8 * SECOND,
    )
    assert batch[0] == late
    assert len(store.asked) == 1


def test_random_histories_read_through_the_cache_are_what_a_model_says() -> None:  # noqa: C901 - five kinds of steps
    """One thread, the clock moved by hand: the model remembers (value, until) for each key and nothing else."""
    for seed in range(25):
        rng = random.Random(seed)
        store, clock = Counting(), Clock()
        mine = view(ttl=rng.choice([None, 25 * SECOND]), a="int64", b="int64", c="int64")
        features = cached(store, clock, mine, settings=CacheSettings(ttl=10 * SECOND, missing_ttl=4 * SECOND))
        truth: dict[int, tuple[float, int] | None] = {}
        model: dict[int, tuple[tuple[float, int] | None, float]] = {}
        for step in range(1, 120):
            key, action = rng.randrange(4), rng.random()
            if action < 0.25:
                put(store, mine, b"%d" % key, clock.event(), step, -step, None, at=step)
                truth[key] = (clock.now, step)
            elif action < 0.3:
                at = stamp(1, step)
                store.replace("v", codec.tombstones([b"%d" % key], at), at=at, retention=FOREVER)
                truth[key] = None
            elif action < 0.6:
                clock.now += rng.choice([0.5, 1, 3, 7])
            else:
                names = rng.choice([None, ["a"], ["c", "a"], ["b", "c", "a"]])
                max_age = rng.choice([None, None, 6])
                keys = rng.sample(range(4), rng.randint(1, 4))
                for one in keys:
                    value, end = model.get(one, (None, -1.0))
                    if end <= clock.now:
                        value = truth.get(one)
                        model[one] = (value, clock.now + (4 if value is None else 10))
                age = None if max_age is None else max_age * SECOND
                if len(keys) == 1:
                    found = [features.read_features("v", keys[0], names, max_age=age)]
                else:
                    found = list(features.batch_read("v", keys, names, max_age=age))
                for one, vector in zip(keys, found, strict=True):
                    assert (vector.status, vector.features) == expected(
                        model[one][0], clock.now, mine, max_age, names
                    ), (seed, step)
                for vector in found:
                    vector.features.clear()  # a caller may do with it what it wants


def expected(
    value: tuple[float, int] | None, now: float, mine: FeatureView, max_age: float | None, names: Sequence[str] | None
) -> tuple[str, dict[str, int | None]]:
    names = list(mine.features) if names is None else names
    if value is None:
        return "missing", dict.fromkeys(names)
    event, step = value
    if (mine.ttl and now - event >= mine.ttl.total_seconds()) or (max_age is not None and now - event > max_age):
        return "expired", dict.fromkeys(names)
    return "present", {name: {"a": step, "b": -step, "c": None}[name] for name in names}


def test_threads_read_only_what_was_true_within_the_ttl_while_runs_write() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    features = cached(store, clock, mine)
    #: Of each key the values it had: (since, until, value); the last one is still true.
    spans: dict[int, list[list[float]]] = {key: [[-1e9, 1e9, 0]] for key in range(3)}
    stop, wrong, reads = threading.Event(), list[Any](), [0, 0, 0]

    def check(key: int, value: int, before: float) -> None:
        after = clock.now
        true = [span for span in spans[key] if span[2] == value and span[0] <= after and span[1] > before - 10]
        if not true:
            wrong.append((key, value, before, after, spans[key][-4:]))

    def reading(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            before, keys = clock.now, [rng.randrange(3) for _ in range(rng.randint(1, 3))]
            for key, vector in zip(keys, features.batch_read("v", keys), strict=True):
                check(key, vector["a"] or 0, before)
            before = clock.now
            check(keys[0], features.read_features("v", keys[0])["a"] or 0, before)
            reads[number] += 1

    threads = [threading.Thread(target=reading, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(7)
    for step in range(1, 120):
        key = rng.randrange(3)
        spans[key].append([clock.now, 1e9, step])
        put(store, mine, b"%d" % key, NOW + timedelta(microseconds=step), step, at=step)
        spans[key][-2][1] = clock.now
        clock.now += rng.choice([0, 0.5, 2, 9])
        time.sleep(0.001)
    stop.set()
    joined(threads)

    assert wrong == []
    hits, misses, _ = counts(features)
    assert min(reads) > 20
    assert min(hits, misses) > 30


# --- what is given away ---------------------------------------------------------------------------------------------------


def test_what_a_caller_changes_stays_with_the_caller() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64", e="list<int64,2>")
    put(store, mine, b"1", NOW, 1, [3, 4])
    features = cached(store, clock, mine)
    for _ in range(3):
        for found in (features.read_features("v", 1), features.batch_read("v", [1])[0], features.read_features("v", 2)):
            assert found.features in ({"a": 1, "e": [3, 4]}, {"a": None, "e": None})
            if found["e"]:
                found["e"].append(5)
            found.features["a"] = 9

    assert features.read_features("v", 1).features == {"a": 1, "e": [3, 4]}
    assert features.read_features("v", 2).features == {"a": None, "e": None}
    assert len(store.asked) == 2


def test_one_record_gives_each_selection_its_features() -> None:
    names = [f"f{number}" for number in range(8)]
    store, clock, mine = Counting(), Clock(), view(**dict.fromkeys(names, "int64"))
    put(store, mine, b"1", NOW, *range(8))
    features = cached(store, clock, mine)
    selections = [names, names[::-1], names[2:4], [], ["f7"], ["f7", "f0"], None, names[1:]]

    for _ in range(3):
        for wanted in selections:
            found = features.read_features("v", 1, wanted).features
            assert list(found.items()) == [(name, int(name[1:])) for name in (names if wanted is None else wanted)]

    assert len(store.asked) == 1
    assert features.cache is not None
    (entry,) = features.cache.entries.values()
    assert len(entry.vectors) <= 4
    assert features.cache.nbytes == entry.nbytes


def test_a_batch_asks_for_what_is_missing_only_once_in_one_round_trip() -> None:
    store, clock, users, shops = Counting(), Clock(), view(name="users", a="float64"), view(name="shops", a="float64")
    for key in range(6):
        put(store, users, b"%d" % key, NOW, float(key))
    features = cached(store, clock, users, shops)
    features.batch_read("users", [1, 3])

    batch, other = features.lookup([Lookup("users", [0, 1, 2, 1, 3, 0]), Lookup("shops", [5, 5])])

    assert store.asked == [{"users": [b"1", b"3"]}, {"users": [b"0", b"2"], "shops": [b"5"]}]
    np.testing.assert_array_equal(batch.to_numpy().values[:, 0], [0, 1, 2, 1, 3, 0])
    assert [vector.status for vector in other] == ["missing", "missing"]
    assert features.lookup([Lookup("users", [0, 1])])[0].to_dicts() == [{"a": 0.0}, {"a": 1.0}]
    assert len(store.asked) == 2


def test_a_remembered_record_of_an_unknown_schema_is_read_when_the_schema_appears() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    cell = store.read_cell("v", watermark.SCHEMAS)
    features = cached(store, clock, mine)
    assert store.compare_and_set_cell("v", watermark.SCHEMAS, cell, b"{}")
    for _ in range(2):
        with pytest.raises(OnlineStoreError, match="found the schema id"):
            features.read_features("v", 1)

    assert store.compare_and_set_cell("v", watermark.SCHEMAS, b"{}", cell or b"")

    assert features.read_features("v", 1)["a"] == 1
    assert len(store.asked) == 1


@pytest.mark.parametrize("content", [b"", b"\x09" + bytes(40), b"x"], ids=["nothing", "format", "short"])
def test_something_else_under_the_key_is_not_remembered(valkey: servers.Server, content: bytes) -> None:
    mine = view(a="int64")
    with RedisStore(valkey.url) as store:
        put(store, mine, b"1", NOW, 1)
        record = valkey.client.get("fs:v:{1}")
        features = cached(store, Clock(), mine)
        valkey.client.set("fs:v:{1}", content)
        with pytest.raises(OnlineStoreError, match="could not decode a stored value"):
            features.read_features("v", 1)

        valkey.client.set("fs:v:{1}", record)

        assert features.read_features("v", 1)["a"] == 1


# --- how many -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int64", "list<int64,2>"])
def test_the_least_recently_read_makes_room(kind: str) -> None:
    store, clock, mine = Counting(), Clock(), view(a=kind)
    features = cached(store, clock, mine, settings=CacheSettings(entries=3, ttl=10 * SECOND))
    for key in (1, 1, 2, 3):
        features.read_features("v", key)
    features.read_features("v", 1)
    features.batch_read("v", [2])

    features.read_features("v", 4)

    store.asked.clear()
    features.batch_read("v", [1, 2, 4])
    assert store.asked == []
    features.batch_read("v", [3])
    assert len(store.asked) == 1
    assert features.cache is not None
    assert (features.cache.stats()["v"].evicted, features.cache.stats()["v"].entries) == (2, 3)


def test_memory_stays_below_its_limit_whatever_is_read() -> None:
    rng, clock = random.Random(3), Clock()
    store, mine, other = Counting(), view(a="string", b="int64"), view(name="w", a="string")
    for key in range(200):
        put(store, mine, b"%d" % key, NOW, "x" * rng.randrange(3_000), key)
    features = cached(store, clock, mine, other, settings=CacheSettings(ttl=10 * SECOND, max_bytes=50_000))
    assert features.cache is not None
    for _ in range(600):
        key = rng.randrange(200)
        if rng.random() < 0.5:
            features.read_features(rng.choice("vw"), key, rng.choice([None, ["a"]]))
        else:
            features.batch_read("v", [key, rng.randrange(200), rng.randrange(200)])
        clock.now += rng.choice([0, 0.1])
        cache = features.cache
        assert cache.nbytes == sum(entry.nbytes for entry in cache.entries.values()) <= 50_000
        assert {name: found.entries for name, found in cache.stats().items()} == {
            name: sum(place[0] == name for place in cache.entries) for name in "vw"
        }
    assert features.cache.stats()["v"].evicted > 50


# --- one fetch at a time --------------------------------------------------------------------------------------------------


def test_fifty_threads_that_want_the_same_entity_ask_the_store_once(valkey: servers.Server) -> None:
    mine = view(a="int64")
    with Valve(valkey.port) as valve, RedisStore(f"redis://127.0.0.1:{valve.port}/0?timeout=20") as store:
        for key in (b"1", b"2"):
            put(store, mine, key, NOW, 1)
        features = cached(store, Clock(), mine)
        features.read_features("v", 2)  # the schema is known
        valkey.client.config_resetstat()
        valve.answering.clear()
        threads, results = in_threads(50, lambda: features.read_features("v", 1)["a"])
        until(lambda: counts(features) == (0, 2, 49))

        valve.answering.set()
        joined(threads)

    assert results == [1] * 50
    assert valkey.client.info("commandstats")["cmdstat_get"]["calls"] == 1
    assert "cmdstat_mget" not in valkey.client.info("commandstats")


def test_reads_that_overlap_in_part_wait_for_that_part_and_never_for_each_other() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    for key in range(9):
        put(store, mine, b"%d" % key, NOW, key)
    features = cached(store, clock, mine)
    store.open.clear()
    first, one = in_threads(1, lambda: features.batch_read("v", [1, 2, 3]).to_dicts())
    until(lambda: len(store.asked) == 1)
    second, two = in_threads(1, lambda: features.batch_read("v", [3, 4, 5, 1]).to_dicts())
    until(lambda: len(store.asked) == 2)
    third, three = in_threads(1, lambda: features.batch_read("v", [5, 2, 8]).to_dicts())
    until(lambda: len(store.asked) == 3)

    store.open.set()
    joined(first + second + third)

    assert [asked["v"] for asked in store.asked] == [[b"1", b"2", b"3"], [b"4", b"5"], [b"8"]]
    assert [one[0], two[0], three[0]] == [[{"a": key} for key in keys] for keys in ([1, 2, 3], [3, 4, 5, 1], [5, 2, 8])]


def test_who_waits_for_a_fetch_gets_its_error_and_nothing_of_it_is_remembered() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    features = cached(store, clock, mine)
    store.open.clear()
    store.errors.append(UnavailableError("no answer"))
    threads, results = in_threads(5, lambda: features.read_features("v", 1))
    until(lambda: counts(features) == (0, 1, 4))

    store.open.set()
    joined(threads)

    assert [(type(error), str(error)) for error in results] == [(UnavailableError, "no answer")] * 5
    assert len({id(error) for error in results}) == 5  # each thread raises its own
    assert features.cache is not None
    assert (len(features.cache.entries), features.cache.flights) == (0, {})
    assert features.read_features("v", 1)["a"] == 1


def test_defaults_stand_for_every_waiter_and_are_not_remembered() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    core = Core([mine], "default", store.location, clock_us=clock.us, defaults={"v": {"a": 7}})
    features = OnlineFeatures(core, store, RecordCache([mine], TTL, deadline=LONG, clock=clock))
    store.errors.append(UnavailableError("no answer"))

    found = [features.read_features("v", 1) for _ in range(3)]

    assert [(vector.status, vector["a"]) for vector in found] == [("default", 7), ("present", 1), ("present", 1)]


def test_while_the_store_is_down_what_is_older_than_its_ttl_is_not_served() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    features = cached(store, clock, mine)
    features.read_features("v", 1)
    store.errors += [UnavailableError("no answer")]

    clock.now = 9
    assert features.read_features("v", 1)["a"] == 1
    clock.now = 10
    with pytest.raises(UnavailableError):
        features.read_features("v", 1)


def test_who_waits_for_a_fetch_that_dies_fetches_for_itself() -> None:
    class Death(BaseException):
        pass

    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    features = cached(store, clock, mine)
    store.open.clear()
    store.errors.append(Death())

    def dying() -> Any:
        with pytest.raises(Death):
            features.read_features("v", 1)

    first, _ = in_threads(1, dying)
    until(lambda: store.asked)
    threads, results = in_threads(4, lambda: features.read_features("v", 1)["a"])
    until(lambda: counts(features)[2] == 4)

    store.open.set()
    joined(first + threads)

    assert results == [1] * 4
    assert len(store.asked) == 2


def test_nobody_waits_longer_than_the_deadline_and_a_fetch_that_never_ends_is_begun_anew() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    features = cached(store, clock, mine, deadline=0.1)
    store.open.clear()
    first, _ = in_threads(1, lambda: features.read_features("v", 1))
    until(lambda: store.asked)
    began = time.monotonic()
    late, results = in_threads(3, lambda: features.read_features("v", 1))

    joined(late)

    assert time.monotonic() - began < 5
    assert {type(error) for error in results} == {UnavailableError}
    assert "another read of the same entities was not answered in 0.1 s" in str(results[0])
    time.sleep(0.1)
    again, results = in_threads(1, lambda: features.read_features("v", 1)["a"])
    until(lambda: len(store.asked) == 2)
    store.open.set()
    joined(first + again)
    assert results == [1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of forks beside threads
def test_a_child_of_a_fork_begins_with_nothing() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    features = cached(store, clock, mine)
    features.read_features("v", 1)
    assert features.cache is not None
    with features.cache.lock:  # as another thread may hold it
        child = os.fork()
        if child == 0:
            signal.alarm(int(LONG))
            found = features.read_features("v", 1)["a"]
            os._exit(0 if (found, len(store.asked), len(features.cache.entries)) == (1, 2, 1) else 1)

    assert os.waitpid(child, 0)[1] == 0


# --- asyncio --------------------------------------------------------------------------------------------------------------


def test_tasks_share_a_fetch_and_what_it_brought() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)

    async def scenario() -> None:
        reader = CountingReader(store)
        features = awaiting(reader, clock, mine)
        reader.open.clear()
        tasks = [asyncio.create_task(features.read_features("v", 1)) for _ in range(50)]
        await reached(lambda: counts(features) == (0, 1, 49))
        reader.open.set()
        assert {vector["a"] for vector in await asyncio.gather(*tasks)} == {1}
        assert (await features.read_features("v", 1))["a"] == 1
        assert (await features.batch_read("v", [1, 2])).to_dicts() == [{"a": 1}, {"a": None}]
        await features.close()

    asyncio.run(scenario())
    assert store.asked == [{"v": [b"1"]}, {"v": [b"2"]}]


def test_a_task_that_is_cancelled_leaves_its_fetch_to_those_who_wait() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)

    async def scenario() -> None:
        reader = CountingReader(store)
        features = awaiting(reader, clock, mine)
        reader.open.clear()
        tasks = [asyncio.create_task(features.read_features("v", 1)) for _ in range(6)]
        await reached(lambda: counts(features) == (0, 1, 5))
        tasks[0].cancel()  # who fetches
        tasks[1].cancel()  # who waits
        await reached(lambda: len(store.asked) == 2)
        reader.open.set()
        first, second, *others = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError)
        assert isinstance(second, asyncio.CancelledError)
        assert {vector["a"] for vector in others} == {1}  # type: ignore[union-attr]

    asyncio.run(scenario())
    assert len(store.asked) == 2


def test_tasks_that_wait_get_the_error_and_wait_no_longer_than_the_deadline() -> None:
    store, clock, mine = Counting(), Clock(), view(a="int64")
    put(store, mine, b"1", NOW, 1)

    async def scenario() -> None:
        reader = CountingReader(store)
        features = awaiting(reader, clock, mine, deadline=0.1)
        store.errors.append(UnavailableError("no answer"))
        told = await asyncio.gather(*(features.read_features("v", 1) for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in told[:1]] == ["no answer"]
        reader.open.clear()
        tasks = [asyncio.create_task(features.read_features("v", 3)) for _ in range(3)]
        done, fetching = await asyncio.wait(tasks, timeout=LONG, return_when=asyncio.FIRST_COMPLETED)
        assert {type(task.exception()) for task in done} == {UnavailableError}
        assert tasks[0] in fetching
        reader.open.set()
        assert (await tasks[0]).status == "missing"
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())


# --- from a config folder -------------------------------------------------------------------------------------------------


def test_nothing_is_cached_unless_somebody_says_so(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.configure(extra="cache_ttl: 1h\n")
    project.table.append(row("a", PAST, 1.5))
    project.run("incremental")

    with OnlineFeatures.connect(project.config, terms=PATIENT) as features:
        assert features.cache is None
    with OnlineFeatures.connect(project.config, cache=CacheSettings(), terms=PATIENT) as features:
        for _ in range(2):
            assert features.read_features("spending", "a", ["amount"]).features == {"amount": 1.5}
        assert counts(features, "spending") == (1, 1, 0)

    async def awaited() -> None:
        async with AsyncOnlineFeatures.connect(project.config, cache=CacheSettings(), terms=PATIENT) as features:
            for _ in range(2):
                assert (await features.read_features("spending", "a", ["amount"])).features == {"amount": 1.5}
            assert counts(features, "spending") == (1, 1, 0)

    asyncio.run(awaited())


def test_a_realtime_view_has_no_ttl_of_a_cache(tmp_path: Path) -> None:
    project = Project(tmp_path, "memory://")
    project.configure(extra="realtime: true\n")
    assert load(project.config).feature_views["spending"].realtime
    project.configure(extra="realtime: true\ncache_ttl: 30s\n")

    with pytest.raises(ConfigError, match="cache_ttl: expected none, because the view is realtime, found '30s'"):
        load(project.config)


@pytest.mark.parametrize(
    "wrong", [{"entries": 0}, {"max_bytes": 0}, {"ttl": timedelta(0)}, {"missing_ttl": -SECOND}], ids=str
)
def test_settings_that_remember_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"found {next(iter(wrong))}="):
        CacheSettings(**wrong)


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_counts_reach_metrics_at_an_interval_and_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    store, clock, mine, other = Counting(), Clock(), view(a="int64"), view(name="w", a="int64")
    features = cached(store, clock, mine, other, settings=CacheSettings(entries=2, ttl=10 * SECOND))
    cache = features.cache
    assert cache is not None
    cache.helpers.append(Regularly(lambda: counted(cache, "default"), seconds=0.05))
    cache.helpers[0].begin()
    features.batch_read("v", [1, 2, 3])
    metrics.write_to(tmp_path / "metrics")
    try:
        until(lambda: samples(tmp_path / "metrics", "materialize_cache_reads_total"))
        for _ in range(5):
            features.read_features("v", 3)
        cache.changed("v", [b"3"])
        cache.close()
        cache.close()
    finally:
        metrics.write_to(None)

    assert samples(tmp_path / "metrics", "materialize_cache_reads_total") == {"hit": 5, "miss": 3}
    assert samples(tmp_path / "metrics", "materialize_cache_evictions_total") == {"full": 1, "changed": 1}
    assert samples(tmp_path / "metrics", "materialize_cache_entries") == {"": 1}
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["materialize.v.default.prom"]
    until(lambda: all(thread.name != "materialize-metrics" for thread in threading.enumerate()))


def samples(folder: Path, name: str) -> dict[str, float]:
    return {
        sample.labels.get("result", sample.labels.get("reason", "")): sample.value
        for path in folder.glob("*.prom")
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
        if sample.name == name
    }


def test_a_reader_with_a_cache_loads_no_library_of_metrics_unless_asked(tmp_path: Path) -> None:
    project = Project(tmp_path, "memory://")
    code = (
        "import sys; from datetime import timedelta; from materialize.serving import CacheSettings, OnlineFeatures\n"
        "features = OnlineFeatures.connect(sys.argv[1], cache=CacheSettings(ttl=timedelta(seconds=1)))\n"
        "features.read_features('spending', 'a'); features.close()\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'prometheus_client'))])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MATERIALIZE_"))}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(project.config)], env=environment, capture_output=True, text=True, check=True
    )

    assert ended.stdout.strip() == "[]"
