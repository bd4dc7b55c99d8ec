"""The nouns: feature views, intervals, watermarks, run reports. Frozen values, no I/O."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import date, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from materialize.feature_type import FeatureType

__all__ = [
    "FeatureView",
    "FeatureViewName",
    "Interval",
    "Layout",
    "Mode",
    "OnlineStoreConfig",
    "Prices",
    "Retention",
    "RunReport",
    "TableSettings",
    "VerifySettings",
    "Watermark",
    "duration_text",
    "from_us",
    "mask_credentials",
    "to_us",
]

FeatureViewName = str
Mode = Literal["incremental", "backfill", "rebuild"]
#: How a store that has hashes keeps a record: as one value, or with a field of plain text beside it for each feature (docs/layouts.md).
Layout = Literal["vector", "hash"]
#: The field of a hash that has the whole record; no feature may have its name.
RECORD_FIELD = "_"

#: Bytes: the limit of a view that says none. A table of 4 million rows is read in one go below it.
MEMORY_LIMIT = 1_000_000_000

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MICROSECOND = timedelta(microseconds=1)
UNIT_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}


def to_us(moment: datetime) -> int:
    """Microseconds since 1970 UTC. Raises ValueError for a datetime without a time zone."""
    if moment.tzinfo is None:
        raise ValueError(f"expected a datetime with a time zone, found {moment!r}")
    return (moment - EPOCH) // MICROSECOND


def from_us(moment_us: int) -> datetime:
    """The UTC datetime of *moment_us* microseconds since 1970."""
    return EPOCH + moment_us * MICROSECOND


def duration_text(duration: timedelta) -> str:
    """*duration* as the YAML writes it, in its largest whole unit: ``1d``, ``36h``, ``90s``."""
    seconds = int(duration.total_seconds())
    unit = next(unit for unit in "dhms" if seconds % UNIT_SECONDS[unit] == 0)
    return f"{seconds // UNIT_SECONDS[unit]}{unit}"


def mask_credentials(url: str) -> str:
    """*url* with the user and password of its authority, and every query value that may be a secret, as ``***``.

    A password is taken to end at the last ``@``, because people forget to escape ``/`` in it.
    """
    url = re.sub(r"//(?:[^/\s]*|[^\s/]*:\S*)@", "//***@", url)
    return re.sub(r"([?&][^=&]*(?:password|secret|token|key)[^=&]*)=[^&]*", r"\1=***", url, flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class VerifySettings:
    """How a view is verified every day: a sample of its entities or all, which share may differ (0 to 1), and whether it is repaired."""

    compare: Literal["sample", "full"] = "sample"
    max_mismatched: float = 0.0
    repair: bool = False


@dataclass(frozen=True, slots=True)
class FeatureView:
    """A named set of features of one Delta table.

    ``source`` is a local path or a URI; ``ttl`` counts from the event time; ``source_connection`` names the Airflow
    connection that holds the credentials of the source. A row whose event time is more than ``max_future`` ahead of
    the clock is quarantined: it would shadow every true row until then. ``timestamp_ntz`` "UTC" says what times without a
    zone mean; else they are refused. ``on_rebuild_needed``: what an incremental run does that cannot be exact.
    ``on_commit``: whether a run starts seconds after a commit, besides the ``schedule``. ``quarantine``: the Delta table that keeps
    the rows that cannot be stored; None for one beside the source, "none" to count them only. ``max_quarantined``: the share
    of a run's rows (0 to 1) that may be among them, None for any. ``layout``: how stores that have hashes keep a record. ``cache_ttl``:
    how long a model server that caches may serve a record it has read, None: as long as the server says; ``realtime``: it never caches.
    ``memory_limit``: bytes that a process may have resident while it writes a piece of the view (`materialize.memory`).
    """

    name: FeatureViewName
    source: str
    join_keys: tuple[str, ...]
    event_timestamp: str
    features: dict[str, FeatureType]
    online_stores: tuple[str, ...]
    created_timestamp: str | None = None
    ttl: timedelta | None = None
    schedule: Literal["hourly", "daily"] = "hourly"
    description: str = ""
    owner: str = ""
    source_connection: str | None = None
    max_future: timedelta = timedelta(days=1)
    tombstone_ttl: timedelta = timedelta(days=14)
    timestamp_ntz: Literal["UTC"] | None = None
    on_rebuild_needed: Literal["fail", "auto"] = "fail"
    freshness: timedelta | None = None
    on_commit: bool = False
    verify: VerifySettings = field(default_factory=VerifySettings)
    quarantine: str | None = None
    max_quarantined: float | None = None
    layout: Layout = "vector"
    realtime: bool = False
    cache_ttl: timedelta | None = None
    memory_limit: int = MEMORY_LIMIT
    storage_options: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def quarantine_table(self) -> str | None:
        """The path or URI of the Delta table with the rows that cannot be stored, None when they are not kept."""
        beside = f"{self.source.rstrip('/')}_quarantine"
        return None if self.quarantine == "none" else self.quarantine or beside

    @property
    def schema_text(self) -> str:
        """The features and their types in order, as canonical JSON: what a reader needs to decode a record."""
        return json.dumps([[name, str(kind)] for name, kind in self.features.items()], separators=(",", ":"))

    @property
    def order_columns(self) -> tuple[str, ...]:
        """The columns that say which entity a row is of and which row is the latest."""
        times = (self.event_timestamp, self.created_timestamp or self.event_timestamp)
        return tuple(dict.fromkeys((*self.join_keys, *times)))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that the view reads."""
        return (*self.order_columns, *self.features)

    @property
    def order_text(self) -> str:
        """The roles of the `order_columns`, as canonical JSON."""
        return json.dumps([self.join_keys, self.event_timestamp, self.created_timestamp], separators=(",", ":"))

    @property
    def ttl_us(self) -> int | None:
        return None if self.ttl is None else self.ttl // MICROSECOND

    def retention(self, now: datetime) -> Retention:
        """How long a record written at *now* stays in the store."""
        return Retention(ttl_us=self.ttl_us, keep_until_us=to_us(now + self.tombstone_ttl))


@dataclass(frozen=True, slots=True)
class Retention:
    """When a record may leave the store.

    A live record without a floor: ``event_us + ttl_us`` (never, without a ttl). A live record with a floor: the later
    of that and ``keep_until_us``. A tombstone: ``keep_until_us``.
    """

    ttl_us: int | None
    keep_until_us: int

    def due(self, event_us: int | None, *, floored: bool) -> int | None:
        """When a record may be purged, in microseconds; None: never. *event_us* None: a tombstone."""
        if event_us is None:
            return self.keep_until_us
        if self.ttl_us is None:
            return None
        return max(event_us + self.ttl_us, self.keep_until_us if floored else event_us + self.ttl_us)


@dataclass(frozen=True, slots=True)
class TableSettings:
    """How ``materialize setup`` makes the tables of a store that has some. Without units they are billed on demand."""

    write_units: int | None = None
    read_units: int | None = None
    point_in_time_recovery: bool = False
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a store costs, for `plan`, as somebody looked it up on a day: a million write and read units, a gigabyte loaded from files,
    a gigabyte kept for a month.
    """

    as_of: date
    currency: str
    million_write_units: float
    million_read_units: float
    bulk_gigabyte: float | None = None
    gigabyte_month: float | None = None


#: Rows of one run of the backfill form that nobody has to approve, unless a store's entry says otherwise: some minutes of full load.
APPROVE_ABOVE_ROWS = 100_000_000


#: Seconds that 99 of 100 reads of a store may take longer during a load than without one, unless its entry says otherwise.
READ_P99 = 0.005


@dataclass(frozen=True, slots=True)
class OnlineStoreConfig:
    """One entry of ``online_stores.yaml``; the repr has no URL.

    ``url`` is empty when the Airflow connection ``connection`` holds it; `Config.online_store` gives it with its URL.
    ``approve_above_rows``: a run of the backfill form that brings more rows to the store waits for a person. ``read_p99``: seconds
    that 99 of 100 reads may take longer during a load (docs/pacing.md), None: loads go at full speed. ``hashed``: the views of the
    config that have the layout ``hash``; `Config.online_store` knows them.
    """

    name: str
    url: str = field(default="", repr=False)
    connection: str | None = None
    pool: str | None = None
    tables: TableSettings = field(default_factory=TableSettings)
    prices: Prices | None = None
    approve_above_rows: int = APPROVE_ABOVE_ROWS
    read_p99: float | None = READ_P99
    hashed: frozenset[str] = frozenset()

    @property
    def masked_url(self) -> str:
        return mask_credentials(self.url)


@dataclass(frozen=True, slots=True)
class Interval:
    """A half-open range of event time, ``[start, end)``, both with a time zone."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        if to_us(self.start) >= to_us(self.end):
            raise ValueError(
                f"expected a start before the end, found [{self.start.isoformat()}, {self.end.isoformat()})"
            )

    def __str__(self) -> str:
        return f"[{self.start.isoformat()}, {self.end.isoformat()})"


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far a view is in a store: every row of table versions up to ``version`` is in the store or counted.

    ``version`` None says that a whole-snapshot run of this ``generation`` has begun and has not finished. ``schema`` and ``order``
    are the view's `schema_text` and `order_text` then. ``fenced``: every entity that lost a row in a table version up to this
    one has a floor online, so that no run that began before can bring the row back; None is ``version``.
    ``generation`` rises when older values must win: a new table id, or a rebuild ordered by an operator. ``floor`` is the
    version number (`materialize.order.stamp`) of the newest snapshot that was brought online whole.
    ``evidence``: what the store's servers said after the data was written (`materialize.evidence`), by node; None where they say nothing.
    ``rows``: live rows of the table at ``version``, as far as the log tells; where ``version`` is None, of the run before.
    ``layout``: how the store keeps the records.
    ``event_us``, ``run_id``, ``finished_us`` and ``counts`` (the finished run's counters by name) are for reporting.
    """

    generation: int
    table_id: str
    version: int | None
    schema: str
    order: str
    run_id: str
    fenced: int | None = None
    floor: int = 0
    event_us: int | None = None
    finished_us: int | None = None
    rows: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    evidence: dict[str, Any] | None = None
    layout: Layout = "vector"

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Watermark:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class RunReport:
    """What a run did, for one view and one store. Counters are rows unless a comment says otherwise.

    They add up: ``entities = written + stale + unchanged + expired``, and every one of ``rows_read`` is
    quarantined or took part in picking an entity's latest row.
    """

    view: str
    store: str
    mode: Mode
    from_version: int | None
    to_version: int
    rows_read: int = 0
    entities: int = 0  # latest rows, one per entity and piece
    written: int = 0
    stale: int = 0  # a newer one is there
    unchanged: int = 0  # the same one is there
    expired: int = 0  # older than the view's ttl, not written
    quarantined: int = 0
    deleted: int = 0  # entities online whose rows are gone
    bytes: int = 0  # keys and values sent
    seconds: float = 0.0
    held_back: float = 0.0  # seconds that writing rested for the store's readers
    event_us: int | None = None  # greatest event time read
    run_id: str = ""
    interval: str | None = None
    reason: str = ""  # why the run took the path it took
    quarantine_reasons: dict[str, int] = field(default_factory=dict)
    probe: dict[str, dict[str, float]] = field(default_factory=dict)  # what reads took: materialize.pacing.Pacer
    timings: dict[str, float] = field(default_factory=dict)  # seconds by stage: materialize.timings

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def counts(self) -> dict[str, int]:
        """The integer counters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in COUNTERS}

    @property
    def changed(self) -> bool:
        """Whether the run changed what readers see."""
        return self.written + self.deleted > 0


#: The counters of a RunReport that add up over the pieces of a run.
COUNTERS = ("rows_read", "entities", "written", "stale", "unchanged", "expired", "quarantined", "deleted", "bytes")
