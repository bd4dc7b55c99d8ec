"""Pushing to a table on S3: pushers at the same moment, an id used twice, and credentials that are refused."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from materialize import pipeline
from materialize.errors import OfflineStoreError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.push import Pusher, PushReport, push
from tests.object_store import BUCKET, SECRET
from tests.stepping import run, served
from tests.tables import SCHEMA, row

if TYPE_CHECKING:
    from materialize.online.base import OnlineStore
    from tests.object_store import ObjectStore

pytestmark = pytest.mark.server

#: Requests to the object store for a push by a Pusher; 9 of them are deltalake's.
MOST_REQUESTS = 13


@pytest.fixture
def view(object_store: ObjectStore, store: OnlineStore) -> FeatureView:
    """A view of a table on S3 that is online."""
    made = FeatureView(
        name="spending",
        source=f"s3://{BUCKET}/pushed-{uuid.uuid4()}",
        join_keys=("user_id",),
        event_timestamp="event_timestamp",
        created_timestamp="created",
        features={"amount": FeatureType.parse("float64")},
        online_stores=("default",),
        storage_options=object_store.options,
    )
    rows = pa.Table.from_pylist([row("a", 1, 1.0)], schema=SCHEMA)
    write_deltalake(made.source, rows, storage_options=made.storage_options)
    pipeline.incremental(made, store, run())
    return made


def test_pushers_at_the_same_moment_are_each_exact(view: FeatureView, store: OnlineStore) -> None:
    barrier = Barrier(3)

    def pushed(number: int) -> list[PushReport]:
        pusher = Pusher(view, store, run(f"pusher-{number}"))
        barrier.wait(60)
        return [
            pusher.push([row("a", 2 + turn, 10.0 * number + turn, created=number), row(f"b{number}-{turn}", 1)])
            for turn in range(3)
        ]

    with ThreadPoolExecutor(3) as pool:
        reports = [report for some in pool.map(pushed, range(3)) for report in some]

    assert sorted(report.version or 0 for report in reports) == list(range(1, 10))
    assert served(view, store)["a"]["amount"] == 22.0
    assert len(served(view, store)) == 10
    assert pipeline.incremental(view, store, run("follows")).written == 0


def test_an_id_is_committed_once(view: FeatureView, store: OnlineStore) -> None:
    reports = [push(view, store, [row("a", 2, 2.0)], run("push"), push_id="id-1") for _ in range(2)]

    assert [(report.version, report.again) for report in reports] == [(1, False), (1, True)]
    assert DeltaTable(view.source, storage_options=view.storage_options).version() == 1


def test_a_table_that_is_not_there_is_told_without_the_secret(view: FeatureView, store: OnlineStore) -> None:
    gone = replace(view, source=f"{view.source}-gone")

    with pytest.raises(OfflineStoreError, match="found no readable table there") as told:
        push(gone, store, [row("a", 2, 2.0)], run("push"))

    assert SECRET not in str(told.value)


def test_a_push_asks_for_little(view: FeatureView, store: OnlineStore, object_store: ObjectStore) -> None:
    pusher = Pusher(view, store, run("push"))
    pusher.push([row("a", 2, 2.0)])
    before = len(object_store.log.read_text().splitlines())

    pusher.push([row("a", 3, 3.0)])

    assert len(object_store.log.read_text().splitlines()) - before <= MOST_REQUESTS
