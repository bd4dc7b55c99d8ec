"""What the quarantine table of a history must hold after a finished run; the table is read as any Delta reader does."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from deltalake.exceptions import TableNotFoundError

from tests.properties.rows import keyed, storable
from tests.tables import kept_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from materialize.model import FeatureView
    from tests.properties.rows import Row

__all__ = ["problem"]


def problem(view: FeatureView, live: Iterable[Row], ever: Iterable[Row]) -> str | None:
    """What is wrong, None for nothing. *live*: the rows of the version of the run; *ever*: all rows that there ever were.

    Each live row whose key or event time cannot be stored is there. Of rows whose values cannot, only those that a run looked at
    are, so these may be. Nothing else is there, and nothing twice for the same reason, whatever was killed or done again.
    """
    try:
        rows = kept_rows(view)
    except TableNotFoundError:
        rows = []
    often = [pair for pair, times in Counter((row["id"], row["reason"]) for row in rows).items() if times > 1]
    if often:
        return f"the quarantine has {often} more than once"
    held = {_text(view, json.loads(row["row"])) for row in rows}
    if lacking := {_content(view, row) for row in live if not keyed(row)} - held:
        return f"the quarantine lacks {sorted(lacking)}"
    if more := held - {_content(view, row) for row in ever if not storable(row)}:
        return f"the quarantine has {sorted(more)}, which can be stored or never was"
    return None


def _content(view: FeatureView, row: Row) -> str:
    """What a row is known by: the columns that every view of a history has."""
    told = dict(row)
    for name in ("event", "created"):
        told[name] = None if row[name] is None else row[name].strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    amount = row["amount"]
    if amount is not None and not math.isfinite(amount):
        told["amount"] = "NaN" if math.isnan(amount) else "Infinity" if amount > 0 else "-Infinity"
    return _text(view, told)


def _text(view: FeatureView, told: dict[str, Any]) -> str:
    names = ("region", "user", "event", "amount", "count", "name", *filter(None, [view.created_timestamp]))
    return json.dumps([told[name] for name in names])
