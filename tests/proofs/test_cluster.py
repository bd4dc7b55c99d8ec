"""Slots of a three-node cluster move while runs write, one key after the other and at once: every key is right afterwards.

Each slot goes round: one that comes back to its owner while a single scan goes on may hide a key from it (docs/redis.md).

ROUNDS sets how many runs, SEED which rows and slots. The oracle reads the data files of the Delta snapshot with pyarrow.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from redis.crc import key_slot

from materialize.online.redis import RedisClusterStore
from materialize.verify import verify
from tests import cluster as clusters
from tests.stepping import adds_up, incremental, run, served
from tests.tables import Table, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

    from tests.cluster import Cluster

pytestmark = [pytest.mark.e2e, pytest.mark.server]

ROUNDS = int(os.environ.get("ROUNDS", "8"))
SEED = int(os.environ.get("SEED", "20261126"))
USERS, ROWS = 4_000, 2_500
#: Slots that are on their way at once, key by key; neighbouring slots that move at once, atomically.
OPEN, NEIGHBOURS = 40, 300
#: Seconds for which a slot stays half moved.
HALF_MOVED = 0.05


@pytest.fixture(scope="module")
def moving_cluster() -> Iterator[Cluster]:
    """A cluster of its own: its slots end anywhere."""
    with clusters.running() as cluster:
        yield cluster


class Mover:
    """Moves slots in a thread of its own until the block ends; what goes wrong there is raised at its end."""

    def __init__(self, cluster: Cluster, step: Callable[[Cluster, random.Random], int], rng: random.Random) -> None:
        self.cluster, self.step, self.rng, self.moved = cluster, step, rng, 0
        self.ending, self.errors = threading.Event(), list[BaseException]()
        self.thread = threading.Thread(target=self._move)

    def _move(self) -> None:
        try:
            while not self.ending.is_set():
                self.moved += self.step(self.cluster, self.rng)
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            self.errors.append(error)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join()
        if self.errors:
            raise self.errors[0]


def move_key_by_key(cluster: Cluster, rng: random.Random) -> int:
    """Open slots of entities, move a part of their keys, wait, move the rest, close them. Returns: how many slots."""
    # To one server at a time, as valkey-cli does: two that take slots at once give themselves the same epoch and may disagree for ever.
    source = rng.choice(cluster.servers)
    target = cluster.after(source)
    slots = {int(key_slot(b"fs:spending:{user%d}" % user)) for user in rng.sample(range(USERS), 3 * OPEN)}
    mine = [slot for slot in sorted(slots) if cluster.owns(source, slot)]
    opened = [(slot, cluster.open_slot(slot, target), target) for slot in mine[:OPEN]]
    for slot, source, target in opened:
        if rng.random() < 0.6:
            cluster.move_keys(slot, source, target, most=rng.randrange(1, 3))
    time.sleep(HALF_MOVED)
    for slot, source, target in opened:
        while cluster.move_keys(slot, source, target):
            pass
        cluster.close_slot(slot, source, target)
    cluster.agree()
    return len(opened)


def move_at_once(cluster: Cluster, rng: random.Random) -> int:
    """Move neighbouring slots of one server. Returns: how many."""
    low = rng.randrange(clusters.SLOTS - NEIGHBOURS)
    source = cluster.owner_of(low)
    high = low
    while high < low + NEIGHBOURS and cluster.owns(source, high + 1):
        high += 1
    cluster.migrate(low, high, source, cluster.after(source))
    cluster.agree()
    return high - low + 1


def expected(table: Table) -> dict[str, dict[str, Any]]:
    """What every entity should have, from the data files of the snapshot. No two rows of an entity tie."""
    latest: dict[str, tuple[Any, dict[str, Any]]] = {}
    for file in table.delta.file_uris():
        for one in pq.read_table(file).to_pylist():
            user, order = one.pop("user_id"), (one.pop("event_timestamp"), one.pop("created"))
            if user not in latest or latest[user][0] < order:
                latest[user] = (order, one)
    return {user: features for user, (_, features) in latest.items()}


def change(table: Table, rng: random.Random, number: int) -> None:
    """An append with late rows, and now and then deletes and updates by deltalake."""
    rows = [
        row(
            f"user{user}",
            number * 10 + rng.random() - 25 * (rng.random() < 0.1),
            rng.random(),
            country="x" * rng.randrange(60),
        )
        for user in rng.sample(range(USERS), ROWS)
    ]
    table.append(*rows)
    some = ", ".join(f"'user{user}'" for user in rng.sample(range(USERS), 60))
    if number % 3 == 1:
        table.delta.delete(f"user_id IN ({some})")
    elif number % 3 == 2:
        table.delta.update(predicate=f"user_id IN ({some})", updates={"amount": "amount + 1.0"})


def asked(cluster: Cluster) -> int:
    """How many requests followed a slot on its way, as the servers counted them."""
    return sum(one.client.info("commandstats").get("cmdstat_asking", {}).get("calls", 0) for one in cluster.servers)


@pytest.mark.parametrize("move", [move_key_by_key, move_at_once])
def test_every_key_is_right_after_slots_moved_under_load(
    table: Table, moving_cluster: Cluster, move: Callable[[Cluster, random.Random], int]
) -> None:
    cluster, rng = moving_cluster, random.Random(SEED)
    cluster.flush()
    before, compared = asked(cluster), 0
    with RedisClusterStore(cluster.url) as store:
        change(table, rng, 0)
        incremental(table, store, "first")
        with Mover(cluster, move, random.Random(SEED)) as mover:
            for number in range(1, ROUNDS + 1):
                change(table, rng, number)

                report = incremental(table, store, f"run {number}")

                assert report.to_version == table.version
                assert adds_up(report), report
                wanted = expected(table)
                if number % 2:
                    assert served(table.view, store) == wanted, f"while slots move, after run {number}"
                else:
                    assert verify(table.view, store, run(f"verify {number}")).mismatched == 0
                compared += len(wanted)
        cluster.agree()

        assert served(table.view, store) == expected(table)
        keys = [f"user{user}".encode() for user in range(USERS)]
        assert [record is not None for record in store.read("spending", keys)].count(True) >= len(expected(table))
        again = incremental(table, store, "again")
        assert again.written == 0
    following = asked(cluster) - before
    print(
        f"seed {SEED}: {move.__name__} moved {mover.moved:,} slots, {following:,} requests followed ASK, {compared:,} keys compared"
    )
    assert mover.moved > 0
    assert following > 0 or move is move_at_once
