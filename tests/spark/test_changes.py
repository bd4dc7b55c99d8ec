"""What Spark does to the rows of a table, in every layout that it can give the table: each run ends with what Spark says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from tests.spark.table import COLUMNS, values
from tests.tables import row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.spark.table import SparkTable

pytestmark = pytest.mark.xdist_group("spark")  # one session for all

VECTORS = {"delta.enableDeletionVectors": "true"}
BY_NAME, BY_ID = {"delta.columnMapping.mode": "name"}, {"delta.columnMapping.mode": "id"}
V2_CHECKPOINTS = {"delta.checkpointPolicy": "v2", "delta.checkpointInterval": "2"}
CHECKPOINTS = {
    "delta.checkpointInterval": "2",
    "delta.checkpoint.writeStatsAsJson": "false",
    "delta.checkpoint.writeStatsAsStruct": "true",
}
#: A table's layout: its properties and clauses.
LAYOUTS: dict[str, tuple[Mapping[str, str], str]] = {
    "plain": ({}, ""),
    "vectors": (VECTORS, ""),
    "mapping by name": (BY_NAME, ""),
    "mapping by id, vectors": (BY_ID | VECTORS, ""),
    "partitioned, mapping by name, vectors": (BY_NAME | VECTORS, "PARTITIONED BY (country)"),
    "partitioned, mapping by id": (BY_ID, "PARTITIONED BY (country, count)"),
    "partitioned by time": ({}, "PARTITIONED BY (event_timestamp)"),
    "v2 checkpoints, vectors": (V2_CHECKPOINTS | VECTORS, ""),
    "checkpoints, vectors": (CHECKPOINTS | VECTORS, ""),
    "clustered": ({}, "CLUSTER BY (user_id)"),
    "row tracking, change data feed": ({"delta.enableRowTracking": "true", "delta.enableChangeDataFeed": "true"}, ""),
    "random prefixes, commit times": (
        {"delta.randomizeFilePrefixes": "true", "delta.enableInCommitTimestamps": "true"} | VECTORS,
        "",
    ),
}

FIRST = (
    row("a", 1, 1.0),
    row("b", 2, 2.0),
    row("b", 1, 0.5),
    row("c", 3, math.nan, count=None, country=None),
    row("d", 4, -0.0, country="A B/%ü=\\'\"|"),
    row("e", 5, math.inf, count=-(2**63), country="😀"),
    row("f", 6, None, country=" "),
)
SECOND = (row("a", 10, 10.0), row("b", 0, 20.0), row("g", 11, 11.0, count=2**63 - 1), row("h", 12, 0.0))

UPDATE = "UPDATE {t} SET amount = 77.5, country = 'FR' WHERE user_id IN ('b', 'c')"
DELETE = "DELETE FROM {t} WHERE user_id = 'a' AND amount = 10 OR user_id = 'd'"
#: Updates e and f, deletes h, inserts i.
MERGE = (
    "MERGE INTO {t} t USING ("
    + values([row("e", 5, 50.0), row("f", 6, 60.0), row("h", 12, 0.0), row("i", 13, 13.0)])
    + f" AS s({', '.join(COLUMNS)})) s ON t.user_id = s.user_id AND t.event_timestamp = s.event_timestamp "
    "WHEN MATCHED AND s.user_id = 'h' THEN DELETE WHEN MATCHED THEN UPDATE SET * WHEN NOT MATCHED THEN INSERT *"
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_insert_update_delete_and_merge_are_followed_in_every_layout(table: SparkTable, layout: str) -> None:
    properties, clause = LAYOUTS[layout]
    table.create(clause, properties=properties)
    table.insert(*FIRST)
    assert table.incremental().written == 6

    table.insert(*SECOND)
    table.sql(DELETE)
    table.sql(UPDATE)
    report = table.follow()
    assert (report.deleted, report.written) == (1, 5)  # d is gone; a as it was before; b, c, g, h

    table.sql(MERGE)
    report = table.follow()
    assert (report.deleted, report.written) == (1, 3)  # h; e, f, i


@pytest.mark.parametrize("properties", [{}, VECTORS], ids=["plain", "vectors"])
def test_each_statement_alone_is_followed(table: SparkTable, properties: Mapping[str, str]) -> None:
    table.create(properties=properties)
    table.insert(*FIRST)
    table.insert(*SECOND)
    table.follow()

    table.sql(DELETE)
    report = table.follow()
    assert (report.deleted, report.written) == (1, 1)

    table.sql(UPDATE)
    assert table.follow().written == 2

    table.sql("UPDATE {t} SET amount = amount WHERE user_id = 'e'")
    assert not table.follow().changed

    table.sql("UPDATE {t} SET user_id = 'z' WHERE user_id = 'f'")
    report = table.follow()
    assert (report.deleted, report.written) == (1, 1)

    table.sql("DELETE FROM {t}")
    assert table.follow(force=True).deleted == 7  # a table that is suddenly empty stops a run
    assert table.served() == {}


@pytest.mark.parametrize("properties", [{}, VECTORS], ids=["plain", "vectors"])
def test_restore_is_followed(table: SparkTable, properties: Mapping[str, str]) -> None:
    table.create(properties=properties)
    table.insert(*FIRST)
    table.insert(*SECOND)  # version 2
    table.incremental()
    table.sql(DELETE)
    table.sql(UPDATE)
    table.incremental()

    table.sql(
        "RESTORE TABLE {t} TO VERSION AS OF 2"
    )  # what was deleted comes back, what was updated gets its old values
    assert table.follow().changed

    table.sql("RESTORE TABLE {t} TO VERSION AS OF 1")
    assert table.follow().deleted == 2


def test_overwrites_are_followed(table: SparkTable) -> None:
    table.create("PARTITIONED BY (country)")
    table.insert(*FIRST, *SECOND)
    table.incremental()

    table.sql(f"INSERT INTO {{t}} REPLACE WHERE country = 'DE' AND amount > 9 {values([row('a', 10, 10.5)])}")
    assert table.follow().deleted == 1  # g

    table.sql("SET spark.sql.sources.partitionOverwriteMode = dynamic")
    table.sql(f"INSERT OVERWRITE {{t}} {values([row('x', 1, 1.0, country=None), row('d', 5, 4.0, country='😀')])}")
    table.sql("SET spark.sql.sources.partitionOverwriteMode = static")
    assert table.follow().written == 2
    assert "c" not in table.served()

    table.sql(f"INSERT OVERWRITE {{t}} {values([row('a', 10, 10.5), row('y', 1, 1.0)])}")
    assert table.follow().written == 2  # a too: it lost its older row
    assert sorted(table.served()) == ["a", "y"]

    table.sql("TRUNCATE TABLE {t}")
    table.insert(row("y", 0, 0.0))
    assert table.follow().deleted == 1


@pytest.mark.parametrize(
    ("clause", "statement"),
    [("", "OPTIMIZE {t} ZORDER BY (user_id)"), ("CLUSTER BY (user_id)", "OPTIMIZE {t} FULL")],
    ids=["z-order", "clustering"],
)
def test_moving_rows_from_file_to_file_costs_nothing(table: SparkTable, clause: str, statement: str) -> None:
    table.create(clause, properties=VECTORS)
    table.insert(*FIRST)
    table.incremental()
    table.insert(*SECOND)
    table.sql(statement)
    assert table.follow().rows_read == 4  # the ones that were inserted, from the files that are not live any more

    table.sql(DELETE)
    table.incremental()
    table.sql("REORG TABLE {t} APPLY (PURGE)")
    table.sql("OPTIMIZE {t}")
    report = table.follow()
    assert (report.rows_read, report.changed) == (0, False)


def test_vacuum_matters_only_where_removed_files_have_to_be_compared(table: SparkTable) -> None:
    table.create()
    table.insert(*FIRST)
    table.insert(*SECOND)
    table.sql(DELETE)
    table.incremental()

    table.sql("VACUUM {t} RETAIN 0 HOURS")
    table.insert(row("v", 1, 1.0))
    assert table.follow().written == 1

    table.sql(UPDATE)
    table.sql("VACUUM {t} RETAIN 0 HOURS")
    table.needs_rebuild("vacuumed")


def test_deletion_vectors_over_many_rows_are_read_row_by_row(table: SparkTable) -> None:
    """More rows than fit one container of a roaring bitmap, deleted in patterns that fill each kind of container."""
    table.create(properties=VECTORS)
    user, when = "concat('u', id % 100)", "TIMESTAMP'2095-01-01 00:00:00Z' + make_dt_interval(0, 0, 0, id)"
    rows = f"SELECT {user}, {when}, {when}, double(id), id, 'DE' FROM range(0, 150000, 1, 1)"
    table.sql(f"INSERT INTO {{t}} {rows}")
    table.incremental()

    table.sql("DELETE FROM {t} WHERE count % 3 = 0")  # scattered
    table.sql("DELETE FROM {t} WHERE count BETWEEN 60000 AND 149950 AND count % 100 < 50")  # runs
    assert table.follow().written > 0

    table.sql("DELETE FROM {t} WHERE user_id = 'u77' OR count IN (149999, 149998)")
    report = table.follow()
    assert (report.deleted, report.written) == (1, 2)
