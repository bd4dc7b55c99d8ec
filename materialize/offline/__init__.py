"""The offline store: a Delta table in, what changed in it out. The only room that imports deltalake.

What reads rows is imported when it is first asked for: it loads polars, pyarrow and numpy, which take longer than a whole run that
finds nothing new, and such a run only looks at the log.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from materialize.offline.changes import Change, changes_since, removed_since
from materialize.offline.live_rows import live_rows, live_rows_after
from materialize.offline.log import DataFile, LogReader, total_rows
from materialize.offline.table import OfflineTable, open_table, reading

if TYPE_CHECKING:
    from materialize.offline.append import Appended, Appender, digest
    from materialize.offline.data_files import brought
    from materialize.offline.difference import (
        Difference,
        appended_files,
        read_difference,
        read_entities,
        read_rewritten,
    )
    from materialize.offline.entity import EntityRows, join_values, read_entity
    from materialize.offline.given import GivenRows, given_rows
    from materialize.offline.history import CommitInfo, commits_told, newest_commits
    from materialize.offline.quarantine import Quarantine, erase, held_rows, mark_released, told_rows
    from materialize.offline.rows import (
        ORDER_ROWS,
        OrderRows,
        may_hold,
        read_features,
        read_order,
        read_parts,
        read_whole,
        versions_are_exact,
        with_versions,
    )

__all__ = [
    "ORDER_ROWS",
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
    "appended_files",
    "brought",
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
    "may_hold",
    "newest_commits",
    "open_table",
    "read_difference",
    "read_entities",
    "read_entity",
    "read_features",
    "read_order",
    "read_parts",
    "read_rewritten",
    "read_whole",
    "reading",
    "removed_since",
    "told_rows",
    "total_rows",
    "versions_are_exact",
    "with_versions",
]

#: The modules that read rows, and what they give.
ROWS = {
    "append": ("Appended", "Appender", "digest"),
    "data_files": ("brought",),
    "difference": ("Difference", "appended_files", "read_difference", "read_entities", "read_rewritten"),
    "entity": ("EntityRows", "join_values", "read_entity"),
    "given": ("GivenRows", "given_rows"),
    "history": ("CommitInfo", "commits_told", "newest_commits"),
    "quarantine": ("Quarantine", "erase", "held_rows", "mark_released", "told_rows"),
    "rows": (
        "ORDER_ROWS",
        "OrderRows",
        "may_hold",
        "read_features",
        "read_order",
        "read_parts",
        "read_whole",
        "versions_are_exact",
        "with_versions",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in ROWS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
