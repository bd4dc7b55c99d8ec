"""What a read gives: feature vectors of entities, and the same as a matrix of numbers. Values only, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from materialize.model import MICROSECOND, from_us
from materialize.order import GENERATION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta

    import numpy.typing as npt

__all__ = ["STATUSES", "FeatureMatrix", "FeatureVector", "ServiceVector", "Status"]

Status = Literal["present", "null", "missing", "expired", "default"]
#: Why a value is there or not; the place of each is its code in `FeatureMatrix`.
STATUSES: tuple[Status, ...] = ("present", "null", "missing", "expired", "default")


@dataclass(frozen=True, slots=True)
class FeatureVector:
    """Features of one entity in one view, as one read found them.

    ``status``: ``present``; ``missing``, the entity was never loaded, or was deleted or erased; ``expired``, its event time is older
    than the view's ttl or the read's ``max_age``; ``default``, the store did not answer and the reader has defaults.
    ``features``: name -> value in the order asked for, None where there is none; `statuses` says why. ``absent``: names that the
    stored record does not have: the feature is newer than the record, or has no default. ``event_us``, ``version`` (generation and
    table version, `materialize.order.stamp`) and ``created_us`` are the record's order fields, None unless present or expired;
    ``read_us`` is the reader's clock at the read; times in microseconds since 1970 UTC.
    """

    status: Status
    features: dict[str, Any]
    read_us: int = field(compare=False)
    event_us: int | None = None
    created_us: int | None = None
    version: int | None = None
    absent: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.features[name]

    @property
    def statuses(self) -> dict[str, Status]:
        """For each feature why its value is there or not."""
        if self.status not in {"present", "default"}:
            return dict.fromkeys(self.features, self.status)
        return {
            name: "missing" if name in self.absent else "null" if value is None else self.status
            for name, value in self.features.items()
        }

    @property
    def event_timestamp(self) -> datetime | None:
        """When the features became true, UTC."""
        return None if self.event_us is None else from_us(self.event_us)

    @property
    def age(self) -> timedelta | None:
        """How long before the read that was."""
        return None if self.event_us is None else (self.read_us - self.event_us) * MICROSECOND

    @property
    def table_version(self) -> int | None:
        """The version of the Delta table that brought the row; of a row that a snapshot brought, the snapshot's version."""
        return None if self.version is None else self.version % GENERATION


@dataclass(frozen=True, slots=True)
class ServiceVector:
    """The features of a feature service for one set of entities. ``vectors``: the vector of each view that they came from."""

    features: dict[str, Any]
    statuses: dict[str, Status]
    vectors: Mapping[str, FeatureVector]

    def __getitem__(self, name: str) -> Any:
        return self.features[name]

    @property
    def age(self) -> timedelta | None:
        """The age of the oldest vector; None when no view has one."""
        return max((vector.age for vector in self.vectors.values() if vector.age is not None), default=None)


@dataclass(frozen=True, slots=True)
class FeatureMatrix:
    """Features of n entities as numbers: what a model takes.

    ``names``: the k features in the order asked for. ``values``: float64, shape (n, k), NaN where there is no value (and where the
    value is NaN). ``statuses``: uint8, shape (n, k), places in `STATUSES`.
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.float64]
    statuses: npt.NDArray[np.uint8]

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Bool, shape (n, k): True where there is no value, as `numpy.ma` has it. A default is a value."""
        there = [STATUSES.index("present"), STATUSES.index("default")]
        mask: npt.NDArray[np.bool_] = np.isin(self.statuses, there, invert=True)
        return mask
