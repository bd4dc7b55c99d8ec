"""A piece that is read in seven shares ends like one that is read at once: the same records, the same counts, the same rows in quarantine."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.errors import RebuildNeeded
from materialize.latest import ENGINE
from materialize.model import Interval, OnlineStoreConfig
from materialize.offline import held_rows
from materialize.online import open_store
from tests.properties.commits import Commits
from tests.properties.lake import Lake
from tests.properties.rows import MAX_VALUE_BYTES, NOW, T0, Rows
from tests.properties.runs import Runs
from tests.properties.storage import Folder

if TYPE_CHECKING:
    from materialize.model import FeatureView, Mode, RunReport
    from materialize.online.base import OnlineStore

SHARES = 7
#: Histories in all, and how they are dealt out.
SEEDS, PARTS = 24, 4
#: Fields of a report that are the same however a piece is read.
TOLD = ("quarantine_reasons", "event_us", "from_version", "to_version")


def run(view: FeatureView, store: OnlineStore, mode: Mode, interval: Interval | None, pieces: int, shares: int) -> Any:
    """One run into *store*. Returns: how many shares its pieces had, what it counted."""
    plan = pipeline.make_plan(
        view, store, mode=mode, store_name=store.location, run_id="run", interval=interval, force=True
    )
    plan = replace(plan, pieces=max(pieces, plan.pieces), engine=ENGINE)
    if shares > 1:
        plan = replace(plan, rows_held=max(1, -(-plan.rows // (plan.pieces * shares))))
    plan = pipeline.begin(view, store, plan, now=NOW)
    done = [pipeline.write_piece(view, store, plan, piece, now=NOW) for piece in range(plan.pieces)]
    report: RunReport = pipeline.commit(view, store, plan, done, now=NOW)
    return plan.shares, report.counts | {name: getattr(report, name) for name in TOLD}


def state(view: FeatureView, store: OnlineStore) -> Any:
    """What *store* holds, and what is kept of the rows that it could not take."""
    records = {key: record for keys, found in store.scan("v") for key, record in zip(keys, found, strict=True)}
    kept = held_rows(view, store.location).select("reason", "id", "entity", "row").rows()
    return records, sorted(kept, key=str)


@pytest.mark.parametrize("part", range(PARTS))
def test_seven_shares_end_like_one(part: int) -> None:
    shares = [share for seed in range(part, SEEDS, PARTS) for share in played(seed)]

    assert SHARES in shares


def played(seed: int) -> list[int]:
    """Play a history on two stores, one of them in shares. Returns: how many shares the pieces had."""
    rng, seen = random.Random(seed), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(Folder(f"{folder}/t"), partitioned=rng.random() < 0.4)
        commits = Commits(lake, rng, Rows(rng), grows=rng.random() < 0.25)
        commits.create()
        stores = [open_store(OnlineStoreConfig("s", f"sqlite:///{folder}/{name}.db")) for name in "ab"]
        for store in stores:
            store.setup("v")
            store.max_value_bytes = MAX_VALUE_BYTES
        first = Runs(lake, stores[0], rng).view
        for _ in range(5):
            for _ in range(rng.randint(1, 3)):
                commits.any()
            mode: Mode = rng.choice(["incremental", "incremental", "incremental", "backfill", "rebuild"])
            interval = Interval(T0, NOW) if mode == "backfill" else None
            features = {name: kind for name, kind in first.features.items() if name in lake.now.columns}
            view, pieces, found = replace(first, features=features), rng.randint(1, 3), []
            for store, shares in zip(stores, (1, SHARES), strict=True):
                try:
                    some, told = run(view, store, mode, interval, pieces, shares)
                except RebuildNeeded:
                    some, told = run(view, store, "rebuild", None, pieces, shares)
                seen.append(some)
                found.append((told, state(view, store)))
            assert found[0] == found[1], f"seed {seed}: {mode} after {commits.told}"
        for store in stores:
            store.close()
    return seen
