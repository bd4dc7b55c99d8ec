"""What one piece of a run did, as JSON from the task that wrote it to the one that commits; and who watches it being written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PieceReport", "no_progress"]


def no_progress(_entities: int) -> None:
    """Nobody watches."""


@dataclass(slots=True)
class PieceReport:
    """What one piece of a run did, and while it is written, what it did so far; the counters of RunReport.

    ``event_us``: greatest event time read. ``positions``: where the piece's writes ended (`OnlineStore.positions`). ``lost``: rows
    of a small sample of those written that were not there when they were read back. ``held_back`` (seconds) and ``probe``: as
    `materialize.pacing.Pacer` has them. ``timings``: seconds by stage (`materialize.timings`).
    """

    rows_read: int = 0
    entities: int = 0
    written: int = 0
    stale: int = 0
    unchanged: int = 0
    expired: int = 0
    quarantined: int = 0
    deleted: int = 0
    bytes: int = 0
    seconds: float = 0.0
    event_us: int | None = None
    held_back: float = 0.0
    probe: dict[str, dict[str, float]] = field(default_factory=dict)
    quarantine_reasons: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    def spent(self, stage: str, seconds: float) -> None:
        """Add to the time of a stage."""
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds

    def quarantine(self, reasons: dict[str, int]) -> None:
        """Count rows that cannot be stored."""
        for reason, rows in reasons.items():
            self.quarantine_reasons[reason] = self.quarantine_reasons.get(reason, 0) + rows
            self.quarantined += rows

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PieceReport:
        return cls(**values)
