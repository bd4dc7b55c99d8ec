"""One stage of the Feast measurement, run by Feast's own Python: settings in, a JSON line with figures out.

`feast_materialize.py` runs the stages ``source``, ``apply``, ``materialize``, ``verify`` and ``read``, each as a process of its
own, so that one stage's memory and caches do not help or burden the next.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

VIEW = "user_features"
DAY = datetime(2025, 3, 1, tzinfo=timezone.utc)
DAY_US = 86_400_000_000
SEED = 20250301
#: Entities whose features are read back and compared.
SAMPLED = 1_000
#: Entities per read of the check.
READ_SIZE = 250
#: Entities of a timed batch; single reads for each of them; reads before the first that counts.
BATCH, BATCH_SHARE, WARM = 100, 20, 20


def feature_names(settings: argparse.Namespace) -> list[str]:
    return [f"feature_{i:02d}" for i in range(settings.features)]


def source(settings: argparse.Namespace) -> dict[str, Any]:
    """Write one Parquet file in event order: each entity has its rows at chance times of one day."""
    rng = np.random.default_rng(SEED)
    rows = settings.entities * settings.rows_per_entity
    event_us = int(DAY.timestamp()) * 10**6 + np.sort(rng.integers(0, DAY_US, rows))
    columns = {
        "user_id": pa.array(rng.permutation(np.repeat(np.arange(settings.entities), settings.rows_per_entity))),
        "event_timestamp": pa.array(event_us, pa.timestamp("us", tz="UTC")),
        "created_timestamp": pa.array(event_us + rng.integers(1, 300_000_000, rows), pa.timestamp("us", tz="UTC")),
        **{name: pa.array(rng.standard_normal(rows)) for name in feature_names(settings)},
    }
    pq.write_table(pa.table(columns), settings.work / "source.parquet", row_group_size=250_000)
    return {"rows": rows}


def apply(settings: argparse.Namespace) -> dict[str, Any]:
    """Register the entity, the file source and the feature view."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int64

    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    file = FileSource(
        name="source",
        path=str(settings.work / "source.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    features = [Field(name=name, dtype=Float64) for name in feature_names(settings)]
    fields = [Field(name="user_id", dtype=Int64), *features]
    # Feast drops rows older than the ttl when it reads: ten years keep all of them.
    view = FeatureView(name=VIEW, entities=[user], ttl=timedelta(days=3650), schema=fields, source=file, online=True)
    FeatureStore(repo_path=str(settings.work)).apply([user, view])
    return {}


def materialize(settings: argparse.Namespace) -> dict[str, Any]:
    """Time ``FeatureStore.materialize`` alone: imports and the opening of the registry are a gift to Feast."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(settings.work))
    store.list_feature_views()
    cpu = time.process_time()
    begin = time.perf_counter()
    store.materialize(DAY - timedelta(days=1), DAY + timedelta(days=2))
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "entities_per_second": settings.entities / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def verify(settings: argparse.Namespace) -> dict[str, Any]:
    """Compare every feature of sampled entities with the latest row of the source."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(settings.work))
    sample = np.random.default_rng(1).permutation(settings.entities)[:SAMPLED]
    table = pq.read_table(settings.work / "source.parquet")
    table = table.filter(pc.is_in(table["user_id"], pa.array(sample)))
    table = table.sort_by([("event_timestamp", "ascending"), ("created_timestamp", "ascending")])
    latest = {row["user_id"]: row for row in table.to_pylist()}  # the last row of an entity stays
    wrong = 0
    for begin in range(0, len(sample), READ_SIZE):
        keys = [int(key) for key in sample[begin : begin + READ_SIZE]]
        found = store.get_online_features(
            features=[f"{VIEW}:{name}" for name in feature_names(settings)],
            entity_rows=[{"user_id": key} for key in keys],
        ).to_dict()
        for i, key in enumerate(found["user_id"]):
            wrong += any(found[name][i] != latest[key][name] for name in feature_names(settings))
    return {"checked": len(sample), "wrong": wrong}


def read(settings: argparse.Namespace) -> dict[str, Any]:
    """Time reads of all features of one entity, and of a hundred, by the SDK in this process: every wait in seconds."""
    from feast import FeatureStore

    store = FeatureStore(repo_path=str(settings.work))
    features = [f"{VIEW}:{name}" for name in feature_names(settings)]
    rng = np.random.default_rng(2)
    waits: dict[str, list[float]] = {}
    for size, reads in ((1, settings.reads), (BATCH, max(settings.reads // BATCH_SHARE, 1))):
        waits[str(size)] = []
        for _ in range(WARM + reads):
            rows = [{"user_id": int(key)} for key in rng.integers(0, settings.entities, size)]
            begin = time.perf_counter()
            store.get_online_features(features=features, entity_rows=rows).to_dict()
            waits[str(size)].append(time.perf_counter() - begin)
        del waits[str(size)][:WARM]
    return waits


STAGES = {"source": source, "apply": apply, "materialize": materialize, "verify": verify, "read": read}


def main() -> None:
    """Run one stage; its figures are the last line of stdout."""
    parser = argparse.ArgumentParser(description="One stage of the Feast measurement.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--entities", type=int, required=True)
    parser.add_argument("--rows-per-entity", type=int, required=True)
    parser.add_argument("--features", type=int, required=True)
    parser.add_argument("--reads", type=int, default=0)
    settings = parser.parse_args()
    print(json.dumps(STAGES[settings.stage](settings)))


if __name__ == "__main__":
    main()
