"""Feast, driven line by line: commands as JSON on stdin, an answer for each on stdout. Runs in Feast's own environment.

The feature view reads one Parquet file, which is made anew from the Delta table before each run. Redis is used as Feast does by
default, reading each entity's stored event time before it writes.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, Int64, String

FEATURES = {"amount": Float64, "count": Int64, "country": String}
SETTINGS = """\
project: correctness
provider: local
registry:
  path: {work}/registry.db
  cache_ttl_seconds: 0
online_store:
  type: redis
  connection_string: "127.0.0.1:{port}"
offline_store:
  type: dask
entity_key_serialization_version: 3
"""


def opened(work: Path, port: str) -> FeatureStore:
    (work / "feature_store.yaml").write_text(SETTINGS.format(work=work, port=port))
    store = FeatureStore(repo_path=str(work))
    if not (work / "registry.db").exists():
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
        file = FileSource(
            name="source",
            path=str(work / "source.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )
        fields = [
            Field(name="user_id", dtype=String),
            *(Field(name=name, dtype=kind) for name, kind in FEATURES.items()),
        ]
        store.apply(
            [user, FeatureView(name="spending", entities=[user], ttl=timedelta(days=3650), schema=fields, source=file)]
        )
    return store


def moment(us: int) -> datetime:
    return datetime.fromtimestamp(us / 1e6, timezone.utc)


def obeyed(store: FeatureStore, command: dict[str, Any]) -> Any:
    if command["do"] == "run":
        store.materialize_incremental(moment(command["end"]))
    elif command["do"] == "backfill":
        store.materialize(moment(command["start"]), moment(command["end"]))
    elif command["do"] == "read":
        found = store.get_online_features(
            features=[f"spending:{name}" for name in FEATURES],
            entity_rows=[{"user_id": user} for user in command["users"]],
        ).to_dict()
        rows = zip(found["user_id"], *(found[name] for name in FEATURES), strict=True)
        return {user: features for user, *features in rows if features[1] is not None}
    return None


def main() -> None:
    work, port = Path(sys.argv[1]), sys.argv[2]
    answers, sys.stdout = sys.stdout, sys.stderr  # Feast prints its progress
    store = opened(work, port)
    for line in sys.stdin:
        print(json.dumps(obeyed(store, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
