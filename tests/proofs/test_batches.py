"""The batches of real runs in any order, twice, and cut: every store holds the same bytes afterwards as in order and once."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from materialize import pipeline
from materialize.online.dynamodb import DynamoDbStore
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisStore
from materialize.online.sqlite import SqliteStore
from materialize.testing import content
from tests.proofs.oracle import Lake, unpacked, wrong_keys
from tests.proofs.stepped import BATCHES
from tests.proofs.story import Story
from tests.stepping import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from materialize.model import FeatureView
    from materialize.online.base import EncodedBatch, OnlineStore

#: Deliveries played in each store; DynamoDB Local takes up to a second for one. More with MATERIALIZE_DELIVERIES=10 times as many.
TIMES = int(os.environ.get("MATERIALIZE_DELIVERIES", "1"))
DELIVERIES = {"memory": 2_500, "sqlite": 1_500, "valkey": 1_000, "dynamodb": 20}
SEED = int(os.environ.get("MATERIALIZE_SEED", "1"))
#: Tables, each with its runs; users in them.
STORIES, ENTITIES = 8, 8
#: Which of the five runs of a tale is a rebuild.
REBUILD = 3
#: What becomes of a batch, in parts of its rows: each row is delivered once at least.
FATES: dict[str, Callable[[random.Random, list[int]], list[list[int]]]] = {
    "whole": lambda _rng, rows: [rows],
    "twice": lambda _rng, rows: [rows, rows],
    "cut, then whole": lambda rng, rows: [rows[: rng.randint(0, len(rows))], rows],
    "some rows, then whole": lambda rng, rows: [rng.sample(rows, rng.randint(0, len(rows))), rows],
    "in two parts": lambda rng, rows: [rows[: (at := rng.randint(0, len(rows)))], rows[at:]],
    "row by row": lambda _rng, rows: [[row] for row in rows],
}


@dataclass(frozen=True, slots=True)
class Call:
    """One write that a run made."""

    method: str
    batch: EncodedBatch
    options: dict[str, Any]

    def parts(self, rng: random.Random) -> list[list[int]]:
        return FATES[rng.choice(list(FATES))](rng, list(range(len(self.batch.keys))))

    def deliver(self, store: OnlineStore, view: str, rows: list[int]) -> None:
        getattr(store, self.method)(view, self.batch.take(np.array(rows, dtype=np.int64)), **self.options)


class Recorded:
    """*store*, with a list of what is written."""

    def __init__(self, store: OnlineStore) -> None:
        self.store, self.calls = store, list[Call]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.store, name)
        if name not in BATCHES:
            return found

        def write(view: str, batch: EncodedBatch, **options: Any) -> Any:
            self.calls.append(Call(name, batch, options))
            return found(view, batch, **options)

        return write


@dataclass(frozen=True, slots=True)
class Tale:
    """The writes of some runs over a table, and what a store holds after them.

    ``runs``: those of each run that finished. ``unfinished``: beside each, those of a run from the same watermark to an older head.
    """

    runs: list[list[Call]]
    unfinished: list[list[Call]]
    end: dict[bytes, bytes]

    def deliver(self, store: OnlineStore, view: str, rng: random.Random) -> None:
        """No run begins before the one before it has delivered all, for its watermark is written last. Else anything goes: batches in
        any order, cut and repeated, and among them what is left of the run that did not finish, and of all earlier ones.
        """
        earlier: list[Call] = []
        for calls, unfinished in zip(self.runs, self.unfinished, strict=True):
            earlier += unfinished
            left = rng.sample(earlier, rng.randint(0, len(earlier)))
            parts = [(call, rows) for call in (*calls, *left) for rows in call.parts(rng)]
            rng.shuffle(parts)
            for call, rows in parts:
                call.deliver(store, view, rows)
            earlier += calls


def tale(folder: Path, seed: int) -> Tale:
    """A first run, then incremental ones over late rows, ties, updates and deletes, and a rebuild before the last one."""
    story, rng = Story(folder, seed, entities=ENTITIES), random.Random(seed)
    view, runs, unfinished = story.table.view, list[list[Call]](), list[list[Call]]()
    with MemoryStore() as store, MemoryStore() as beside:
        for number in range(5):
            story.grow(rng.randint(1, 2))
            unfinished.append([])
            if number:
                for name in ("records", "cells", "due"):
                    getattr(beside.content, name).clear()
                    getattr(beside.content, name).update(getattr(store.content, name))
                unfinished[-1] = recorded(pipeline.incremental, view, beside, f"unfinished-{number}")
                story.grow(rng.randint(1, 2))
            mode = pipeline.rebuild if number == REBUILD else pipeline.incremental
            runs.append(recorded(mode, view, store, f"run-{number}"))
        end = content(store, view.name)
    assert not wrong_keys(Lake(folder), {key: unpacked(record) for key, record in end.items()})
    return Tale(runs, unfinished, end)


def recorded(mode: Callable[..., Any], view: FeatureView, store: OnlineStore, name: str) -> list[Call]:
    found: Any = Recorded(store)
    mode(view, found, run(name))
    return [call for call in found.calls if len(call.batch.keys)]


@pytest.fixture(scope="module")
def tales(tmp_path_factory: pytest.TempPathFactory) -> list[Tale]:
    folder = tmp_path_factory.mktemp("tales")
    return [tale(folder / str(number), SEED + number) for number in range(STORIES)]


@pytest.fixture
def named_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineStore]:
    if request.param == "memory":
        store: OnlineStore = MemoryStore()
    elif request.param == "sqlite":
        store = SqliteStore(f"sqlite:///{tmp_path}/online.db")
    elif request.param == "valkey":
        store = RedisStore(request.getfixturevalue("valkey").url)
    else:
        local = request.getfixturevalue("dynamodb_local")
        local.drop_tables()
        store = DynamoDbStore(
            f"dynamodb://key:secret@eu-central-1/fs?endpoint_url={local.endpoint}&write_units=1000000"
        )
    with store:
        yield store


@pytest.mark.parametrize(
    ("named_store", "name"),
    [
        ("memory", "memory"),
        ("sqlite", "sqlite"),
        pytest.param("valkey", "valkey", marks=pytest.mark.server),
        pytest.param("dynamodb", "dynamodb", marks=[pytest.mark.server, pytest.mark.xdist_group("dynamodb")]),
    ],
    indirect=["named_store"],
)
def test_batches_in_any_order_twice_and_cut_leave_the_same_bytes(
    named_store: OnlineStore, tales: list[Tale], name: str
) -> None:
    for number in range(SEED, SEED + TIMES * DELIVERIES[name]):
        one, view = tales[number % STORIES], f"view{number}"
        named_store.setup(view)

        one.deliver(named_store, view, random.Random(number))

        found = content(named_store, view)
        assert found == one.end, f"seed {number}: {different(found, one.end)}"


def different(found: dict[bytes, bytes], end: dict[bytes, bytes]) -> dict[bytes, Any]:
    return {key: (found.get(key), end.get(key)) for key in {*found, *end} if found.get(key) != end.get(key)}
