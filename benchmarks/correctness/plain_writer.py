"""The writer that tutorials show, driven as `feast_writer.py` is: the newest row of each entity in a window of event time, in one pipeline.

One hash for each entity; the end of the last window in a file, written when the window is loaded.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import redis

FEATURES = ("amount", "count", "country")
#: Entities of one pipeline.
BATCH = 1_000


def load(work: Path, client: redis.Redis, start: int, end: int) -> None:
    times = [datetime.fromtimestamp(us / 1e6, timezone.utc) for us in (start, end)]
    rows = pq.read_table(work / "source.parquet")
    inside = pc.and_(pc.greater_equal(rows["event_timestamp"], times[0]), pc.less(rows["event_timestamp"], times[1]))
    rows = rows.filter(inside).sort_by([("event_timestamp", "ascending"), ("created", "ascending")])
    latest = list({row["user_id"]: row for row in rows.to_pylist()}.values())
    for low in range(0, len(latest), BATCH):
        pipe = client.pipeline(transaction=False)
        for row in latest[low : low + BATCH]:
            pipe.hset(f"spending:{row['user_id']}", mapping={name: json.dumps(row[name]) for name in FEATURES})
        pipe.execute()


def obeyed(work: Path, client: redis.Redis, command: dict[str, Any]) -> Any:
    state = work / "state"
    if command["do"] == "run":
        load(work, client, int(state.read_text()) if state.exists() else 0, command["end"])
        state.write_text(str(command["end"]))
    elif command["do"] == "backfill":
        load(work, client, command["start"], command["end"])
    elif command["do"] == "read":
        pipe = client.pipeline(transaction=False)
        for user in command["users"]:
            pipe.hmget(f"spending:{user}", FEATURES)
        found = zip(command["users"], pipe.execute(), strict=True)
        return {user: [json.loads(one) for one in features] for user, features in found if features[1] is not None}
    return None


def main() -> None:
    work, client = Path(sys.argv[1]), redis.Redis(port=int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(obeyed(work, client, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
