"""One load of DynamoDB by one client: a server's address, a prefix and sizes in, a JSON line with the CPU and wall time out.

`dynamodb.py` runs every load as a process of its own, Feast's by Feast's own Python. Imports, generated rows, tables, the client and a
small load of another table, which opens connections, come before the measured span. What is in it:

- ``ours``: frame -> entity keys -> `codec.encode` -> `Writer` -> `DynamoDbStore.merge`, in the batches of a run;
- ``bare``: the statements of such a load, ready as bytes, through boto3's client as it is by as many threads, and nothing else;
- ``batch_writer``: boto3's resource as its documentation has it, one attribute per feature, floats as Decimal;
- ``feast``: `FeatureStore.write_to_online_store`, which does to a frame what materialize does to each batch that it has read: values
  to protos, protos to bytes, batch_writer. Reading the source and picking the latest rows, which materialize does too, is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import numpy as np
from botocore.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import polars as pl

    from materialize.model import FeatureView
    from materialize.online.dynamodb import DynamoDbStore

    #: A view's name and its rows in; what loads them out.
    Prepare = Callable[[str, "Rows"], Callable[[], None]]

__all__ = ["CLIENTS", "KEY", "REGION", "SCHEMA_ID", "SECRET", "VIEW", "WARM_VIEW", "Rows", "rows"]

#: Any will do, of letters and digits.
KEY, SECRET, REGION = "test", "test", "eu-central-1"
VIEW, WARM_VIEW = "load", "warm"
#: Entities of the load before the measured one: some for every connection.
WARM_ROWS = 400
SEED = 20250301
#: 2025-03-01 in microseconds, and a day of them.
DAY_AT, DAY_US = 1_740_787_200_000_000, 86_400_000_000
#: Write units a second that no server here takes: the load is not held back.
UNITS = 100_000_000
#: In the head of every record of the product.
SCHEMA_ID = 1
#: Rows per call of Feast, `online_write_batch_size`, as in `feast_materialize.py`.
FEAST_ROWS = 10_000
#: What one statement of a request begins with.
STATEMENT = b'{"Statement":'
FEAST_SETTINGS = """\
project: {project}
provider: local
registry:
  path: {work}/registry.db
  cache_ttl_seconds: 0
online_store:
  type: dynamodb
  region: {region}
  endpoint_url: {endpoint}
offline_store:
  type: dask
entity_key_serialization_version: 3
"""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the tables are: ``PREFIX.VIEW`` at *endpoint*."""

    endpoint: str
    prefix: str


@dataclass(frozen=True, slots=True)
class Rows:
    """One row per entity, shape (n,) each; ``features`` float64 by name."""

    user_id: npt.NDArray[np.int64]
    event_us: npt.NDArray[np.int64]
    created_us: npt.NDArray[np.int64]
    features: dict[str, npt.NDArray[np.float64]]


def rows(entities: int, features: int) -> Rows:
    """The same rows for the same sizes, everywhere."""
    rng = np.random.default_rng(SEED)
    event_us = DAY_AT + rng.integers(0, DAY_US, entities)
    return Rows(
        user_id=np.arange(entities),
        event_us=event_us,
        created_us=event_us + rng.integers(1, 300_000_000, entities),
        features={f"feature_{number:02d}": rng.standard_normal(entities) for number in range(features)},
    )


# --- the product, and its requests alone -------------------------------------------------------------------------------


def opened(target: Target) -> DynamoDbStore:
    from materialize.online.dynamodb import DynamoDbStore

    options = f"write_units={UNITS}&endpoint_url={target.endpoint}"
    return DynamoDbStore(f"dynamodb://{KEY}:{SECRET}@{REGION}/{target.prefix}?{options}")


def view_of(name: str, of: Rows) -> FeatureView:
    from materialize.feature_type import FeatureType
    from materialize.model import FeatureView

    kinds = dict.fromkeys(of.features, FeatureType("float64"))
    return FeatureView(name, "", ("user_id",), "event_timestamp", kinds, ("default",))


def frame_of(of: Rows) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame({"user_id": of.user_id, "event_us": of.event_us, "created_us": of.created_us, **of.features})


def write(store: DynamoDbStore, view: FeatureView, frame: pl.DataFrame) -> None:
    """What a run does with the latest rows (`materialize.piece`), from their frame on."""
    import polars as pl

    from materialize import codec
    from materialize.codec import entity_keys
    from materialize.model import Retention
    from materialize.online.base import HEADER
    from materialize.order import WRITTEN, stamp
    from materialize.piece import BATCH_BYTES, no_progress
    from materialize.writer import Writer

    forever = Retention(ttl_us=None, keep_until_us=2**53 - 1)

    def merge(batch: Any) -> Any:
        return store.merge(view.name, batch, tie_wins=True, retention=forever)

    stamped = frame.with_columns(version=pl.lit(stamp(1, 10), pl.Int64))
    with Writer(store, no_progress) as writer:
        for part in stamped.iter_slices(BATCH_BYTES // (8 * len(view.features) + HEADER.size)):
            keys = entity_keys(part, view.join_keys)
            order, features = part.select("event_us", "created_us", "version"), part.select(*view.features)
            writer.submit(codec.encode(keys, order, features, view, schema_id=SCHEMA_ID), merge)
    if writer.outcomes[WRITTEN] != frame.height:
        raise SystemExit(f"found {writer.outcomes[WRITTEN]:,} rows written, expected {frame.height:,}")


def ours(target: Target) -> Prepare:
    store = opened(target)

    def prepare(view: str, of: Rows) -> Callable[[], None]:
        store.setup(view)
        return partial(write, store, view_of(view, of), frame_of(of))

    return prepare


def requests(target: Target, view: str, of: Rows) -> deque[bytes]:
    """The bodies of the statements that a first load sends, taken from the store itself while it sends nothing."""
    found: deque[bytes] = deque()

    def call(operation: str, body: bytes) -> dict[str, Any]:
        if operation != "batch_execute_statement":
            return {"Responses": {}}  # none of the rows is there yet
        found.append(body)
        return {"Responses": [{}] * body.count(STATEMENT), "ResponseMetadata": {"RetryAttempts": 0}}

    with opened(target) as store:
        store.client.call = call  # type: ignore[method-assign]
        write(store, view_of(view, of), frame_of(of))
    return found


def bare(target: Target) -> Prepare:
    store = opened(target)
    at_once = store.address.requests
    config = Config(parameter_validation=False, max_pool_connections=at_once, retries={"mode": "standard"})
    client: Any = boto3.client("dynamodb", endpoint_url=target.endpoint, config=config)
    ready = threading.local()
    client.meta.events.register("before-call.dynamodb", lambda params, **_: params.update(body=ready.body))

    def send(bodies: deque[bytes]) -> None:
        while True:
            try:
                ready.body = bodies.popleft()
            except IndexError:
                return
            client.batch_execute_statement(Statements=[])

    def load(bodies: deque[bytes]) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(send, [bodies] * at_once))

    def prepare(view: str, of: Rows) -> Callable[[], None]:
        store.setup(view)
        return partial(load, requests(target, view, of))

    return prepare


# --- the peers ---------------------------------------------------------------------------------------------------------


def batch_writer(target: Target) -> Prepare:
    dynamodb: Any = boto3.resource("dynamodb", endpoint_url=target.endpoint)

    def load(table: Any, frame: pl.DataFrame) -> None:
        with table.batch_writer() as batch:
            for row in frame.iter_rows(named=True):
                item = {name: Decimal(str(value)) if isinstance(value, float) else value for name, value in row.items()}
                batch.put_item(Item=item)

    def prepare(view: str, of: Rows) -> Callable[[], None]:
        dynamodb.create_table(
            TableName=f"{target.prefix}.{view}",
            KeySchema=[{"AttributeName": "user_id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "user_id", "AttributeType": "N"}],
            BillingMode="PAY_PER_REQUEST",
        ).wait_until_exists()
        return partial(load, dynamodb.Table(f"{target.prefix}.{view}"), frame_of(of))

    return prepare


def feast(target: Target) -> Prepare:
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int64

    work = Path(tempfile.mkdtemp(prefix="feast-"))  # in the folder that the caller removes
    settings = FEAST_SETTINGS.format(project=target.prefix, work=work, region=REGION, endpoint=target.endpoint)
    (work / "feature_store.yaml").write_text(settings)
    store = FeatureStore(repo_path=str(work))
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    times = {"timestamp_field": "event_timestamp", "created_timestamp_column": "created_timestamp"}
    source = FileSource(name="source", path=str(work / "source.parquet"), **times)

    def load(view: str, frame: Any) -> None:
        for low in range(0, len(frame), FEAST_ROWS):
            store.write_to_online_store(view, frame[low : low + FEAST_ROWS])

    def prepare(view: str, of: Rows) -> Callable[[], None]:
        fields = [Field(name="user_id", dtype=Int64), *(Field(name=name, dtype=Float64) for name in of.features)]
        store.apply([user, FeatureView(name=view, entities=[user], schema=fields, source=source, online=True)])
        store.refresh_registry()
        times = {"event_timestamp": of.event_us, "created_timestamp": of.created_us}
        stamps = {name: pd.to_datetime(values, unit="us", utc=True) for name, values in times.items()}
        return partial(load, view, pd.DataFrame({"user_id": of.user_id, **stamps, **of.features}))

    return prepare


# --- measuring ---------------------------------------------------------------------------------------------------------

CLIENTS = {"ours": ours, "bare": bare, "batch_writer": batch_writer, "feast": feast}


def cpu_seconds() -> float:
    """User and system time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prepare, load, print."""
    parser = argparse.ArgumentParser(description="One load of DynamoDB by one client.")
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--entities", type=int, required=True)
    parser.add_argument("--features", type=int, required=True)
    given = parser.parse_args()
    prepare = CLIENTS[given.client](Target(given.endpoint, given.prefix))
    prepare(WARM_VIEW, rows(WARM_ROWS, given.features))()
    load = prepare(VIEW, rows(given.entities, given.features))
    used, begin = cpu_seconds(), time.perf_counter()
    load()
    found = {"cpu_seconds": cpu_seconds() - used, "seconds": time.perf_counter() - begin}
    print(json.dumps(found | {"boto3": boto3.__version__}))


if __name__ == "__main__":
    main()
