"""One batch on its way into a table: rows in, statements out, outcomes in the end. No I/O, and one thread at a time.

Each row begins as an INSERT, an UPDATE under the order rule's condition, or a read, whichever costs least by what the rows before it
met; the first ones are read. Where DynamoDB refuses a statement it says what it holds; the rule in Python (`materialize.order`) then says
whether the row is done, and if not, the next statement holds only for exactly that item. Rows that are taken at once, which is the
rule, pass as slices of the batch; only refused ones are looked at one by one.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from botocore.exceptions import ClientError

from materialize import order
from materialize.online.base import EncodedBatch, unpack_order
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
    from materialize.online.base import Outcomes

__all__ = ["AGAIN", "READS", "Load", "Rule", "Writes"]

#: Statements per request (BatchExecuteStatement's own limit), and bytes, far below the 16 MB of a request.
STATEMENTS, STATEMENT_BYTES = 25, 4 * 2**20
#: Keys per reading request (BatchGetItem's own limit).
READS = 100
#: What a read of 4 KB costs of a write of 1 KB, on demand and provisioned alike (config's prices, 2026).
READ_COST = 0.2
#: Errors of a statement after which it is sent again as it is.
AGAIN = THROTTLES | {"InternalServerError", "TransactionConflict"}
NO_ROWS = range(0)

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

    absent: int = 0
    changed: int = 0
    kept: int = 0

    @property
    def rows(self) -> int:
        return self.absent + self.changed + self.kept

    @property
    def cheapest(self) -> Way:
        """By write units: a statement that is refused costs what it would have written, and another one follows."""
        if not self.rows:
            return "read"
        absent, kept = self.absent / self.rows, self.kept / self.rows
        costs: dict[Way, float] = {"update": 1 + absent, "insert": 2 - absent, "read": READ_COST + 1 - kept}
        return min(costs, key=lambda way: costs[way])


class Attempt(NamedTuple):
    """One statement for one row. ``outcome``: the row's, if it holds. ``again``: one like it may have been done, unanswered."""

    row: int
    kind: Literal["insert", "update", "exactly"]
    text: bytes | memoryview
    outcome: int = WRITTEN
    again: bool = False


class Writes(NamedTuple):
    """One request: statements of rows that were refused before, then those of *fresh* rows, which all begin the same *way*."""

    attempts: list[Attempt]
    fresh: range
    way: Way
    body: bytes
    units: float


class Load:
    """The rows of one batch. ``left``: how many are not settled. ``counts``: refusals, by error code.

    Rows go out in no order, so that no partition of the table is hit by a run of neighbours: the batch is shuffled first.
    """

    def __init__(
        self, batch: EncodedBatch, view: str, table: str, keys: Sequence[str], rule: Rule, retention: Retention
    ) -> None:
        self.view, self.table, self.keys, self.rule, self.retention = view, table, keys, rule, retention
        self.shuffled = np.random.default_rng().permutation(len(batch.keys))
        self.batch = batch.take(self.shuffled)
        self.columns = columns(self.batch, view, retention)
        self.units = -(-item_bytes(self.batch) // UNIT_BYTES)
        self.left = len(batch.keys)
        self.met = Met()
        self.counts: Counter[str] = Counter()
        self._fresh = range(self.left)
        self._waiting: deque[Attempt] = deque()
        self._probing = False
        self._met_before = bytearray(self.left)
        self._settled = np.zeros(self.left, dtype=np.uint8)

    @property
    def outcomes(self) -> Outcomes:
        """uint8, by row of the batch as it came; all are known when none is left."""
        found = np.empty_like(self._settled)
        found[self.shuffled] = self._settled
        return found

    # --- what goes out ---

    def take_reads(self) -> range:
        """The rows that the next request reads; empty when something else comes first."""
        if self.met.cheapest != "read" or len(self._waiting) >= STATEMENTS or (self._probing and not self.met.rows):
            return NO_ROWS
        self._probing = True
        return self._take(READS)

    def take_writes(self, *, alone: bool) -> Writes | None:
        """What the next request writes. *alone*: no request is under way; else one that would not be full waits for more."""
        attempts, size = list[Attempt](), 0
        while self._waiting and len(attempts) < STATEMENTS and size < STATEMENT_BYTES:
            attempts.append(self._waiting.popleft())
            size += len(attempts[-1].text)
        way, fresh, texts = self.met.cheapest, NO_ROWS, [attempt.text for attempt in attempts]
        if way != "read" and self._fresh and size < STATEMENT_BYTES:
            frames = self._inserts if way == "insert" else self._updates
            fits = frames.within(self._fresh.start, STATEMENT_BYTES - size)
            fresh = self._take(min(STATEMENTS - len(attempts), fits))
            if fresh:
                texts.append(frames.slice(fresh))
                size += len(texts[-1])
        full = len(attempts) + len(fresh) == STATEMENTS or size >= STATEMENT_BYTES
        if not texts or not (full or alone):
            self._waiting.extendleft(reversed(attempts))
            self._fresh = range(self._fresh.start - len(fresh), self._fresh.stop)
            return None
        units = self.units[fresh.start : fresh.stop].sum() + sum(self.units[attempt.row] for attempt in attempts)
        return Writes(attempts, fresh, way, b'{"Statements":[%b]}' % b",".join(texts), float(units))

    def _take(self, most: int) -> range:
        rows, self._fresh = self._fresh[:most], self._fresh[most:]
        return rows

    # --- what comes back ---

    def met_by_reading(self, rows: Sequence[int], items: Mapping[str, Mapping[str, Any]]) -> None:
        """What rows met: *items* by entity key, as boto3 gives them."""
        for row in rows:
            item = items.get(self.key(row))
            if item is None:
                self._meets(row, absent=True)
                self._waiting.append(self._first(row, "insert"))
                continue
            stored = stored_order(item)
            outcome, after = self._decided(row, stored)
            self._meets(row, changed=after is not None)
            if after is None:
                self._settle(row, outcome)
            elif after.version == self.batch.version[row]:
                self._waiting.append(self._first(row, "update"))
            else:  # another record than an UPDATE by the rule's condition can bring about
                self._waiting.append(Attempt(row, "exactly", self._exactly(row, stored, after), outcome))

    def met_by_writing(self, writes: Writes, errors: Sequence[Mapping[str, Any] | None], *, resent: bool) -> None:
        """What statements met, each None or the error of boto3's answer. *resent*: the request went out more than once.

        Raises botocore's ClientError for an error that no other attempt can change.
        """
        attempts, fresh = writes.attempts, writes.fresh
        taken = sum(error is None for error in errors[len(attempts) :])
        if writes.way == "insert":
            self.met.absent += taken
        else:
            self.met.changed += taken
        if taken == len(fresh):
            self._settled[fresh.start : fresh.stop] = WRITTEN
            self.left -= taken
        else:
            attempts = [*attempts, *(self._first(row, writes.way) for row in fresh)]
            self._met_before[fresh.start : fresh.stop] = bytes(
                error is None for error in errors[len(writes.attempts) :]
            )
        for attempt, error in zip(attempts, errors, strict=False):
            if error is None:
                self._meets(attempt.row, absent=attempt.kind == "insert", changed=attempt.kind != "insert")
                self._settle(attempt.row, attempt.outcome)
                continue
            code = str(error["Code"]).removesuffix("Exception")
            self.counts[code] += 1
            if code in AGAIN:
                self._waiting.append(attempt._replace(again=attempt.again or resent or code not in THROTTLES))
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
            self._waiting.append(self._first(row, "update" if attempt.kind == "insert" else "insert", again=again))
            return
        stored = stored_order(item)
        outcome, after = self._decided(row, stored)
        self._meets(row, changed=after is not None)
        if after is not None:
            self._waiting.append(Attempt(row, "exactly", self._exactly(row, stored, after), outcome))
        elif again and record_of(item) == self._record(row):
            self._settle(row, WRITTEN)  # by a statement whose answer was lost
        else:
            self._settle(row, outcome)

    def _meets(self, row: int, *, absent: bool = False, changed: bool = False) -> None:
        """What the row met at first; later attempts say nothing about the rows to come."""
        if not self._met_before[row]:
            self._met_before[row] = True
            self.met.absent += absent
            self.met.changed += changed
            self.met.kept += not (absent or changed)

    def _settle(self, row: int, outcome: int) -> None:
        self._settled[row] = outcome
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
