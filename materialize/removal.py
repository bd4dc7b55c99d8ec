"""Entities without a row any more in, tombstones out: they disappear for readers, and no older run can bring them back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from materialize import codec, decoder
from materialize.model import to_us
from materialize.online.base import TOMBSTONE
from materialize.order import WRITTEN, stamp
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore, Outcomes
    from materialize.plan import Plan

__all__ = ["remove", "sweep"]

#: Entities of one read and one write.
AT_ONCE = 10_000


def remove(view: FeatureView, store: OnlineStore, plan: Plan, entity_keys: Sequence[bytes], now: datetime) -> int:
    """Tombstone the entities, also those that are not online. Returns how many of them readers still saw."""
    removed = 0
    for low in range(0, len(entity_keys), AT_ONCE):
        keys = entity_keys[low : low + AT_ONCE]
        held = with_retry(partial(store.read, view.name, keys))
        outcomes = _tombstone(view, store, plan, keys, now)
        there = np.array([record is not None for record in held])
        seen = _seen(view, decoder.headers([record for record in held if record is not None]), now)
        removed += int((seen & (outcomes[there] == WRITTEN)).sum())
    return removed


def sweep(view: FeatureView, store: OnlineStore, plan: Plan, now: datetime) -> int:
    """Tombstone every entity online that the plan's snapshot has no storable row of. Returns how many of them readers still saw.

    Every row of the snapshot was written with the snapshot's floor, so a lower floor means "not in the snapshot".
    """
    removed = 0
    for keys, records in store.scan(view.name):
        heads = decoder.headers(records)
        gone = np.flatnonzero(heads["floor"] < stamp(plan.generation, plan.to_version))
        outcomes = _tombstone(view, store, plan, [keys[row] for row in gone], now)
        removed += int((_seen(view, heads[gone], now) & (outcomes == WRITTEN)).sum())
    return removed


def _tombstone(view: FeatureView, store: OnlineStore, plan: Plan, keys: Sequence[bytes], now: datetime) -> Outcomes:
    at = stamp(plan.generation, plan.to_version)
    batch = codec.tombstones(keys, at)
    return with_retry(partial(store.replace, view.name, batch, at=at, retention=view.retention(now)))


def _seen(view: FeatureView, heads: npt.NDArray[Any], now: datetime) -> npt.NDArray[np.bool_]:
    """Whether readers see each record: bool."""
    live: npt.NDArray[np.bool_] = heads["flags"] & TOMBSTONE == 0
    return live if view.ttl_us is None else live & (heads["event_us"] + view.ttl_us > to_us(now))
