"""What every online store promises: guarded writes, reads, and small compare-and-set cells for positions."""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from materialize.errors import OnlineStoreError
from materialize.model import READ_P99
from materialize.online.pace import Brake
from materialize.order import Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from typing_extensions import Self

    from materialize.evidence import Facts
    from materialize.model import FeatureView, Layout, Mode, Retention
    from materialize.online.demand import Demand
    from materialize.online.pace import Probe

    Outcomes = npt.NDArray[np.uint8]

__all__ = [
    "HEADER",
    "LEAD_BYTES",
    "TOMBSTONE",
    "BulkStore",
    "EncodedBatch",
    "OnlineStore",
    "pack_order",
    "typical_bytes",
    "unpack_order",
]

#: The first bytes of every record: format version, flags, schema id, event_us, created_us, version, floor (docs/format.md).
HEADER = struct.Struct("<BBHqqqq")
#: The flag of a record that says "this entity has no row".
TOMBSTONE = 1
#: What a text of a key or a feature takes, as nobody knows before it is read.
TYPICAL_TEXT = 16
#: Format version, flags and schema id: the part of the header that is not order.
LEAD_BYTES = 4


def typical_bytes(view: FeatureView) -> int:
    """About what the entity key and the record of one entity of *view* take, from the widths of its features."""
    values = sum(kind.width or TYPICAL_TEXT for kind in view.features.values())
    return HEADER.size + values + TYPICAL_TEXT * len(view.join_keys)


def unpack_order(record: bytes) -> Record:
    """The order fields of *record*; the payload is its first four bytes and what follows the header, as `pack_order` wants it."""
    _, flags, _, event_us, created_us, version, floor = HEADER.unpack_from(record)
    payload = record[:LEAD_BYTES] + record[HEADER.size :]
    return Record(None if flags & TOMBSTONE else event_us, created_us, version, floor, payload)


def pack_order(record: Record) -> bytes:
    """The bytes of a record that `unpack_order` took apart, with the order fields that it has now."""
    lead = record.payload[:LEAD_BYTES]
    times = struct.pack("<qqqq", record.event_us or 0, record.created_us, record.version, record.floor)
    return lead + times + record.payload[LEAD_BYTES:]


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Records of one view, ready to be stored; no entity twice.

    ``keys``: pa.binary, entity keys without prefix. ``values``: pa.binary, whole records (docs/format.md), each with
    its order fields in the header. ``event_us``, ``created_us``, ``version``: int64, shape (n,), the same order fields.
    ``tombstone``: the records of this batch are all tombstones (event_us is then 0 and means nothing). ``fields``: pa.binary, of a
    view with the layout `hash` the plain text of each feature by its name (`materialize.plain`), null where the row has none.
    """

    keys: pa.BinaryArray
    values: pa.BinaryArray
    event_us: npt.NDArray[np.int64]
    created_us: npt.NDArray[np.int64]
    version: npt.NDArray[np.int64]
    tombstone: bool = False
    fields: Mapping[str, pa.BinaryArray] = field(default_factory=dict)

    def take(self, rows: npt.NDArray[np.int64]) -> EncodedBatch:
        """The rows of these numbers, in their order."""
        return EncodedBatch(
            keys=self.keys.take(rows),
            values=self.values.take(rows),
            event_us=self.event_us[rows],
            created_us=self.created_us[rows],
            version=self.version[rows],
            tombstone=self.tombstone,
            fields={name: texts.take(rows) for name, texts in self.fields.items()},
        )


class OnlineStore(ABC):
    """A serving store. Safe to use from several threads; opening one does not touch the network.

    Every method raises `UnavailableError` when the store does not answer and `OnlineStoreError` when it refuses.
    """

    #: The URL with credentials masked, for messages.
    location: str
    #: How many merge or replace calls at once make writing faster.
    parallel_writes: int = 1
    #: Rows with a longer entity key or record are quarantined before sending.
    max_key_bytes: int = 2048
    max_value_bytes: int = 2**20
    #: Whether the operator accepts that the store may remove records to make room.
    eviction_allowed: bool = False
    #: The views that are kept with a field for each feature (layout `hash`), in stores that have hashes.
    hashed: frozenset[str] = frozenset()
    #: Loads that make 99 of 100 reads take so many seconds longer are held back (`materialize.pacing`); None: none is.
    read_p99: float | None = READ_P99

    @cached_property
    def brake(self) -> Brake:
        """Where writes rest between calls. `materialize.pacing` puts one of its own here for the time of a load."""
        return Brake()

    def layout(self, view: str) -> Layout:
        """How this store keeps records of *view*."""
        return "hash" if view in self.hashed else "vector"

    @abstractmethod
    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        """Store each row unless the store holds a newer one for its entity (`materialize.order.merge`, atomic per entity).

        Returns: uint8, shape (n,), one of WRITTEN, STALE, UNCHANGED per row of *batch*, in its order. If it raises, any
        subset may be stored; writing the same batch again is harmless. The order of two calls does not matter.
        """

    @abstractmethod
    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        """Store each row as its entity's full state in snapshot *at* (`materialize.order.replace`, atomic per entity).

        The records in *batch* carry *at* as version and floor. Returns and raises as `merge` does.
        """

    @abstractmethod
    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """The stored record of each entity key, tombstones and expired records included; None for an absent key."""

    def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        """As `read`, for several views: their entity keys by view in, their records by view out."""
        return {view: self.read(view, some) for view, some in keys.items()}

    @abstractmethod
    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Every entity key of *view* with its record, tombstones included, in batches of some thousands, in no order.

        A key that is in the store during the whole scan is returned at least once; other keys may be or not. *start*, from 0 to 1:
        where in the store's own order the scan begins. Where that is the order of a hash (Redis, DynamoDB) and not of the keys, the
        first batches of a random start are a random sample.
        """

    @abstractmethod
    def read_cell(self, view: str, name: str) -> bytes | None:
        """The content of the cell *name* of *view*, None when it was never written."""

    @abstractmethod
    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        """Write *new* to the cell if it holds *expected* (None: nothing), atomically; whether it was written."""

    def now_us(self, view: str) -> int:  # noqa: ARG002 - some stores ask where the view's cells are
        """The time of the clock that leases of *view* go by, in microseconds since 1970 UTC: the store's own where it has one.

        Here: this machine's, for stores that live on it.
        """
        return time.time_ns() // 1_000

    def write_copies(self, view: str, name: str, content: bytes) -> None:  # noqa: B027 - most stores have one place
        """Write *content* to the further copies of the cell *name*, whatever they hold; the cell itself stays.

        A store of several servers keeps a copy at fixed places spread over all of them. After it returns, every place that `read_copies`
        asks holds *content*; if it raises, any of them may. Does nothing where the cell is the only place.
        """

    def read_copies(self, view: str, name: str) -> list[bytes | None]:
        """What the cell *name* of *view* and each of its copies hold, the cell first; None for one that is not there.

        The number of copies may change when servers join or leave, so compare contents, and do not count.
        """
        return [self.read_cell(view, name)]

    def evidence(self) -> Facts | None:
        """What each server says about itself now, by node name; None for a store that has no way to lose a part of what it took."""
        return None

    def positions(self) -> dict[str, int]:
        """Where the writes of this object since the last call ended: history (`materialize.evidence.position`) -> greatest offset."""
        return {}

    def settle(self, view: str) -> str:  # noqa: ARG002 - most stores have no replicas of their own
        """Wait until as many replicas as are configured have all that was written before. Returns: what is lacking, in words.

        Raises UnavailableError when fewer have it after the configured time. Without a configured number nothing is awaited for
        long, and the words say what a failover would lose.
        """
        return ""

    def record_bytes(self, view: str, keys: Sequence[bytes]) -> float | None:  # noqa: ARG002 - most stores do not tell
        """The mean memory of the records of *keys* that are there, bytes with all overhead; None where none is, or it is not known."""
        return None

    @abstractmethod
    def purge(self, view: str, now_us: int) -> None:
        """Remove records of *view* whose retention ended before *now_us*. Does nothing where the store does it by itself."""

    def setup(self, view: str) -> list[str]:  # noqa: ARG002 - most stores need nothing
        """Make what the store needs before the first run of *view*, or what of it is lacking. Returns: what was done."""
        return []

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Do before the first call what takes long and needs no server; without it the first call does."""

    def open_probe(self, view: str) -> Probe | None:  # noqa: ARG002 - most stores have none
        """What measures the reads of *view*, without touching the network yet. None: its loads are not paced by that."""
        return None

    def estimate(self, view: FeatureView, rows: int, mode: Mode | Literal["verify"], *, first: bool) -> dict[str, Any]:  # noqa: ARG002 - most stores cost nothing per row
        """What a run of *mode* that brings at most *rows* costs, or a full comparison with them, as facts for people.

        *first*: it loads the view. Reads no record.
        """
        return {}

    def size(self, view: FeatureView, sample: EncodedBatch, demand: Demand) -> dict[str, Any]:  # noqa: ARG002 - most stores cannot tell
        """What the entities of *demand* take and cost in this store, measured with the records of *sample*, as facts for people.

        Touches no key of the view. After it returns or raises, nothing of the sample is left in the store.
        """
        return {"sizing": "not available: this store tells no sizes"}

    def bulk(self, view: str, location: str) -> BulkStore:
        """What a first load of *view* may be written to, as files at *location* that the store then reads by itself.

        Raises OnlineStoreError where the store has no such way.
        """
        raise OnlineStoreError(
            f"could not load feature view {view!r} into {self.location} by files at {location}: only DynamoDB reads files. "
            f"Nothing was read or written. Run: materialize incremental {view}"
        )

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Reach the store and say what it is (kind, version, memory, policy ...), for ``materialize doctor``."""

    @abstractmethod
    def close(self) -> None:
        """Give back connections and files. Calling it twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BulkStore(OnlineStore):
    """A store whose `replace` gathers rows in files, until `load` has the real store read them. It reads what the real one holds."""

    @abstractmethod
    def load(self) -> str:
        """Have the store read all files, and wait until it has. Returns: what it told, in a sentence.

        Nothing is promised of single rows: an ordinary run has to follow, which reads each row back. Raises OnlineStoreError where
        the store gave up; the files are then left where they are.
        """
