"""What the pieces of a run did in, what the run did out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from materialize import timings
from materialize.model import COUNTERS, RunReport
from materialize.pacing import merged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.piece_report import PieceReport
    from materialize.plan import Plan

__all__ = ["greatest", "summed"]


def summed(plan: Plan, pieces: Sequence[PieceReport]) -> RunReport:
    """The report of the run whose *pieces* are all of *plan*; what `pipeline.begin` repaired counts too."""
    reasons: dict[str, int] = {}
    for piece in pieces:
        for reason, rows in piece.quarantine_reasons.items():
            reasons[reason] = reasons.get(reason, 0) + rows
    totals = {name: sum(getattr(piece, name) for piece in pieces) for name in COUNTERS}
    totals["deleted"] += plan.removed
    totals["written"] += plan.repaired
    totals["entities"] += plan.repaired
    return RunReport(
        view=plan.view,
        store=plan.store,
        mode=plan.mode,
        from_version=plan.from_version,
        to_version=plan.to_version,
        seconds=sum(piece.seconds for piece in pieces),
        held_back=round(sum(piece.held_back for piece in pieces), 3),
        probe=merged(piece.probe for piece in pieces),
        event_us=greatest(*(piece.event_us for piece in pieces)),
        run_id=plan.run_id,
        interval=None if plan.interval is None else str(plan.interval),
        reason=plan.reason,
        quarantine_reasons=reasons,
        timings=timings.summed([{"plan": plan.seconds}, *(piece.timings for piece in pieces)]),
        **totals,
    )


def greatest(*moments: int | None) -> int | None:
    return max((moment for moment in moments if moment is not None), default=None)
