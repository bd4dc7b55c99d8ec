"""Where each view stands in each store, and which schemas its records have. The only writer of positions.

Both live in cells of the online store, beside the data that they describe: ``watermark`` holds a Watermark as JSON,
``schemas`` a JSON object from schema id to the schema's text.
"""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING

from materialize.errors import OnlineStoreError, StoreChangedError, WatermarkError
from materialize.feature_type import FeatureType
from materialize.model import Watermark

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["SCHEMAS", "move", "read", "read_text", "register_schema", "schemas", "schemas_of"]

WATERMARK, SCHEMAS = "watermark", "schemas"
#: Schema ids are 16 bits in a record's header; 0 is for tombstones, which have no schema.
SCHEMA_IDS = 2**16 - 1


def read_text(store: OnlineStore, view: str) -> str | None:
    """The oldest copy of the watermark as it is stored: what `move` compares with. None where a copy is missing, or all are.

    Each server that holds a part of the view holds a copy beside it, so the oldest says what all parts have.
    Raises OnlineStoreError for a cell that `Watermark.from_json` cannot read.
    """
    return _oldest(store, view, store.read_copies(view, WATERMARK))


def _oldest(store: OnlineStore, view: str, copies: Sequence[bytes | None]) -> str | None:
    try:
        read = [None if content is None else Watermark.from_json(content) for content in copies]
    except (ValueError, TypeError):
        raise _unreadable(store.location, view, WATERMARK) from None
    content = min(zip(map(_place, read), range(len(copies)), copies, strict=True))[2]
    return None if content is None else content.decode()


def _place(found: Watermark | None) -> tuple[int, int, int]:
    """Watermarks of a view only go up in this order."""
    if found is None:
        return (-1, -1, -1)
    return (found.generation, -1 if found.version is None else found.version, found.finished_us or 0)


def read(store: OnlineStore, view: str) -> Watermark | None:
    """The watermark of *view*, None when it was never loaded."""
    text = read_text(store, view)
    return None if text is None else Watermark.from_json(text)


def move(store: OnlineStore, view: str, expected: str | None, new: Watermark) -> str:
    """Write *new* if the oldest copy is *expected*, and return its text. Done before by the same run counts as done.

    If it raises or dies, any of the copies may be written; the oldest counts. Raises WatermarkError when another run moved the
    watermark since *expected* was read, StoreChangedError when the watermark went back.
    """
    text = new.to_json()
    copies = store.read_copies(view, WATERMARK)
    # What the cell holds may be newer than a copy: then a run died between the two, or a server lost the copy with its records.
    if _oldest(store, view, copies) == expected and store.compare_and_set_cell(
        view, WATERMARK, copies[0], text.encode()
    ):
        store.write_copies(view, WATERMARK, text.encode())
        return text
    found = read(store, view)
    if found is not None and (found.run_id, found.generation, found.version) == (
        new.run_id,
        new.generation,
        new.version,
    ):
        store.write_copies(view, WATERMARK, found.to_json().encode())
        return found.to_json()
    started = None if expected is None else Watermark.from_json(expected)
    facts = (
        f"feature view {view!r}: could not move the watermark in {store.location}: it is at {_told(found)}, "
        f"this run started from {_told(started)}. "
    )
    if _place(found)[:2] < _place(started)[:2]:
        raise StoreChangedError(f"{facts}The store went back or lost it, and no run claims what is gone. Run again.")
    raise WatermarkError(
        f"{facts}Another run finished or started first; what this run wrote is harmless and there is nothing to repair."
    )


def _told(watermark: Watermark | None) -> str:
    if watermark is None:
        return "no version"
    if watermark.version is None:
        return f"an unfinished snapshot run ({watermark.run_id})"
    return f"version {watermark.version}"


def register_schema(store: OnlineStore, view: FeatureView) -> int:
    """The id of the view's current schema, made known to every reader before a record uses it."""
    while True:
        content = store.read_cell(view.name, SCHEMAS)
        known = _schema_texts(store.location, view.name, content)
        schema_id = zlib.crc32(view.schema_text.encode()) % SCHEMA_IDS + 1
        while known.get(str(schema_id), view.schema_text) != view.schema_text:
            schema_id = schema_id % SCHEMA_IDS + 1
        if str(schema_id) in known:
            return schema_id
        updated = json.dumps(known | {str(schema_id): view.schema_text}, sort_keys=True).encode()
        if store.compare_and_set_cell(view.name, SCHEMAS, content, updated):
            return schema_id


def schemas(store: OnlineStore, view: str) -> dict[int, dict[str, FeatureType]]:
    """Every schema of *view* that this release can decode: schema id -> feature name -> type, in the record's order."""
    return schemas_of(store.read_cell(view, SCHEMAS), store.location, view)


def schemas_of(content: bytes | None, location: str, view: str) -> dict[int, dict[str, FeatureType]]:
    """The same of the *content* of the cell `SCHEMAS`, which was read at *location*."""
    known = {}
    for schema_id, text in _schema_texts(location, view, content).items():
        with suppress(ValueError):  # a type of a newer release: only records of that schema cannot be read here
            known[int(schema_id)] = {name: FeatureType.parse(kind) for name, kind in json.loads(text)}
    return known


def _schema_texts(location: str, view: str, content: bytes | None) -> dict[str, str]:
    """The *content* of a schemas cell: schema id -> the schema's text."""
    try:
        texts: object = {} if content is None else json.loads(content)
    except ValueError:
        texts = None
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _unreadable(location, view, SCHEMAS)
    return texts


def _unreadable(location: str, view: str, cell: str) -> OnlineStoreError:
    return OnlineStoreError(
        f"feature view {view!r}: could not read the cell {cell!r} in {location}: found something else than this release writes. "
        "A newer release did, or something else writes under this prefix; nothing was changed. "
        f"Upgrade, or delete the cell and run: materialize rebuild {view}"
    )
