"""A run that is not done in time in, what is late online out: a line in the log, and a call of whom the DAG file names. Runs in the triggerer."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from materialize.airflow import tasks
from materialize.config import load
from materialize.errors import MaterializeError

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["freshness_missed"]

log = structlog.get_logger(__name__)


async def freshness_missed(*, view: str, dags_folder: str, on_late: str | None = None, context: dict[str, Any]) -> str:
    """Called by Airflow once for a run that had not succeeded by its deadline. Returns what it found, in sentences.

    Each store in which the view is late is an ERROR in the triggerer's log; all at once they are the argument of the coroutine
    function *on_late*, which is not called if nothing is late, and not again if it fails.
    """
    run = f"{context['dag_run']['dag_id']}/{context['dag_run']['dag_run_id']}"
    # In a thread, as `triggers.FreshnessTrigger` does: files and stores are read synchronously.
    late = await asyncio.to_thread(late_stores, view, tasks.config_dir(Path(dags_folder)), run, tasks.utcnow())
    for one in late:
        log.error("late", **one)
    if late and on_late is not None:
        module, _, name = on_late.rpartition(".")
        await getattr(import_module(module), name)(late)
    # A text: Airflow 3.3.2 stores it as it is, and its triggerer ends where the database does not take it.
    return "\n".join(one["says"] for one in late) or f"feature view {view!r}: no commit waits for longer than it may"


def late_stores(view: str, folder: Path, run: str, now: datetime) -> list[dict[str, Any]]:
    """The stores in which *view* is later than its ``freshness`` allows, or of which that cannot be told; JSON for people."""
    config = load(folder)
    found = [late_store(view, store, folder, run, now) for store in config.feature_views[view].online_stores]
    return [one for one in found if one is not None]


def late_store(view: str, store: str, folder: Path, run: str, now: datetime) -> dict[str, Any] | None:
    from materialize.freshness import freshness

    facts: dict[str, Any] = {"view": view, "store": store, "run": run, "next": f"materialize status {view}"}
    try:
        with tasks.opened(view, store, folder) as (feature_view, online):
            lag = freshness(feature_view, online)
    except MaterializeError as error:
        return facts | {"says": f"could not tell how fresh feature view {view!r} is in online store {store!r}: {error}"}
    target, waiting = feature_view.freshness, lag.waiting_since
    if target is None or waiting is None or not lag.late(now, target):
        return None
    return facts | {
        "state": lag.state,
        "waiting_since": waiting.isoformat(),
        "target": str(target),
        "says": (
            f"feature view {view!r} is late in online store {store!r}: a commit of {waiting.isoformat()} is not online, expected "
            f"within {target}. Look after the run {run}, and run: materialize status {view}"
        ),
    }
