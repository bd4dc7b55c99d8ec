"""Entities that a run wrote in, which of them the store does not have any more out.

Some are remembered in a cell beside the watermark, so that the next run can ask for them again. No key leaves the store.
"""

from __future__ import annotations

import json
import zlib
from functools import partial
from typing import TYPE_CHECKING

from materialize.model import to_us
from materialize.online.base import unpack_order
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    import numpy as np
    import numpy.typing as npt

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["forget", "missing", "missing_since", "remembered"]

CELL = "sample"
#: Entities that are remembered: of a store that lost 5 % of its records, one is missing with a probability of 96 %.
REMEMBERED = 64
#: A record that expires within this time may be gone: clocks differ, and a run takes its time.
SOON_US = 3_600_000_000


def missing(
    view: FeatureView, store: OnlineStore, keys: Sequence[bytes], event_us: npt.NDArray[np.int64], now: datetime
) -> int:
    """Read entities back that were just written, and remember them with their event times. Returns: how many are gone."""
    written = {key: us for key, us in zip(keys, event_us.tolist(), strict=True) if _stays(view, us, now)}
    if not written:
        return 0
    gone = sum(record is None for record in _read(view, store, list(written)))
    _change(view, store, lambda known: known | written)
    return gone


def missing_since(view: FeatureView, store: OnlineStore, now: datetime) -> list[bytes]:
    """Which remembered entities the store should have and does not have any more. Those that left by themselves are forgotten."""
    known = remembered(view, store)
    held = dict(zip(known, _read(view, store, list(known)), strict=True))
    lost = [key for key, us in known.items() if held[key] is None and _stays(view, us, now)]
    left = [key for key, record in held.items() if record is None or unpack_order(record).event_us is None]
    if done := set(left).difference(lost):
        forget(view, store, done)
    return lost


def remembered(view: FeatureView, store: OnlineStore) -> dict[bytes, int]:
    """The remembered entity keys with their event times, us; none where there are none, or where the cell holds something else."""
    return _known(with_retry(partial(store.read_cell, view.name, CELL)))


def forget(view: FeatureView, store: OnlineStore, keys: Iterable[bytes]) -> None:
    """Remember *keys* no longer."""
    out = set(keys)
    _change(view, store, lambda known: {key: us for key, us in known.items() if key not in out})


def _change(view: FeatureView, store: OnlineStore, change: Callable[[dict[bytes, int]], dict[bytes, int]]) -> None:
    """Write what *change* makes of the remembered entities: at most `REMEMBERED`, those of the least checksum, so in whatever order runs end."""
    done = False
    while not done:
        content = with_retry(partial(store.read_cell, view.name, CELL))
        kept = sorted(change(_known(content)).items(), key=lambda one: (zlib.crc32(one[0]), one[0]))[:REMEMBERED]
        text = json.dumps({key.decode("latin-1"): us for key, us in kept}).encode()
        done = content == text or with_retry(partial(store.compare_and_set_cell, view.name, CELL, content, text))


def _known(content: bytes | None) -> dict[bytes, int]:
    try:
        return {} if content is None else {key.encode("latin-1"): int(us) for key, us in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def _read(view: FeatureView, store: OnlineStore, keys: Sequence[bytes]) -> list[bytes | None]:
    return with_retry(partial(store.read, view.name, keys)) if keys else []


def _stays(view: FeatureView, event_us: int, now: datetime) -> bool:
    return view.ttl_us is None or event_us + view.ttl_us > to_us(now) + SOON_US
