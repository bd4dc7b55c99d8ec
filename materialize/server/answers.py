"""Feature vectors in, the bytes of an answer out: JSON that every reader takes exactly, or an Arrow stream."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic_core import to_json

from materialize.json_value import json_writer
from materialize.model import from_us
from materialize.serving import STATUSES
from materialize.serving.core import MOST_SELECTIONS

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Sequence

    from materialize.serving import FeatureBatch, FeatureVector, ServiceBatch, ServiceVector
    from materialize.serving.decoding import Selection

__all__ = ["arrow", "service_vectors", "vectors", "written"]

#: Vectors that are written before other requests get their turn: about 1 ms of 50 features each.
CHUNK = 50


def written(told: Any) -> bytes:
    """*told* as JSON: what JSON has, and floats that are not finite as the text that `json_value` makes of them.

    The json of Python takes 50 us for 50 floats, this 6.
    """
    return to_json(told, inf_nan_mode="strings")


async def vectors(batch: FeatureBatch, counts: Counter[str]) -> list[bytes]:
    """Each vector of *batch* as JSON; *counts*: its values by status are added."""
    writers = _writers(batch.selection, batch.selection.names)
    return await _each(batch, lambda vector: {**_about(vector), **_features(vector, writers, counts)})


async def service_vectors(batch: ServiceBatch, counts: Counter[str]) -> list[bytes]:
    """The same of a feature service."""
    parts = zip(batch.parts, batch.names, strict=True)
    writers = tuple(chain.from_iterable(_writers(part.selection, names) for part, names in parts))

    def one(vector: ServiceVector) -> dict[str, Any]:
        views = {view: _about(part) for view, part in vector.vectors.items()}
        return {**_features(vector, writers, counts), "views": views}

    return await _each(batch, one)


async def _each(batch: Sequence[Any], told: Any) -> list[bytes]:
    done = []
    for place, vector in enumerate(batch):
        if place % CHUNK == CHUNK - 1:
            await asyncio.sleep(0)
        done.append(written(told(vector)))
    return done


def _about(vector: FeatureVector) -> dict[str, Any]:
    if vector.event_us is None:
        return {"status": vector.status, "event_timestamp": None, "age_seconds": None, "table_version": None}
    return {
        "status": vector.status,
        "event_timestamp": from_us(vector.event_us).isoformat(),
        "age_seconds": (vector.read_us - vector.event_us) / 1e6,
        "table_version": vector.table_version,
    }


@lru_cache(maxsize=MOST_SELECTIONS)
def _writers(selection: Selection, names: tuple[str, ...]) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    """The features, by what they are called here, whose values JSON does not have as they are, and what makes them so."""
    kinds = zip(names, selection.kinds.values(), strict=True)
    return tuple((name, write) for name, kind in kinds if (write := json_writer(kind)) is not None)


def _features(
    vector: FeatureVector | ServiceVector, writers: Sequence[tuple[str, Callable[[Any], Any]]], counts: Counter[str]
) -> dict[str, Any]:
    features = vector.features
    statuses = {name: status for name, status in vector.statuses.items() if status != "present"}
    counts["present"] += len(features) - len(statuses)
    if statuses:
        counts.update(statuses.values())
    if writers:
        features = {
            **features,
            **{name: write(features[name]) for name, write in writers if features[name] is not None},
        }
    return {"features": features, "statuses": statuses}


async def arrow(batch: FeatureBatch | ServiceBatch, counts: Counter[str]) -> bytes:
    """An Arrow stream of one record batch, as ``to_arrow`` gives it."""
    if len(batch) <= CHUNK:
        return _arrow(batch, counts)
    return await asyncio.to_thread(_arrow, batch, counts)


def _arrow(batch: FeatureBatch | ServiceBatch, counts: Counter[str]) -> bytes:
    table = batch.to_arrow()
    for name, column in zip(table.schema.names, table.columns, strict=True):
        if name.startswith("__statuses"):
            found = np.bincount(column.values.to_numpy(zero_copy_only=False), minlength=len(STATUSES)).tolist()
            counts.update({status: count for status, count in zip(STATUSES, found, strict=True) if count})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_batch(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content
