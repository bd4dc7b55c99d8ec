"""Where each view stands in each store, and which schemas its records have. The only writer of positions.

Both live in cells of the online store, beside the data that they describe: ``watermark`` holds a Watermark as JSON,
``schemas`` a JSON object from schema id to the schema's text.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING

from materialize.errors import WatermarkError
from materialize.model import FeatureType, Watermark

if TYPE_CHECKING:
    from materialize.model import FeatureView
    from materialize.online.base import OnlineStore

__all__ = ["move", "read", "read_text", "register_schema", "schemas"]

WATERMARK, SCHEMAS = "watermark", "schemas"
#: Schema ids are 16 bits in a record's header; 0 is for tombstones, which have no schema.
SCHEMA_IDS = 2**16 - 1


def read_text(store: OnlineStore, view: str) -> str | None:
    """The watermark cell as it is stored: what `move` compares with. None for a view that was never loaded."""
    content = store.read_cell(view, WATERMARK)
    return None if content is None else content.decode()


def read(store: OnlineStore, view: str) -> Watermark | None:
    """The watermark of *view*, None when it was never loaded."""
    text = read_text(store, view)
    return None if text is None else Watermark.from_json(text)


def move(store: OnlineStore, view: str, expected: str | None, new: Watermark) -> str:
    """Write *new* if the cell holds *expected*, and return its text. Done before by the same run counts as done.

    Raises WatermarkError when another run moved the watermark since *expected* was read.
    """
    text = new.to_json()
    if store.compare_and_set_cell(view, WATERMARK, None if expected is None else expected.encode(), text.encode()):
        return text
    found = read(store, view)
    if found is not None and (found.run_id, found.generation, found.version) == (
        new.run_id,
        new.generation,
        new.version,
    ):
        return found.to_json()
    raise WatermarkError(
        f"feature view {view!r}: could not move the watermark in {store.location}: it is at {_told(found)}, "
        f"this run started from {_told(None if expected is None else Watermark.from_json(expected))}. "
        "Another run finished or started first; what this run wrote is harmless and there is nothing to repair."
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
        known: dict[str, str] = {} if content is None else json.loads(content)
        schema_id = zlib.crc32(view.schema_text.encode()) % SCHEMA_IDS + 1
        while known.get(str(schema_id), view.schema_text) != view.schema_text:
            schema_id = schema_id % SCHEMA_IDS + 1
        if str(schema_id) in known:
            return schema_id
        updated = json.dumps(known | {str(schema_id): view.schema_text}, sort_keys=True).encode()
        if store.compare_and_set_cell(view.name, SCHEMAS, content, updated):
            return schema_id


def schemas(store: OnlineStore, view: str) -> dict[int, dict[str, FeatureType]]:
    """Every schema that records of *view* may have: schema id -> feature name -> type, in the record's order."""
    content = store.read_cell(view, SCHEMAS)
    texts: dict[str, str] = {} if content is None else json.loads(content)
    return {int(key): {name: FeatureType.parse(kind) for name, kind in json.loads(text)} for key, text in texts.items()}
