"""One batch on its way into a table: rows in, statements out, outcomes in the end. No I/O.

Each row begins as an INSERT, an UPDATE under the order rule's condition, or a read, whichever costs least by what the rows before it
met; the first ones are read. Where DynamoDB refuses a statement it says what it holds; the rule in Python (`materialize.order`) then says whether the row is
done, and if not, the next statement holds only for exactly that item.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass, replace as altered
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from botocore.exceptions import ClientError

from materialize import order
from materialize.online.base import unpack_order
from materialize.online.dynamodb.client import THROTTLES
from materialize.online.dynamodb.items import (
    CREATED,
    EVENT,
    EXPIRES,
    FLOOR,
    ORDER,
    RECORD,
    UNIT_BYTES,
    VERSION,
    Frames,
    Statement,
    columns,
    item_bytes,
    record_of,
    stored_order,
    values_of,
)
from materialize.order import WRITTEN, Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from materialize.model import Retention
    from materialize.online.base import EncodedBatch

__all__ = ["AGAIN", "Attempt", "Load", "Rule"]

#: Statements per request (BatchExecuteStatement's own limit), and bytes, far below the 16 MB of a request.
STATEMENTS, STATEMENT_BYTES = 25, 4 * 2**20
#: Keys per reading request (BatchGetItem's own limit).
READS = 100
#: What a read of 4 KB costs of a write of 1 KB, on demand and provisioned alike (config's prices, 2026).
READ_COST = 0.2
#: Errors of a statement after which it is sent again as it is.
AGAIN = THROTTLES | {"InternalServerError", "TransactionConflict"}


Way = Literal["insert", "update", "read"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How a row meets what the store holds. ``at``: the snapshot whose full state it is; None: a row that was added."""

    at: int | None = None
    tie_wins: bool = False

    def decide(self, stored: Record, new: Record) -> tuple[int, Record]:
        if self.at is None:
            return order.merge(stored, new, tie_wins=self.tie_wins)
        return order.replace(stored, new, at=self.at)

    @property
    def condition(self) -> str:
        """When an UPDATE may store the row as it is (`materialize.order`), in PartiQL."""
        if self.at is not None:
            return "f<{n} AND n<={n}"
        tie = " OR (e={e} AND c={c} AND n<{n})" if self.tie_wins else ""
        return f"f<{{n}} AND (e<{{e}} OR (e={{e}} AND c<{{c}}){tie})"

    @property
    def sets(self) -> tuple[str, ...]:
        """What that UPDATE sets beside the expiry: a row that was added keeps the floor."""
        kept = (RECORD, EVENT, CREATED, VERSION)
        return kept if self.at is None else (*kept, FLOOR)


@dataclass(slots=True)
class Met:
    """What the rows of a batch met so far, and so how the next ones should begin."""

    absent: float = 0.0
    changed: float = 0.0
    kept: float = 0.0

    @property
    def rows(self) -> float:
        return self.absent + self.changed + self.kept

    def add(self, *, absent: bool = False, changed: bool = False) -> None:
        self.absent += absent
        self.changed += changed
        self.kept += not (absent or changed)

    @property
    def cheapest(self) -> Way:
        """By write units: a statement that is refused costs what it would have written, and another one follows."""
        if not self.rows:
            return "read"
        absent, kept = self.absent / self.rows, self.kept / self.rows
        costs: dict[Way, float] = {"update": 1 + absent, "insert": 2 - absent, "read": READ_COST + 1 - kept}
        return min(costs, key=lambda way: costs[way])


@dataclass(frozen=True, slots=True)
class Attempt:
    """One statement for one row. ``outcome``: the row's, if it holds. ``again``: one like it may have been done, unanswered."""

    row: int
    kind: Literal["insert", "update", "exactly"]
    text: bytes | memoryview
    outcome: int = WRITTEN
    again: bool = False


class Load:
    """The rows of one batch. ``outcomes``: uint8, by row; all are known when it is `done`. ``counts``: refusals, by error code.

    Rows go out in no order, so that no partition of the table is hit by a run of neighbours.
    """

    def __init__(
        self, batch: EncodedBatch, view: str, table: str, keys: Sequence[str], rule: Rule, retention: Retention
    ) -> None:
        self.batch, self.table, self.keys, self.rule, self.retention = batch, table, keys, rule, retention
        self.met = Met()
        self.columns = columns(batch, view, retention)
        self.units = -(-item_bytes(batch) // UNIT_BYTES)
        self.outcomes = np.zeros(len(batch.keys), dtype=np.uint8)
        self.left = len(batch.keys)
        self.fresh = deque(np.random.default_rng().permutation(self.left).tolist())
        self.waiting: deque[Attempt] = deque()
        self.counts: Counter[str] = Counter()
        self.probing = False
        self._met_before = np.zeros(self.left, dtype=np.bool_)

    @property
    def done(self) -> bool:
        return self.left == 0

    def take_reads(self) -> list[int]:
        """The rows that the next request reads; empty when something else comes first."""
        if self.met.cheapest != "read" or len(self.waiting) >= STATEMENTS or (self.probing and not self.met.rows):
            return []
        self.probing = True
        return [self.fresh.popleft() for _ in range(min(READS, len(self.fresh)))]

    def take_statements(self, *, alone: bool) -> list[Attempt]:
        """What the next request writes. *alone*: no request is under way; else one that would not be full waits for more."""
        way, attempts, size = self.met.cheapest, list[Attempt](), 0
        while len(attempts) < STATEMENTS and size < STATEMENT_BYTES:
            if self.waiting:
                attempts.append(self.waiting.popleft())
            elif self.fresh and way != "read":
                attempts.append(self._first(self.fresh.popleft(), way))
            elif alone:
                return attempts
            else:
                self.waiting.extendleft(reversed(attempts))
                return []
            size += len(attempts[-1].text)
        return attempts

    def met_by_reading(self, rows: Sequence[int], items: Mapping[str, Mapping[str, Any]]) -> None:
        """What rows met: *items* by entity key, as boto3 gives them."""
        for row in rows:
            item = items.get(self.key(row))
            if item is None:
                self._meets(row, absent=True)
                self.waiting.append(self._first(row, "insert"))
                continue
            stored = stored_order(item)
            outcome, after = self._decided(row, stored)
            self._meets(row, changed=after is not None)
            if after is None:
                self._settled(row, outcome)
            elif after.version == self.batch.version[row]:
                self.waiting.append(self._first(row, "update"))
            else:  # another record than an UPDATE by the rule's condition can bring about
                self.waiting.append(Attempt(row, "exactly", self._exactly(row, stored, after), outcome))

    def met_by_writing(
        self, attempts: Sequence[Attempt], errors: Sequence[Mapping[str, Any] | None], *, resent: bool
    ) -> None:
        """What statements met, each None or the error of boto3's answer. *resent*: the request went out more than once.

        Raises botocore's ClientError for an error that no other attempt can change.
        """
        for attempt, error in zip(attempts, errors, strict=True):
            if error is None:
                self._meets(attempt.row, absent=attempt.kind == "insert", changed=attempt.kind != "insert")
                self._settled(attempt.row, attempt.outcome)
                continue
            code = str(error["Code"]).removesuffix("Exception")
            self.counts[code] += 1
            if code in AGAIN:
                self.waiting.append(altered(attempt, again=attempt.again or resent or code not in THROTTLES))
            elif code in {"DuplicateItem", "ConditionalCheckFailed"}:
                self._refused(attempt, error.get("Item"), again=attempt.again or resent)
            else:
                raise ClientError(
                    {"Error": {"Code": code, "Message": error.get("Message", "")}}, "BatchExecuteStatement"
                )

    def _refused(self, attempt: Attempt, item: Mapping[str, Any] | None, *, again: bool) -> None:
        row = attempt.row
        if item is None:
            if attempt.kind != "insert":
                self._meets(row, absent=True)
            self.waiting.append(self._first(row, "update" if attempt.kind == "insert" else "insert", again=again))
            return
        stored = stored_order(item)
        outcome, after = self._decided(row, stored)
        self._meets(row, changed=after is not None)
        if after is not None:
            self.waiting.append(Attempt(row, "exactly", self._exactly(row, stored, after), outcome))
        elif again and record_of(item) == self._record(row):
            self._settled(row, WRITTEN)  # by a statement whose answer was lost
        else:
            self._settled(row, outcome)

    def _meets(self, row: int, *, absent: bool = False, changed: bool = False) -> None:
        """What the row met at first; later attempts say nothing about the rows to come."""
        if not self._met_before[row]:
            self._met_before[row] = True
            self.met.add(absent=absent, changed=changed)

    def _settled(self, row: int, outcome: int) -> None:
        self.outcomes[row] = outcome
        self.left -= 1

    def _decided(self, row: int, stored: Record) -> tuple[int, Record | None]:
        """The outcome of a row, and the record to store for it; None if what is stored stays as it is."""
        outcome, after = self.rule.decide(stored, unpack_order(self._record(row)))
        return outcome, None if after == stored else after

    # --- statements ---

    def _first(self, row: int, way: Way, *, again: bool = False) -> Attempt:
        if way == "insert":
            return Attempt(row, "insert", self._inserts[row], again=again)
        return Attempt(row, "update", self._updates[row], again=again)

    @cached_property
    def _inserts(self) -> Frames:
        names = [*self.keys, RECORD, *ORDER, *([EXPIRES] if EXPIRES in self.columns else [])]
        return Statement.insert(self.table, names).frames(self.columns)

    @cached_property
    def _updates(self) -> Frames:
        expires = EXPIRES in self.columns
        sets, removes = (*self.rule.sets, *([EXPIRES] if expires else [])), () if expires else (EXPIRES,)
        return Statement.update(self.table, self.keys, sets, removes, self.rule.condition).frames(self.columns)

    def _exactly(self, row: int, stored: Record, after: Record) -> bytes:
        """Store *after* in place of exactly *stored*."""
        expires = self.retention.due(after.event_us, floored=after.floor != order.NO_FLOOR)
        values = values_of(after, expires)
        if not after.payload:  # the stored row stays, with another floor
            del values[RECORD]
        sets, removes = tuple(values), () if expires is not None else (EXPIRES,)
        held = {f"was_{name}": value for name, value in values_of(stored, None).items() if name in ORDER}
        condition = " AND ".join(f"{name}={{was_{name}}}" for name in ORDER)
        keys = {name: self.columns[name] for name in self.keys}
        texts = {name: text if isinstance(text, bytes) else text[row].as_py() for name, text in keys.items()}
        given = {name: json.dumps(value).encode() for name, value in (values | held).items()} | texts
        return Statement.update(self.table, self.keys, sets, removes, condition).frame(given)

    def _record(self, row: int) -> bytes:
        record: bytes = self.batch.values[row].as_py()
        return record

    def key(self, row: int) -> str:
        key: bytes = self.batch.keys[row].as_py()
        return key.decode()
