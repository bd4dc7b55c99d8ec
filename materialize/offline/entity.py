"""One entity in; its rows in a Delta table out, each with the commit and the data file that brought it, also those that are gone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from materialize.offline.dtypes import polars_type
from materialize.offline.log import OLDEST
from materialize.offline.rows import read_features, read_order
from materialize.offline.table import reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.offline.log import DataFile
    from materialize.offline.table import OfflineTable

__all__ = ["EntityRows", "join_values", "read_entity"]

#: Columns that say where a row is and not what it is.
PLACE = ("version", "position", "__file", "__removed_by")


@dataclass(frozen=True, slots=True)
class EntityRows:
    """``order``: the join keys, event_us, created_us Int64, version Int64 (the commit, null where the log does not tell), position UInt32, __exact Boolean
    (else an earlier commit may have brought it), __file String (its path in the log), __removed_by Int64 (the commit after which it is gone, null for
    a row that is there). ``features``: the view's features in order, in their column types, of the same rows.
    ``unread``: files that were removed from the table and not looked at.
    """

    order: pl.DataFrame
    features: pl.DataFrame
    unread: int


def join_values(table: OfflineTable, parts: Sequence[str]) -> pl.DataFrame:
    """One row with the join keys of an entity in their column types, from their texts. Raises ValueError for a text that is no such value."""
    columns = []
    for name, text in zip(table.view.join_keys, parts, strict=True):
        dtype = polars_type(table.columns[name].type)
        value = pl.Series(name, [text])
        try:
            if dtype == pl.Boolean:
                value = pl.Series(name, [{"true": True, "false": False}[text]])
            columns.append(value.str.to_date("%Y-%m-%d") if dtype == pl.Date else value.cast(dtype))
        except (KeyError, pl.exceptions.PolarsError):
            raise ValueError(f"join key {name!r}: expected a value of type {table.columns[name].type}") from None
    return pl.DataFrame(columns)


def read_entity(table: OfflineTable, of: pl.DataFrame, *, most_gone: int) -> EntityRows:
    """The rows of the entity with the join keys *of* (one row) in the pinned version, newest first; then those that commits removed, as far as
    their data files are left: of the *most_gone* that were removed last.

    Files whose statistics leave no room for integer join keys are not read. A row that was only moved to another file is no other row.
    """
    live = _rows(table, table.snapshot_files(), of)
    removed = _removed_files(table)
    left = dict(list(removed.items())[:most_gone])
    with reading(table.view):
        gone_paths = table.log.missing(left)
    left = {path: found for path, found in left.items() if path not in gone_paths}
    gone = _rows(table, [table.data_file(action, version=OLDEST) for _, action in left.values()], of)
    by = [left[path][0] for path in gone["__file"]]
    gone = gone.with_columns(pl.Series("__removed_by", by, dtype=pl.Int64)).sort("__removed_by", descending=True)
    # What is in the table again, or still, in the same or another file, is not gone.
    seen = {_identity(row) for row in live.iter_rows(named=True)}
    fresh = []
    for row in gone.iter_rows(named=True):
        fresh.append((same := _identity(row)) not in seen)
        seen.add(same)
    gone = gone.filter(pl.Series(fresh, dtype=pl.Boolean))
    both = pl.concat([live.with_columns(__removed_by=pl.lit(None, pl.Int64)), gone])
    newest = [pl.col("__removed_by").is_null(), "event_us", "created_us", "version", "position"]
    both = _with_commits(table, both).sort(newest, descending=True, nulls_last=True)
    features = {_apart(name): name for name in table.view.features}
    return EntityRows(
        both.drop(list(features)), both.select(list(features)).rename(features).rechunk(), len(removed) - len(left)
    )


def _apart(feature: str) -> str:
    """The column of a feature beside the columns of the order, which it may be called like."""
    return f"__feature {feature}"


def _identity(row: dict[str, Any]) -> str:
    return repr([value for name, value in row.items() if name not in PLACE])


def _rows(table: OfflineTable, files: list[DataFile], of: pl.DataFrame) -> pl.DataFrame:
    found = read_order(table, files, of=of)
    same = found.frame.sort("position")
    blocks = [features for _, features in read_features(table, found, same["position"])]
    empty = {name: polars_type(table.columns[name].type) for name in table.view.features}
    features = pl.concat(blocks) if blocks else pl.DataFrame(schema=empty)
    of_file = np.searchsorted(np.cumsum(found.counts), same["position"].to_numpy(), side="right")
    paths = pl.Series("__file", [found.files[int(number)].path for number in of_file], dtype=pl.String)
    return pl.concat([same.with_columns(paths), features.rename(_apart)], how="horizontal")


def _removed_files(table: OfflineTable) -> dict[str, tuple[int, dict[str, Any]]]:
    """The commit that last removed rows of each data file, and how; newest first, as far as the log goes back."""
    with reading(table.view):
        commits = table.log.commits_left(table.version)
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    for commit in reversed(commits):
        for remove in commit.removes:
            described = remove.get("partitionValues") is not None or not table.partition_columns
            if remove["dataChange"] and described:
                found.setdefault(remove["path"], (commit.version, remove))
    return found


def _with_commits(table: OfflineTable, rows: pl.DataFrame) -> pl.DataFrame:
    with reading(table.view):
        brought, appended = table.log.file_versions(table.version), table.log.appended_files(table.version)
    versions = [brought.get(path, OLDEST) for path in rows["__file"]]
    return rows.with_columns(
        version=pl.Series([None if one == OLDEST else one for one in versions], dtype=pl.Int64),
        __exact=pl.Series([path in appended for path in rows["__file"]], dtype=pl.Boolean),
    )
