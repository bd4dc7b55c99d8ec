"""Records in, feature vectors, matrices and Arrow batches out: the one decoding core of every client. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

from materialize import watermark
from materialize.decoder import FORMAT_VERSION, HAS_NULLS, Decoder, Header, headers
from materialize.errors import OnlineStoreError
from materialize.online.base import HEADER, TOMBSTONE
from materialize.serving.vectors import STATUSES, FeatureMatrix, FeatureVector, ServiceVector, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from materialize.feature_type import FeatureType
    from materialize.model import FeatureView

__all__ = ["FeatureBatch", "Selection", "ServiceBatch", "ViewSchemas"]

#: Before every event time: nothing is older.
NEVER = -(2**63)
PRESENT, NULL, MISSING, EXPIRED, DEFAULT = range(len(STATUSES))
#: What fits a float64 exactly.
NUMBERS = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64")
#: Bytes of the schema id in a record.
SCHEMA_ID = slice(2, 4)
NO_TIMES, NOTHING = (None, None, None), frozenset[str]()
STATUS_TYPE = pa.dictionary(pa.int8(), pa.string())
TIME_TYPE = pa.timestamp("us", tz="UTC")


class ViewSchemas:
    """A view, and the schemas of its records that were seen so far. Safe to use from several threads."""

    def __init__(self, view: FeatureView, location: str) -> None:
        self.view, self.location = view, location
        self.decoders: dict[int, Decoder] = {}

    def learn(self, content: bytes | None) -> None:
        """Know all schemas in *content*, that of the view's ``schemas`` cell."""
        known = watermark.schemas_of(content, self.location, self.view.name)
        self.decoders = {schema_id: Decoder(features) for schema_id, features in known.items()}

    def unknown(self, records: Sequence[bytes | None]) -> bool:
        """Whether `learn` has to be called before *records* can be decoded."""
        known = self.decoders
        for record in records:  # 0.1 us each
            if record is not None and int.from_bytes(record[SCHEMA_ID], "little") not in known:
                if not Header.unpack(record).tombstone:
                    return True
        return False

    def decoder(self, schema_id: int) -> Decoder:
        if schema_id not in self.decoders:
            raise OnlineStoreError(
                f"feature view {self.view.name!r}: could not decode a record in {self.location}: found the schema id {schema_id}, "
                f"expected one of {sorted(self.decoders)}. The schemas cell was lost, or a newer release wrote the record. Upgrade this reader, or run: materialize rebuild {self.view.name}"
            )
        return self.decoders[schema_id]


class Selection:
    """Some features of a view in the order asked for, and how they are taken out of records of each schema."""

    def __init__(self, schemas: ViewSchemas, names: Sequence[str] | None) -> None:
        """Raises ValueError for a name that the view does not have, or that is there twice."""
        view = schemas.view
        self.schemas, self.names = schemas, tuple(view.features if names is None else names)
        if unknown := [name for name in self.names if name not in view.features]:
            raise ValueError(
                f"feature view {view.name!r}: found {', '.join(map(repr, unknown))}, expected features out of {', '.join(view.features)}"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"feature view {view.name!r}: found a feature name twice, expected each once")
        self.kinds = {name: view.features[name] for name in self.names}
        self.none = dict.fromkeys(self.names)
        self.missing = FeatureVector("missing", self.none, 0)
        self.variable = any(kind.width is None for kind in self.kinds.values())
        #: Whether nobody can change the values, which may then be given away again.
        self.frozen = all(kind.kind != "list" for kind in self.kinds.values())
        self._takers: dict[int, Taker] = {}

    def vector(self, record: bytes | None, read_us: int, oldest_us: int) -> FeatureVector:
        """What *record* says at *read_us*; expired when its event time is at or before *oldest_us*. Raises OnlineStoreError when damaged."""
        status, features, times, absent = self._read(record, oldest_us)
        return FeatureVector(status, features, read_us, *times, absent)

    def features(self, record: bytes | None, oldest_us: int) -> dict[str, Any]:
        """The features of that vector."""
        return self._read(record, oldest_us)[1]

    def _read(
        self, record: bytes | None, oldest_us: int
    ) -> tuple[Status, dict[str, Any], tuple[int | None, int | None, int | None], frozenset[str]]:
        """The status of a record, its features, its order fields as `FeatureVector` has them, and the names that it lacks."""
        if record is None:
            return "missing", self.none.copy(), NO_TIMES, NOTHING
        if len(record) < HEADER.size or record[0] != FORMAT_VERSION:
            Header.unpack(record)  # raises, with what was found
        _, flags, schema_id, event_us, created_us, version, _ = HEADER.unpack_from(record)
        if flags & TOMBSTONE:
            return "missing", self.none.copy(), NO_TIMES, NOTHING
        times = (event_us, created_us, version)
        if event_us <= oldest_us:
            return "expired", self.none.copy(), times, NOTHING
        taker = self._takers.get(schema_id) or self._new_taker(schema_id)
        return "present", taker.take(taker.decoder.values(record)), times, taker.absent

    def _new_taker(self, schema_id: int) -> Taker:
        # What a schema id means never changes (materialize.watermark.register_schema), so it is kept.
        taker = self._takers[schema_id] = Taker(self.schemas.decoder(schema_id), self.names)
        return taker

    def numbers(self) -> None:
        """Raises ValueError when a feature is not a number that a float64 holds exactly."""
        if other := [f"{name!r} is {kind}" for name, kind in self.kinds.items() if kind.kind not in NUMBERS]:
            raise ValueError(
                f"feature view {self.schemas.view.name!r}: found that {', '.join(other)}, expected features out of {', '.join(NUMBERS)} "
                "for a matrix of float64. Leave them out, or take to_arrow() or to_dicts()"
            )


class Taker:
    """Takes features by name out of the values of records of one schema, None for what it lacks. ``absent``: the names of that."""

    def __init__(self, decoder: Decoder, names: tuple[str, ...]) -> None:
        self.decoder, self.names = decoder, names
        self.absent = frozenset(names) - frozenset(decoder.names)
        self.places = {name: decoder.names.index(name) for name in names if name not in self.absent}
        self.pick = itemgetter(*self.places.values()) if len(self.places) > 1 else tuple
        self.take: Callable[[Sequence[Any]], dict[str, Any]] = self._each
        if names == decoder.names:
            self.take = self._all
        elif len(self.places) == len(names) > 1:
            self.take = self._some

    def _all(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, values))  # noqa: B905 - as many as there are names, and strict costs a fifth

    def _some(self, values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(self.names, self.pick(values)))  # noqa: B905 - as above

    def _each(self, values: Sequence[Any]) -> dict[str, Any]:
        return {name: values[self.places[name]] if name in self.places else None for name in self.names}


class FeatureBatch(Sequence[FeatureVector]):
    """The vectors of some entities of one view, in the order asked for; decoded when they are looked at.

    A record that is damaged raises OnlineStoreError then. ``fallback``: defaults by feature name that stand for every vector, because
    the store did not answer; None: it did.
    """

    def __init__(
        self,
        selection: Selection,
        records: Sequence[bytes | None],
        *,
        read_us: int,
        oldest_us: int = NEVER,
        fallback: Mapping[str, Any] | None = None,
    ) -> None:
        self.selection, self.records = selection, records
        self.read_us, self.oldest_us, self.fallback = read_us, oldest_us, fallback

    @property
    def names(self) -> tuple[str, ...]:
        return self.selection.names

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, place: int) -> FeatureVector: ...
    @overload
    def __getitem__(self, place: slice) -> list[FeatureVector]: ...
    def __getitem__(self, place: int | slice) -> FeatureVector | list[FeatureVector]:
        if isinstance(place, slice):
            return [self._vector(record) for record in self.records[place]]
        return self._vector(self.records[place])

    def __iter__(self) -> Iterator[FeatureVector]:
        return map(self._vector, self.records)

    def _vector(self, record: bytes | None) -> FeatureVector:
        if self.fallback is None:
            return self.selection.vector(record, self.read_us, self.oldest_us)
        features = {name: self.fallback.get(name) for name in self.names}
        return FeatureVector("default", features, self.read_us, absent=self._undefaulted())

    def _undefaulted(self) -> frozenset[str]:
        return frozenset(self.names).difference(self.fallback or ())

    def to_dicts(self) -> list[dict[str, Any]]:
        """The features of each entity: name -> value, None where there is none."""
        if self.fallback is not None:
            return [vector.features for vector in self]
        features, oldest_us = self.selection.features, self.oldest_us
        return [features(record, oldest_us) for record in self.records]

    def to_numpy(self) -> FeatureMatrix:
        """All features as float64. Raises ValueError where one is of a type that float64 does not hold exactly."""
        self.selection.numbers()
        shape = (len(self.records), len(self.names))
        values = np.full(shape, np.nan)
        statuses = np.full(shape, MISSING, dtype=np.uint8)
        if self.fallback is None:
            self._fill(values, statuses)
        else:
            for column, name in enumerate(self.names):
                if name in self.fallback:
                    value = self.fallback[name]
                    values[:, column], statuses[:, column] = (np.nan, NULL) if value is None else (value, DEFAULT)
        return FeatureMatrix(self.names, values, statuses)

    def _fill(self, values: np.ndarray[Any, Any], statuses: np.ndarray[Any, Any]) -> None:
        places = np.array([place for place, record in enumerate(self.records) if record is not None], dtype=np.intp)
        there = [record for record in self.records if record is not None]
        heads = headers(there)
        live = heads["flags"] & TOMBSTONE == 0
        old = live & (heads["event_us"] <= self.oldest_us)
        statuses[places[old]] = EXPIRED
        shapes = heads["schema"].astype(np.int64) * 2 + (heads["flags"] & HAS_NULLS != 0)
        for shape in np.unique(shapes[live & ~old]).tolist():
            chosen = np.flatnonzero(live & ~old & (shapes == shape))
            decoder = self.selection.schemas.decoder(shape // 2)
            names = [name for name in self.names if name in decoder.features]
            numbers, nulls = decoder.numbers([there[row] for row in chosen], names, nulls=bool(shape % 2))
            numbers[nulls] = np.nan
            block: Any = np.ix_(places[chosen], np.array([self.names.index(name) for name in names], dtype=np.intp))
            if len(chosen) == len(self.records) and len(names) == len(self.names):
                block = np.s_[:, :]  # all of it, in a tenth of the time
            values[block], statuses[block] = numbers, np.where(nulls, np.uint8(NULL), np.uint8(PRESENT))

    def to_arrow(self) -> pa.RecordBatch:
        """A column for each feature in its exact type, null where there is no value; and of each vector ``__status``, ``__statuses``
        (uint8 for each feature, places in `STATUSES`), ``__event_timestamp`` and ``__table_version``.
        """
        vectors = list(self)
        columns = _columns(self.selection.kinds, vectors)
        columns["__statuses"] = _statuses(vectors, len(self.names))
        return pa.RecordBatch.from_pydict(columns | _about(vectors))


@dataclass(frozen=True)
class ServiceBatch(Sequence[ServiceVector]):
    """The vectors of a feature service for some sets of entities. ``parts``: of each view its vectors, all of one length; ``names``: of
    each part what its features are called here.
    """

    parts: tuple[FeatureBatch, ...]
    names: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @overload
    def __getitem__(self, place: int) -> ServiceVector: ...
    @overload
    def __getitem__(self, place: slice) -> list[ServiceVector]: ...
    def __getitem__(self, place: int | slice) -> ServiceVector | list[ServiceVector]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        vectors = [part[place] for part in self.parts]
        names = list(chain.from_iterable(self.names))
        values = chain.from_iterable(vector.features.values() for vector in vectors)
        statuses = chain.from_iterable(vector.statuses.values() for vector in vectors)
        views = [part.selection.schemas.view.name for part in self.parts]
        return ServiceVector(
            dict(zip(names, values, strict=True)),
            dict(zip(names, statuses, strict=True)),
            dict(zip(views, vectors, strict=True)),
        )

    def to_dicts(self) -> list[dict[str, Any]]:
        """The features of each set of entities, as `FeatureBatch.to_dicts`."""
        return [vector.features for vector in self]

    def to_numpy(self) -> FeatureMatrix:
        """All features as float64, in the order of the service. Raises ValueError as `FeatureBatch.to_numpy` does."""
        matrices = [part.to_numpy() for part in self.parts]
        return FeatureMatrix(
            tuple(chain.from_iterable(self.names)),
            np.hstack([matrix.values for matrix in matrices]),
            np.hstack([matrix.statuses for matrix in matrices]),
        )

    def to_arrow(self) -> pa.RecordBatch:
        """As `FeatureBatch.to_arrow`; ``__status``, ``__statuses`` and the like once for each view, with ``.VIEW`` behind the name."""
        columns: dict[str, pa.Array] = {}
        about: dict[str, pa.Array] = {}
        for part, names in zip(self.parts, self.names, strict=True):
            vectors, view = list(part), part.selection.schemas.view.name
            found = _columns(part.selection.kinds, vectors)
            columns |= dict(zip(names, found.values(), strict=True))
            told = {"__statuses": _statuses(vectors, len(names)), **_about(vectors)}
            about |= {f"{name}.{view}": column for name, column in told.items()}
        return pa.RecordBatch.from_pydict(columns | about)


def _columns(kinds: Mapping[str, FeatureType], vectors: Sequence[FeatureVector]) -> dict[str, pa.Array]:
    return {
        name: pa.array([vector.features[name] for vector in vectors], _arrow_type(kind)) for name, kind in kinds.items()
    }


def _statuses(vectors: Sequence[FeatureVector], width: int) -> pa.Array:
    codes = [STATUSES.index(status) for vector in vectors for status in vector.statuses.values()]
    return pa.FixedSizeListArray.from_arrays(pa.array(codes, pa.uint8()), width)


def _about(vectors: Sequence[FeatureVector]) -> dict[str, pa.Array]:
    return {
        "__status": pa.array([vector.status for vector in vectors], STATUS_TYPE),
        "__event_timestamp": pa.array([vector.event_us for vector in vectors], pa.int64()).cast(TIME_TYPE),
        "__table_version": pa.array([vector.table_version for vector in vectors], pa.int64()),
    }


def _arrow_type(kind: FeatureType) -> pa.DataType:
    if kind.kind == "decimal":
        return pa.decimal128(kind.precision, kind.scale)
    if kind.kind == "list":
        item = getattr(pa, kind.item)()
        return pa.list_(item) if kind.length is None else pa.list_(item, kind.length)
    special = {"bool": pa.bool_(), "date": pa.date32(), "timestamp": TIME_TYPE}
    return special[kind.kind] if kind.kind in special else getattr(pa, kind.kind)()
