"""An entity key in, an erased entity in a store out: its features are gone, and no run, backfill, rebuild, repair or replay brings it back.

A tombstone with the greatest floor there is (`materialize.order.ERASED`) takes the record's place, and stays for ever. It goes through
the order rule like every other write, so it needs no lease and every store that keeps the rule keeps this promise.

``materialize forget`` erases its quarantined rows too (`materialize.offline.erase`). What is not erased: the rows in the Delta table,
which their owner deletes (DELETE, then VACUUM), and older copies of the store: backups, append-only files, replicas that are cut off. A
store that loses its data loses its tombstones too.
"""

from __future__ import annotations

import hashlib
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any

from materialize import codec
from materialize.errors import UnavailableError
from materialize.model import Retention
from materialize.online.base import HEADER, unpack_order
from materialize.order import ERASED
from materialize.retry import with_retry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from materialize.online.base import OnlineStore

__all__ = ["erased", "forget", "key_hash", "receipt"]

#: The last second of the year 9999, in microseconds: the latest that DynamoDB, Redis and Python's datetime all can say.
FOR_EVER = Retention(ttl_us=None, keep_until_us=253_402_300_799_000_000)
#: Random bytes per receipt, so that the same key has another hash in each.
SALT_BYTES = 16


def forget(store: OnlineStore, view: str, key: bytes) -> str:
    """Erase the entity *key* of *view* in *store*, whether it is there or not. Returns: what was done, for the receipt.

    After it returns, the store was read and holds nothing of the entity but its key. If it raises, that is not known; doing it
    again is harmless. Raises UnavailableError where the store does not answer, or still shows the old record after some attempts.
    """
    (held,) = with_retry(partial(store.read, view, [key]))
    with_retry(partial(store.replace, view, codec.tombstones([key], ERASED), at=ERASED, retention=FOR_EVER))
    with_retry(partial(_must_be_erased, store, view, key))
    if held is None:
        return "erased; nothing was there"
    return "erased before" if erased(held) else "erased"


def erased(record: bytes) -> bool:
    """Whether *record* is what `forget` leaves."""
    order = unpack_order(record)
    return order.event_us is None and order.floor == ERASED and len(record) == HEADER.size


def receipt(
    view: str, key: bytes, outcomes: Mapping[str, str], *, when: datetime, by: str, host: str
) -> dict[str, Any]:
    """What proves later that this key was erased, as JSON, without telling which it is. *outcomes*: by store.

    Whoever has the receipt can find out whether it is of a key that they guess, so it is a pseudonym and no anonymous record.
    """
    salt = secrets.token_hex(SALT_BYTES)
    stores = [{"store": store, "outcome": outcome} for store, outcome in outcomes.items()]
    return {
        "erased_from": view,
        "key_sha256": key_hash(view, key, salt),
        "salt": salt,
        "stores": stores,
        "when": when.isoformat(),
        "by": by,
        "host": host,
        "not_erased": "the Delta table, and older copies of the stores: DELETE and VACUUM there",
    }


def key_hash(view: str, key: bytes, salt: str) -> str:
    """SHA-256 over the salt's text, the view's name and the entity key (docs/format.md), with a zero byte between them. Hexadecimal."""
    return hashlib.sha256(b"\0".join((salt.encode(), view.encode(), key))).hexdigest()


def _must_be_erased(store: OnlineStore, view: str, key: bytes) -> None:
    (found,) = store.read(view, [key])
    if found is None or not erased(found):
        raise UnavailableError(
            f"feature view {view!r}: could not see an erased entity in {store.location}: found another record, expected its tombstone. "
            "It was written; a replica may be behind. Run it again"
        )
