"""The offline store: a Delta table in, what changed in it out. The only room that imports deltalake."""

from materialize.offline.append import Appended, Appender, digest
from materialize.offline.changes import Change, changes_since, removed_since
from materialize.offline.difference import Difference, read_difference, read_entities
from materialize.offline.entity import EntityRows, join_values, read_entity
from materialize.offline.given import GivenRows, given_rows
from materialize.offline.history import CommitInfo, commits_told, newest_commits
from materialize.offline.live_rows import live_rows, live_rows_after
from materialize.offline.log import DataFile, LogReader, total_rows
from materialize.offline.quarantine import Quarantine, erase, held_rows, mark_released, told_rows
from materialize.offline.rows import OrderRows, read_features, read_order, versions_are_exact, with_versions
from materialize.offline.table import OfflineTable, open_table, reading

__all__ = [
    "Appended",
    "Appender",
    "Change",
    "CommitInfo",
    "DataFile",
    "Difference",
    "EntityRows",
    "GivenRows",
    "LogReader",
    "OfflineTable",
    "OrderRows",
    "Quarantine",
    "changes_since",
    "commits_told",
    "digest",
    "erase",
    "given_rows",
    "held_rows",
    "join_values",
    "live_rows",
    "live_rows_after",
    "mark_released",
    "newest_commits",
    "open_table",
    "read_difference",
    "read_entities",
    "read_entity",
    "read_features",
    "read_order",
    "reading",
    "removed_since",
    "told_rows",
    "total_rows",
    "versions_are_exact",
    "with_versions",
]
