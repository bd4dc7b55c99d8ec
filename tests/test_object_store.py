"""Tables on S3: commits of two writers, files at absolute addresses, credentials of the view and of the environment, errors."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from materialize import pipeline
from materialize.errors import OfflineStoreError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from tests.object_store import BUCKET, SECRET
from tests.properties.storage import Bucket
from tests.stepping import run, served
from tests.tables import SCHEMA, row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from materialize.online.base import OnlineStore
    from tests.object_store import ObjectStore

pytestmark = pytest.mark.server


@pytest.fixture
def lake(object_store: ObjectStore) -> Bucket:
    """The address of a table that is not there yet."""
    return Bucket(object_store.client, BUCKET, f"table-{uuid.uuid4()}", object_store.options)


def append(table: Bucket, *rows: dict[str, Any]) -> None:
    write_deltalake(
        table.uri, pa.Table.from_pylist(list(rows), schema=SCHEMA), mode="append", storage_options=table.options
    )


def view_of(table: Bucket, options: Mapping[str, str]) -> FeatureView:
    return FeatureView(
        name="spending",
        source=table.uri,
        join_keys=("user_id",),
        event_timestamp="event_timestamp",
        created_timestamp="created",
        features={"amount": FeatureType.parse("float64")},
        online_stores=("default",),
        storage_options=dict(options),
    )


def amounts(view: FeatureView, store: OnlineStore) -> dict[str, float]:
    return {key: features["amount"] for key, features in served(view, store).items()}


def test_commits_of_writers_at_once_are_all_read(lake: Bucket, object_store: ObjectStore, store: OnlineStore) -> None:
    append(lake, row("first", 1, 0.0))
    view, writers, commits, together = view_of(lake, lake.options), 3, 4, Barrier(3)
    pipeline.incremental(view, store, run())

    def write(writer: int) -> None:
        for commit in range(commits):
            together.wait()
            append(lake, row(f"{writer}-{commit}", 2, float(writer)))

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(write, range(writers)))
    report = pipeline.incremental(view, store, run())

    assert object_store.refused("_delta_log") > 0  # they did collide, and each commit is a conditional put
    assert (report.to_version, report.written) == (writers * commits, writers * commits)
    assert len(amounts(view, store)) == 1 + writers * commits


def test_credentials_of_the_environment_are_used(
    lake: Bucket, store: OnlineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(lake, row("a", 1, 1.0), row("b", 1, 1.0))
    for name, value in lake.options.items():
        monkeypatch.setenv(name, value)
    view = view_of(lake, {})
    pipeline.incremental(view, store, run())
    DeltaTable(lake.uri).delete("user_id = 'b'")
    append(lake, row("a", 2, 2.0))

    assert pipeline.incremental(view, store, run()).deleted == 1
    assert amounts(view, store) == {"a": 2.0}


def test_files_of_another_table_are_read_where_they_are(lake: Bucket, store: OnlineStore) -> None:
    """As a shallow clone has them: the log says where the original's files are, as a URI."""
    lake.prefix = f"original ö {lake.prefix}"
    append(lake, row("a", 1, 1.0), row("b", 1, 1.0), row("c", 1, 1.0))
    clone = Bucket(lake.client, lake.bucket, f"clone ü {lake.prefix}", lake.options)
    actions = [json.loads(line) for line in lake.read("_delta_log/00000000000000000000.json").splitlines()]
    for action in actions:
        if "add" in action:
            action["add"]["path"] = f"{quote(lake.uri, safe=':/')}/{action['add']['path']}"
    clone.write("_delta_log/00000000000000000000.json", "\n".join(map(json.dumps, actions)).encode())
    view = view_of(clone, clone.options)
    assert pipeline.incremental(view, store, run()).written == 3

    append(clone, row("b", 2, 2.0), row("d", 1, 3.0))
    removed = [
        {"remove": {name: action["add"][name] for name in ("path", "size", "dataChange", "partitionValues")}}
        for action in actions
        if "add" in action
    ]
    clone.write("_delta_log/00000000000000000002.json", "\n".join(map(json.dumps, removed)).encode())
    assert pipeline.incremental(view, store, run()).deleted == 2
    assert amounts(view, store) == {"b": 2.0, "d": 3.0}


@pytest.mark.parametrize("source", ["s3://nowhere/table", f"s3://{BUCKET}/nothing"])
def test_table_that_is_not_there_is_told_without_the_secret(lake: Bucket, store: OnlineStore, source: str) -> None:
    view = view_of(Bucket(lake.client, *source.removeprefix("s3://").split("/"), lake.options), lake.options)

    with pytest.raises(OfflineStoreError, match=f"feature view 'spending'.*{source}.*Nothing was written") as failed:
        pipeline.incremental(view, store, run())

    assert SECRET not in f"{failed.value} {view!r}"
