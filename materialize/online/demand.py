"""What a view is sized for: how many entities, how many of them change, how often they are read."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DAYS_A_MONTH", "SECONDS_A_DAY", "Demand"]

#: As AWS counts a month: 730 hours (https://aws.amazon.com/calculator/calculator-assumptions/).
DAYS_A_MONTH = 730 / 24
SECONDS_A_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Demand:
    """``changes_per_day``: entities written by runs, None where nobody knows. ``reads_per_second``: of single entities."""

    entities: int
    changes_per_day: int | None
    reads_per_second: float
