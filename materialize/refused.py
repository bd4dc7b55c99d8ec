"""Entity keys of rows that cannot be stored in, what the store says about these entities out: versions, floors, and which were erased."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from materialize import decoder
from materialize.order import ERASED
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.online.base import OnlineStore

__all__ = ["Held", "erased", "held"]

#: Entities of one read.
AT_ONCE = 10_000


class Held(NamedTuple):
    """The version and floor of a record or tombstone."""

    version: int
    floor: int


def held(store: OnlineStore, view: str, entities: Sequence[str]) -> dict[str, Held]:
    """What the store holds of those of *entities* that it holds anything of."""
    # a store may refuse to look for a key that it cannot hold
    possible = [entity for entity in entities if 0 < len(entity.encode()) <= store.max_key_bytes]
    found: dict[str, Held] = {}
    for low in range(0, len(possible), AT_ONCE):
        some = possible[low : low + AT_ONCE]
        records = with_retry(partial(store.read, view, [entity.encode() for entity in some]))
        there = {entity: record for entity, record in zip(some, records, strict=True) if record is not None}
        heads = decoder.headers([*there.values()])
        found |= zip(there, map(Held, heads["version"].tolist(), heads["floor"].tolist()), strict=True)
    return found


def erased(store: OnlineStore, view: str, entities: Sequence[str]) -> list[str]:
    """Those of *entities* of which nothing may be kept any more, whatever the table still holds."""
    return [entity for entity, head in held(store, view, entities).items() if head.floor >= ERASED]
