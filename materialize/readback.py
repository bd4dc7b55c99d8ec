"""Entities that a run wrote in, which of them the store does not have any more out.

Some are remembered in a cell beside the watermark, so that the next run can ask for them again. No key leaves the store.
"""

from __future__ import annotations

import json
import zlib
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from materialize import decoder
from materialize.model import to_us
from materialize.online.base import TOMBSTONE
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    import numpy.typing as npt

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["forget", "missing", "missing_since", "remembered"]

CELL = "sample"
#: Entities that are remembered: of a store that lost 5 % of its records, one is missing with a probability of 96 %.
REMEMBERED = 64
#: A record that expires within this time may leave before it is read back.
SOON_US = 3_600_000_000


def missing(
    view: FeatureView, store: OnlineStore, keys: Sequence[bytes], event_us: npt.NDArray[np.int64], now: datetime
) -> int:
    """Read entities back that were just written, and remember them. Returns: how many are gone."""
    stay = list(compress(keys, _stays(view, event_us, now)))
    if not stay or store.evidence() is None:
        return 0
    gone = sum(record is None for record in _read(view, store, stay))
    _change(view, store, lambda known: [*known, *stay])
    return gone


def missing_since(view: FeatureView, store: OnlineStore, now: datetime) -> list[bytes]:
    """Which remembered entities the store does not have any more. Those that may leave by themselves soon are forgotten."""
    keys = remembered(view, store)
    held = dict(zip(keys, _read(view, store, keys), strict=True))
    there = {key: record for key, record in held.items() if record is not None}
    heads = decoder.headers(list(there.values()))
    going = ~((heads["flags"] & TOMBSTONE == 0) & _stays(view, heads["event_us"], now))
    if going.any():
        forget(view, store, compress(there, going))
    return [key for key in keys if key not in there]


def remembered(view: FeatureView, store: OnlineStore) -> list[bytes]:
    """The remembered entity keys; none where there are none, or where the cell holds something else."""
    return _keys(with_retry(partial(store.read_cell, view.name, CELL)))


def forget(view: FeatureView, store: OnlineStore, keys: Iterable[bytes]) -> None:
    """Remember *keys* no longer."""
    out = set(keys)
    _change(view, store, lambda known: [key for key in known if key not in out])


def _change(view: FeatureView, store: OnlineStore, change: Callable[[list[bytes]], Iterable[bytes]]) -> None:
    """Write what *change* makes of the remembered keys, at most `REMEMBERED`: those of the least checksum, whatever order runs came in."""
    done = False
    while not done:
        content = with_retry(partial(store.read_cell, view.name, CELL))
        kept = sorted(set(change(_keys(content))), key=lambda key: (zlib.crc32(key), key))[:REMEMBERED]
        text = json.dumps([key.decode("latin-1") for key in kept]).encode()
        done = content == text or with_retry(partial(store.compare_and_set_cell, view.name, CELL, content, text))


def _keys(content: bytes | None) -> list[bytes]:
    try:
        return [] if content is None else [str(text).encode("latin-1") for text in json.loads(content)]
    except (ValueError, TypeError):
        return []


def _read(view: FeatureView, store: OnlineStore, keys: Sequence[bytes]) -> list[bytes | None]:
    return with_retry(partial(store.read, view.name, keys)) if keys else []


def _stays(view: FeatureView, event_us: npt.NDArray[np.int64], now: datetime) -> npt.NDArray[np.bool_]:
    """Which records, by their event times, are still there in `SOON_US`."""
    if view.ttl_us is None:
        return np.ones(len(event_us), dtype=np.bool_)
    return event_us > to_us(now) + SOON_US - view.ttl_us
