"""One Delta table and the plain list of its rows: commits go through deltalake, what they did is read from the log's JSON.

`Version` is what a reader of that version must find. Rows are known by their ``uid``; nothing here is the package's own.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake

from tests.properties.rows import COLUMNS, content, entity_key, key, order, storable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from materialize.model import FeatureView
    from tests.properties.rows import Row
    from tests.properties.storage import Storage

__all__ = ["DataFile", "Lake", "LakeError", "Vector", "Version", "log_name"]

#: ``uid`` is a row's own number below this, plus this times the number of the operation that gave the row its values.
SPAN = 2**20
#: Before every commit: a version whose commit file is gone.
UNKNOWN = -1


class LakeError(AssertionError):
    """The table is not what its commits should have made of it: deltalake or this model is wrong, not the package."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A live data file: its add action, its rows, the last commit they may be taken to be of, and the positions removed."""

    action: dict[str, Any]
    uids: tuple[int, ...]
    at: int
    dead: frozenset[int] = frozenset()

    @property
    def vector(self) -> str | None:
        return vector_text(self.action)

    @property
    def live(self) -> list[int]:
        return [uid for position, uid in enumerate(self.uids) if position not in self.dead]


@dataclass(frozen=True, slots=True)
class Vector:
    """A deletion vector that was written by hand: as the log describes it, the positions it removes, the file it is in."""

    described: dict[str, Any]
    dead: frozenset[int]
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """A table version. ``came``: for each live row the commit that brought it."""

    files: dict[str, DataFile]
    metadata: dict[str, Any]
    protocol: dict[str, Any]
    came: dict[int, int]

    @property
    def columns(self) -> list[str]:
        return [column["name"] for column in json.loads(self.metadata["schemaString"])["fields"]]

    @property
    def table_id(self) -> str:
        return str(self.metadata["id"])

    @property
    def at(self) -> dict[int, int]:
        """For each live row the last commit that may have put it into a file with rows of other commits."""
        return {uid: file.at for file in self.files.values() for uid in file.live}


@dataclass(slots=True)
class Lake:
    """``values``: every row there ever was. By version: ``changed``, whether rows were; ``needed``, the files that say which;
    ``added``, the number of rows if nothing else happened; ``described``, whether it says what the columns are.

    ``life`` counts how often the table was made, ``losses`` how often files of older versions may have gone.
    """

    storage: Storage
    partitioned: bool
    values: dict[int, Row] = field(default_factory=dict)
    versions: dict[int, Version] = field(default_factory=dict)
    changed: dict[int, bool] = field(default_factory=dict)
    described: dict[int, bool] = field(default_factory=dict)
    needed: dict[int, set[str]] = field(default_factory=dict)
    added: dict[int, int | None] = field(default_factory=dict)
    vectors: dict[str | None, Vector] = field(default_factory=dict)
    contents: dict[str, tuple[int, ...]] = field(default_factory=dict)
    head: int = -1
    operation: int = 0
    life: int = 0
    losses: int = 0

    @property
    def uri(self) -> str:
        return self.storage.uri

    @property
    def options(self) -> dict[str, str] | None:
        return self.storage.options or None

    @property
    def table(self) -> DeltaTable:
        return DeltaTable(self.uri, storage_options=self.options)

    @property
    def now(self) -> Version:
        return self.versions[self.head]

    @property
    def live(self) -> dict[int, Row]:
        return {uid: self.values[uid] for uid in sorted(self.now.came)}

    @property
    def has_later(self) -> bool:
        return "later" in self.now.columns

    def schema(self, *, later: bool) -> pa.Schema:
        return pa.schema([(name, kind) for name, kind in COLUMNS.items() if later or name != "later"])

    # --- rows ---

    def new(self, rows: Iterable[Row], *, later: bool | None = None) -> list[Row]:
        """*rows* with a ``uid`` of their own, and without the columns that the table does not have."""
        later = self.has_later if later is None else later
        made = []
        for row in rows:
            values = {name: value for name, value in row.items() if later or name != "later"}
            if self.partitioned and row["region"] == "":
                values["region"] = None  # what the log says for an empty partition value
            uid = len(self.values) % SPAN + self.operation * SPAN
            self.values[uid] = values | {"uid": uid}
            made.append(self.values[uid])
        return made

    def altered(self, row: Row, changes: Row) -> int:
        """The ``uid`` of *row* after this operation wrote it again with *changes*."""
        uid = row["uid"] % SPAN + self.operation * SPAN
        self.values[uid] = row | changes | {"uid": uid}
        return uid

    def arrow(self, rows: Sequence[Row], *, later: bool | None = None) -> pa.Table:
        later = self.has_later if later is None else later
        return pa.Table.from_pylist(list(rows), schema=self.schema(later=later))

    def write(self, rows: Sequence[Row], mode: str, *, later: bool | None = None, **options: Any) -> None:
        write_deltalake(  # type: ignore[call-overload]
            self.uri,
            self.arrow(rows, later=later),
            mode=mode,
            partition_by=["region"] if self.partitioned else None,
            schema_mode="merge",
            storage_options=self.options,
            **options,
        )

    # --- what commits did ---

    def commit(self, change: Callable[[], object], expected: Iterable[int] | None = None) -> None:
        """Do *change* and read what it committed; afterwards exactly the rows *expected* are live, as before without it."""
        wanted = set(self.now.came if expected is None else expected)
        change()
        self.read_log()
        if self.now.came.keys() != wanted:
            lost, more = wanted - self.now.came.keys(), self.now.came.keys() - wanted
            raise LakeError(f"version {self.head} lacks the rows {sorted(lost)} and has {sorted(more)} too many")

    def read_log(self) -> None:
        while self.storage.has(log_name(self.head + 1)):
            self._read_commit(self.head + 1)
            self.head += 1

    def _read_commit(self, version: int) -> None:
        actions = [json.loads(line) for line in self.storage.read(log_name(version)).splitlines()]
        before = self.versions.get(version - 1, Version({}, {}, {}, {}))
        files = dict(before.files)
        removes = [action["remove"] for action in actions if "remove" in action]
        adds = [action["add"] for action in actions if "add" in action]
        inputs = [files[name_of(remove)].at for remove in removes]
        for remove in removes:
            if files.pop(name_of(remove)).vector != vector_text(remove):
                raise LakeError(f"version {version} removes {name_of(remove)} with another deletion vector than it has")
        for add in adds:
            if name_of(add) in files:
                raise LakeError(f"version {version} adds {name_of(add)}, which is live")
            at = version if add["dataChange"] else max(inputs, default=version)
            dead = self.vectors[vector_text(add)].dead if "deletionVector" in add else frozenset()
            files[name_of(add)] = DataFile(add, self._uids(name_of(add)), at, dead)
        metadata, protocol = before.metadata, before.protocol
        for action in actions:
            metadata, protocol = action.get("metaData", metadata), action.get("protocol", protocol)
        uids = {uid for file in files.values() for uid in file.live}
        self.versions[version] = Version(files, metadata, protocol, self._came(before, uids, version))
        moved = [action for action in (*removes, *adds) if action["dataChange"]]
        self.changed[version], self.described[version] = bool(moved), any("metaData" in action for action in actions)
        self.needed[version] = {name for action in moved for name in self._names(action)}
        only_adds = not any(remove["dataChange"] for remove in removes)
        self.added[version] = (
            sum(len(files[name_of(add)].live) for add in adds if add["dataChange"]) if only_adds else None
        )

    def _came(self, before: Version, uids: set[int], version: int) -> dict[int, int]:
        """A row that only got another ``uid``, or went and came in one commit, may be seen as new or as never gone."""
        gone = defaultdict(list)
        for uid in before.came.keys() - uids:
            gone[content(self.values[uid])].append(before.came[uid])
        return {
            uid: before.came[uid] if uid in before.came else min(gone.get(content(self.values[uid]), [version]))
            for uid in uids
        }

    def _names(self, action: dict[str, Any]) -> list[str]:
        """The files of *action*: its data file, and the one that its deletion vector is in."""
        vector = self.vectors[vector_text(action)].file if action.get("deletionVector") else None
        return [name_of(action), *([vector] if vector else [])]

    def _uids(self, name: str) -> tuple[int, ...]:
        if name not in self.contents:
            found = pq.read_table(io.BytesIO(self.storage.read(name)), columns=["uid"])
            self.contents[name] = tuple(found["uid"].to_pylist())
        return self.contents[name]

    # --- what a run must find ---

    def latest(self, state: Version, view: FeatureView) -> dict[bytes, list[Row]]:
        """Per entity the rows of a version that are the latest one; more than one where Delta cannot tell which is."""
        facts: dict[bytes, list[Row]] = defaultdict(list)
        for uid in state.came:
            if storable(self.values[uid]):
                facts[entity_key(key(self.values[uid]))].append(self.values[uid])
        oldest, at = self.oldest_commit(), state.at
        right = {}
        for entity, rows in facts.items():
            newest = max(order(row, view) for row in rows)
            equal = [row for row in rows if order(row, view) == newest]
            surely = max(UNKNOWN if (came := state.came[row["uid"]]) < oldest else came for row in equal)
            right[entity] = [row for row in equal if at[row["uid"]] >= surely]
        return right

    def oldest_commit(self) -> int:
        """The oldest version whose commit file is in the log."""
        return min(int(name[:-5]) for name in self.storage.names("_delta_log") if name.endswith(".json"))

    def gone(self, table_id: str, after: int, last: int) -> str | None:
        """Why what changed after version *after* up to *last* cannot be told any more; None when it can."""
        if table_id != self.versions[last].table_id:
            return "the table was dropped and created again"
        if last < after:
            return "the table was restored from a copy"
        for version in range(after + 1, last + 1):
            if not self.storage.has(log_name(version)):
                return f"commit {version} is gone"
            if lost := [name for name in self.needed[version] if not self.storage.has(name)]:
                return f"{lost[0]} of version {version} is gone"
        described = [version for version in range(after + 1, last + 1) if self.described[version]]
        if described and described[0] - 1 < self.oldest_commit():
            return f"the schema before version {described[0]} is gone"
        return None

    def readable(self, version: int) -> bool:
        """Whether *version* can be opened and all of its files are there."""
        names = [name for file in self.versions[version].files.values() for name in self._names(file.action)]
        return version >= self.oldest_commit() and all(self.storage.has(name) for name in names)

    def forget(self) -> None:
        """The table is gone with all of its versions."""
        self.storage.wipe()
        self.head = -1
        for known in (self.versions, self.changed, self.needed, self.added, self.contents):
            known.clear()

    def put_vector(self, name: str, vector: Vector, protocol: Sequence[dict[str, Any]]) -> None:
        """Commit by hand, as Spark's DELETE does, that *vector* removes rows of the data file *name*."""
        added = self.now.files[name].action
        self.vectors[vector_text({"deletionVector": vector.described})] = vector
        remove = {"path": added["path"], "dataChange": True, "deletionTimestamp": 1}
        if self.partitioned:
            remove["partitionValues"] = added["partitionValues"]
        if added.get("deletionVector"):
            remove["deletionVector"] = added["deletionVector"]
        self.put(
            *protocol, {"remove": remove}, {"add": added | {"deletionVector": vector.described, "dataChange": True}}
        )

    def put(self, *actions: dict[str, Any]) -> None:
        """Commit by hand."""
        self.storage.write(log_name(self.head + 1), "\n".join(json.dumps(action) for action in actions).encode())


def log_name(version: int) -> str:
    return f"_delta_log/{version:020d}.json"


def name_of(action: dict[str, Any]) -> str:
    """The name of a data file, whose path is percent-encoded in the log."""
    return unquote(action["path"])


def vector_text(action: dict[str, Any]) -> str | None:
    """What tells one deletion vector from another; None for none."""
    vector = action.get("deletionVector")
    return None if vector is None else f"{vector['storageType']}{vector['pathOrInlineDv']}@{vector.get('offset')}"
