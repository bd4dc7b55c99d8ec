"""Rows of a table that is hard on a feature store: times that tie, keys that need escapes, values that differ in one bit.

A row is a mapping by column. ``uid`` is a number of its own that no view reads: by it a row is known in any data file.
"""

from __future__ import annotations

import math
import string
import struct
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import random

    from materialize.model import FeatureView

__all__ = [
    "COLUMNS",
    "FEATURES",
    "NOW",
    "T0",
    "Row",
    "Rows",
    "content",
    "entity_key",
    "key",
    "order",
    "shown",
    "storable",
]

Row = dict[str, Any]

#: The first event time, and the clock of all runs: ahead of every server's own clock, so that it never matters.
T0 = datetime(2095, 1, 1, tzinfo=timezone.utc)
NOW = datetime(2095, 6, 1, tzinfo=timezone.utc)
UTC_TIME = pa.timestamp("us", tz="UTC")
#: Every column a table may have; ``later`` comes and goes.
COLUMNS = {
    "uid": pa.int64(),
    "region": pa.string(),
    "user": pa.int64(),
    "event": UTC_TIME,
    "created": UTC_TIME,
    "amount": pa.float64(),
    "count": pa.int64(),
    "name": pa.string(),
    "flags": pa.list_(pa.int32()),
    "points": pa.list_(pa.float32()),
    "later": pa.float32(),
}
#: The features a view may have; the first three are in every view.
FEATURES = {
    "amount": "float64",
    "count": "int64",
    "name": "string",
    "flags": "list<int32>",
    "points": "list<float32>",
    "later": "float32",
}
#: What a record holds at most in these histories, and a name that is above it.
MAX_VALUE_BYTES = 2_000
OVERSIZED = "x" * (MAX_VALUE_BYTES + 1)
REGIONS = ["de", "a|b", "{}", "100%", "%7C", "ü€😀", "it's", "x" * 200]
USERS = [-1, 0, 1, 2**62 + 1]
FLOATS = [0.0, -0.0, 1.5, math.nan, math.inf, -math.inf, 5e-324, None]
POINTS = [None, [], [0.0], [-0.0], [math.nan], [1.5, -0.0, math.nan], [1.5, 0.0, math.nan]]


@dataclass(slots=True)
class Rows:
    """Random rows of a few entities."""

    rng: random.Random
    entities: list[tuple[str, int]] = field(init=False)
    made: int = 0

    def __post_init__(self) -> None:
        self.entities = [self._new_entity() for _ in range(self.rng.randint(1, 7))]

    def _new_entity(self) -> tuple[str, int]:
        return self.rng.choice(REGIONS), self.rng.choice(USERS)

    def entity(self) -> tuple[str, int]:
        """One that has rows, most of the time."""
        if self.rng.random() < 0.05:
            self.entities.append(self._new_entity())
        return self.rng.choice(self.entities)

    def row(self, **fixed: Any) -> Row:
        """A row without a ``uid``; one of ten has something that cannot be stored."""
        rng = self.rng
        region, user = self.entity()
        self.made += 1
        values = {
            "region": region,
            "user": user,
            "event": T0 + timedelta(minutes=rng.randint(-4, 8), microseconds=rng.choice([0, 0, 1])),
            "created": None if rng.random() < 0.1 else T0 + timedelta(minutes=rng.randint(0, 2)),
            **self.features(),
        }
        odd = rng.random()
        if odd < 0.02:
            values["region"] = rng.choice([None, ""])
        elif odd < 0.04:
            values["user"] = None
        elif odd < 0.07:
            values["event"] = rng.choice([None, NOW + timedelta(days=2)])
        elif odd < 0.11:
            values["name"] = OVERSIZED
        return values | fixed

    def features(self) -> Row:
        rng = self.rng
        return {
            "amount": rng.choice(FLOATS),
            "count": rng.choice([None, 0, -(2**63), 2**63 - 1, self.made]),
            "name": rng.choice([None, "", "ü€", "".join(rng.choices(string.printable, k=rng.randint(1, 30)))]),
            "flags": rng.choice([None, [], [1, -2, 3]]),
            "points": rng.choice(POINTS),
            "later": rng.choice([None, 0.5, -1.0, -0.0, math.nan]),
        }


def key(row: Row) -> tuple[Any, Any]:
    return row["region"], row["user"]


def order(row: Row, view: FeatureView) -> tuple[Any, ...]:
    """What says which of two rows of an entity is the later fact."""
    if view.created_timestamp is None:
        return (row["event"],)
    created = row["created"]
    return row["event"], datetime.min.replace(tzinfo=timezone.utc) if created is None else created


def keyed(row: Row) -> bool:
    """Whether the row's key and event time can be stored."""
    named = row["region"] not in {None, ""} and row["user"] is not None
    return bool(named and row["event"] is not None and row["event"] <= NOW + timedelta(days=1))


def storable(row: Row) -> bool:
    return keyed(row) and row["name"] != OVERSIZED


def entity_key(parts: tuple[Any, ...]) -> bytes:
    escapes = {"%": "%25", "|": "%7C", "{": "%7B", "}": "%7D"}
    return "|".join("".join(escapes.get(character, character) for character in str(part)) for part in parts).encode()


def shown(values: Any) -> Any:
    """Values as they compare exactly: floats by their bits."""
    if isinstance(values, dict):
        return {name: shown(value) for name, value in values.items()}
    if isinstance(values, list):
        return [shown(value) for value in values]
    return struct.pack("<d", values) if isinstance(values, float) else values


def content(row: Row) -> str:
    """What two rows have in common that Delta cannot tell from each other: the columns that every view reads."""
    columns = ("region", "user", "event", "created", "amount", "count", "name")
    return repr([shown(row[name]) for name in columns])
