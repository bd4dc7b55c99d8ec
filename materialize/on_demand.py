"""What a run needs where there are rows, loaded by the first run that has some.

polars, pyarrow and numpy take longer to load than a whole run that finds nothing new.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize.order import ERASED
from materialize.piece_report import PieceReport, no_progress
from materialize.stop import hear_at_once

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore
    from materialize.plan import Plan

__all__ = ["engine", "highest_version", "piece_writer", "sweep", "write_piece"]


def engine() -> str:
    """What picks the latest rows in this process (`Plan.engine`)."""
    from materialize.latest import ENGINE

    return ENGINE


def piece_writer() -> Callable[..., PieceReport]:
    """`materialize.piece.write_piece`."""
    from materialize.piece import write_piece as write

    hear_at_once()
    return write


def write_piece(
    view: FeatureView,
    store: OnlineStore,
    plan: Plan,
    piece: int,
    *,
    now: datetime,
    progress: Callable[[int], None] = no_progress,
) -> PieceReport:
    """`materialize.piece.write_piece`, for who writes the pieces of a plan one by one."""
    return piece_writer()(view, store, plan, piece, now=now, progress=progress)


def sweep(view: FeatureView, store: OnlineStore, plan: Plan, now: datetime) -> int:
    """`materialize.removal.sweep`."""
    from materialize import removal

    return removal.sweep(view, store, plan, now)


def highest_version(view: FeatureView, store: OnlineStore) -> int | None:
    """The greatest version or floor of any record of *view* in the store, but of erased ones, None when there is no record."""
    from materialize import decoder

    every = (decoder.headers(records) for _, records in store.scan(view.name))
    heads = (head[head["floor"] < ERASED] for head in every)
    return max((int(max(head["version"].max(), head["floor"].max())) for head in heads if len(head)), default=None)
