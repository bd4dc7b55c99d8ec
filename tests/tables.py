"""Small Delta tables as many writers leave them: rows in, commits out; what deltalake cannot write is written by hand."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, QueryBuilder, write_deltalake

from materialize.feature_type import FeatureType
from materialize.model import FeatureView

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from uuid import UUID

__all__ = ["NOW", "SCHEMA", "T0", "Table", "at", "deletion_vector_file", "inline_deletion_vector", "kept_rows", "row"]

#: The first event time of all tables, and the clock of the runs: both ahead of every server's own clock, so that it never matters.
T0 = datetime(2095, 1, 1, tzinfo=timezone.utc)
NOW = datetime(2095, 1, 10, tzinfo=timezone.utc)
UTC_TIME = pa.timestamp("us", tz="UTC")
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("event_timestamp", UTC_TIME),
        ("created", UTC_TIME),
        ("amount", pa.float64()),
        ("count", pa.int64()),
        ("country", pa.string()),
    ]
)


def at(minutes: float) -> datetime:
    """The moment *minutes* after the first event time."""
    return T0 + timedelta(minutes=minutes)


def row(user: str | None, minutes: float | None, amount: float | None = 0.0, **others: Any) -> dict[str, Any]:
    """One row of `SCHEMA`; *others* may be ``created`` (minutes), ``count``, ``country`` or columns of other schemas."""
    created = others.pop("created", minutes)
    return {
        "user_id": user,
        "event_timestamp": None if minutes is None else at(minutes),
        "created": None if created is None else at(created),
        "amount": amount,
        "count": others.pop("count", 1),
        "country": others.pop("country", "DE"),
        **others,
    }


def kept_rows(view: FeatureView) -> list[dict[str, Any]]:
    """All rows of the view's quarantine table, of every view and store, released or not."""
    # not to_pyarrow_table, after which a process may abort at its end
    table = DeltaTable(str(view.quarantine_table), storage_options=view.storage_options or None)
    found = QueryBuilder().register("kept", table).execute("SELECT * FROM kept").read_all()
    return pa.table(found).to_pylist()  # type: ignore[no-any-return]


@dataclass(slots=True)
class Table:
    """One Delta table in *path*. ``view`` reads it; ``schema`` is what `append` writes."""

    path: Path
    schema: pa.Schema = SCHEMA
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

    def arrow(self, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist([dict(one) for one in rows], schema=self.schema)

    def append(self, *rows: Mapping[str, Any], **options: Any) -> int:
        """Commit *rows* and return the version."""
        return self.append_table(self.arrow(rows), **options)

    def append_table(self, rows: pa.Table, *, mode: str = "append", **options: Any) -> int:
        write_deltalake(str(self.path), rows, mode=mode, **options)  # type: ignore[call-overload]
        return self.version

    @property
    def delta(self) -> DeltaTable:
        return DeltaTable(str(self.path))

    @property
    def version(self) -> int:
        return int(self.delta.version())

    def actions(self, version: int) -> list[dict[str, Any]]:
        """The actions of one commit as they are in the log."""
        return [json.loads(line) for line in self.log_file(version).read_text().splitlines()]

    def log_file(self, version: int) -> Path:
        return self.path / "_delta_log" / f"{version:020d}.json"

    def commit(self, *actions: Mapping[str, Any]) -> int:
        """Write a commit by hand and return its version."""
        version = self.version + 1 if (self.path / "_delta_log").exists() else 0
        self.log_file(version).parent.mkdir(parents=True, exist_ok=True)
        self.log_file(version).write_text("".join(json.dumps(action) + "\n" for action in actions))
        return version

    def create(self, *, partition_by: Sequence[str] = (), schema: pa.Schema | None = None) -> int:
        """Commit an empty table."""
        DeltaTable.create(str(self.path), schema=schema or self.schema, partition_by=list(partition_by))
        return self.version

    def add_file(
        self, name: str, rows: pa.Table, *, partition: Mapping[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Write a data file at *name* (a plain path) and return its add action; partition columns are not stored."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows.drop_columns(list(partition or ())), file, **options)
        return {
            "add": {
                "path": name,
                "partitionValues": dict(partition or {}),
                "size": file.stat().st_size,
                "modificationTime": 0,
                "dataChange": True,
                "stats": json.dumps({"numRecords": rows.num_rows}),
            }
        }

    def delete_rows(self, path: str, positions: Iterable[int]) -> int:
        """Commit a deletion vector on the data file *path* (as in the log), as Spark's DELETE does."""
        added = next(
            action["add"]
            for version in range(self.version, -1, -1)
            for action in self.actions(version)
            if action.get("add", {}).get("path") == path
        )
        removed = {
            "path": path,
            "deletionTimestamp": 1,
            "dataChange": True,
            "partitionValues": added["partitionValues"],
        }
        if "deletionVector" in added:  # a file is known by its path and its vector together
            removed["deletionVector"] = added["deletionVector"]
        actions: list[dict[str, Any]] = [
            {"remove": removed},
            {"add": {**added, "deletionVector": inline_deletion_vector(sorted(positions))}},
        ]
        if self.delta.protocol().min_reader_version < 3:
            listed = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
            actions.insert(0, {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **listed}})
        return self.commit(*actions)


Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def _z85(data: bytes) -> str:
    text = ""
    for low in range(0, len(data), 4):
        number = int.from_bytes(data[low : low + 4], "big")
        text += "".join(Z85[number // 85**power % 85] for power in (4, 3, 2, 1, 0))
    return text


def inline_deletion_vector(positions: Sequence[int]) -> dict[str, Any]:
    """The descriptor of a deletion vector that is in the log itself."""
    data = _deletion_vector(positions)
    padded = data + b"\0" * (-len(data) % 4)
    return {"storageType": "i", "pathOrInlineDv": _z85(padded), "sizeInBytes": len(data), "cardinality": len(positions)}


def deletion_vector_file(
    name: UUID, positions: Sequence[int], *, prefix: str = "", behind: Sequence[int] = ()
) -> tuple[str, bytes, dict[str, Any]]:
    """A file with a deletion vector, after one of the positions *behind* if there are any: its path, its bytes, and the descriptor."""
    framed = [
        struct.pack(">I", len(data)) + data + struct.pack(">I", zlib.crc32(data))
        for data in map(_deletion_vector, [behind, positions] if behind else [positions])
    ]
    descriptor = {
        "storageType": "u",
        "pathOrInlineDv": prefix + _z85(name.bytes),
        "offset": 1 + sum(map(len, framed[:-1])),
        "sizeInBytes": len(framed[-1]) - 8,
        "cardinality": len(positions),
    }
    folder = f"{prefix}/" if prefix else ""
    return f"{folder}deletion_vector_{name}.bin", b"\1" + b"".join(framed), descriptor


def _deletion_vector(positions: Sequence[int]) -> bytes:
    """A deletion vector as PROTOCOL.md describes it, written independently of any library: array containers only."""
    containers: dict[int, list[int]] = {}
    for position in positions:
        containers.setdefault(position >> 16, []).append(position & 0xFFFF)
    bitmap = struct.pack("<II", 12346, len(containers))
    bitmap += b"".join(struct.pack("<HH", key, len(values) - 1) for key, values in containers.items())
    begin = len(bitmap) + 4 * len(containers)
    for values in containers.values():
        bitmap += struct.pack("<I", begin)
        begin += 2 * len(values)
    bitmap += b"".join(struct.pack(f"<{len(values)}H", *values) for values in containers.values())
    return struct.pack("<iqI", 1681511377, 1, 0) + bitmap
