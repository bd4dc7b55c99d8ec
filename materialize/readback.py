"""Entities that were written in, how many of them the store does not have any more out.

Some are remembered in a cell beside the watermark, so that the next run can ask for them again. No key leaves the store.
"""

from __future__ import annotations

import json
import random
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from materialize import decoder
from materialize.model import to_us
from materialize.online.base import TOMBSTONE
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["forget", "keys_of", "missing", "missing_since"]

CELL = "sample"
#: Entities that are remembered: of a store that lost 5 % of its records, one is missing with a probability of 96 %.
REMEMBERED = 64
#: A record that expires within this time may leave before it is read back.
SOON_US = 3_600_000_000


def missing(view: FeatureView, store: OnlineStore, written: Sequence[tuple[bytes, int]], now: datetime) -> int:
    """Read some entities back that were just *written*, (entity key, event time in us), and remember them. Returns: how many are gone."""
    if not written or store.evidence() is None:
        return 0
    keys = [key for key, event_us in written if _stays(view, event_us, now)]
    gone = sum(record is None for record in _read(view, store, keys))
    _remember(view, store, keys)
    return gone


def missing_since(view: FeatureView, store: OnlineStore, now: datetime) -> int:
    """How many of the remembered entities the store does not have any more. Those that may leave by themselves soon are forgotten."""
    keys = keys_of(view, store)
    held = _read(view, store, keys)
    there = [(key, record) for key, record in zip(keys, held, strict=True) if record is not None]
    heads = decoder.headers([record for _, record in there])
    live = heads["flags"] & TOMBSTONE == 0
    stays = np.array([_stays(view, int(event_us), now) for event_us in heads["event_us"]], dtype=bool)
    going = [there[row][0] for row in np.flatnonzero(~(live & stays))]
    if going:
        forget(view, store, going)
    return len(keys) - len(there)


def keys_of(view: FeatureView, store: OnlineStore) -> list[bytes]:
    """The remembered entity keys; none where there are none, or where the cell holds something else."""
    return _keys(with_retry(partial(store.read_cell, view.name, CELL)))


def forget(view: FeatureView, store: OnlineStore, keys: Iterable[bytes]) -> None:
    """Remember *keys* no longer. Losing a race with another run does no harm: it is done again."""
    content, out = with_retry(partial(store.read_cell, view.name, CELL)), set(keys)
    with_retry(partial(_write, view, store, content, [key for key in _keys(content) if key not in out]))


def _remember(view: FeatureView, store: OnlineStore, keys: Sequence[bytes]) -> None:
    """Put *keys* among those that are remembered, in the place of random others. A piece that loses a race is not remembered."""
    content = with_retry(partial(store.read_cell, view.name, CELL))
    others = [key for key in _keys(content) if key not in set(keys)]
    random.shuffle(others)
    with_retry(partial(_write, view, store, content, [*keys, *others][:REMEMBERED]))


def _write(view: FeatureView, store: OnlineStore, content: bytes | None, keys: Sequence[bytes]) -> None:
    text = json.dumps([key.decode("latin-1") for key in keys])
    store.compare_and_set_cell(view.name, CELL, content, text.encode())


def _keys(content: bytes | None) -> list[bytes]:
    try:
        return [] if content is None else [str(text).encode("latin-1") for text in json.loads(content)]
    except (ValueError, TypeError):
        return []


def _read(view: FeatureView, store: OnlineStore, keys: Sequence[bytes]) -> list[bytes | None]:
    return with_retry(partial(store.read, view.name, keys)) if keys else []


def _stays(view: FeatureView, event_us: int, now: datetime) -> bool:
    return view.ttl_us is None or event_us + view.ttl_us > to_us(now) + SOON_US
