"""Values of Python in, what JSON has for them out: for the command line and for HTTP, so that both write the same."""

from __future__ import annotations

import math
from datetime import date, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.feature_type import FeatureType

__all__ = ["json_value", "json_writer"]

#: Types whose values need not fit a float64, which is the only number that JavaScript and many other readers of JSON have.
WIDE = ("int64", "uint64")
#: Types whose values JSON has as they are: a float only where it is finite.
AS_IT_IS = frozenset({"bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64", "string"})


def json_value(value: Any) -> Any:
    """*value* as what JSON has.

    Bytes are hexadecimal text, times ISO format, decimals text with all digits; so are ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which JSON has no numbers for (the convention of Protocol Buffers).
    """
    if isinstance(value, dict):
        return {name: json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | time):
        return value.isoformat()
    if value is None or isinstance(value, str | int | float):
        return value
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def json_writer(kind: FeatureType) -> Callable[[Any], Any] | None:
    """What makes of a feature's values, nulls apart, what readers take exactly whose numbers are all float64; None where they are that.

    As `json_value`, and 64-bit integers are text, each of them: what a reader gets depends on the feature's type and never on how
    great a value is today. Floats that are not finite are left to `json_value`.
    """
    if kind.kind in AS_IT_IS:
        return None
    if kind.kind == "list":
        return (lambda values: [str(value) for value in values]) if kind.item in WIDE else json_value
    return str if kind.kind in WIDE else json_value
