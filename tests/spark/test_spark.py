"""Tables that Apache Spark and Delta Lake write: after each statement a run must hold what Spark itself says is the latest row."""

from __future__ import annotations

import os
import shutil
import struct
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.errors import OfflineStoreError, RebuildNeeded
from materialize.model import FeatureType, FeatureView
from materialize.online.memory import MemoryStore
from tests.spark.session import SparkMissing, SparkSession, literal
from tests.stepping import run, served
from tests.tables import at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.online.base import OnlineStore

#: One session for all tests, whatever process runs them.
pytestmark = pytest.mark.xdist_group("spark")
COLUMNS = "user_id STRING, event_timestamp TIMESTAMP, created TIMESTAMP, amount DOUBLE, count BIGINT, country STRING"
VECTORS = "'delta.enableDeletionVectors'='true'"
NO_VECTORS = "'delta.enableDeletionVectors'='false'"


def values(*rows: tuple[Any, ...]) -> str:
    """Rows of `COLUMNS` as SQL, from (user, minute, amount, count, country); the created time is the event's."""
    shown = ((user, at(minute), at(minute), *others) for user, minute, *others in rows)
    return "VALUES " + ", ".join(f"({', '.join(map(literal, row))})" for row in shown)


FIRST = values(
    ("a", 1, 1.0, 1, "DE"),
    ("a", 2, 2.0, None, "FR"),
    ("b", 1, -0.0, 2, None),
    ("c", 1, float("nan"), -(2**63), "x|{}%"),
    ("d", 5, None, 3, ""),
    ("e", 1, float("inf"), 4, "DE"),
    ("f", 9, 9.5, 9, "ü€😀"),
)
SECOND = values(("a", 3, 3.0, 1, "DE"), ("g", 1, 0.0, 1, "FR"), ("b", 0, 7.0, 7, "DE"))
UPDATE = "UPDATE {t} SET amount = 0.0 WHERE user_id = 'b'"
DELETE = "DELETE FROM {t} WHERE user_id = 'a' AND amount > 1 OR user_id = 'c'"
MERGE = (
    f"MERGE INTO {{t}} t USING ({values(('d', 5, 5.0, 5, 'DE'), ('e', 1, 1.0, 1, 'DE'), ('h', 1, 1.0, 1, 'DE'))}"
    " AS s(user_id, event_timestamp, created, amount, count, country)) s"
    " ON t.user_id = s.user_id AND t.event_timestamp = s.event_timestamp"
    " WHEN MATCHED AND s.user_id = 'e' THEN DELETE WHEN MATCHED THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *"
)
EVERYTHING = (f"INSERT INTO {{t}} {SECOND}", UPDATE, DELETE, MERGE, "RESTORE TABLE {t} TO VERSION AS OF 1")


@dataclass(frozen=True, slots=True)
class Case:
    """A table and what happens to it. ``raised``: number of a step -> the error that the run after it must raise; a rebuild follows."""

    name: str
    steps: tuple[str, ...]
    properties: str = NO_VECTORS
    clause: str = ""
    columns: str = COLUMNS
    features: dict[str, str] = field(
        default_factory=lambda: {"amount": "float64", "count": "int64", "country": "string"}
    )
    raised: dict[int, type[OfflineStoreError]] = field(default_factory=dict)
    timestamp_ntz: Any = None


CASES = (
    Case("copy on write", EVERYTHING),
    Case("deletion vectors", (*EVERYTHING, DELETE, "OPTIMIZE {t}", "REORG TABLE {t} APPLY (PURGE)"), VECTORS),
    Case("column mapping by name", EVERYTHING, "'delta.columnMapping.mode'='name'"),
    Case("column mapping by id with vectors", EVERYTHING, f"'delta.columnMapping.mode'='id', {VECTORS}"),
    Case(
        "partitions under a column mapping", EVERYTHING, "'delta.columnMapping.mode'='name'", "PARTITIONED BY (country)"
    ),
    Case("partitions with vectors", EVERYTHING, VECTORS, "PARTITIONED BY (country)"),
    Case(
        "liquid clustering and row tracking",
        (*EVERYTHING, "OPTIMIZE {t}"),
        "'delta.enableRowTracking'='true'",
        "CLUSTER BY (user_id)",
    ),
    Case("v2 checkpoints", EVERYTHING, f"'delta.checkpointPolicy'='v2', 'delta.checkpointInterval'='2', {VECTORS}"),
    Case(
        "change feed and in-commit timestamps",
        EVERYTHING,
        "'delta.enableChangeDataFeed'='true', 'delta.enableInCommitTimestamps'='true'",
    ),
    Case(
        "overwrites",
        (
            f"INSERT OVERWRITE {{t}} {SECOND}",
            f"INSERT INTO {{t}} REPLACE WHERE country = 'FR' {values(('z', 1, 1.0, 1, 'FR'))}",
            "OPTIMIZE {t} ZORDER BY (user_id)",
            "TRUNCATE TABLE {t}",
            f"INSERT INTO {{t}} {FIRST}",
        ),
    ),
    Case(
        "columns added, renamed and dropped",
        (
            "ALTER TABLE {t} ADD COLUMN later INT FIRST",
            "ALTER TABLE {t} RENAME COLUMN later TO latest",
            "ALTER TABLE {t} DROP COLUMN latest",
            f"INSERT INTO {{t}} {SECOND}",
            "ALTER TABLE {t} DROP COLUMN amount",
            "ALTER TABLE {t} ADD COLUMN amount DOUBLE",
            UPDATE,
        ),
        "'delta.columnMapping.mode'='name'",
        raised={4: OfflineStoreError, 5: RebuildNeeded},
    ),
    Case(
        "widened types",
        (
            "ALTER TABLE {t} CHANGE COLUMN number TYPE BIGINT",
            "ALTER TABLE {t} CHANGE COLUMN ratio TYPE DOUBLE",
            "ALTER TABLE {t} CHANGE COLUMN price TYPE DECIMAL(12, 2)",
            "INSERT INTO {t} SELECT user_id, event_timestamp, created, 4000000000, 1.1D, 1234567890.25 FROM {t} WHERE user_id = 'a'",
            "UPDATE {t} SET ratio = 2.5 WHERE user_id = 'b'",
            "DELETE FROM {t} WHERE user_id = 'c'",
        ),
        f"'delta.enableTypeWidening'='true', {NO_VECTORS}",
        columns="user_id STRING, event_timestamp TIMESTAMP, created TIMESTAMP, number INT, ratio FLOAT, price DECIMAL(8, 2)",
        features={"number": "int64", "ratio": "float64", "price": "decimal(12,2)"},
    ),
    Case("dropped and created again", ("DROP", f"INSERT INTO {{t}} {SECOND}"), raised={0: RebuildNeeded}),
)


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkSession]:
    with ExitStack() as stack:
        try:
            session = stack.enter_context(SparkSession(tmp_path_factory.mktemp("spark")))
        except SparkMissing as missing:
            if os.environ.get("MATERIALIZE_SPARK") == "require":
                pytest.fail(f"no Spark: {missing}", pytrace=False)
            pytest.skip(f"NOT TESTED against Spark: {missing}")
        yield session


def exact(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Values as they compare exactly: floats by their bits."""
    return {
        key: {name: struct.pack("<d", value) if isinstance(value, float) else value for name, value in features.items()}
        for key, features in rows.items()
    }


def latest(spark: SparkSession, table: str, view: FeatureView) -> dict[str, dict[str, Any]]:
    """The latest row of each entity, as Spark sees it."""
    newest = "row_number() OVER (PARTITION BY user_id ORDER BY event_timestamp DESC, created DESC NULLS LAST) AS newest"
    names = ", ".join(view.features)
    rows = spark.sql(f"SELECT user_id, {names} FROM (SELECT *, {newest} FROM {table}) WHERE newest = 1")
    return {row["user_id"]: {name: row[name] for name in view.features} for row in rows}


def view_of(folder: Path, features: dict[str, str], **changes: Any) -> FeatureView:
    return FeatureView(
        name="spark",
        source=str(folder),
        join_keys=("user_id",),
        event_timestamp="event_timestamp",
        created_timestamp="created",
        features={name: FeatureType.parse(kind) for name, kind in features.items()},
        online_stores=("default",),
        **changes,
    )


def check(spark: SparkSession, table: str, view: FeatureView, store: OnlineStore) -> None:
    assert exact(served(view, store)) == exact(latest(spark, table, view))


@pytest.mark.parametrize(
    ("case", "every"),
    [*((case, 1) for case in CASES), *((case, 100) for case in CASES[:2])],
    ids=[*(case.name for case in CASES), *(f"{case.name}, all at once" for case in CASES[:2])],
)
def test_tables_of_spark_are_read_exactly(spark: SparkSession, tmp_path: Path, case: Case, every: int) -> None:
    folder = tmp_path / "t"
    table, view = f"delta.`{folder}`", view_of(folder, case.features)
    created = f"CREATE TABLE {table} ({case.columns}) USING delta {case.clause} TBLPROPERTIES ({case.properties})"
    spark.sql(created)
    first = (
        "SELECT user_id, event_timestamp, created, int(count % 100), float(count % 8), decimal(count % 1000) / 4 FROM"
    )
    widened = case.columns != COLUMNS
    spark.sql(
        f"INSERT INTO {table} "
        + (f"{first} ({FIRST} AS s(user_id, event_timestamp, created, a, count, c))" if widened else FIRST)
    )
    with MemoryStore() as store:
        pipeline.incremental(view, store, run("first"))
        check(spark, table, view, store)
        for number, step in enumerate(case.steps):
            if step == "DROP":
                shutil.rmtree(folder)
                spark.sql(created)
            else:
                spark.sql(step.replace("{t}", table))
            if (number + 1) % every and number + 1 < len(case.steps):
                continue
            if number in case.raised:
                with pytest.raises(case.raised[number]):
                    pipeline.incremental(view, store, run())
                if case.raised[number] is RebuildNeeded:
                    pipeline.rebuild(view, store, run())
                    check(spark, table, view, store)
                continue
            try:
                report = pipeline.incremental(view, store, run())
            except RebuildNeeded:
                assert case.raised, "nothing of this case needs a rebuild"
                report = pipeline.rebuild(view, store, run())
            check(spark, table, view, store)
            if step.startswith(("OPTIMIZE", "REORG")) and every == 1:
                assert report.rows_read == 0
