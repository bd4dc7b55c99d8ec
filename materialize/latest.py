"""Many rows per entity in, the newest storable one out. Pure polars, no I/O.

The first of two passes looks at keys and order columns only; the wide columns are read for the winning rows alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import polars as pl

from materialize.model import duration_text, to_us
from materialize.order import stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from materialize.model import FeatureView, Interval

__all__ = [
    "ENGINE",
    "among",
    "by_reason",
    "entities",
    "greatest_event_us",
    "have_ties",
    "joined",
    "moved",
    "newest",
    "newest_of",
    "runners_up",
    "shard",
    "shards",
    "stamped",
    "unexpired",
    "valid_entities",
    "valid_rows",
    "within",
    "without",
]

#: Pieces are cut by polars' hash of the join keys, which may differ between versions.
ENGINE = f"polars {pl.__version__}"

#: Rows that `newest_of` ranks at a time: sorting copies them a few times, at about 120 bytes a row.
ROWS_RANKED = 500_000
#: Event and created times outside +-2**53 microseconds (the years 1684 to 2255) are not exact in Lua's doubles.
EXACT_US = 2**53
#: Bytes of an escaped character of an entity key ("%7C"), and the most that a join key of another type than text takes.
ESCAPED_WIDTH, OTHER_KEY_WIDTH = 3, 21


def valid_rows(
    rows: pl.DataFrame, view: FeatureView, *, now: datetime, max_key_bytes: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tell rows whose key or times cannot be stored from the others.

    *rows*: the join keys, event_us Int64, created_us Int64 and any other columns. Returns: the rows that can, with the same
    columns; and those that cannot, with the same columns and __reason String, the first that holds for the row.
    """
    event, created = pl.col("event_us"), pl.col("created_us")
    checks = {
        **_key_checks(rows, view.join_keys, max_key_bytes),
        "null event timestamp": event.is_null(),
        f"event timestamp more than {duration_text(view.max_future)} in the future": event
        > to_us(now + view.max_future),
        "event timestamp before 1684": event < -EXACT_US,
        "created timestamp outside 1684 to 2255": ~created.is_between(-EXACT_US, EXACT_US),
    }
    flags = rows.select(check.fill_null(value=False).alias(reason) for reason, check in checks.items())
    if not any(flags.select(pl.all().any()).row(0)):
        return rows, rows.clear().with_columns(pl.lit(None, pl.String).alias("__reason"))
    first = pl.coalesce(pl.when(reason).then(pl.lit(reason)) for reason in checks)
    found = flags.select(first.alias("__reason"))["__reason"]
    return rows.filter(found.is_null()), rows.with_columns(found).filter(found.is_not_null())


def by_reason(reasons: pl.Series) -> dict[str, int]:
    """How many rows each of the *reasons* (null: none) has."""
    counted = reasons.drop_nulls().alias("reason").value_counts()
    return dict(zip(counted["reason"], counted["count"], strict=True))


def valid_entities(entities: pl.DataFrame, join_keys: Sequence[str], max_key_bytes: int) -> pl.DataFrame:
    """Those of *entities* (their join keys) that can be stored at all."""
    wrong = pl.any_horizontal(_key_checks(entities, join_keys, max_key_bytes).values())
    return entities.filter(~wrong.fill_null(value=False))


def _key_checks(rows: pl.DataFrame, join_keys: Sequence[str], max_key_bytes: int) -> dict[str, pl.Expr]:
    """What can be wrong with an entity key, as reason -> condition."""
    strings = [key for key in join_keys if rows.schema[key] == pl.String]
    return {
        "null join key": pl.any_horizontal(pl.col(key).is_null() for key in join_keys),
        "empty join key": pl.any_horizontal(pl.col(key) == "" for key in strings) if strings else pl.lit(value=False),
        f"entity key longer than {max_key_bytes:,} bytes": _longer_than(rows, join_keys, strings, max_key_bytes),
    }


def _longer_than(rows: pl.DataFrame, join_keys: Sequence[str], strings: Sequence[str], limit: int) -> pl.Expr:
    """Whether a row's entity key is over *limit* bytes. Escapes are counted only where they could matter: it is slow."""
    longest = (
        rows.select(pl.sum_horizontal(pl.col(key).str.len_bytes().max() for key in strings)).item() if strings else 0
    )
    if ESCAPED_WIDTH * (longest or 0) + OTHER_KEY_WIDTH * len(join_keys) <= limit:
        return pl.lit(value=False)
    others = [key for key in join_keys if key not in strings]
    texts = [
        pl.col(key).str.len_bytes() + (ESCAPED_WIDTH - 1) * pl.col(key).str.count_matches(r"[%|{}]") for key in strings
    ]
    texts += [pl.col(key).cast(pl.String).str.len_bytes() for key in others]
    return pl.sum_horizontal(texts) + len(join_keys) - 1 > limit


def within(rows: pl.DataFrame, interval: Interval) -> pl.DataFrame:
    """The rows whose event time is in *interval*; a row without one is in none."""
    return rows.filter((pl.col("event_us") >= to_us(interval.start)) & (pl.col("event_us") < to_us(interval.end)))


def shard(rows: pl.DataFrame, join_keys: Sequence[str], *, part: int, parts: int) -> pl.DataFrame:
    """The rows of one of *parts* sets of entities. The hash is the same in every process with this polars version."""
    if parts == 1:
        return rows
    hashed = rows.select(join_keys).hash_rows(seed=0)
    return rows[(hashed % parts == part).arg_true()]  # a filter would keep the text of all rows in memory


def shards(join_keys: Sequence[str], parts: int) -> list[Callable[[pl.DataFrame], pl.DataFrame]]:
    """`shard` for each of *parts* sets of entities."""
    return [partial(shard, join_keys=join_keys, part=part, parts=parts) for part in range(parts)]


def newest(rows: pl.DataFrame, join_keys: Sequence[str]) -> pl.DataFrame:
    """The latest row of each entity by (event_us, created_us, version, position): a total order, so the same row every time.

    Returns: one row per entity, the columns of *rows*, ascending by position.
    """
    ranked = rows.sort("event_us", "created_us", "version", "position")
    places = ranked.select(join_keys).with_row_index("__place").lazy()
    # polars' streaming engine keeps one number per entity, where `unique` gathers all rows of each: half the time.
    last = places.group_by(join_keys).agg(pl.col("__place").max()).collect(engine="streaming")["__place"]
    winners: pl.DataFrame = ranked[last.sort()].sort("position")
    return winners


def have_ties(rows: pl.DataFrame, join_keys: Sequence[str]) -> bool:
    """Whether two rows of an entity are equal in event and created time, so that their commits decide."""
    return bool(rows.select(*join_keys, "event_us", "created_us").is_duplicated().any())


def newest_of(parts: list[pl.DataFrame], join_keys: Sequence[str], *, at_once: int = ROWS_RANKED) -> pl.DataFrame:
    """`newest` over all rows of *parts*, which is emptied. What ranking copies, it copies of about *at_once* rows at a time."""
    rows = pl.concat(parts)
    parts.clear()
    cuts = -(-rows.height // at_once)
    if cuts <= 1:
        return newest(rows, join_keys)
    # Another seed than `shard` has, which would put all rows of a share into one of these.
    cut = (rows.select(join_keys).hash_rows(seed=1) % cuts).cast(pl.UInt32)
    found = [newest(rows.filter(cut == number), join_keys) for number in range(cuts)]
    del rows, cut
    return pl.concat(found).sort("position")


def entities(parts: Sequence[pl.DataFrame], join_keys: Sequence[str]) -> pl.DataFrame:
    """The join keys of all rows of *parts*."""
    return pl.concat([part.select(join_keys) for part in parts])


def joined(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The rows of all *parts*, at least one."""
    return pl.concat(parts)


def among(rows: pl.DataFrame, others: pl.DataFrame, join_keys: Sequence[str]) -> pl.DataFrame:
    """The rows whose entity is among *others*."""
    return rows.join(others, on=join_keys, how="semi", nulls_equal=True)


def moved(rows: pl.DataFrame, base: int) -> pl.DataFrame:
    """*rows* at places that are *base* higher."""
    return rows.with_columns(pl.col("position") + pl.lit(base, pl.UInt32)) if base else rows


def distinct(rows: pl.DataFrame, join_keys: Sequence[str]) -> pl.DataFrame:
    """The join keys of *rows*, each entity once."""
    return rows.select(join_keys).unique()


def without(rows: pl.DataFrame, others: pl.DataFrame, join_keys: Sequence[str]) -> pl.DataFrame:
    """The rows whose entity is not among *others*."""
    return rows.join(others, on=join_keys, how="anti", nulls_equal=True)


def runners_up(rows: pl.DataFrame, join_keys: Sequence[str]) -> pl.DataFrame:
    """The rows but for the `newest` of each entity. Returns: as *rows*, ascending by position."""
    return rows.join(newest(rows, join_keys), on="position", how="anti").sort("position")


def stamped(rows: pl.DataFrame, generation: int, *, at: int | None) -> pl.DataFrame:
    """*rows* with the version that a record carries: *at*, or the row's own commit in *generation*."""
    version = pl.col("version") + stamp(generation, 0) if at is None else pl.lit(at, pl.Int64)
    return rows.with_columns(version=version)


def greatest_event_us(rows: pl.DataFrame) -> int | None:
    """The greatest event time of *rows* in microseconds, None without rows."""
    greatest: int | None = rows.select(pl.col("event_us").max()).item()
    return greatest


def unexpired(rows: pl.DataFrame, view: FeatureView, now: datetime) -> pl.DataFrame:
    """The rows that the view's ttl still lets readers see at *now*."""
    return rows if view.ttl_us is None else rows.filter(pl.col("event_us") + view.ttl_us > to_us(now))
