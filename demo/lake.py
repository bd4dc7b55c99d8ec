"""Makes a small realistic lake: two Delta tables in hourly partitions, with late rows, as a streaming job would leave them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from deltalake import write_deltalake

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    Ints = npt.NDArray[np.integer[Any]]

__all__ = ["Lake", "Table"]

#: Of the rows of an hour, the share whose event happened up to three hours before.
LATE_SHARE = 0.03
LATE_HOURS = 3
#: Microseconds between an event and its row, at most.
DELAY_US = 90_000_000
HOUR_US = 3_600_000_000
#: 2025-01-01, from which last transactions are drawn.
FIRST_SEEN_US = 1_735_689_600_000_000
COUNTRIES = ("DE", "FR", "GB", "IN", "JP", "NG", "PL", "US")
CATEGORIES = ("airline", "fuel", "gambling", "grocery", "hotel", "jewelry", "restaurant", "software")


@dataclass(slots=True)
class Table:
    """One Delta table and every row that was committed to it, in order. Entities are numbered from 1.

    ``keys``: entity numbers in, join key columns out. ``features``: a random generator and a number of rows in, columns out.
    """

    path: Path
    entities: int
    rows_per_hour: int
    keys: Callable[[Ints], dict[str, Any]]
    features: Callable[[np.random.Generator, int], dict[str, Any]]
    commits: list[pl.DataFrame] = field(default_factory=list)

    def append(self, rows: pl.DataFrame, *, readable: bool = True) -> None:
        """Commit *rows*: the join keys, event_timestamp, created_timestamp, the features. Not *readable*: none can be served."""
        event = pl.col("event_timestamp")
        partitioned = rows.with_columns(event_date=event.dt.strftime("%Y-%m-%d"), event_hour=event.dt.strftime("%H"))
        partitions = ["event_date", "event_hour"]
        write_deltalake(str(self.path), partitioned.to_arrow(), mode="append", partition_by=partitions)
        if readable:
            self.commits.append(rows)

    def newest(self) -> pl.DataFrame:
        """What a reader must see: each entity's row with the greatest event and created time, a tie to the later commit.

        Returns: the columns of the table and ``entity``, the entity key as text.
        """
        keys = list(self.keys(np.array([1])))
        rows = pl.concat([commit.with_columns(commit=pl.lit(number)) for number, commit in enumerate(self.commits)])
        rows = rows.sort("event_timestamp", "created_timestamp", "commit").unique(
            keys, keep="last", maintain_order=True
        )
        return rows.with_columns(entity=pl.concat_str(keys, separator="|")).drop("commit")


class Lake:
    """The tables ``user_spending_stats`` and ``merchant_risk`` in *root*; the same *seed* gives the same rows."""

    def __init__(self, root: Path, start: datetime, seed: int = 7) -> None:
        if start.tzinfo is None:
            raise ValueError(f"expected a start with a time zone, found {start!r}")
        self.start = start
        self.random = np.random.default_rng(seed)
        self.tables = {
            "user_spending_stats": Table(root / "user_spending_stats", 60_000, 40_000, user_keys, user_features),
            "merchant_risk": Table(root / "merchant_risk", 8_000, 10_000, merchant_keys, merchant_features),
        }

    def hour(self, number: int) -> None:
        """Commit the rows of the hour that begins *number* hours after the start to both tables."""
        for table in self.tables.values():
            count = table.rows_per_hour
            entities = self.random.integers(1, table.entities + 1, count)
            late = self.random.random(count) < LATE_SHARE
            hours = number - late * self.random.integers(1, LATE_HOURS + 1, count)
            event_us = hours * HOUR_US + self.random.integers(0, HOUR_US, count)
            delayed_us = event_us + self.random.integers(0, DELAY_US, count)
            created_us = np.where(late, number * HOUR_US + self.random.integers(0, HOUR_US, count), delayed_us)
            table.append(self._rows(table, entities, event_us, created_us))

    def one(self, view: str, entity: int, *, event: float, created: float, **features: Any) -> None:
        """Commit a single row; times are hours after the start, *features* replace the generated ones."""
        table = self.tables[view]
        times = (np.array([round(hours * HOUR_US)]) for hours in (event, created))
        row = self._rows(table, np.array([entity]), *times)
        table.append(
            row.with_columns(pl.lit(value).cast(row.schema[name]).alias(name) for name, value in features.items())
        )

    def unstorable(self, view: str, entity: int, *, created: float) -> int:
        """Commit a row without its first join key, and one of *entity* from two years ahead. Returns their number."""
        table = self.tables[view]
        created_us = np.array([round(created * HOUR_US)])
        keyless = self._rows(table, np.array([entity]), created_us, created_us).with_columns(
            pl.lit(None, pl.Int64).alias("user_id")
        )
        future = self._rows(table, np.array([entity]), created_us + 2 * 8_760 * HOUR_US, created_us)
        table.append(pl.concat([keyless, future]), readable=False)
        return 2

    def interval(self, number: int) -> tuple[datetime, datetime]:
        """The start and the end of an hour of the story."""
        begin = self.start + timedelta(hours=number)
        return begin, begin + timedelta(hours=1)

    def _rows(self, table: Table, entities: Ints, event_us: Ints, created_us: Ints) -> pl.DataFrame:
        """Rows of *entities* with drawn features; times are microseconds after the start."""
        times = {"event_timestamp": self._times(event_us), "created_timestamp": self._times(created_us)}
        return pl.DataFrame(table.keys(entities) | times | table.features(self.random, len(entities)))

    def _times(self, after_start_us: Ints) -> pl.Series:
        start_us = int(self.start.timestamp()) * 1_000_000
        return pl.Series(after_start_us.astype(np.int64) + start_us).cast(pl.Datetime("us", "UTC"))


def user_keys(entities: Ints) -> dict[str, Any]:
    return {"user_id": entities.astype(np.int64)}


def user_features(random: np.random.Generator, count: int) -> dict[str, Any]:
    spent = np.round(random.lognormal(5.5, 0.8, count), 2)
    transactions = random.poisson(22, count).astype(np.int64)
    seen_us = FIRST_SEEN_US + random.integers(0, 30 * 24 * HOUR_US, count)
    return {
        "total_spend_7d": np.round(spent * 0.25, 2),
        "total_spend_30d": spent,
        "total_spend_90d": np.round(spent * 2.9, 2),
        "avg_transaction_amount": np.round(spent / np.maximum(transactions, 1), 2),
        "max_transaction_amount": (spent * random.random(count)).astype(np.float32),
        "transaction_count_30d": transactions,
        "distinct_merchants_30d": random.poisson(9, count).astype(np.int32),
        "home_country": random.choice(COUNTRIES, count),
        "favourite_category": random.choice(CATEGORIES, count),
        "is_frequent_traveller": random.random(count) < 0.1,
        "last_transaction_at": pl.Series(seen_us).cast(pl.Datetime("us", "UTC")),
        "spending_embedding": pl.Series(random.standard_normal((count, 8)).astype(np.float32)).cast(
            pl.List(pl.Float32)
        ),
    }


def merchant_keys(entities: Ints) -> dict[str, Any]:
    return {"merchant_id": entities.astype(np.int64), "country": np.array(COUNTRIES)[entities % len(COUNTRIES)]}


def merchant_features(random: np.random.Generator, count: int) -> dict[str, Any]:
    score = random.beta(1.5, 8, count)
    return {
        "risk_score": np.round(score, 4),
        "chargeback_rate_90d": random.beta(1.2, 90, count).astype(np.float32),
        "transaction_count_24h": random.poisson(180, count).astype(np.int64),
        "category_code": random.integers(1_000, 10_000, count).astype(np.int16),
        "risk_level": np.where(score < 0.2, "low", np.where(score < 0.45, "medium", "high")),
        "on_watch_list": score > 0.6,
    }
