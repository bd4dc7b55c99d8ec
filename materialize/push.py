"""Rows of an application in, one commit of the view's Delta table and the same rows online out (write-through), or the commit alone (write-behind).

The table stays the truth. A pushed row is written online as the incremental run that reads its commit would write it, with the same
version, so that this run finds it unchanged, and so does any run that was overtaken: `materialize.order` says which record stays. So a
push needs no lease, and moves no watermark.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from materialize import codec, latest, metrics, watermark
from materialize.codec import entity_keys
from materialize.errors import OnlineStoreError, RowsError
from materialize.model import mask_credentials
from materialize.offline import Appender, digest, given_rows
from materialize.online.base import HEADER, OnlineStore
from materialize.order import NO_FLOOR, stamp
from materialize.piece import no_progress
from materialize.refused import erased
from materialize.retry import with_retry
from materialize.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from materialize.model import FeatureView, Watermark
    from materialize.offline import GivenRows, OfflineTable
    from materialize.pipeline import Run

__all__ = ["PushReport", "Pusher", "Where", "push"]

log = logging.getLogger(__name__)

Where = Literal["both", "offline"]
#: Bytes of records per write call, and rows that an error names.
BATCH_BYTES, NAMED = 4 * 2**20, 10
#: Random bytes by which a commit is found again.
TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class PushReport:
    """What a push did. ``rows`` are in the table since ``version``, which None says was not known any more (a *push_id* used long ago),
    or that there were none. ``again``: an earlier push with the same id had committed them.

    Of write-through: ``entities`` with a row, of each the latest = ``written + stale + unchanged + expired``. ``stale``: a newer row is
    there, or the entity was written whole from a newer version. ``unchanged``: a run that read the commit was faster.
    ``online_version``: where the watermark is, which a push does not move. ``online``: whether readers have these rows now; else the
    next run brings them.
    """

    view: str
    store: str
    to: Where
    run_id: str
    rows: int
    version: int | None = None
    again: bool = False
    online: bool = False
    entities: int = 0
    written: int = 0
    stale: int = 0
    unchanged: int = 0
    expired: int = 0
    bytes: int = 0
    online_version: int | None = None
    push_id: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class _Standing:
    """What records carry: of the watermark the generation and floor, and the id of the view's schema."""

    mark: Watermark
    schema_id: int


def push(
    view: FeatureView,
    store: OnlineStore | None,
    rows: Any,
    run: Run,
    *,
    to: Where = "both",
    push_id: str | None = None,
) -> PushReport:
    """Push *rows* once, as `Pusher.push` does. Who pushes often keeps a Pusher: opening the table costs more than the rest."""
    return Pusher(view, store, run).push(rows, to=to, push_id=push_id)


class Pusher:
    """Pushes rows of *view* into its table and *store*. Safe across threads; holds the table open between pushes, and no connection.

    *store*: None for ``to="offline"`` only. *run*: who pushes; its id is in the commits. *changed*: called after each try to write with
    the view's name and the entity keys whose records it may have changed.
    """

    def __init__(
        self,
        view: FeatureView,
        store: OnlineStore | None,
        run: Run,
        changed: Callable[[str, list[bytes]], None] = lambda _view, _keys: None,
    ) -> None:
        self.view, self.store, self.run, self.changed = view, store, run, changed
        self.appender = Appender(view)

    def push(self, rows: Any, *, to: Where = "both", push_id: str | None = None) -> PushReport:
        """Commit *rows* to the table, and with *to* ``both`` bring them online at once.

        *rows*: mappings by column name, or a pyarrow table or anything else with ``__arrow_c_stream__`` (`offline.given_rows` says what
        fits). *push_id*: a text for these rows and no others, so that they are committed once however often they are pushed.

        After it returns, the rows are in the table, in one commit; with ``both`` each entity online has its latest pushed row, or what
        the order rule prefers, and the run that brings the commit's version finds nothing to change. (A rebuild that was planned
        before the commit and began after this call takes the rows back, until the next run.) With ``offline`` the store is not
        asked, and the next run brings the rows.

        A crash, or an error, before the commit: nothing happened. Between the commit and the online store, or in the middle of the
        latter: the rows are in the table, any of them online, and the next incremental run brings the others; pushing them again with the
        same *push_id* does it too, and commits nothing. Without a *push_id* it commits the rows a second time, which readers do not
        see. A crash of which the caller does not know when it came: push again with the same *push_id*.

        Nothing is written when one row cannot be stored: RowsError names which (a null key, an event time too far in the future, a value
        that does not fit, an entity that was erased), and why. With ``both`` OnlineStoreError is raised, and nothing is
        committed, for a view that the store has not loaded, or that was loaded from another table or with other features or
        keys; while its first load or a rebuild is under way, a push is exact. Else raises as `offline.Appender.append`
        before the commit, and OnlineStoreError and UnavailableError, which say so, after it.
        """
        started = time.monotonic()
        if to not in get_args(Where):
            raise ValueError(
                f"feature view {self.view.name!r}: found a push to {to!r}, expected one to {' or '.join(get_args(Where))}"
            )
        store = self.store if to == "both" else None
        if to == "both" and store is None:
            raise ValueError(
                f"feature view {self.view.name!r}: found no online store, expected one for a push to 'both'"
            )
        now = self.run.now()
        table = self.appender.newest()
        given = given_rows(table, rows)
        _check_rows(self.view, given, now, store or OnlineStore)
        report = PushReport(
            self.view.name, self.run.store_name, to, self.run.run_id, given.data.num_rows, push_id=push_id
        )
        standing = None if store is None else _standing(self.view, store, table, given)
        if not report.rows:
            return replace(report, seconds=time.monotonic() - started)
        report = self._committed(table, given, report)
        if store is not None and standing is not None and report.version is not None:
            report = self._through(store, standing, given, report, now)
        report = replace(report, seconds=time.monotonic() - started)
        named = (report.view, report.store, to, report.version, report.rows)
        log.info("pushed view=%s store=%s to=%s version=%s rows=%s", *named)
        metrics.pushed(report.view, report.store, to, 0 if report.again else report.rows)
        return report

    def _committed(self, table: OfflineTable, given: GivenRows, report: PushReport) -> PushReport:
        done = self.appender.append(
            table,
            given.data,
            token=secrets.token_hex(TOKEN_BYTES),
            run_id=report.run_id,
            push_id=report.push_id,
            content="" if report.push_id is None else digest(self.view, given.data),
        )
        return replace(report, version=done.version, again=done.again)

    def _through(
        self, store: OnlineStore, standing: _Standing, given: GivenRows, report: PushReport, now: datetime
    ) -> PushReport:
        """Write the committed rows online, once more for every generation that began meanwhile: records of an older one lose."""
        view = self.view
        try:
            while True:
                report = _merged(view, store, standing, given, report, now, self.changed)
                found = with_retry(partial(watermark.read, store, view.name))
                if found is None or _unlike(view, found, standing.mark.table_id):
                    return report  # with the view as it is now, the next run brings them
                if found.generation == standing.mark.generation:
                    return replace(report, online=True, online_version=found.version)
                standing = replace(standing, mark=found)
        except OnlineStoreError as error:
            failed = type(error)(
                f"{str(error).rstrip('.')}. The {report.rows:,} rows are in the table since version {report.version}, and not all of them are known to be online: "
                f"the next run brings them, and so does the same push with the same push_id. Run: materialize incremental {view.name}"
            )
            raise failed from None


# --- before the commit -------------------------------------------------------------------------------------------------


def _check_rows(view: FeatureView, given: GivenRows, now: datetime, limits: OnlineStore | type[OnlineStore]) -> None:
    """Raise RowsError where a run would put one of the rows into quarantine, or its values are none of their columns."""
    refused = given.refused.copy()
    _, invalid = latest.valid_rows(given.order, view, now=now, max_key_bytes=limits.max_key_bytes)
    for row, reason in zip(invalid["position"], invalid["__reason"], strict=True):
        refused.setdefault(row, reason)
    reasons = codec.unstorable_rows(given.features, view, max_value_bytes=limits.max_value_bytes)
    for row, reason in enumerate(() if reasons is None else reasons):
        if reason is not None:
            refused.setdefault(row, reason)
    if refused:
        raise _refusal(view, given, dict(sorted(refused.items())))


def _check_erased(view: FeatureView, store: OnlineStore, given: GivenRows) -> None:
    """Raise RowsError for rows of entities that were erased: online they stay away, and the table should not get them either."""
    keys = [key.decode() for key in entity_keys(given.order, view.join_keys)]
    gone = set(erased(store, view.name, list(dict.fromkeys(keys))))
    if gone:
        raise _refusal(
            view, given, {row: "of an entity that was erased" for row, key in enumerate(keys) if key in gone}
        )


def _refusal(view: FeatureView, given: GivenRows, refused: dict[int, str]) -> RowsError:
    rows: dict[str, list[int]] = {}
    for row, reason in refused.items():
        rows.setdefault(reason, []).append(row)
    told = [
        f"{reason}: {len(found):,}, row {', '.join(map(str, found[:NAMED]))}{' ...' * (len(found) > NAMED)}"
        for reason, found in rows.items()
    ]
    message = f"feature view {view.name!r}: could not push {given.data.num_rows:,} rows: found {len(refused):,} that cannot be stored (counted from 0)"
    return RowsError("\n  ".join([message, *told]) + "\nNothing was written. Push the others without them.", refused)


def _standing(view: FeatureView, store: OnlineStore, table: OfflineTable, given: GivenRows) -> _Standing:
    """How rows of *table* are written online now, with their schema made known to readers.

    Raises OnlineStoreError where only a run can tell, RowsError for rows of entities that were erased.
    """
    mark = with_retry(partial(watermark.read, store, view.name))
    problem = "that it was never loaded there" if mark is None else _unlike(view, mark, table.table_id)
    if mark is not None and problem is None and mark.version is not None and mark.version > table.version:
        problem = f"it at version {mark.version} and the table's head at {table.version}"
    if mark is None or problem is not None:
        raise OnlineStoreError(
            f"feature view {view.name!r}: could not push into {store.location} and {mask_credentials(view.source)}: found {problem}, expected a view "
            "that is online as it is configured. Nothing was written. "
            f"Run: materialize incremental {view.name}; or push to 'offline', and the next run brings the rows"
        )
    _check_erased(view, store, given)
    return _Standing(mark, with_retry(partial(watermark.register_schema, store, view)))


def _unlike(view: FeatureView, mark: Watermark, table_id: str) -> str | None:
    """Why records of *view* as it is configured cannot be written beside those of *mark*; None: they can."""
    if mark.table_id != table_id:
        return f"it loaded from another table (id {mark.table_id}, now {table_id})"
    if mark.order != view.order_text:
        return "it loaded with other join keys or time columns"
    # also where a feature is only gone: an older configuration looks the same, and would write records without the feature
    return "it loaded with other features" if mark.schema != view.schema_text else None


# --- after it ----------------------------------------------------------------------------------------------------------


def _merged(
    view: FeatureView,
    store: OnlineStore,
    standing: _Standing,
    given: GivenRows,
    report: PushReport,
    now: datetime,
    changed: Callable[[str, list[bytes]], None],
) -> PushReport:
    """The report of writing the latest row of each entity, as the run would that reads the commit."""
    assert report.version is not None  # noqa: S101 - there is nothing to write without a commit
    mark = standing.mark
    winners = latest.newest(given.order, view.join_keys)
    fresh = latest.unexpired(winners, view, now)
    order = latest.stamped(fresh, mark.generation, at=stamp(mark.generation, report.version))
    features, keys = given.features[fresh["position"]], entity_keys(fresh, view.join_keys)
    floor = NO_FLOOR if view.ttl is not None or mark.version is None else mark.floor
    write = partial(store.merge, view.name, tie_wins=True, retention=view.retention(now))
    size = max(1, BATCH_BYTES * fresh.height // (int(features.estimated_size()) + HEADER.size * fresh.height + 1))
    try:
        with Writer(store, no_progress, rows=fresh.height) as writer:
            for low in range(0, fresh.height, size):
                part = order.slice(low, size), features.slice(low, size)
                writer.submit(
                    codec.encode(keys.slice(low, size), *part, view, schema_id=standing.schema_id, floor=floor), write
                )
    finally:
        changed(view.name, keys.to_list())
    stale, written, unchanged = writer.outcomes.tolist()
    return replace(
        report,
        entities=winners.height,
        written=written,
        stale=stale,
        unchanged=unchanged,
        expired=winners.height - fresh.height,
        bytes=writer.nbytes,
    )
