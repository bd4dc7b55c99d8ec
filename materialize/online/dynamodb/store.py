"""DynamoDB: conditional writes of 25 rows per request, atomic per item, at a share of the table's capacity; reads of 100.

A table holds one item per entity (and view, in a shared table). Cells are items too, with a key that no entity has.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError as FutureTimeout
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from materialize.errors import UnavailableError
from materialize.model import TableSettings
from materialize.online.base import BulkStore, EncodedBatch, OnlineStore
from materialize.online.dynamodb import tables
from materialize.online.dynamodb.address import Address
from materialize.online.dynamodb.bulk import BulkFiles
from materialize.online.dynamodb.client import Client
from materialize.online.dynamodb.cost import estimate
from materialize.online.dynamodb.deadline import Deadline
from materialize.online.dynamodb.items import CELL, KEY, MAX_VALUE_BYTES, ORDER, RECORD, VIEW, cell_key, record_of
from materialize.online.dynamodb.load import READS, Load, Rule
from materialize.online.dynamodb.pace import Pace
from materialize.online.dynamodb.sending import PATIENCE, Sending
from materialize.online.dynamodb.sizing import Items, item_sizes, sizing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from materialize.model import FeatureView, Mode, Prices, Retention
    from materialize.online.base import Outcomes
    from materialize.online.demand import Demand
    from materialize.online.reading import ReadTerms

__all__ = ["DynamoDbStore"]

#: Seconds of the first pause before keys are asked for again; doubles with each, with full jitter, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 2.0
#: Threads of a model server for reads of more keys than one request takes, and the seconds that one may be late.
READING_THREADS, GRACE = 32, 0.02
NO_SETTINGS = TableSettings()


class DynamoDbStore(OnlineStore):
    """*url*: see `materialize.online.dynamodb.address`. *settings*: of the tables that `setup` makes; no run makes one.

    *terms*: for a model server; ``replicas`` reads eventually consistently, at half the price, whatever the URL says. The first call makes
    boto3's client, half a second of work that does not count.
    """

    #: The next batch is encoded while one is sent; how many requests of it are under way at once is for `sending` to say.
    parallel_writes = 1
    max_value_bytes = MAX_VALUE_BYTES

    def __init__(
        self,
        url: str,
        settings: TableSettings = NO_SETTINGS,
        prices: Prices | None = None,
        *,
        terms: ReadTerms | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.terms = terms
        self.address, self.settings, self.prices = Address.parse(url), settings, prices
        self.clock, self.sleep = clock, sleep
        self.location = self.address.location
        self.client = Client(self.address, terms)
        self.consistent = self.address.consistent and not (terms and terms.replicas)
        self.keys = (KEY, VIEW) if self.address.shared else (KEY,)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._paces: dict[str, Pace] = {}

    # --- writing ---

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._write(view, batch, Rule(tie_wins=tie_wins), retention)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        return self._write(view, batch, Rule(at=at), retention)

    def _write(self, view: str, batch: EncodedBatch, rule: Rule, retention: Retention) -> Outcomes:
        if not len(batch.keys):
            return np.empty(0, dtype=np.uint8)
        table = self.address.table(view)
        load = Load(batch, view, table, self.keys, rule, retention)

        def orders(keys: list[str]) -> Mapping[str, Any]:
            return self._get({view: keys}, ORDER, consistent=True)[view]

        with self.client.translated(f"write {len(batch.keys):,} rows of feature view {view!r} to", view):
            Sending(load, self.client, self.pace(table), orders, self._executor(), self.clock).run()
        return load.outcomes

    def pace(self, table: str) -> Pace:
        """What holds writers of *table* back."""
        with self._lock:
            if table not in self._paces:
                units = self.address.write_units
                full = units or self.address.share * tables.write_capacity(self.client.api, table)
                self._paces[table] = Pace(full, self.clock, self.sleep)
            return self._paces[table]

    # --- reading ---

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.read_views({view: keys})[view]

    def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        """As `read`, for several views at once: their keys share requests."""
        wanted = {view: list(dict.fromkeys(key.decode() for key in some)) for view, some in keys.items()}
        subject = f"read {sum(map(len, wanted.values())):,} entities of {', '.join(keys)} from"
        chunks = list(_chunks(wanted, READS))
        with self.client.translated(subject, next(iter(keys), "")):
            deadline = self._deadline()
            get = partial(self._get, attributes=(*ORDER, RECORD), consistent=self.consistent, deadline=deadline)
            parts = self._together(get, chunks, deadline) if len(chunks) > 1 else [get(chunk) for chunk in chunks]
        found = {
            (view, key): record_of(item)
            for part in parts
            for view, items in part.items()
            for key, item in items.items()
        }
        return {view: [found.get((view, key.decode())) for key in some] for view, some in keys.items()}

    def _deadline(self) -> Deadline | None:
        """That of a call which begins now, if it has one."""
        if self.terms is None:
            return None
        self.prepare()
        return Deadline(self.terms.deadline)

    def prepare(self) -> None:
        """Make boto3's client."""
        _ = self.client.api

    def _together(
        self, get: Callable[[Any], dict[str, Any]], chunks: Sequence[Any], deadline: Deadline | None
    ) -> list[dict[str, Any]]:
        try:
            return list(self._executor().map(get, chunks, timeout=None if deadline is None else deadline.left + GRACE))
        except FutureTimeout:
            raise UnavailableError(
                f"could not read {len(chunks)} times {READS} entities from {self.location}: no answer in time. Nothing was returned."
            ) from None

    def _get(
        self,
        keys: Mapping[str, Sequence[str]],
        attributes: Sequence[str],
        *,
        consistent: bool,
        deadline: Deadline | None = None,
    ) -> dict[str, dict[str, Any]]:
        """The items of at most `READS` different keys, by view and key; what is not processed is asked for until it is."""
        found: dict[str, dict[str, Any]] = {view: {} for view in keys}
        views = {self.address.table(view): view for view in keys}
        shape = {"ProjectionExpression": ",".join((*self.keys, *attributes)), "ConsistentRead": consistent}
        left: Any = {}
        for view, some in keys.items():
            request = left.setdefault(self.address.table(view), {"Keys": [], **shape})
            request["Keys"] += [self._item_key(view, key) for key in some]
        since, pause = self.clock(), FIRST_PAUSE
        patience = PATIENCE if deadline is None else deadline.left
        while any(request["Keys"] for request in left.values()):
            send = partial(self.client.call, "batch_get_item", json.dumps({"RequestItems": left}).encode())
            answer = send() if deadline is None else deadline.keep(send)
            for table, items in answer["Responses"].items():
                for item in items:
                    view = item[VIEW]["S"] if self.address.shared else views[table]
                    found[view][item[KEY]["S"]] = item
            left = answer.get("UnprocessedKeys") or {}
            if not left:
                break
            if self.clock() - since > patience:
                raise UnavailableError(
                    f"could not read from {self.location}: keys were left unprocessed for {patience:.2g} s. Nothing was returned."
                )
            waiting = pause * random.random()  # noqa: S311 - jitter
            self.sleep(waiting if deadline is None else min(waiting, deadline.left))
            pause = min(2 * pause, LONGEST_PAUSE)
        return found

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        only: dict[str, Any] = {}
        if self.address.shared:
            only = {"FilterExpression": f"{VIEW} = :view", "ExpressionAttributeValues": {":view": {"S": view}}}
        scan = partial(
            self.client.api.get_paginator("scan").paginate,
            TableName=self.address.table(view),
            ConsistentRead=True,
            **only,
        )
        # Items lie in the order of a hash of their keys, so any key is a random place; behind it, the scan ends before it saw all.
        place: dict[str, Any] = {"ExclusiveStartKey": self._item_key(view, f"{start}")}
        rounds = [scan(**place), scan()] if start else [scan()]
        with self.client.translated(f"scan feature view {view!r} in", view):
            for page in chain.from_iterable(rounds):
                items = [item for item in page["Items"] if not item[KEY]["S"].startswith(CELL)]
                if items:
                    yield [item[KEY]["S"].encode() for item in items], [record_of(item) for item in items]

    # --- cells ---

    def read_cell(self, view: str, name: str) -> bytes | None:
        with self.client.translated(f"read the {name} of feature view {view!r} from", view):
            get: Callable[[], Any] = partial(
                self.client.api.get_item,
                TableName=self.address.table(view),
                Key=self._item_key(view, cell_key(name)),
                ConsistentRead=True,
            )
            deadline = self._deadline()
            found = get() if deadline is None else deadline.keep(get)
        return bytes(found["Item"][RECORD]["B"]) if "Item" in found else None

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        condition: dict[str, Any] = {"ConditionExpression": f"attribute_not_exists({KEY})"}
        if expected is not None:
            condition = {
                "ConditionExpression": f"{RECORD} = :expected",
                "ExpressionAttributeValues": {":expected": {"B": expected}},
            }
        item = self._item_key(view, cell_key(name)) | {RECORD: {"B": new}}
        with self.client.translated(f"write the {name} of feature view {view!r} to", view):
            try:
                self.client.api.put_item(TableName=self.address.table(view), Item=item, **condition)
            except self.client.api.exceptions.ConditionalCheckFailedException:
                return False
        return True

    def now_us(self, view: str) -> int:
        """The Date of an answer, which has whole seconds (HTTP, RFC 9110): the clock of the front end that answered."""
        with self.client.translated(f"ask the time for feature view {view!r} of", view):
            answer: Any = self.client.api.get_item(
                TableName=self.address.table(view),
                Key=self._item_key(view, cell_key("lease")),
                ProjectionExpression=KEY,
            )
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        return super().now_us(view) if told is None else int(parsedate_to_datetime(told).timestamp() * 1e6)

    def purge(self, view: str, now_us: int) -> None:
        """Nothing to do: the tables' time to live does it."""

    def setup(self, view: str) -> list[str]:
        table = self.address.table(view)
        with self.client.translated(f"set up the table {table} of", view):
            return tables.make(self.client.api, table, self.keys, self.settings)

    def estimate(self, view: FeatureView, rows: int, mode: Mode | Literal["verify"], *, first: bool) -> dict[str, Any]:
        with self.client.translated(f"read the capacity of feature view {view.name!r} in", view.name):
            rate = self.pace(self.address.table(view.name)).full
        return estimate(view, rows, mode, rate, self.prices, first=first)

    def size(self, view: FeatureView, sample: EncodedBatch, demand: Demand) -> dict[str, Any]:
        """Nothing is written or asked: DynamoDB documents what an item takes."""
        sizes = item_sizes(sample, shared_view=view.name if self.address.shared else None, expires=view.ttl is not None)
        return sizing(Items.of(sizes), demand, self.prices)

    def bulk(self, view: str, location: str) -> BulkStore:
        """*location*: ``s3://BUCKET/PREFIX``, in the region of the store."""
        return BulkFiles(self, view, location)

    def describe(self) -> dict[str, str]:
        with self.client.translated("list the tables of", "VIEW"):
            found = [
                name
                for page in self.client.api.get_paginator("list_tables").paginate()
                for name in page["TableNames"]
                if re.match(rf"{self.address.prefix}(\.|-features$)", name)
            ]
        return {"kind": "dynamodb", "tables": ", ".join(found) or "none; run: materialize setup"}

    def close(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        self.client.close()

    def _item_key(self, view: str, key: str) -> dict[str, Any]:
        return {KEY: {"S": key}} | ({VIEW: {"S": view}} if self.address.shared else {})

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self.address.requests if self.terms is None else READING_THREADS,
                    thread_name_prefix="materialize-dynamodb",
                )
            return self._pool


def _chunks(keys: Mapping[str, Sequence[str]], size: int) -> Iterator[dict[str, list[str]]]:
    """The keys of all views in groups of *size*."""
    pairs = [(view, key) for view, some in keys.items() for key in some]
    for low in range(0, len(pairs), size):
        chunk: dict[str, list[str]] = {}
        for view, key in pairs[low : low + size]:
            chunk.setdefault(view, []).append(key)
        yield chunk
