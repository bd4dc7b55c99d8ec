"""Entity keys in, feature vectors out. No read depends on the state of any run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from materialize import watermark
from materialize.decoder import Decoder, Header
from materialize.errors import OnlineStoreError
from materialize.model import from_us, to_us

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["FeatureReader", "FeatureVector"]


@dataclass(frozen=True, slots=True)
class FeatureVector:
    """The features of one entity. ``features`` is empty unless the status is ``present``; a null feature is None."""

    status: Literal["present", "missing", "expired"]
    event_timestamp: datetime | None
    features: dict[str, Any]


class FeatureReader:
    """Reads the feature vectors of one view from one store; knows the schemas of its records after the first read."""

    def __init__(self, view: FeatureView, store: OnlineStore) -> None:
        self.view, self.store = view, store
        self.decoders: dict[int, Decoder] = {}

    def lookup(
        self, keys: Sequence[bytes], *, now: datetime, features: Sequence[str] | None = None
    ) -> list[FeatureVector]:
        """The feature vector of each entity key, in order.

        *features*: names out of the view's, all by default. An entity that was never loaded or was deleted is ``missing``; one
        whose event time plus the view's ttl is past at *now* is ``expired``. A feature that the stored record does not have
        yet is None. Raises ValueError for a name that the view does not have.
        """
        names = list(self.view.features) if features is None else list(features)
        if unknown := [name for name in names if name not in self.view.features]:
            raise ValueError(
                f"feature view {self.view.name!r}: found {', '.join(map(repr, unknown))}, expected features out of {', '.join(self.view.features)}"
            )
        return [self._vector(record, names, to_us(now)) for record in self.store.read(self.view.name, keys)]

    def _vector(self, record: bytes | None, names: Sequence[str], now_us: int) -> FeatureVector:
        if record is None:
            return FeatureVector("missing", None, {})
        header = Header.unpack(record)
        if header.tombstone:
            return FeatureVector("missing", None, {})
        event = from_us(header.event_us)
        if self.view.ttl_us is not None and header.event_us + self.view.ttl_us <= now_us:
            return FeatureVector("expired", event, {})
        values = self._decoder(header.schema_id).decode(record)
        return FeatureVector("present", event, {name: values.get(name) for name in names})

    def _decoder(self, schema_id: int) -> Decoder:
        if schema_id not in self.decoders:
            self.decoders = {
                known: Decoder(features) for known, features in watermark.schemas(self.store, self.view.name).items()
            }
        if schema_id not in self.decoders:
            raise OnlineStoreError(
                f"feature view {self.view.name!r}: could not decode a record in {self.store.location}: found the schema id {schema_id}, "
                f"expected one of {sorted(self.decoders)}. The schemas cell was lost, or a newer release wrote the record. Upgrade this reader, or run: materialize rebuild {self.view.name}"
            )
        return self.decoders[schema_id]
