"""Writers are held to their share of a table's capacity, whatever they ask for; a clock moved by hand."""

from __future__ import annotations

import heapq
import random
import threading
import time as os_time
from typing import TYPE_CHECKING, Any

import pytest
from botocore.stub import Stubber

from materialize.online.dynamodb import DynamoDbStore
from materialize.online.dynamodb.pace import Pace
from materialize.online.dynamodb.tables import write_capacity
from tests.dynamodb_stub import Time

if TYPE_CHECKING:
    from collections.abc import Callable

FULL = 100.0
#: Real seconds after which threads that wait for each other are given up.
HANGS = 10.0
#: What sums of many floats may be off by.
NEARLY = 1e-6


class Slept(Time):
    """A clock that sleeping moves, and by how much each time."""

    def __init__(self) -> None:
        super().__init__()
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.sleeps.append(seconds)


@pytest.fixture
def time() -> Slept:
    return Slept()


@pytest.fixture
def pace(time: Slept) -> Pace:
    """FULL units a second; throttles pause for nothing, so that only the test moves the clock."""
    return Pace(FULL, time.clock, time.sleep, lambda: 0.0)


def rate_after(pace: Pace, time: Slept, seconds: float) -> float:
    """The rate when nothing happened for *seconds*."""
    time.sleep(seconds)
    pace.take(0.0)
    return pace.rate


# --- holding back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_rate_is_held_over_an_hour_and_used(seed: int) -> None:
    rng, time, total = random.Random(seed), Time(), 0.0
    full = rng.choice([1.0, 7.5, 100.0, 40_000.0])
    pace = Pace(full, time.clock, time.sleep)
    largest = rng.choice([0.1, 1.0, 5.0]) * full

    while time.clock() < 3_600:
        units = rng.uniform(0.0, largest)
        pace.take(units)
        total += units
        assert total <= full * (time.clock() + 1.0) * (1 + NEARLY)

    assert total >= full * time.clock()


@pytest.mark.parametrize("seed", range(20))
def test_rate_is_held_in_every_window_when_writers_rest_in_between(seed: int) -> None:
    rng, time, taken = random.Random(seed), Time(), list[tuple[float, float]]()
    pace = Pace(FULL, time.clock, time.sleep)

    for _ in range(300):
        if rng.random() < 0.1:
            time.sleep(rng.uniform(0.0, 30.0))
        units = rng.uniform(0.0, 0.5 * FULL)
        pace.take(units)
        taken.append((time.clock(), units))

    for first, (since, _) in enumerate(taken):
        within = 0.0
        for at, units in taken[first:]:
            within += units
            assert within <= FULL * (at - since + 1.0 + NEARLY) + 0.5 * FULL


@pytest.mark.parametrize("rest", [0.0, 0.5, 1.0, 3_600.0])
def test_a_burst_is_at_most_one_second(pace: Pace, time: Slept, rest: float) -> None:
    pace.take(FULL)
    time.seconds += rest

    burst = 0
    while not time.sleeps:
        pace.take(1.0)
        burst += 1

    assert burst - 1 == min(rest, 1.0) * FULL


def test_a_new_pace_has_a_second_saved_up(pace: Pace, time: Slept) -> None:
    pace.take(FULL)
    assert time.sleeps == []

    pace.take(FULL / 2)
    assert time.sleeps == [0.5]


def test_asking_for_more_than_a_second_waits_for_all_of_it_and_others_wait_longer(pace: Pace, time: Slept) -> None:
    pace.take(10 * FULL)
    assert time.sleeps == [9.0]

    pace.take(1.0)
    assert time.sleeps == [9.0, pytest.approx(0.01)]


def test_taking_nothing_waits_for_nothing(pace: Pace, time: Slept) -> None:
    pace.take(0.0)

    assert time.sleeps == []


# --- throttles -------------------------------------------------------------------------------------------------------------


def test_a_throttle_halves_the_rate_once_a_second(pace: Pace, time: Slept) -> None:
    rates = []
    for _ in range(9):
        pace.throttled()
        rates.append(pace.rate)
        time.seconds += 0.25

    assert rates == [50.0] * 4 + [25.0] * 4 + [12.5]


def test_a_throttle_takes_away_what_was_saved_up(pace: Pace, time: Slept) -> None:
    time.seconds += 60
    pace.throttled()
    time.sleeps.clear()

    pace.take(1.0)

    assert time.sleeps == [1.0 / 50.0]


def test_after_a_throttle_a_burst_is_a_second_of_the_lower_rate(pace: Pace, time: Slept) -> None:
    pace.throttled()
    time.seconds += 30.0
    time.sleeps.clear()

    pace.take(50.0)
    assert time.sleeps == []

    pace.take(1.0)
    assert time.sleeps == [1.0 / FULL]  # the rate is the full one again


def test_rate_is_never_below_a_hundredth_and_never_above_the_full_one() -> None:
    for seed in range(50):
        rng, time = random.Random(seed), Time()
        pace = Pace(FULL, time.clock, time.sleep, rng.random)
        happens: list[Callable[[], None]] = [pace.throttled, pace.succeeded, lambda pace=pace: pace.take(5.0)]
        for _ in range(300):
            rng.choices(happens, weights=[seed % 10 + 1, 3, 3])[0]()
            time.seconds += rng.choice([0.0, 0.1, 2.0])
            assert FULL / 100 <= pace.rate <= FULL


def test_throttles_without_end_leave_a_hundredth(pace: Pace, time: Slept) -> None:
    for _ in range(20):
        pace.throttled()
        time.seconds += 1.0

    assert pace.rate == FULL / 100


def test_rate_recovers_by_a_twentieth_of_the_full_one_a_second(pace: Pace, time: Slept) -> None:
    pace.throttled()

    assert rate_after(pace, time, 1.0) == 50.0
    assert [rate_after(pace, time, 1.0) for _ in range(12)] == [
        pytest.approx(min(50.0 + 5.0 * seconds, 100.0)) for seconds in range(1, 13)
    ]


def test_recovery_is_the_same_in_small_steps_and_in_one(pace: Pace, time: Slept) -> None:
    other = Pace(FULL, time.clock, time.sleep, lambda: 0.0)
    for one in (pace, other):
        one.throttled()
        rate_after(one, time, 0.0)
    time.seconds += 1.0
    pace.take(0.0)
    other.take(0.0)

    for _ in range(40):
        rate_after(pace, time, 0.1)
    other.take(0.0)

    assert pace.rate == pytest.approx(other.rate)
    assert pace.rate == pytest.approx(70.0)


def test_recovery_from_the_slowest_takes_twenty_seconds(pace: Pace, time: Slept) -> None:
    for _ in range(20):
        pace.throttled()
        time.seconds += 1.0
    pace.take(0.0)

    seconds = 0
    while pace.rate < FULL:
        rate_after(pace, time, 1.0)
        seconds += 1

    assert seconds == 20


# --- pauses ----------------------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_five_seconds(time: Slept) -> None:
    pace = Pace(FULL, time.clock, time.sleep, lambda: 1.0)

    for _ in range(10):
        pace.throttled()

    assert time.sleeps == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_pauses_have_full_jitter(time: Slept) -> None:
    jitters = [0.0, 0.5, 0.999, 0.25]
    pace = Pace(FULL, time.clock, time.sleep, iter(jitters).__next__)

    for _ in jitters:
        pace.throttled()

    assert time.sleeps == pytest.approx([0.0, 0.05, 0.1998, 0.1])


def test_a_success_resets_the_pause(time: Slept) -> None:
    pace = Pace(FULL, time.clock, time.sleep, lambda: 1.0)

    for _ in range(4):
        pace.throttled()
    pace.succeeded()
    pace.throttled()

    assert time.sleeps == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.05])


def test_pause_stays_at_five_seconds_however_many_throttles_are_in_a_row(time: Slept) -> None:
    pace = Pace(FULL, time.clock, time.sleep, lambda: 1.0)

    for _ in range(2_000):
        pace.throttled()

    assert max(time.sleeps) == 5.0


def test_what_is_held_back_adds_up_over_waits_and_pauses(time: Slept) -> None:
    pace = Pace(FULL, time.clock, time.sleep, random.Random(1).random)

    for turn in range(50):
        pace.take(FULL)
        if turn % 5 == 0:
            pace.throttled()

    assert pace.throttles == 10
    assert pace.held_back == pytest.approx(sum(time.sleeps))
    assert pace.held_back > 49.0


# --- several threads -------------------------------------------------------------------------------------------------------


class SharedTime:
    """A clock for several threads, that moves on to the next one that is due when all of them are asleep: no real time passes."""

    def __init__(self, threads: int) -> None:
        self.awake, self.seconds = threads, 0.0
        self.due: list[float] = []
        self.turn = threading.Condition()

    def clock(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        with self.turn:
            at = self.seconds + seconds
            heapq.heappush(self.due, at)
            self.awake -= 1
            self._move()
            assert self.turn.wait_for(lambda: self.seconds >= at, HANGS), "no thread moves the clock"

    def ended(self) -> None:
        """One thread less."""
        with self.turn:
            self.awake -= 1
            self._move()

    def _move(self) -> None:
        """When nobody is awake, wake those that are due first."""
        if self.awake or not self.due:
            return
        self.seconds = max(self.seconds, self.due[0])
        while self.due and self.due[0] <= self.seconds:
            heapq.heappop(self.due)
            self.awake += 1
        self.turn.notify_all()


@pytest.mark.parametrize("throttling", [False, True])
def test_threads_together_do_not_exceed_the_rate(*, throttling: bool) -> None:
    time = SharedTime(8)
    pace = Pace(FULL, time.clock, time.sleep, random.Random(1).random)
    taken: list[tuple[float, float]] = []

    def write(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.clock() < 120.0:
                units = rng.uniform(0.0, 30.0)
                pace.take(units)
                taken.append((time.clock(), units))
                if throttling and rng.random() < 0.02:
                    pace.throttled()
                else:
                    pace.succeeded()
        finally:
            time.ended()

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    total = 0.0
    for at, units in sorted(taken):
        total += units
        assert total <= FULL * (at + 1.0) * (1 + NEARLY)
    assert total >= FULL * 120.0 * (0.1 if throttling else 1.0)


class OneAtATime:
    """A clock that stands still, and counts how often several threads look at it at the same time."""

    def __init__(self) -> None:
        self.free, self.overlaps = threading.Lock(), 0

    def __call__(self) -> float:
        if self.free.acquire(blocking=False):
            os_time.sleep(0)  # lets the other threads run
            self.free.release()
        else:
            self.overlaps += 1
        return 0.0


def in_eight_threads(work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=lambda: [work() for _ in range(100)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_what_several_threads_take_at_once_is_counted_whole() -> None:
    clock, waits = OneAtATime(), list[float]()
    pace = Pace(FULL, clock, waits.append)

    in_eight_threads(lambda: pace.take(1.0))

    assert clock.overlaps == 0
    assert sorted(waits) == pytest.approx([number / FULL for number in range(1, 701)])
    assert pace.held_back == pytest.approx(sum(waits))


def test_throttles_of_several_threads_are_counted_whole_and_halve_the_rate_once() -> None:
    clock, pauses = OneAtATime(), list[float]()
    pace = Pace(FULL, clock, pauses.append, lambda: 1.0)

    in_eight_threads(pace.throttled)

    assert clock.overlaps == 0
    assert (pace.throttles, pace.rate) == (800, FULL / 2)
    assert pace.held_back == pytest.approx(sum(pauses))


# --- what it is a share of -------------------------------------------------------------------------------------------------

ON_DEMAND = {"ProvisionedThroughput": {"ReadCapacityUnits": 0, "WriteCapacityUnits": 0}}


@pytest.mark.parametrize(
    ("table", "units"),
    [
        ({"ProvisionedThroughput": {"ReadCapacityUnits": 9, "WriteCapacityUnits": 7}}, 7.0),
        (ON_DEMAND, 4_000.0),
        ({}, 4_000.0),
        (ON_DEMAND | {"WarmThroughput": {"WriteUnitsPerSecond": 12_000}}, 12_000.0),
        (ON_DEMAND | {"OnDemandThroughput": {"MaxWriteRequestUnits": 500}}, 500.0),
        (ON_DEMAND | {"OnDemandThroughput": {"MaxWriteRequestUnits": -1}}, 4_000.0),
        (
            ON_DEMAND
            | {
                "WarmThroughput": {"WriteUnitsPerSecond": 12_000},
                "OnDemandThroughput": {"MaxWriteRequestUnits": 50_000},
            },
            12_000.0,
        ),
    ],
)
def test_capacity_is_what_the_table_takes_now(table: dict[str, Any], units: float) -> None:
    with DynamoDbStore("dynamodb://key:pw@eu-west-1/fs?share=0.25") as store, Stubber(store.client.api) as stubbed:
        for _ in range(2):
            stubbed.add_response(
                "describe_table", {"Table": {"TableName": "fs.view"} | table}, {"TableName": "fs.view"}
            )

        assert write_capacity(store.client.api, "fs.view") == units
        assert store.pace("fs.view").full == units / 4


def test_write_units_of_the_url_go_before_a_share_and_nothing_is_asked() -> None:
    with DynamoDbStore("dynamodb://key:pw@eu-west-1/fs?write_units=3000") as store, Stubber(store.client.api):
        assert store.pace("fs.view").full == 3_000.0


def test_all_writers_of_a_table_have_one_pace() -> None:
    with DynamoDbStore("dynamodb://key:pw@eu-west-1/fs?write_units=3000") as store:
        assert store.pace("fs.view") is store.pace("fs.view")
        assert store.pace("fs.view") is not store.pace("fs.other")
