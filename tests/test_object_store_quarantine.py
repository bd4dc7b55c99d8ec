"""A quarantine table on S3: rows are kept, listed, released and erased there, with the credentials of the source."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from materialize import pipeline
from materialize.errors import OfflineStoreError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.offline import erase, held_rows
from materialize.offline.quarantine import HELD, Quarantine
from materialize.release import release
from tests.object_store import BUCKET, SECRET
from tests.stepping import run, served
from tests.tables import NOW, SCHEMA, kept_rows, row

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from materialize.online.base import OnlineStore
    from tests.object_store import ObjectStore

pytestmark = pytest.mark.server

FUTURE, LATER = 60 * 24 * 20, NOW + timedelta(days=20)


@pytest.fixture
def view(object_store: ObjectStore) -> Iterator[FeatureView]:
    """A view of a table on S3 that is not there yet."""
    return FeatureView(
        name="spending",
        source=f"s3://{BUCKET}/quarantined-{uuid.uuid4()}",
        join_keys=("user_id",),
        event_timestamp="event_timestamp",
        created_timestamp="created",
        features={"amount": FeatureType.parse("float64")},
        online_stores=("default",),
        storage_options=object_store.options,
    )


def append(view: FeatureView, *rows: dict[str, Any]) -> None:
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    write_deltalake(view.source, table, mode="append", storage_options=view.storage_options)


def bytes_of(object_store: ObjectStore, view: FeatureView) -> bytes:
    """Every object of the quarantine table."""
    prefix = f"{view.quarantine_table}/".removeprefix(f"s3://{BUCKET}/")
    objects = object_store.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    return b"".join(object_store.client.get_object(Bucket=BUCKET, Key=one["Key"])["Body"].read() for one in objects)


def test_rows_are_kept_released_and_erased(view: FeatureView, object_store: ObjectStore, store: OnlineStore) -> None:
    append(view, row("a", 1, 1.0), row("a", FUTURE, 2.0), row("the-secret", None), row(None, 1))
    pipeline.incremental(view, store, run())
    pipeline.rebuild(view, store, run())
    assert sorted(map(str, held_rows(view, "default")["entity"])) == ["None", "a", "the-secret"]

    report = release(view, store, run("release", LATER))

    assert (report.released, report.held, served(view, store)["a"]["amount"]) == (1, 2, 2.0)
    assert [one["entity"] for one in kept_rows(view) if one["released_by"] == "release"] == ["a"]
    assert b"the-secret" in bytes_of(object_store, view)
    assert erase(view, "default", b"the-secret") == 1
    assert b"the-secret" not in bytes_of(object_store, view)
    assert len(kept_rows(view)) == 2


def test_writers_at_once_keep_every_row(view: FeatureView, object_store: ObjectStore) -> None:
    """As pieces in several processes do, with the first commit, which makes the table, among them."""
    writers, together = 3, Barrier(3)

    def told(writer: int, number: int) -> pl.DataFrame:
        import polars as pl

        values = {"view": view.name, "store": "default", "reason": "r", "id": f"{writer}-{number}"}
        return pl.DataFrame([{name: values.get(name) for name in HELD}], schema=HELD)

    def write(writer: int) -> None:
        for number in range(3):
            rows = told(writer, number)
            together.wait()
            Quarantine(view, "default").keep(rows)

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))

    assert object_store.refused(f"{view.quarantine_table}/_delta_log".rpartition(f"{BUCKET}/")[2]) > 0  # they collided
    assert sorted(one["id"] for one in kept_rows(view)) == [
        f"{writer}-{number}" for writer in range(3) for number in range(3)
    ]


def test_a_bucket_that_is_not_there_is_told_without_the_secret(view: FeatureView, store: OnlineStore) -> None:
    from dataclasses import replace

    append(view, row("a", None))
    elsewhere = replace(view, quarantine="s3://nowhere/quarantine")

    with pytest.raises(OfflineStoreError, match=r"'spending'.*s3://nowhere/quarantine") as failed:
        pipeline.incremental(elsewhere, store, run())

    assert SECRET not in f"{failed.value} {elsewhere!r}"
