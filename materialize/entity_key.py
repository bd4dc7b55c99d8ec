"""Join key values in, entity keys out: readable, injective text, as docs/format.md fixes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["format_key", "key_parts", "parse_key"]

#: Characters of a join key's text that an entity key escapes; "%" first.
ESCAPES = (("%", "%25"), ("|", "%7C"), ("{", "%7B"), ("}", "%7D"))


def format_key(parts: Sequence[object]) -> bytes:
    """The entity key of one entity, from its join key values in the view's order."""
    return "|".join([_part_text(part) for part in parts]).encode()


def _part_text(part: object) -> str:
    if type(part) is int:
        return str(part)
    return _escaped(str(part).lower() if isinstance(part, (bool, np.bool_)) else str(part))


def parse_key(text: str, join_keys: Sequence[str]) -> bytes:
    """The entity key that a person wrote: parts joined by ``|``, escapes optional where nothing is ambiguous.

    Raises ValueError when the number of parts is not the number of join keys.
    """
    parts = text.split("|")
    if len(parts) != len(join_keys):
        raise ValueError(
            f"expected {len(join_keys)} part(s) for the join keys {', '.join(join_keys)}, separated by '|' ('|' in a value is written %7C), found {len(parts)}"
        )
    return "|".join(_escaped(_unescaped(part)) for part in parts).encode()


def key_parts(key: bytes) -> list[str]:
    """The texts of the join key values in an entity key, in the view's order."""
    return [_unescaped(part) for part in key.decode().split("|")]


def _escaped(text: str) -> str:
    for character, escape in ESCAPES:
        text = text.replace(character, escape)
    return text


def _unescaped(text: str) -> str:
    for character, escape in reversed(ESCAPES):
        text = text.replace(escape, character)
    return text
