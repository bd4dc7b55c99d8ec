"""A run and its store in, whether the store still is what the run takes it for: before the first write, and around the watermark.

The watermark must never claim what the store does not hold. What is damaged is repaired before the run goes on.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from materialize import readback, watermark
from materialize.errors import OnlineStoreError, StoreChangedError
from materialize.evidence import Verdict, during_run, facts_from_json, facts_to_json, since_watermark
from materialize.model import Watermark
from materialize.preflight import check_memory
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from materialize.evidence import Facts
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore
    from materialize.pipeline import Run
    from materialize.plan import Plan

__all__ = ["after_writes", "before_writes"]

log = logging.getLogger(__name__)


def before_writes(view: FeatureView, store: OnlineStore, plan: Plan, run: Run) -> Plan:
    """Compare the store with the facts in the plan's watermark, and repair what an incremental run builds on.

    Returns: the plan, with what was found and done in its ``reason``. A crash leaves any part repaired and the watermark as it was.
    Raises OnlineStoreError, before anything is written, for a store that may evict records or has no room for the run.
    """
    facts = with_retry(store.evidence)
    if facts is None:
        return plan
    store.positions()  # those of an earlier run
    if not plan.force:
        _refuse_eviction(view, store, facts)
        check_memory(view, store, plan, facts)
    plan = replace(plan, evidence=facts_to_json(facts))
    held = None if plan.watermark is None else Watermark.from_json(plan.watermark)
    if held is None or plan.mode == "backfill":
        return plan
    before = facts_from_json(held.evidence)
    found = Verdict() if before is None else since_watermark(before, facts)
    gone = readback.missing_since(view, store, run.now()) if plan.reads_changes else []
    words = [found.words] if found.words else []
    if gone:
        words.append(f"{len(gone):,} of the records that earlier runs wrote and that were read back are missing")
    if plan.reads_changes and (found.lost or gone):
        plan, done = _repaired(view, store, plan, run)
        words.append(done)
        # Those that the table does not have either would be missing for ever; the others are remembered when they are written.
        readback.forget(view, store, gone)
    if not words:
        return plan
    log.warning("found in the store view=%s store=%s: %s", view.name, plan.store, "; ".join(words))
    return replace(plan, reason=f"{plan.reason}; {'; '.join(words)}", moved=True)


def after_writes(
    view: FeatureView, store: OnlineStore, plan: Plan, positions: Mapping[str, int], lost: int = 0
) -> tuple[Facts | None, str]:
    """Check that the store holds what was written until *positions*.

    *lost*: rows that were read back and not found. Returns: the facts for the watermark, and what happened without harm, in words.
    Raises StoreChangedError when something is lost or may be, OnlineStoreError when it was evicted.
    """
    began = facts_from_json(plan.evidence)
    facts = None if began is None else with_retry(store.evidence)
    if began is None or facts is None:
        return None, ""
    found = during_run(began, facts, positions)
    wiped = plan.watermark is not None and with_retry(partial(watermark.read_text, store, view.name)) is None
    words = [found.words] if found.words else []
    if lost:
        words.append(f"{lost:,} rows that were written and read back are missing")
    if wiped:
        words.append("the watermark is gone, as after FLUSHALL")
    told = "; ".join(words)
    if not (found.lost or lost or wiped):
        if told:
            log.warning("during the run view=%s store=%s: %s", view.name, plan.store, told)
        return facts, told
    message = (
        f"feature view {view.name!r}: could not finish the run: found that {told} ({store.location}), "
        "expected all that it wrote. The run does not count as done"
    )
    if found.evicted:
        raise OnlineStoreError(
            f"{message}. Give the store more memory or set maxmemory-policy noeviction, and run again: it repairs what is missing."
        )
    raise StoreChangedError(f"{message}; running again repairs what is missing.")


def _refuse_eviction(view: FeatureView, store: OnlineStore, facts: Facts) -> None:
    evicting = [(node, one.policy, one.maxmemory) for node, one in facts.items() if one.evicts]
    if not evicting or store.eviction_allowed:
        return
    node, policy, maxmemory = evicting[0]
    raise OnlineStoreError(
        f"feature view {view.name!r}: could not begin to write to {store.location}: found maxmemory-policy {policy!r} on {node} with maxmemory "
        f"{maxmemory:,} bytes, expected 'noeviction': a full server would remove records that the watermark claims. Nothing was written. "
        "Run: CONFIG SET maxmemory-policy noeviction; or accept it with ?eviction=allow in the store's URL, once with --force"
    )


def _repaired(view: FeatureView, store: OnlineStore, plan: Plan, run: Run) -> tuple[Plan, str]:
    """Make the store equal to the table at the watermark's version. Returns: the plan that goes on from there, and what was done."""
    from materialize.verify import PROBLEMS, verify

    report = verify(view, store, run, repair=True)
    text = with_retry(partial(watermark.read_text, store, view.name))
    if text is None:
        raise StoreChangedError(
            f"feature view {view.name!r}: could not repair {store.location}: the watermark went away meanwhile. Run again."
        )
    removed = min(report.extra, report.repaired)
    counts = ", ".join(f"{problem} {getattr(report, problem):,}" for problem in PROBLEMS if getattr(report, problem))
    done = f"compared all {report.compared:,} entities with version {report.version}: {counts or 'nothing differs'}"
    done += f", repaired {report.repaired:,}" if report.mismatched else ""
    plan = replace(
        plan,
        watermark=text,
        generation=Watermark.from_json(text).generation,
        repaired=report.repaired - removed,
        removed=removed,
        positions=store.positions(),
    )
    return plan, done
