"""Appending: one commit with exactly the given rows, its version known whoever else commits, nothing quoted where it is refused."""

from __future__ import annotations

import json
import shutil
import threading
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder, write_deltalake
from deltalake.schema import Field, PrimitiveType, Schema

from materialize.errors import OfflineStoreError, RowsError, UnavailableError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.offline import Appended, Appender, digest, given_rows, open_table
from materialize.push import push
from tests.stepping import amounts, incremental, run
from tests.tables import SCHEMA, T0, UTC_TIME, Table, at, row

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.offline import GivenRows
    from materialize.online.base import OnlineStore

SECRET = "s3cret-value"


def appended(
    appender: Appender, *rows: Any, token: str = "token", push_id: str | None = None, content: str = "1.0 abc"
) -> Appended:
    table = appender.newest()
    given = given_rows(table, list(rows))
    return appender.append(table, given.data, token=token, run_id="run", push_id=push_id, content=content)


def info(table: Table, version: int) -> dict[str, Any]:
    (found,) = [action["commitInfo"] for action in table.actions(version) if "commitInfo" in action]
    return found  # type: ignore[no-any-return]


@pytest.fixture
def ready(table: Table) -> Table:
    table.append(row("a", 1, 1.0))
    return table


# --- one commit --------------------------------------------------------------------------------------------------------


def test_commit_says_who_made_it(ready: Table) -> None:
    assert appended(Appender(ready.view), row("b", 2), push_id="id-1", content="1.0 abc") == Appended(1, again=False)

    told = info(ready, 1)
    assert {name: told[name] for name in told if name.startswith("materialize.")} == {
        "materialize.writer": "materialize push",
        "materialize.token": "token",
        "materialize.push_id": "id-1",
        "materialize.digest": "1.0 abc",
    }
    assert told["run_id"] == "run"
    assert sum("add" in action for action in ready.actions(1)) == 1


def test_each_of_many_writers_knows_the_version_of_its_commit(ready: Table) -> None:
    found: dict[str, int | None] = {}
    shared = Appender(ready.view)

    def write(name: int) -> None:
        appender = shared if name % 2 else Appender(ready.view)
        for number in range(5):
            token = f"{name}-{number}"
            found[token] = appended(appender, row("b", number), token=token).version

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    said = {info(ready, version).get("materialize.token"): version for version in range(1, ready.version + 1)}
    assert said == found
    assert len(said) == 20


def test_the_same_id_at_the_same_time_is_committed_once(ready: Table) -> None:
    """The second one opened the table before the first one committed: Delta refuses it, and it finds the other's commit."""
    late = Appender(ready.view)
    table = late.newest()
    given = given_rows(table, [row("b", 2)])

    first = appended(Appender(ready.view), row("b", 2), token="first", push_id="id-1", content="1.0 abc")
    second = late.append(table, given.data, token="second", run_id="run", push_id="id-1", content="1.0 abc")

    assert (first, second) == (Appended(1, again=False), Appended(1, again=True))
    assert ready.version == 1


def test_the_same_id_at_the_same_time_with_other_rows_is_refused(ready: Table) -> None:
    late = Appender(ready.view)
    table = late.newest()
    given = given_rows(table, [row("b", 3)])
    appended(Appender(ready.view), row("b", 2), token="first", push_id="id-1", content="1.0 abc")

    with pytest.raises(RowsError, match="their push_id was committed with other rows"):
        late.append(table, given.data, token="second", run_id="run", push_id="id-1", content="1.0 xyz")

    assert ready.version == 1


def test_rows_are_not_compared_over_versions_of_polars(ready: Table) -> None:
    appended(Appender(ready.view), row("b", 2), token="first", push_id="id-1", content="1.0 abc")

    again = appended(Appender(ready.view), row("b", 2), token="second", push_id="id-1", content="2.0 xyz")

    assert again == Appended(1, again=True)


def test_digest_tells_rows_apart_by_what_the_view_reads(ready: Table) -> None:
    table = open_table(ready.view)
    digests = [
        digest(ready.view, given_rows(table, rows).data)
        for rows in ([row("a", 1)], [row("a", 1)], [row("a", 1, 2.0)], [row("b", 1)], [row("a", 1), row("a", 1)])
    ]

    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_a_table_that_changed_between_opening_and_commit_is_refused(ready: Table) -> None:
    appender = Appender(ready.view)
    table = appender.newest()
    given = given_rows(table, [row("b", 2)])
    ready.delta.alter.set_table_properties({"delta.logRetentionDuration": "interval 40 days"})

    with pytest.raises(UnavailableError, match=r"Metadata changed.*Nothing was written. Push again"):
        appender.append(table, given.data, token="token", run_id="run", push_id=None, content="")

    assert appended(appender, row("b", 2)).version == 2


def test_columns_that_changed_for_another_thread_are_noticed(ready: Table) -> None:
    appender = Appender(ready.view)
    table = appender.newest()
    given = given_rows(table, [row("b", 2)])
    wider = ready.arrow([row("c", 1)]).append_column("more", pa.array([1]))
    ready.append_table(wider, schema_mode="merge")
    appender.newest()

    with pytest.raises(UnavailableError, match="changed its columns meanwhile"):
        appender.append(table, given.data, token="token", run_id="run", push_id=None, content="")


def test_the_table_is_held_open_for_some_commits_and_then_opened_anew(ready: Table) -> None:
    appender = Appender(ready.view)
    held = []
    for minute in range(30):
        held.append(appender.newest().delta)
        appended(appender, row("b", minute))

    opened = [number for number in range(1, 30) if held[number] is not held[number - 1]]
    assert opened == [20]
    assert ready.version == 30


def test_a_table_that_was_made_anew_is_opened_anew(ready: Table) -> None:
    appender = Appender(ready.view)
    for minute in range(3):
        appended(appender, row("b", minute))
    shutil.rmtree(ready.path)
    for minute in range(6):  # as far as the old one was, and further
        ready.append(row("new", minute))

    table = appender.newest()

    assert (table.table_id, table.version) == (ready.delta.metadata().id, 5)
    assert appended(appender, row("b", 9)).version == 6


# --- what cannot be written --------------------------------------------------------------------------------------------


def test_rows_that_break_a_constraint_are_refused_and_not_quoted(ready: Table) -> None:
    ready.delta.alter.add_constraint({"small": "amount < 10"})

    with pytest.raises(RowsError, match=r"break a constraint.*Nothing was written") as refused:
        appended(Appender(ready.view), row(SECRET, 2, 99.0))

    assert SECRET not in str(refused.value)
    assert ready.version == 1


def test_a_null_that_the_table_does_not_take_is_told_by_its_index(table: Table) -> None:
    schema = SCHEMA.set(SCHEMA.get_field_index("country"), pa.field("country", pa.string(), nullable=False))
    table.create(schema=schema)

    given = given_rows(open_table(table.view), [row("a", 1), row("b", 2, country=None)])

    assert given.refused == {1: "column 'country': null, which the table does not take"}


def test_a_table_with_a_feature_that_cannot_be_written_is_refused(ready: Table) -> None:
    features = {"minReaderVersion": 1, "minWriterVersion": 7, "writerFeatures": ["identityColumns"]}
    ready.commit({"protocol": features})

    with pytest.raises(OfflineStoreError, match=r"cannot write.*IdentityColumns.*Nothing was written"):
        appended(Appender(ready.view), row("b", 2))

    assert ready.version == 1


def test_a_commit_after_which_something_fails_is_found(table: Table) -> None:
    """The checkpoint that deltalake writes after the commit cannot be written."""
    table.append(row("a", 1, 1.0), configuration={"delta.checkpointInterval": "1"})
    (table.path / "_delta_log" / f"{1:020d}.checkpoint.parquet" / "in the way").mkdir(parents=True)
    appender = Appender(table.view)

    assert appended(appender, row("b", 2)) == Appended(1, again=False)
    assert info(table, 1)["materialize.token"] == "token"


def test_a_table_that_went_away_in_the_commit_leaves_it_open_whether_it_is_there(ready: Table) -> None:
    appender = Appender(ready.view)
    table = appender.newest()
    given = given_rows(table, [row(SECRET, 2)])
    shutil.rmtree(ready.path)
    ready.path.write_text("in the way")

    with pytest.raises(OfflineStoreError, match=r"Whether they are in the table is not known") as told:
        appender.append(table, given.data, token="token", run_id="run", push_id=None, content="")

    assert SECRET not in str(told.value)


def test_a_table_that_is_not_there_is_told(table: Table) -> None:
    with pytest.raises(OfflineStoreError, match="found no readable table there"):
        Appender(table.view).newest()


# --- tables of all kinds -----------------------------------------------------------------------------------------------


def test_rows_keep_their_order_so_that_the_last_of_two_equal_times_wins(table: Table, store: OnlineStore) -> None:
    table.append(row("z", 1))
    incremental(table, store)

    push(table.view, store, [row(f"u{n % 7}", 1, float(n)) for n in range(5_000)], run())

    there = amounts(table, store)
    incremental(table, store)
    assert amounts(table, store) == there
    assert there["u0"] == float(max(n for n in range(5_000) if n % 7 == 0))


def test_partitioned_tables_get_their_rows_by_partition(table: Table, store: OnlineStore) -> None:
    table.create(partition_by=["country"])
    table.append(row("z", 1))
    incremental(table, store)

    push(table.view, store, [row("a", 2, 1.0, country="FR"), row("b", 2, 2.0, country=None)], run())

    report = incremental(table, store)
    assert (report.written, report.unchanged) == (0, 2)
    assert amounts(table, store) == {"z": 0.0, "a": 1.0, "b": 2.0}


def test_a_partition_column_is_needed(table: Table) -> None:
    table.create(partition_by=["day"], schema=SCHEMA.append(pa.field("day", pa.date32())))

    with pytest.raises(RowsError, match="'day': found no such column in the rows"):
        given_rows(open_table(table.view), [row("a", 1)])


def test_generated_columns_are_left_to_the_table(table: Table, store: OnlineStore) -> None:
    fields = Schema.from_arrow(SCHEMA).fields
    day = Field("day", PrimitiveType("date"), metadata={"delta.generationExpression": "CAST(event_timestamp AS DATE)"})
    DeltaTable.create(str(table.path), schema=Schema([*fields, day]), partition_by=["day"])
    table.append(row("z", 1))
    incremental(table, store)

    push(table.view, store, [row("a", 2, 1.0)], run())

    added = next(action["add"] for action in table.actions(table.version) if "add" in action)
    assert added["partitionValues"] == {"day": str(T0.date())}
    assert incremental(table, store).unchanged == 1


def test_column_mapping_by_name_is_written_by_the_stored_names(table: Table, store: OnlineStore) -> None:
    fields = json.loads(Schema.from_arrow(SCHEMA).to_json())["fields"]
    for number, field in enumerate(fields):
        field["metadata"] = {
            "delta.columnMapping.id": number + 1,
            "delta.columnMapping.physicalName": f"col-{number}",
        }
    table.commit(
        {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}},
        {
            "metaData": {
                "id": "x",
                "format": {"provider": "parquet", "options": {}},
                "schemaString": json.dumps({"type": "struct", "fields": fields}),
                "partitionColumns": [],
                "configuration": {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "6"},
                "createdTime": 0,
            }
        },
    )
    incremental(table, store)

    push(table.view, store, [row("a", 2, 1.0)], run())

    there = amounts(table, store)
    incremental(table, store)
    assert amounts(table, store) == there == {"a": 1.0}


def test_times_without_a_zone_are_utc_where_the_view_says_so(table: Table, store: OnlineStore) -> None:
    naive = pa.timestamp("us")
    table.schema = SCHEMA.set(1, pa.field("event_timestamp", naive)).set(2, pa.field("created", naive))
    table.change_view(timestamp_ntz="UTC")
    table.create(schema=table.schema)
    incremental(table, store)
    zone = timezone(timedelta(hours=2))

    push(
        table.view,
        store,
        [
            row("a", 1, 1.0) | {"event_timestamp": at(1).replace(tzinfo=None)},
            row("b", 1, 1.0) | {"event_timestamp": at(1).astimezone(zone)},
        ],
        run(),
    )

    report = incremental(table, store)
    assert (report.written, report.unchanged) == (0, 2)
    rows = QueryBuilder().register("rows", table.delta).execute("SELECT DISTINCT event_timestamp FROM rows").read_all()
    assert pa.table(rows).to_pylist() == [{"event_timestamp": at(1).replace(tzinfo=None)}]


# --- values ------------------------------------------------------------------------------------------------------------

TYPES = pa.schema(
    [
        ("k", pa.string()),
        ("t", UTC_TIME),
        ("double", pa.float64()),
        ("single", pa.float32()),
        ("byte", pa.int8()),
        ("long", pa.int64()),
        ("money", pa.decimal128(10, 2)),
        ("vector", pa.list_(pa.float32())),
        ("bytes", pa.list_(pa.int8())),
        ("day", pa.date32()),
        ("raw", pa.binary()),
        ("flag", pa.bool_()),
    ]
)
GOOD: dict[str, Any] = {
    "k": "x",
    "t": T0,
    "double": 1.5,
    "single": 0.1,
    "byte": 5,
    "long": 2**63 - 1,
    "money": Decimal("1.20"),
    "vector": [0.1, 2.0],
    "bytes": [1, 2],
    "day": date(2024, 1, 1),
    "raw": b"\xff",
    "flag": True,
}


@pytest.fixture
def wide(tmp_path: Path) -> FeatureView:
    DeltaTable.create(str(tmp_path / "wide"), schema=TYPES)
    kinds = {"double": "float64", "single": "float32", "byte": "int8", "long": "int64", "money": "decimal(10,2)"}
    kinds |= {"vector": "list<float32>", "bytes": "list<int8>", "day": "date", "raw": "binary", "flag": "bool"}
    features = {name: FeatureType.parse(kind) for name, kind in kinds.items()}
    return FeatureView("wide", str(tmp_path / "wide"), ("k",), "t", features, ("default",))


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"double": 1},
        {"double": np.float32(0.5)},
        {"single": 1},
        {"byte": 3.0},
        {"byte": np.int64(3)},
        {"money": 3},
        {"money": Decimal("1.5")},
        {"vector": np.array([0.5, 2.0])},
        {"vector": (1, 2)},
        {"vector": []},
        {"t": datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=3)))},
        {name: None for name in GOOD if name not in {"k", "t"}},
    ],
    ids=str,
)
def test_values_that_are_the_same_in_the_columns_type_are_taken(wide: FeatureView, value: dict[str, Any]) -> None:
    given = given_rows(open_table(wide), [GOOD, GOOD | value])

    assert given.refused == {}
    assert given.data.schema.equals(pa.schema(open_table(wide).delta.schema().to_arrow()))
    for name, wanted in value.items():
        found = given.data[name].to_pylist()[1]
        assert found == (list(wanted) if isinstance(wanted, np.ndarray | tuple) else wanted)


def test_values_of_several_types_are_told_apart(wide: FeatureView) -> None:
    values = [2**53 + 1, 2.0, 2.5, "x", None, True]

    given = given_rows(open_table(wide), [GOOD | {"long": value} for value in values])

    assert list(given.refused) == [2, 3, 5]
    assert given.data["long"].to_pylist() == [2**53 + 1, 2, None, None, None, None]


@pytest.mark.parametrize(
    "value",
    [
        {"double": "1.5"},
        {"double": True},
        {"double": 2**53 + 1},
        {"double": Decimal("1.5")},
        {"single": 1e300},
        {"byte": 300},
        {"byte": 3.5},
        {"byte": True},
        {"byte": float("nan")},
        {"long": 2**63},
        {"long": 2**70},
        {"money": Decimal("1.234")},
        {"money": Decimal("1e20")},
        {"money": 1.5},
        {"vector": [1e300]},
        {"vector": ["a"]},
        {"vector": 5},
        {"bytes": [300]},
        {"bytes": [1.5]},
        {"bytes": [True]},
        {"day": datetime(2024, 1, 1, tzinfo=timezone.utc)},
        {"day": "2024-01-01"},
        {"raw": "x"},
        {"flag": 1},
        {"k": 5},
        {"k": b"x"},
        {"t": datetime(2024, 1, 1)},  # noqa: DTZ001 - that is what is refused
        {"t": 5},
        {"t": date(2024, 1, 1)},
        {"t": "2024-01-01T00:00:00Z"},
    ],
    ids=str,
)
@pytest.mark.parametrize("beside", [True, False], ids=["beside others", "alone"])
def test_values_that_are_others_in_the_columns_type_are_refused(
    wide: FeatureView, value: dict[str, Any], *, beside: bool
) -> None:
    rows = [GOOD, GOOD | value] if beside else [GOOD | value]

    given = given_rows(open_table(wide), rows)

    assert list(given.refused) == [len(rows) - 1]
    assert next(iter(given.refused.values())).startswith(f"column {next(iter(value))!r}: ")


def arrow_refused(view: FeatureView, **columns: Any) -> dict[int, str]:
    """What is refused of some rows of the right types but for *columns*."""
    height = len(next(iter(columns.values())))
    rows = pa.Table.from_pylist([GOOD] * height, schema=TYPES)
    for name, column in columns.items():
        rows = rows.set_column(TYPES.get_field_index(name), name, column)
    found: GivenRows = given_rows(open_table(view), rows)
    return found.refused


@pytest.mark.parametrize(
    ("name", "column", "refused"),
    [
        ("double", pa.array([2**53, 2**53 + 1]), [1]),
        ("double", pa.array([0.1, float("inf")], pa.float32()), []),
        ("single", pa.array([0.5, 0.1, float("nan"), 1e300]), [1, 3]),
        ("byte", pa.array([1.0, 2.5, float("nan"), None, -128.0, 128.0]), [1, 2, 5]),
        ("long", pa.array([2**63 - 1, 2**63], pa.uint64()), [1]),
        ("money", pa.array([Decimal("1.230"), Decimal("1.234")], pa.decimal128(20, 3)), [1]),
        ("vector", pa.array([[0.5], [0.1], None]), [1]),
        ("vector", pa.array([[0.5, 1.0]], pa.list_(pa.float32(), 2)), []),
        ("bytes", pa.array([[1], [300], [None]]), [1]),
        ("k", pa.array(["x", "y"]).dictionary_encode(), []),
        ("k", pa.array(["x"], pa.string_view()), []),
        ("t", pa.array([1_000, 1_001], pa.timestamp("ns", "Europe/Berlin")), [1]),
        ("t", pa.array([1], pa.timestamp("s", "UTC")), []),
        ("double", pa.nulls(2), []),
    ],
    ids=str,
)
def test_arrow_values_are_taken_where_they_are_the_same(
    wide: FeatureView, name: str, column: pa.Array, refused: list[int]
) -> None:
    assert list(arrow_refused(wide, **{name: column})) == refused


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("double", pa.array(["1"])),
        ("double", pa.array([True])),
        ("double", pa.array([Decimal("1.5")])),
        ("money", pa.array([1.5])),
        ("k", pa.array([1])),
        ("raw", pa.array(["x"])),
        ("t", pa.array([0], pa.timestamp("us"))),
        ("t", pa.array(["2024-01-01T00:00:00Z"])),
        ("day", pa.array([0], UTC_TIME)),
        ("vector", pa.array([["a"]])),
        ("flag", pa.array([1])),
    ],
    ids=str,
)
def test_arrow_columns_of_another_kind_are_refused(wide: FeatureView, name: str, column: pa.Array) -> None:
    with pytest.raises(RowsError, match=rf"'{name}': found .*, expected"):
        arrow_refused(wide, **{name: column})


@pytest.mark.parametrize("rows", [5, "text", [1], [{1: 2}]], ids=str)
def test_what_are_no_rows_is_told(wide: FeatureView, rows: Any) -> None:
    with pytest.raises(RowsError, match="1 problem with their columns"):
        given_rows(open_table(wide), rows)


def test_structs_that_the_view_does_not_read_pass_as_they_are(table: Table) -> None:
    place = pa.struct([("x", pa.int32())])
    table.schema = SCHEMA.append(pa.field("place", place))
    table.create(schema=table.schema)
    opened = open_table(table.view)

    mappings = given_rows(opened, [row("a", 1, place={"x": 1})])
    with pytest.raises(RowsError, match="'place': found Python values of other types, expected struct"):
        given_rows(opened, [row("a", 1, place={"x": "a"})])
    with pytest.raises(RowsError, match="'place': found int64, expected struct"):
        given_rows(opened, pa.table(mappings.data).set_column(6, "place", pa.array([1])))

    assert mappings.data["place"].to_pylist() == [{"x": 1}]
    write_deltalake(str(table.path), mappings.data, mode="append")
