"""What tests of the offline store share: a table read as a run reads it, commits written by hand, column mapping."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from materialize.errors import RebuildNeeded
from materialize.latest import newest
from materialize.model import Watermark
from materialize.offline import changes_since, open_table, read_difference, read_features, read_order, with_versions
from tests.tables import SCHEMA, UTC_TIME, Table, row

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

    from materialize.model import Interval
    from materialize.offline import OfflineTable, OrderRows

__all__ = [
    "NAIVE",
    "WIDE",
    "added",
    "changed",
    "difference",
    "fields_of",
    "latest",
    "live_rows",
    "map_columns",
    "metadata",
    "mode_of_mapping",
    "naive",
    "needs_rebuild",
    "path_in_log",
    "removal",
    "rename_column",
    "rewrite",
    "rows_of",
    "snapshot",
    "stored",
    "two_commits",
    "users",
    "vacuum",
    "watermark",
    "with_fields",
]

WIDE = pa.schema([*SCHEMA, ("score", pa.float64())])
NAIVE = pa.schema([field.with_type(pa.timestamp("us")) if field.type == UTC_TIME else field for field in SCHEMA])


# --- reading -----------------------------------------------------------------------------------------------------------


def watermark(table: Table, version: int, **changes: Any) -> Watermark:
    values = {
        "generation": 1,
        "table_id": str(table.delta.metadata().id),
        "schema": table.view.schema_text,
        "order": table.view.order_text,
        "run_id": "r",
    }
    return Watermark(**(values | {"version": version} | changes))


def rows_of(opened: OfflineTable, found: OrderRows, order: pl.DataFrame | None = None) -> list[dict[str, Any]]:
    """The rows of *found* (or of *order* alone) as a run reads them: keys and order first, then the features."""
    order = found.frame if order is None else order.sort("position")
    rows = order.sort("position").to_dicts()
    for first, features in read_features(opened, found, order["position"].sort()):
        for index, values in enumerate(features.to_dicts()):
            rows[first + index] |= values
    return rows


def live_rows(opened: OfflineTable, interval: Interval | None = None) -> OrderRows:
    """Keys and order of the rows of the pinned version."""
    return with_versions(opened, read_order(opened, opened.snapshot_files(interval)))


def snapshot(table: Table, interval: Interval | None = None) -> list[dict[str, Any]]:
    opened = open_table(table.view)
    return rows_of(opened, live_rows(opened, interval))


def difference(table: Table, after: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What came after a version: the rows that were added, and the users that lost one."""
    opened = open_table(table.view)
    found = read_difference(opened, changes_since(opened, watermark(table, after)))
    return rows_of(opened, found.added), sorted(found.lost["user_id"], key=str)


def changed(table: Table, after: int) -> tuple[list[tuple[str, Any]], list[str]]:
    """What came after a version: user and amount of each row that was added, and the users that lost one."""
    rows, lost = difference(table, after)
    return sorted(((one["user_id"], one["amount"]) for one in rows), key=str), lost


def added(table: Table, after: int) -> list[dict[str, Any]]:
    """The rows that came after a version, in which no entity lost one."""
    rows, lost = difference(table, after)
    assert lost == []
    return rows


def latest(table: Table, after: int | None = None) -> dict[str, dict[str, Any]]:
    """The newest row of each entity, from the snapshot or from what came after a version."""
    opened = open_table(table.view)
    if after is None:
        found = live_rows(opened)
    else:
        found = read_difference(opened, changes_since(opened, watermark(table, after))).added
    return {one["user_id"]: one for one in rows_of(opened, found, newest(found.frame, table.view.join_keys))}


def users(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(one["user_id"] for one in rows)


def needs_rebuild(table: Table, after: int, because: str) -> None:
    """What came after a version cannot be told, for a reason that the message names."""
    with pytest.raises(RebuildNeeded, match=because) as caught:
        difference(table, after)
    assert f"the watermark stays at version {after}" in str(caught.value)
    assert f"materialize rebuild {table.view.name}" in str(caught.value)
    assert caught.value.reason in str(caught.value)


# --- commits -----------------------------------------------------------------------------------------------------------


def two_commits(table: Table) -> None:
    table.append(row("a", 1), row("b", 2))
    table.append(row("c", 3))


def path_in_log(table: Table, version: int) -> str:
    return next(action["add"]["path"] for action in table.actions(version) if "add" in action)


def removal(add: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The remove action of a file, from its add action; what is changed to None is left out."""
    kept = {
        name: add["add"][name] for name in ("path", "partitionValues", "size", "deletionVector") if name in add["add"]
    }
    remove = {**kept, "dataChange": True, "deletionTimestamp": 1} | changes
    return {"remove": {name: value for name, value in remove.items() if value is not None}}


def rewrite(table: Table, gone: Mapping[str, Any], name: str, *rows: Mapping[str, Any]) -> int:
    """Commit *rows* in a new file instead of the one of the add action *gone*."""
    return table.commit(removal(gone), table.add_file(name, table.arrow(rows)))


def vacuum(table: Table) -> None:
    table.delta.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)


def naive(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row with times that have no zone."""
    return {
        name: value.replace(tzinfo=None) if isinstance(value, datetime) else value for name, value in values.items()
    }


# --- metadata ----------------------------------------------------------------------------------------------------------


def metadata(table: Table) -> dict[str, Any]:
    """The newest metaData action."""
    written = (action for version in range(table.version, -1, -1) for action in table.actions(version))
    return next(action for action in written if "metaData" in action)


def fields_of(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields: list[dict[str, Any]] = json.loads(meta["metaData"]["schemaString"])["fields"]
    return fields


def with_fields(meta: Mapping[str, Any], fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"metaData": {**meta["metaData"], "schemaString": json.dumps({"type": "struct", "fields": fields})}}


def mode_of_mapping(meta: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """*meta* with a column mapping: every column is stored under another name, ``col-1`` and so on."""
    fields = fields_of(meta)
    for index, field in enumerate(fields, start=1):
        field["metadata"] = {"delta.columnMapping.id": index, "delta.columnMapping.physicalName": f"col-{index}"}
    mapped = with_fields(meta, fields)
    configuration = {"delta.columnMapping.mode": mode, "delta.columnMapping.maxColumnId": str(len(fields))}
    mapped["metaData"]["configuration"] = configuration
    return mapped


def map_columns(table: Table, mode: str = "name", *, partition_by: tuple[str, ...] = ()) -> None:
    """Create the table with a column mapping."""
    table.create(partition_by=partition_by)
    actions = [mode_of_mapping(action, mode) if "metaData" in action else action for action in table.actions(0)]
    actions = [
        {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}} if "protocol" in action else action
        for action in actions
    ]
    table.log_file(0).write_text("".join(json.dumps(action) + "\n" for action in actions))


def stored(table: Table, name: str, *rows: Mapping[str, Any], partition: Mapping[str, Any] | None = None) -> Any:
    """Write a data file of a table with a column mapping, and return its add action."""
    physical = {
        field["name"]: field["metadata"]["delta.columnMapping.physicalName"] for field in fields_of(metadata(table))
    }
    numbers = {field["name"]: field["metadata"]["delta.columnMapping.id"] for field in fields_of(metadata(table))}
    data = table.arrow(rows)
    mapped = pa.schema(
        [
            field.with_name(physical[field.name]).with_metadata({"PARQUET:field_id": str(numbers[field.name])})
            for field in data.schema
        ]
    )
    values = {physical[column]: value for column, value in (partition or {}).items()}
    return table.add_file(name, data.cast(data.schema).rename_columns(mapped.names).cast(mapped), partition=values)


def rename_column(table: Table, old: str, new: str) -> int:
    """Commit a metaData action by which the column *old* is called *new*."""
    meta = metadata(table)
    fields = [field | {"name": new} if field["name"] == old else field for field in fields_of(meta)]
    return table.commit(with_fields(meta, fields))
