"""What a run found in, an error out where it looks like a mistake upstream: a source that is suddenly empty or small, too many rows that
cannot be stored. ``--force`` lets one run pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from materialize.errors import OfflineStoreError, QuarantineError
from materialize.model import mask_credentials

if TYPE_CHECKING:
    from materialize.model import FeatureView, Watermark
    from materialize.online.base import OnlineStore
    from materialize.plan import Plan

__all__ = ["Counted", "check_quarantined", "check_source"]

#: A source that has this share of its live rows or less, compared with the last run, stops the next one: 60 % are gone.
SHRUNKEN = 0.4
#: Below so many live rows, two of three rows may well go at once: only a source that became empty stops a run.
SMALL = 1_000


class Counted(Protocol):
    """What a piece or a run counted."""

    @property
    def quarantined(self) -> int: ...

    @property
    def quarantine_reasons(self) -> dict[str, int]: ...


def check_source(
    view: FeatureView, store: OnlineStore, mark: Watermark | None, plan: Plan, *, rows: int | None
) -> None:
    """Raise OfflineStoreError when the source of *view* is empty or shrunken, compared with what *mark* knows; nothing was written.

    *rows*: live rows of the planned version, None where the log does not tell; then there is nothing to compare. Where no
    watermark knows how many there were, an empty source stops a run if the store holds any record of the view.
    """
    if plan.force or rows is None:
        return
    before = None if mark is None else mark.rows
    if before is None:
        if rows or not any(keys for keys, _ in store.scan(view.name)):
            return
        known = "; expected some, because the online store holds records of the view"
    elif before == 0 or (rows > 0 and (before < SMALL or rows > SHRUNKEN * before)):
        return
    else:
        least = int(SHRUNKEN * before) + 1 if before >= SMALL else 1
        version = "before" if mark is None or mark.version is None else f"at version {mark.version}"
        known = f", where there were {before:,} {version}; expected at least {least:,}"
    command = f"materialize {plan.mode} {view.name} --store {plan.store} --force"
    raise OfflineStoreError(
        f"feature view {view.name!r}: could not plan the {plan.mode} run to version {plan.to_version} of {mask_credentials(view.source)}: "
        f"found {rows:,} live rows{known}. Nothing was written: readers see what they saw, and the watermark stays. If the table is wrong, "
        f"mend it, and the next run goes on; if it is right, let one run pass: {command}"
    )


def check_quarantined(view: FeatureView, plan: Plan, counted: Counted, *, rows: int) -> None:
    """Raise QuarantineError when more of *rows* were *counted* that cannot be stored than the view allows.

    Asked of a piece before it removes entities that are gone, with the rows of all pieces, and of the whole run before the commit:
    so where keys become null by mistake, the entities that seem to be gone stay. A backfill moves no watermark and removes
    nothing, so it is never stopped.
    """
    most = view.max_quarantined
    if most is None or plan.force or plan.mode == "backfill" or counted.quarantined <= most * rows:
        return
    found = "; ".join(
        f"{reason}: {counted.quarantine_reasons[reason]:,}" for reason in sorted(counted.quarantine_reasons)
    )
    raise QuarantineError(
        f"feature view {view.name!r}: could not finish the {plan.mode} run to version {plan.to_version}: found that {counted.quarantined:,} of "
        f"{rows:,} rows cannot be stored ({found}), expected at most {most:.4%} (max_quarantined). The watermark does not move; the "
        f"rows that can be stored are online, which is harmless. See them: materialize quarantine list {view.name}. Mend the table, or let "
        f"one run pass: materialize {plan.mode} {view.name} --store {plan.store} --force"
    )
