"""What every entity should have online, from the data files of an append-only Delta table: numpy and plain Python, nothing of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.tables import Table

__all__ = ["Oracle"]


class Oracle:
    """Reads each data file once. A tie of event and created time does not occur in these tables."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.seen: set[str] = set()
        self.latest: dict[str, tuple[Any, Any, dict[str, Any]]] = {}

    def expected(self) -> dict[str, dict[str, Any]]:
        for file in self.table.delta.file_uris():
            if file in self.seen:
                continue
            self.seen.add(file)
            for one in pq.read_table(file).to_pylist():
                user, moment, created = one.pop("user_id"), one.pop("event_timestamp"), one.pop("created")
                if user not in self.latest or self.latest[user][:2] < (moment, created):
                    self.latest[user] = (moment, created, one)
        return {user: features for user, (_, _, features) in self.latest.items()}
