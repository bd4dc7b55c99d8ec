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
    from materialize.offline.difference import Difference, read_difference, read_entities
    from materialize.offline.quarantine import Quarantine, erase, held_rows, mark_released, told_rows
    from materialize.offline.rows import OrderRows, read_features, read_order, versions_are_exact, with_versions

__all__ = [
    "Change",
    "DataFile",
    "Difference",
    "LogReader",
    "OfflineTable",
    "OrderRows",
    "Quarantine",
    "changes_since",
    "erase",
    "held_rows",
    "live_rows",
    "live_rows_after",
    "mark_released",
    "open_table",
    "read_difference",
    "read_entities",
    "read_features",
    "read_order",
    "reading",
    "removed_since",
    "told_rows",
    "total_rows",
    "versions_are_exact",
    "with_versions",
]

#: The modules that read rows, and what they give.
ROWS = {
    "difference": ("Difference", "read_difference", "read_entities"),
    "quarantine": ("Quarantine", "erase", "held_rows", "mark_released", "told_rows"),
    "rows": ("OrderRows", "read_features", "read_order", "versions_are_exact", "with_versions"),
}


def __getattr__(name: str) -> Any:
    for module, names in ROWS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
