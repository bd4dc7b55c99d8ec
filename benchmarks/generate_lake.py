"""Writes the Delta table of the benchmark and the values that must be online; sizes in, a folder (`lake.Lake`) out.

Runs as a process of its own (``python benchmarks/generate_lake.py FOLDER --entities N``): on Linux a child's peak
memory counts from its parent's, so the process that measures the product stays small.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from deltalake import write_deltalake
from lake import DAY, FIRST_DAY, FIRST_DAY_VERSION, HOURS, KINDS, NULL_SHARE, SEED, Lake

#: Entities whose online bytes are compared with the table.
SAMPLED = 1_000


def generate(lake: Lake) -> None:
    """Write the table and the expected values; the same sizes give the same rows."""
    rng = np.random.default_rng(lake.seed)
    for day in range(2):
        # Each row gets an hour of the day by chance, each entity exactly rows_per_entity rows.
        hour_of_row = rng.integers(0, HOURS, (lake.entities, lake.rows_per_entity), dtype=np.int8)
        for hour in range(HOURS):
            user_id = np.nonzero(hour_of_row == hour)[0]
            begin = FIRST_DAY + day * DAY + timedelta(hours=hour)
            event_us = int(begin.timestamp()) * 10**6 + np.sort(rng.integers(0, 3_600_000_000, user_id.size))
            created_us = event_us + rng.integers(1, 300_000_000, user_id.size)
            # Event order is arrival order; entities come at random.
            frame = pl.DataFrame(
                {
                    "user_id": rng.permutation(user_id),
                    "event_timestamp": pl.Series(event_us).cast(pl.Datetime("us", "UTC")),
                    "created_timestamp": pl.Series(created_us).cast(pl.Datetime("us", "UTC")),
                    **{name: values(rng, kind, user_id.size) for name, kind in lake.feature_kinds.items()},
                    "event_date": pl.Series([begin.date()]).new_from_index(0, user_id.size),
                    "event_hour": pl.Series([hour], dtype=pl.Int32).new_from_index(0, user_id.size),
                },
            )
            write_deltalake(str(lake.table), frame, mode="append", partition_by=["event_date", "event_hour"])
    later = lake.folder / "later"
    later.mkdir()
    for version in range(FIRST_DAY_VERSION + 1, 2 * HOURS):
        shutil.move(lake.table / "_delta_log" / f"{version:020d}.json", later)
    for day in range(2):
        write_expected(lake, day)
    (lake.folder / "done.json").write_text(json.dumps(lake.sizes))


def values(rng: np.random.Generator, kind: str, rows: int) -> pl.Series:
    """*rows* values of *kind*, as `lake.KINDS` writes it."""
    plain = kind.rstrip("?")
    if plain == "float64":
        made = pl.Series(rng.standard_normal(rows))
    elif plain == "int64":
        made = pl.Series(rng.integers(-(2**62), 2**62, rows))
    elif plain == "bool":
        made = pl.Series(rng.integers(0, 2, rows, dtype=np.int8)).cast(pl.Boolean)
    elif plain == "timestamp":
        made = pl.Series(rng.integers(0, 2 * 10**15, rows)).cast(pl.Datetime("us", "UTC"))
    else:  # words of a vocabulary, 11 to 26 bytes of UTF-8
        words = pl.Series([f"größe-{'x' * (number % 16)}{number:03d}" for number in range(1_000)])
        made = words[rng.integers(0, len(words), rows)]
    if kind == plain:
        return made
    return pl.select(pl.when(pl.Series(rng.random(rows) >= NULL_SHARE)).then(made)).to_series()


def write_expected(lake: Lake, day: int) -> None:
    """Pick the latest row of sampled entities out of the data files with polars alone, without the product."""
    sample = sorted(random.Random(lake.seed).sample(range(lake.entities), min(SAMPLED, lake.entities)))
    dates = [(FIRST_DAY + past * DAY).date().isoformat() for past in range(day + 1)]
    rows = pl.concat(
        [
            pl.read_parquet(file, hive_partitioning=False).filter(pl.col("user_id").is_in(sample))
            for date in dates
            for file in sorted(lake.table.glob(f"event_date={date}/**/*.parquet"))
        ],
    )
    latest = rows.sort("event_timestamp", "created_timestamp").unique("user_id", keep="last").sort("user_id")
    lines = [json.dumps(expected_record(row, lake.feature_names)) for row in latest.iter_rows(named=True)]
    (lake.folder / f"expected_day{day}.jsonl").write_text("\n".join(lines) + "\n")


def expected_record(row: dict[str, Any], feature_names: list[str]) -> dict[str, object]:
    """One row as JSON values, which keep every bit of these; the features in the view's order, times in microseconds."""
    found = [row[name] for name in feature_names]
    return {
        "key": str(row["user_id"]),
        "event_us": microseconds(row["event_timestamp"]),
        "created_us": microseconds(row["created_timestamp"]),
        "features": [microseconds(value) if isinstance(value, datetime) else value for value in found],
    }


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970 UTC."""
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)


def main() -> None:
    """Generate the table unless the folder already holds it."""
    parser = argparse.ArgumentParser(description="Generate the Delta table of the benchmark.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--entities", type=int, default=20_000)
    parser.add_argument("--rows-per-entity", type=int, default=3)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--kind", choices=KINDS, default="float64")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    lake = Lake(**vars(arguments))
    if lake.done:
        return
    lake.folder.mkdir(parents=True, exist_ok=True)
    (lake.folder / "done.json").unlink(missing_ok=True)
    for part in (lake.table, lake.folder / "later"):
        shutil.rmtree(part, ignore_errors=True)
    generate(lake)


if __name__ == "__main__":
    main()
