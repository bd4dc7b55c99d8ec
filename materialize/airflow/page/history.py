"""Pairs of a feature view and a store in, what Airflow's metadata database tells of their runs out: a few indexed reads, no write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select, union_all

from materialize.airflow import tasks
from materialize.airflow.verification import verified

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

__all__ = ["RUNS", "History", "Pair", "Run", "Verified", "newest", "paused", "read"]

#: A feature view and a store, by name.
Pair = tuple[str, str]
#: The events of a view and store that are read and drawn.
RUNS = 30
#: Parts of one statement; SQLite takes 500 at most.
BATCH = 100


@dataclass(frozen=True, slots=True)
class Run:
    """One asset event: a run that changed what readers see. The counters are rows."""

    at: datetime
    mode: str
    from_version: int | None
    to_version: int | None
    rows_read: int
    written: int
    stale: int
    quarantined: int
    deleted: int
    seconds: float | None
    dag_id: str | None
    run_id: str | None


@dataclass(frozen=True, slots=True)
class Verified:
    """One comparison of what is online with the table. The counters are entities."""

    at: datetime
    compare: str
    version: int | None
    compared: int
    missing: int
    extra: int
    stale: int
    wrong: int
    repaired: int
    dag_id: str | None
    run_id: str | None

    @property
    def differences(self) -> int:
        return self.missing + self.extra + self.stale + self.wrong


@dataclass(frozen=True, slots=True)
class History:
    """The last runs of a view in a store, the newest first, and the last comparison."""

    runs: tuple[Run, ...] = ()
    verified: Verified | None = None


def read(pairs: Sequence[Pair], session: Session) -> dict[Pair, History]:
    """The `History` of each of *pairs*; an empty one where nothing has happened yet."""
    asked = {tasks.asset(*pair).name: pair for pair in pairs}
    checks = {pair: verified(*pair).name for pair in pairs}
    names = [*asked, *checks.values()]
    ids = asset_ids(names, session)
    events = newest({ids[name]: RUNS if name in asked else 1 for name in names if name in ids}, session)
    histories = {}
    for name, pair in asked.items():
        checked = events.get(ids.get(checks[pair], -1), [])
        runs = tuple(map(run_of, events.get(ids.get(name, -1), [])))
        histories[pair] = History(runs, verified_of(checked[0]) if checked else None)
    return histories


def asset_ids(names: Sequence[str], session: Session) -> dict[str, int]:
    """The ids of the assets of ours that Airflow knows, by name."""
    from airflow.models.asset import AssetModel

    ids: dict[str, int] = {}
    for part in parts(names):
        rows = session.execute(select(AssetModel.name, AssetModel.uri, AssetModel.id).where(AssetModel.name.in_(part)))
        ids |= {name: number for name, uri, number in rows if uri == f"materialize://{name}"}
    return ids


def newest(limits: Mapping[int, int], session: Session) -> dict[int, list[Any]]:
    """The newest events of each asset, as many as its limit, the newest first; by the index on asset and time."""
    found: dict[int, list[Any]] = {}
    for part in parts(list(limits)):
        statement = union_all(*(select(last(asset, limits[asset]).subquery()) for asset in part))
        for event in session.execute(statement):
            found.setdefault(event.asset_id, []).append(event)
    for events in found.values():
        events.sort(key=lambda event: (event.timestamp, event.id), reverse=True)
    return found


def last(asset: int, limit: int) -> Select[Any]:
    from airflow.models.asset import AssetEvent

    columns = ("id", "asset_id", "timestamp", "extra", "source_dag_id", "source_run_id")
    events = select(*(getattr(AssetEvent, name) for name in columns)).where(AssetEvent.asset_id == asset)
    return events.order_by(AssetEvent.timestamp.desc()).limit(limit)


def paused(dag_ids: Iterable[str], session: Session) -> dict[str, bool]:
    """Whether each of the DAGs is paused; without those that Airflow does not know, or whose file is gone."""
    from airflow.models.dag import DagModel

    rows = select(DagModel.dag_id, DagModel.is_paused).where(DagModel.dag_id.in_(dag_ids), DagModel.is_stale.is_(False))
    return {dag_id: bool(is_paused) for dag_id, is_paused in session.execute(rows)}


# An event's extra is checked here once: whoever may write asset events may put anything into it. -------------------------


def run_of(event: Any) -> Run:
    extra = event.extra
    return Run(
        at=event.timestamp,
        mode=text(extra, "mode"),
        from_version=whole(extra, "from_version"),
        to_version=whole(extra, "to_version"),
        **{name: whole(extra, name) or 0 for name in ("rows_read", "written", "stale", "quarantined", "deleted")},
        seconds=number(extra, "seconds"),
        dag_id=event.source_dag_id,
        run_id=event.source_run_id,
    )


def verified_of(event: Any) -> Verified:
    extra = event.extra
    counts = ("compared", "missing", "extra", "stale", "wrong", "repaired")
    return Verified(
        at=event.timestamp,
        compare=text(extra, "compare"),
        version=whole(extra, "version"),
        **{name: whole(extra, name) or 0 for name in counts},
        dag_id=event.source_dag_id,
        run_id=event.source_run_id,
    )


def text(extra: Any, name: str) -> str:
    """The text *name*, short; empty when there is none."""
    value = extra.get(name) if isinstance(extra, dict) else None
    return value[:40] if isinstance(value, str) else ""


def number(extra: Any, name: str) -> float | None:
    """The finite, not negative number *name*; None when there is none."""
    value = extra.get(name) if isinstance(extra, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return value


def whole(extra: Any, name: str) -> int | None:
    value = number(extra, name)
    return None if value is None else int(value)


def parts(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
