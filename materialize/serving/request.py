"""What a model server asks for: views, entities as Python values, feature names. In: what callers write; out: entity keys in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from materialize.entity_key import format_key

if TYPE_CHECKING:
    from datetime import timedelta

    from materialize.model import FeatureView

__all__ = ["EntityKey", "Lookup", "entity_key_bytes"]

#: One value where the view has one join key, values in the order of the join keys, or values by the names of the join keys; or the
#: entity key as docs/format.md has it, in bytes.
EntityKey: TypeAlias = Any
#: What a join key's column can hold; numbers of numpy count as numbers.
KEY_VALUES = (str, int, np.integer, np.bool_, date)


class Lookup(NamedTuple):
    """Features of some entities of one view. ``feature_names`` None: all. ``max_age``: a vector whose event time is longer ago is
    expired, None: only the view's ttl counts.
    """

    view: str
    entity_keys: Sequence[EntityKey]
    feature_names: Sequence[str] | None = None
    max_age: timedelta | None = None


def entity_key_bytes(view: FeatureView, key: EntityKey) -> bytes:
    """The entity key that *key* means in *view*; bytes are one. Raises ValueError, without the key's values, for what cannot be one."""
    if isinstance(key, bytes):
        return key
    parts: Sequence[Any]
    if isinstance(key, (str, int)):  # a tuple is asked in half the time of a union
        parts = (key,)
    elif isinstance(key, Mapping):
        if missing := [name for name in view.join_keys if name not in key]:
            raise _unusable(view, f"no {', '.join(map(repr, missing))}")
        parts = [key[name] for name in view.join_keys]
    else:
        parts = key if isinstance(key, (tuple, list)) else (key,)
    if len(parts) != len(view.join_keys):
        raise _unusable(view, f"{len(parts)} value(s)")
    for part in parts:
        if not isinstance(part, KEY_VALUES) or isinstance(part, datetime):
            raise _unusable(view, f"a {type(part).__name__}")
    return format_key(parts)


def _unusable(view: FeatureView, found: str) -> ValueError:
    return ValueError(
        f"feature view {view.name!r}: found {found} in an entity key, expected a text, whole number, date or truth value for each join key: {', '.join(view.join_keys)}"
    )
