"""The generated Delta table of the benchmarks: its sizes, its two days, the values that must be online after each.

The table has two days of 24 hourly partitions, one commit and one data file per hour. Each day holds
``rows_per_entity`` rows of every entity, so the second day brings a newer row of every entity:

- versions 0 to 23: the first day, what the store holds before the guarded incremental;
- versions 24 to 47: the second day, the new rows. Their commit files wait in ``later/`` for `show_second_day`.

`generate_lake.py` writes it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

__all__ = [
    "DAY",
    "FIRST_DAY",
    "FIRST_DAY_VERSION",
    "HOURS",
    "KINDS",
    "NULL_SHARE",
    "SEED",
    "VIEW",
    "Lake",
    "generated",
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
#: The types of ten features, again and again; a "?" behind one: `NULL_SHARE` of its values are null.
KINDS = {
    "float64": ("float64",),
    "mixed": (
        *("float64", "int64", "string", "float64?", "bool"),
        *("float64", "string?", "int64?", "timestamp?", "float64"),
    ),
}
NULL_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Lake:
    """The sizes of the generated table and where it lies. ``kind``: of `KINDS`."""

    folder: Path
    entities: int
    rows_per_entity: int
    features: int
    kind: str = "float64"
    seed: int = SEED

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

    @property
    def feature_kinds(self) -> dict[str, str]:
        """The types of the features, with a "?" where values may be null."""
        kinds = KINDS[self.kind]
        return {name: kinds[index % len(kinds)] for index, name in enumerate(self.feature_names)}

    @property
    def feature_types(self) -> dict[str, str]:
        """The types of the features, as a feature view writes them."""
        return {name: kind.rstrip("?") for name, kind in self.feature_kinds.items()}

    def write_config(self, folder: Path, url: str, pace: str | None = None, ttl: str | None = None) -> None:
        """Write a config folder of the view `VIEW` over the table and the store at *url*."""
        view = [
            f"source: {self.table}",
            "join_keys: [user_id]",
            "event_timestamp: event_timestamp",
            "created_timestamp: created_timestamp",
            "features:",
            *(f"  {name}: {kind}" for name, kind in self.feature_types.items()),
            *([f"ttl: {ttl}"] if ttl else []),
        ]
        (folder / "feature_views").mkdir(parents=True)
        (folder / "feature_views" / f"{VIEW}.yaml").write_text("\n".join(view) + "\n")
        paced = f", pace: {pace}" if pace else ""
        (folder / "online_stores.yaml").write_text(f'default: {{url: "{url}"{paced}}}\n')

    @property
    def done(self) -> bool:
        """Whether the folder holds a whole table of exactly these sizes."""
        marker = self.folder / "done.json"
        return marker.exists() and json.loads(marker.read_text()) == self.sizes

    @property
    def sizes(self) -> dict[str, int | str]:
        """What decides the content of the table."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def expected(self, day: int) -> dict[str, tuple[int, int, tuple[Any, ...]]]:
        """Per sampled entity key after *day*: event_us, created_us, the values of the features in order, times in microseconds."""
        lines = (self.folder / f"expected_day{day}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["key"]: (row["event_us"], row["created_us"], tuple(row["features"])) for row in rows}


def generated(work: Path, **sizes: Any) -> Lake:
    """The table of *sizes* in a folder of its own below *work*, made by a process of its own when it is not there; with its first day only."""
    table = Lake(folder=work.resolve() / "-".join(["lake", *map(str, sizes.values())]), **sizes)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in table.sizes.items()]
    if not table.done:
        print(f"  making {table.folder.name}", file=sys.stderr, flush=True)
    script = Path(__file__).with_name("generate_lake.py")
    subprocess.run([sys.executable, str(script), str(table.folder), *options], check=True)
    hide_second_day(table)
    return table


def hide_second_day(lake: Lake) -> None:
    """Make version 23 the head: the second day has not been committed yet."""
    for commit in (lake.folder / "later").iterdir():
        (lake.table / "_delta_log" / commit.name).unlink(missing_ok=True)


def show_second_day(lake: Lake) -> None:
    """Make version 47 the head: the second day's commits arrive, in order."""
    for commit in sorted((lake.folder / "later").iterdir()):
        shutil.copyfile(commit, lake.table / "_delta_log" / commit.name)
