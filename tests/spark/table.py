"""A Delta table that Spark alone writes, a feature view on it, and what Spark says that the view should serve."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import pytest
from deltalake import DeltaTable

from materialize import pipeline
from materialize.errors import RebuildNeeded
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from tests.spark.session import SparkSession, literal
from tests.stepping import adds_up, run, served

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from materialize.model import RunReport
    from materialize.online.base import OnlineStore

__all__ = ["COLUMNS", "SparkTable", "values"]

#: What `tests.tables.row` makes rows of.
COLUMNS = {
    "user_id": "STRING",
    "event_timestamp": "TIMESTAMP",
    "created": "TIMESTAMP",
    "amount": "DOUBLE",
    "count": "BIGINT",
    "country": "STRING",
}


def values(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """*rows* as the VALUES clause of a statement."""
    return "VALUES " + ", ".join("(" + ", ".join(literal(one[name]) for name in columns) + ")" for one in rows)


@dataclass(slots=True)
class SparkTable:
    """A table in *path*; ``{t}`` in a statement is its name. ``view`` reads it into ``store``."""

    spark: SparkSession
    path: Path
    store: OnlineStore
    view: FeatureView = field(init=False)

    def __post_init__(self) -> None:
        features = {"amount": "float64", "count": "int64", "country": "string"}
        self.view = FeatureView(
            name="spending",
            source=str(self.path),
            join_keys=("user_id",),
            event_timestamp="event_timestamp",
            created_timestamp="created",
            features={name: FeatureType.parse(kind) for name, kind in features.items()},
            online_stores=("default",),
        )

    def change_view(self, **changes: Any) -> FeatureView:
        """Set fields of ``view``; *features* as text."""
        if "features" in changes:
            changes["features"] = {name: FeatureType.parse(kind) for name, kind in changes["features"].items()}
        self.view = replace(self.view, **changes)
        return self.view

    @property
    def name(self) -> str:
        return f"delta.`{self.path}`"

    @property
    def delta(self) -> DeltaTable:
        return DeltaTable(str(self.path))

    # --- writing, by Spark ---

    def sql(self, statement: str) -> list[dict[str, Any]]:
        return self.spark.sql(statement.replace("{t}", self.name))

    def create(
        self, *clauses: str, columns: Mapping[str, str] = COLUMNS, properties: Mapping[str, str] | None = None
    ) -> None:
        """Create the table; *clauses* such as ``PARTITIONED BY (country)``."""
        typed = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        listed = ", ".join(f"'{name}' = '{value}'" for name, value in (properties or {}).items())
        told = [f"TBLPROPERTIES ({listed})"] if listed else []
        self.sql(" ".join([f"CREATE TABLE {{t}} ({typed}) USING delta", *clauses, *told]))

    def insert(self, *rows: Mapping[str, Any]) -> None:
        columns = list(rows[0])
        self.sql(f"INSERT INTO {{t}} ({', '.join(columns)}) {values(rows, columns)}")

    def set_properties(self, **properties: str) -> None:
        listed = ", ".join(f"'{name.replace('__', '.')}' = '{value}'" for name, value in properties.items())
        self.sql(f"ALTER TABLE {{t}} SET TBLPROPERTIES ({listed})")

    # --- running, and what Spark says ---

    def incremental(self, *, force: bool = False) -> RunReport:
        return pipeline.incremental(self.view, self.store, replace(run(), force=force))

    def follow(self, *, force: bool = False) -> RunReport:
        """An incremental run that ends with the whole truth; every run but the first reads changes, not the snapshot."""
        report = self.incremental(force=force)
        assert adds_up(report)
        assert report.quarantined == 0
        assert report.to_version == self.delta.version()
        assert report.reason.startswith("first run" if report.from_version is None else "from the watermark")
        self.check()
        return report

    def needs_rebuild(self, because: str) -> RunReport:
        """An incremental run cannot be exact and says why; it leaves the store as it was; a rebuild is exact."""
        before = self.served()
        with pytest.raises(RebuildNeeded, match=because):
            self.incremental()
        assert self.served() == before
        report = pipeline.rebuild(self.view, self.store, run())
        assert adds_up(report)
        self.check()
        return report

    def check(self) -> None:
        """Whether what is served is exactly what Spark says, floats by their bits."""
        assert self.served() == self.expected()

    def served(self) -> dict[str, dict[str, Any]]:
        return {
            key: {name: _exact(value) for name, value in features.items()}
            for key, features in served(self.view, self.store).items()
        }

    def expected(self) -> dict[str, dict[str, Any]]:
        """The latest row of every entity in Spark's words."""
        view = self.view
        keys, latest = ", ".join(view.join_keys), [f"{name} DESC" for name in view.order_columns[len(view.join_keys) :]]
        numbered = f"row_number() OVER (PARTITION BY {keys} ORDER BY {', '.join(latest)}) AS place"
        rows = self.sql(f"SELECT * FROM (SELECT *, {numbered} FROM {{t}}) WHERE place = 1")
        return {
            "|".join(str(one[key]) for key in view.join_keys): {name: _exact(one[name]) for name in view.features}
            for one in rows
        }


def _exact(value: Any) -> Any:
    """Equal values are the same value: a float is its digits, a time without a zone is UTC."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=timezone.utc)
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return value
