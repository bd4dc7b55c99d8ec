"""The type of a feature: what YAML and stored schemas write in, how a record holds it out. Frozen values, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["FIXED_WIDTHS", "LIST_ITEMS", "MAX_PRECISION", "FeatureType"]

#: Feature types of one fixed size, with the bytes each takes in a record.
FIXED_WIDTHS = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float32": 4,
    "float64": 8,
    "date": 4,
    "timestamp": 8,
    "decimal": 16,
}
VARIABLE_KINDS = ("string", "binary")
#: What a list may hold: numbers of one fixed size, as embeddings and histograms do.
LIST_ITEMS = tuple(kind for kind in FIXED_WIDTHS if kind.startswith(("int", "uint", "float")))
#: The largest decimal precision of Delta and Arrow's decimal128.
MAX_PRECISION = 38


@dataclass(frozen=True, slots=True)
class FeatureType:
    """The type of one feature: ``float64``, ``decimal(18,2)``, ``list<float32>`` or ``list<float32,128>`` ...

    ``width`` is the number of bytes in the fixed section of a record, or None for a value in the variable section.
    """

    kind: str
    precision: int = 0
    scale: int = 0
    item: str = ""
    length: int | None = None

    @classmethod
    def parse(cls, text: str) -> FeatureType:
        """Read a type as it is written in YAML. Raises ValueError that lists what is allowed."""
        compact = text.replace(" ", "")
        if compact != "decimal" and (compact in FIXED_WIDTHS or compact in VARIABLE_KINDS):
            return cls(compact)
        if match := re.fullmatch(r"decimal\((\d+),(\d+)\)", compact):
            precision, scale = int(match[1]), int(match[2])
            if 1 <= precision <= MAX_PRECISION and scale <= precision:
                return cls("decimal", precision=precision, scale=scale)
        if match := re.fullmatch(r"list<(\w+)(?:,([1-9]\d*))?>", compact):
            if match[1] in LIST_ITEMS:
                return cls("list", item=match[1], length=int(match[2]) if match[2] else None)
        simple = ", ".join([*(kind for kind in FIXED_WIDTHS if kind != "decimal"), *VARIABLE_KINDS])
        raise ValueError(f"expected one of {simple}, decimal(P,S), list<NUMBER> or list<NUMBER,LENGTH>, found {text!r}")

    def __str__(self) -> str:
        if self.kind == "decimal":
            return f"decimal({self.precision},{self.scale})"
        if self.kind == "list":
            return f"list<{self.item}>" if self.length is None else f"list<{self.item},{self.length}>"
        return self.kind

    @property
    def width(self) -> int | None:
        if self.kind == "list":
            return None if self.length is None else FIXED_WIDTHS[self.item] * self.length
        return FIXED_WIDTHS.get(self.kind)
