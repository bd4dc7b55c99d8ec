"""Loads yield to readers, and go on: the rule with latencies of our making, the probe and the brake against a real server."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.memory import MemoryStore
from materialize.online.pace import Brake, Probe
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.pacing import EVERY, LEAST_SHARE, MOST_BEHIND, Controller, Histogram, Pacer, merged
from materialize.pipeline import PieceReport, Run
from materialize.stop import Stopped, stop_on
from materialize.testing import FOREVER, Row, make_batch
from materialize.writer import Writer
from tests import servers
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.online.base import OnlineStore
    from tests.cluster import Cluster

TARGET = 0.005
FAST, SLOW = 0.0002, 0.02
#: Seconds after which a test gives up to wait.
HANGS = 20.0


class Load:
    """A controller whose reads come every `EVERY` seconds of a clock moved by hand."""

    def __init__(self, share: float = 1.0) -> None:
        self.controller, self.now = Controller(TARGET, share), 0.0
        self.controller.idle(FAST)

    def felt(self, seconds: float, latency: Callable[[int], float]) -> list[float]:
        """The shares while reads take what *latency* says of each by its number."""
        shares = []
        for number in range(round(seconds / EVERY)):
            self.now += EVERY
            shares.append(self.controller.read(latency(number), self.now))
        return shares


def one_in(every: int, slow: float = SLOW) -> Callable[[int], float]:
    return lambda number: slow if number % every == every - 1 else FAST


# The rule --------------------------------------------------------------------------------------------------------------


def test_a_load_that_nobody_feels_keeps_its_full_speed() -> None:
    assert set(Load().felt(60, lambda _: FAST)) == {1.0}


def test_one_slow_read_in_a_thousand_is_below_a_p99() -> None:
    assert set(Load().felt(60, one_in(1000, TARGET * 1.5))) == {1.0}


def test_slow_reads_slow_a_load_within_a_second_and_never_stop_it() -> None:
    shares = Load().felt(60, lambda _: SLOW)

    assert shares[round(1 / EVERY)] < 0.5
    assert min(shares) == shares[-1] == LEAST_SHARE > 0


def test_a_load_recovers_its_full_speed() -> None:
    load = Load()
    load.felt(10, lambda _: SLOW)

    shares = load.felt(20, lambda _: FAST)

    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_a_load_finds_the_share_at_which_reads_are_just_fast_enough() -> None:
    load, shares = Load(), list[float]()
    for _ in range(round(300 / EVERY)):  # above 40 % of the time every tenth read is slow
        shares += load.felt(EVERY, lambda _, share=load.controller.share: SLOW if share > 0.4 else FAST)

    settled = shares[len(shares) // 2 :]
    assert 0.25 < sum(settled) / len(settled) < 0.45
    assert max(settled) < 0.55


def test_a_read_that_waited_long_counts_as_all_that_would_have_come_meanwhile() -> None:
    assert Load().felt(1, lambda number: 0.5 if number == 100 else FAST)[-1] < 1.0


def test_a_way_that_is_long_by_itself_is_no_reason_to_hold_back() -> None:
    load = Load()
    load.controller.least = math.inf

    assert set(load.felt(30, lambda _: 0.04)) == {1.0}


def test_a_store_that_was_slow_before_the_load_is_not_what_the_load_is_blamed_for() -> None:
    blamed, other = Load(), Load()
    for number in range(2_000):
        other.controller.idle(one_in(40, TARGET * 1.5)(number))

    assert min(blamed.felt(30, one_in(40, TARGET * 1.5))) < 1.0
    assert set(other.felt(30, one_in(40, TARGET * 1.5))) == {1.0}


def test_two_loads_of_one_store_come_to_equal_shares() -> None:
    first, second = Load(), Load(LEAST_SHARE)
    sums = [0.0, 0.0]
    for number in range(round(600 / EVERY)):
        latency = SLOW if first.controller.share + second.controller.share > 0.9 else FAST
        for which, load in enumerate((first, second)):
            share = load.felt(EVERY, lambda _: latency)[0]  # noqa: B023 - called at once
            sums[which] += share * (number > 300 / EVERY)

    assert sums[0] / sums[1] == pytest.approx(1.0, abs=0.1)


def test_a_replica_that_falls_behind_slows_a_load() -> None:
    controller = Controller(TARGET)

    assert controller.behind(MOST_BEHIND, 1.0) == 1.0
    assert controller.behind(MOST_BEHIND + 1, 2.0) == 0.7
    assert min(controller.behind(2 * MOST_BEHIND, 3.0 + second) for second in range(50)) == LEAST_SHARE


# The brake -------------------------------------------------------------------------------------------------------------


def test_a_brake_that_is_off_costs_no_time_and_one_that_is_on_rests_its_share() -> None:
    brake = Brake()
    brake.rest(100.0)
    assert (brake.rested, brake.free, brake.began) == (0.0, True, True)

    brake.share = 0.5
    for _ in range(20):
        brake.rest(0.005)

    assert not brake.free
    assert 0.09 < brake.rested < 5.0


def test_a_rest_ends_at_once_when_it_is_released() -> None:
    brake = Brake()
    brake.share = 0.1
    resting = threading.Thread(target=brake.rest, args=(1_000.0,))
    resting.start()

    brake.release()
    resting.join(HANGS)

    assert not resting.is_alive()
    assert brake.free


def test_a_signal_ends_the_rest_of_all_writers_at_once() -> None:
    class Resting(MemoryStore):
        parallel_writes = 2

        def open_probe(self, view: str) -> Probe:  # noqa: ARG002 - as the store's
            return Scripted(FAST)

    store, begun = Resting(), []

    def write(batch: object) -> object:
        store.brake.share = LEAST_SHARE
        begun.append(batch)
        store.brake.rest(3.0)  # as long as a rest of 27 seconds makes it
        return [1]

    def run() -> None:
        with stop_on(signal.SIGTERM), Pacer(store, "view"), Writer(store, lambda _: None) as writer:
            for _ in range(2):
                writer.submit(make_batch([Row(b"a")]), write)  # type: ignore[arg-type]
            wait_until(lambda: len(begun) == 2)
            signal.raise_signal(signal.SIGTERM)

    started = time.monotonic()
    with pytest.raises(Stopped):
        run()

    assert time.monotonic() - started < HANGS


# Figures ---------------------------------------------------------------------------------------------------------------


def test_quantiles_are_right_within_a_bucket() -> None:
    histogram = Histogram()
    for number in range(1, 1_001):
        histogram.add(number / 1e6)

    assert histogram.quantile_ms(0.5) == pytest.approx(0.5, rel=0.05)
    assert histogram.quantile_ms(0.99) == pytest.approx(0.99, rel=0.05)
    assert histogram.summary()["reads"] == 1_000


def test_a_long_wait_counts_for_readers_who_would_have_come() -> None:
    histogram = Histogram()
    for _ in range(100):
        histogram.add(FAST)
    histogram.add(1.0)

    assert histogram.quantile_ms(0.99) > 900
    assert histogram.quantile_ms(0.5) > 200


def test_reports_of_pieces_are_one() -> None:
    first = {
        "before": {"reads": 10, "p50_ms": 1.0, "p99_ms": 9.0},
        "during": {"reads": 30, "p50_ms": 1.0, "p99_ms": 2.0},
    }
    second = {"during": {"reads": 10, "p50_ms": 5.0, "p99_ms": 7.0}}

    assert merged([first, {}, second]) == {
        "before": {"reads": 10, "p50_ms": 1.0, "p99_ms": 9.0},
        "during": {"reads": 40, "p50_ms": 2.0, "p99_ms": 7.0},
    }


# Against a probe of our making -----------------------------------------------------------------------------------------


class Scripted(Probe):
    """Every read takes so long, or fails so."""

    def __init__(self, answer: float | Exception) -> None:
        self.answer, self.closed, self.asked = answer, False, 0

    def read(self) -> float:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def behind(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("error", [OnlineStoreError("no right to"), UnavailableError("no answer")])
def test_a_probe_that_fails_never_fails_the_load(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Probed(MemoryStore):
        def open_probe(self, view: str) -> Probe:  # noqa: ARG002 - as the store's
            return probe

    probe, store = Scripted(error), Probed()

    with Pacer(store, "view") as pacer:
        wait_until(lambda: probe.asked > 0)

    assert (pacer.held_back, pacer.probe, probe.closed) == (0.0, {}, True)
    assert ("is not paced" in caplog.text) == (type(error) is OnlineStoreError)


def test_a_store_without_a_probe_is_written_as_before(table: Table) -> None:
    table.append(row("a", 1))
    store = MemoryStore()
    threads = threading.active_count()

    with Pacer(store, "spending"):
        assert threading.active_count() == threads
    report = pipeline.incremental(table.view, store, Run("default", "run", lambda: NOW))

    assert (report.written, report.held_back, report.probe) == (1, 0.0, {})


# Against a real server -------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_store(valkey: servers.Server) -> Iterator[RedisStore]:
    with RedisStore(valkey.url) as store:
        yield store


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANGS
    while not holds():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.002)


@pytest.fixture(params=["server", "cluster"])
def disturbed(request: pytest.FixtureRequest) -> Iterator[tuple[OnlineStore, servers.Server]]:
    """A store, and the server that has a heavy neighbour: the only one, or one of a cluster's."""
    if request.param == "server":
        server: servers.Server = request.getfixturevalue("valkey")
        with RedisStore(server.url) as store:
            yield store, server
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    with RedisClusterStore(cluster.url) as store:
        yield store, cluster.servers[1]


@pytest.mark.server
def test_a_slow_server_holds_writers_back_and_they_go_on_and_all_is_written(
    disturbed: tuple[OnlineStore, servers.Server],
) -> None:
    """Slow: a script that keeps the server busy for milliseconds, again and again, as a heavy neighbour does."""
    store, server = disturbed
    busy, over = "for i = 1, 2000000 do local x = i * i end", threading.Event()

    def disturb() -> None:
        while not over.is_set():
            server.client.eval(busy, 0)

    neighbour, shares, written = threading.Thread(target=disturb), list[float](), 0
    with Pacer(store, "view") as pacer:
        wait_until(lambda: pacer.phases["before"].reads >= 5)
        written += len(store.merge("view", make_batch([Row(b"0")]), tie_wins=False, retention=FOREVER))
        neighbour.start()
        try:
            deadline = time.monotonic() + HANGS
            while pacer.brake.rested == 0.0 or pacer.brake.share > 0.5:
                assert time.monotonic() < deadline, "never held back"
                batch = make_batch([Row(b"%d" % (written + number)) for number in range(300)])
                written += len(store.merge("view", batch, tie_wins=False, retention=FOREVER))
                shares.append(pacer.brake.share)
        finally:
            over.set()
            neighbour.join()
        wait_until(lambda: pacer.brake.share > min(shares))

    assert pacer.held_back > 0
    assert {"before", "during"} <= set(pacer.probe)
    assert sum(len(keys) for keys, _ in store.scan("view")) == written


@pytest.mark.server
def test_a_probe_sees_what_a_reader_waits_and_not_what_this_process_takes_to_notice(
    redis_store: RedisStore, valkey: servers.Server
) -> None:
    class Late:
        """A connection whose answers are noticed late, as in a process that is busy encoding."""

        def __init__(self, connection: Any) -> None:
            self.connection = connection

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

        def read_response(self, *, disable_decoding: bool) -> Any:
            answer = self.connection.read_response(disable_decoding=disable_decoding)
            time.sleep(0.02)
            return answer

    probe = redis_store.open_probe("view")
    quick = min(probe.read() for _ in range(50))
    connection, probe.connection = probe.connection, Late(probe.connection)
    noticed_late = sorted(probe.read() for _ in range(11))[5]
    probe.connection = connection
    valkey.client.client_pause(60, all=True)
    paused = probe.read()
    probe.close()

    assert quick < 0.005
    assert noticed_late < 0.01
    assert paused > 0.03


@pytest.mark.server
def test_a_probe_survives_the_loss_of_its_connection(redis_store: RedisStore, valkey: servers.Server) -> None:
    probe = redis_store.open_probe("view")
    probe.read()
    valkey.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    with pytest.raises(UnavailableError):
        probe.read()

    assert probe.read() < 1.0
    probe.close()


@pytest.mark.server
def test_closing_a_probe_ends_a_read_that_waits(redis_store: RedisStore, valkey: servers.Server) -> None:
    probe, ended = redis_store.open_probe("view"), []
    probe.read()
    valkey.client.client_pause(2_000, all=True)

    def read() -> None:
        try:
            probe.read()
        except UnavailableError as error:
            ended.append(error)

    waiting = threading.Thread(target=read)
    started = time.monotonic()
    waiting.start()
    time.sleep(0.05)
    probe.close()
    waiting.join(HANGS)
    took = time.monotonic() - started
    valkey.client.client_unpause()

    assert len(ended) == 1
    assert took < 1.5


@pytest.mark.server
def test_a_replica_that_stands_still_is_seen(valkey: servers.Server) -> None:
    with (
        servers.running("valkey", "--replicaof", f"127.0.0.1 {valkey.port}") as replica,
        RedisStore(valkey.url) as store,
    ):
        probe = store.open_probe("view")
        wait_until(lambda: replica.client.info("replication")["master_link_status"] == "up")
        wait_until(lambda: probe.behind() == 0 and len(probe.offsets) == 3)
        replica.process.send_signal(signal.SIGSTOP)
        try:
            valkey.client.set("large", b"x" * 100_000)
            behind = [probe.behind() for _ in range(3)][-1]
        finally:
            replica.process.send_signal(signal.SIGCONT)
        wait_until(lambda: probe.behind() == 0)
        probe.close()

    assert behind >= 100_000


@pytest.mark.server
def test_a_run_reports_what_its_readers_felt(table: Table, redis_store: RedisStore) -> None:
    table.append(*(row(f"u{number}", number) for number in range(2_000)))

    report = pipeline.incremental(table.view, redis_store, Run("default", "run", lambda: NOW))

    assert report.written == 2_000
    assert report.probe["before"]["reads"] > 0
    assert {"reads", "p50_ms", "p99_ms"} == set(report.probe["before"])
    assert json.loads(json.dumps(report.to_dict()))["held_back"] == report.held_back
    assert (
        PieceReport.from_dict(json.loads(json.dumps(PieceReport(probe=report.probe).to_dict()))).probe == report.probe
    )


@pytest.mark.server
def test_at_max_speed_nothing_is_measured(table: Table, redis_store: RedisStore) -> None:
    table.append(row("a", 1))
    redis_store.read_p99 = None

    report = pipeline.incremental(table.view, redis_store, Run("default", "run", lambda: NOW))

    assert (report.written, report.held_back, report.probe) == (1, 0.0, {})
