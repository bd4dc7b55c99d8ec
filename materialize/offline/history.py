"""What commits of a table say about themselves: when, which operation, what their writer noted, how many rows they brought."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from materialize.offline.log import READERS, rows_of
from materialize.offline.table import reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from materialize.offline.table import OfflineTable

__all__ = ["CommitInfo", "commits_told", "newest_commits"]

#: What writers put into commitInfo by themselves; anything else was noted by who ran them (PROTOCOL.md, Commit Provenance Information).
OWN = frozenset(
    (
        "timestamp",
        "inCommitTimestamp",
        "operation",
        "operationParameters",
        "operationMetrics",
        "engineInfo",
        "clientVersion",
        "txnId",
        "isolationLevel",
        "isBlindAppend",
        "readVersion",
        "userId",
        "userName",
        "notebook",
        "clusterId",
        "job",
        "tags",
    )
)


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """One commit. ``committed_us``: by its own word or its file's time, microseconds since 1970. ``noted``: what its writer noted, such as
    ``userMetadata``. ``rows``: of the files that it added with new data, None where the log does not tell. ``added``, ``removed``: paths of data files
    whose data changed, as in the log; ``moved``: those added by compaction and the like, with those removed by it.
    """

    version: int
    committed_us: int
    operation: str
    noted: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()


def commits_told(table: OfflineTable, versions: Iterable[int]) -> dict[int, CommitInfo]:
    """Those of *versions* that the log still has, by version. Raises OfflineStoreError when the log cannot be read."""
    wanted = sorted(set(versions))
    with reading(table.view), ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda version: _read(table, version), wanted)
        return {one.version: one for one in found if one is not None}


def newest_commits(table: OfflineTable, *, since_us: int, most: int) -> Iterator[CommitInfo]:
    """Commits from the pinned version backwards: at most *most*, and none that was made before *since_us*."""
    top = table.version
    while top >= 0 and most > 0:
        low = max(0, top - min(READERS, most) + 1)
        told = commits_told(table, range(low, top + 1))
        for version in range(top, low - 1, -1):
            if version not in told or told[version].committed_us < since_us:
                return
            yield told[version]
        most, top = most - (top - low + 1), low - 1


def _read(table: OfflineTable, version: int) -> CommitInfo | None:
    path = f"_delta_log/{version:020d}.json"
    try:
        with table.log.open(path) as file:
            actions = [json.loads(line) for line in file.read().splitlines() if line.strip()]
    except FileNotFoundError:
        return None
    info: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    moment = info.get("inCommitTimestamp", info.get("timestamp"))
    adds = [action["add"] for action in actions if "add" in action]
    changed = [add for add in adds if add["dataChange"]]
    counted = [rows_of(add) for add in changed]
    return CommitInfo(
        version=version,
        committed_us=int(moment) * 1_000 if moment else table.committed_us(version),
        operation=str(info.get("operation", "unknown")),
        noted={name: value for name, value in info.items() if name not in OWN},
        rows=None if None in counted else sum(rows for rows in counted if rows is not None),
        added=tuple(add["path"] for add in changed),
        removed=tuple(action["remove"]["path"] for action in actions if action.get("remove", {}).get("dataChange")),
        moved=tuple(add["path"] for add in adds if not add["dataChange"]),
    )
