"""The offline store: a Delta table in, what changed in it out. The only room that imports deltalake."""

from materialize.offline.log import DataFile, total_rows
from materialize.offline.table import OfflineTable, RowCounts, open_table, planned_files

__all__ = ["DataFile", "OfflineTable", "RowCounts", "open_table", "planned_files", "total_rows"]
