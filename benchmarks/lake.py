"""The generated Delta table of the benchmark: its sizes, its two days, the values that must be online after each.

The table has two days of 24 hourly partitions, one commit and one data file per hour. Each day holds
``rows_per_entity`` rows of every entity, so the second day brings a newer row of every entity:

- versions 0 to 23: the first day, what the store holds before the guarded incremental;
- versions 24 to 47: the second day, the new rows. Their commit files wait in ``later/`` for `show_second_day`.

`generate_lake.py` writes it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

__all__ = [
    "DAY",
    "FIRST_DAY",
    "FIRST_DAY_VERSION",
    "HOURS",
    "SEED",
    "VIEW",
    "Lake",
    "hide_second_day",
    "show_second_day",
]

FIRST_DAY = datetime(2025, 3, 1, tzinfo=timezone.utc)
DAY = timedelta(days=1)
HOURS = 24
#: The version of the table at the end of the first day.
FIRST_DAY_VERSION = HOURS - 1
SEED = 20250301
VIEW = "bench_user_features"


@dataclass(frozen=True, slots=True)
class Lake:
    """The sizes of the generated table and where it lies."""

    folder: Path
    entities: int
    rows_per_entity: int
    features: int

    @property
    def table(self) -> Path:
        """The Delta table."""
        return self.folder / "table"

    @property
    def rows_per_day(self) -> int:
        """Rows that each run reads."""
        return self.entities * self.rows_per_entity

    @property
    def feature_names(self) -> list[str]:
        """The feature columns in order."""
        return [f"feature_{i:02d}" for i in range(self.features)]

    def write_config(self, folder: Path, url: str, pace: str = "5ms") -> None:
        """Write a config folder of the view `VIEW` over the table and the store at *url*."""
        view = [f"source: {self.table}", "join_keys: [user_id]", "event_timestamp: event_timestamp", "features:"]
        view += [f"  {name}: float64" for name in self.feature_names]
        (folder / "feature_views").mkdir(parents=True)
        (folder / "feature_views" / f"{VIEW}.yaml").write_text("\n".join(view) + "\n")
        (folder / "online_stores.yaml").write_text(f'default: {{url: "{url}", pace: {pace}}}\n')

    @property
    def done(self) -> bool:
        """Whether the folder holds a whole table of exactly these sizes."""
        marker = self.folder / "done.json"
        return marker.exists() and json.loads(marker.read_text()) == self.sizes

    @property
    def sizes(self) -> dict[str, int]:
        """What decides the content of the table."""
        return {name: value for name, value in asdict(self).items() if name != "folder"} | {"seed": SEED}

    def expected(self, day: int) -> dict[str, tuple[int, int, bytes]]:
        """Per sampled entity key after *day*: event_us, created_us, the features as packed little-endian doubles."""
        lines = (self.folder / f"expected_day{day}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["key"]: (row["event_us"], row["created_us"], bytes.fromhex(row["features"])) for row in rows}


def hide_second_day(lake: Lake) -> None:
    """Make version 23 the head: the second day has not been committed yet."""
    for commit in (lake.folder / "later").iterdir():
        (lake.table / "_delta_log" / commit.name).unlink(missing_ok=True)


def show_second_day(lake: Lake) -> None:
    """Make version 47 the head: the second day's commits arrive, in order."""
    for commit in sorted((lake.folder / "later").iterdir()):
        shutil.copyfile(commit, lake.table / "_delta_log" / commit.name)
