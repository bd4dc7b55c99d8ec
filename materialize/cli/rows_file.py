"""A file of rows in, the rows as `materialize.push` takes them out: Parquet as it is, text as values of the table's columns."""

from __future__ import annotations

import csv
import json
from contextlib import suppress
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from materialize.cli.targets import usage_error
from materialize.offline.log import partition_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = ["FORMATS", "read_rows"]

FORMATS = (".parquet", ".ndjson", ".jsonl", ".csv")
INTEGERS = ("byte", "short", "integer", "long")


def read_rows(path: Path, types: Mapping[str, str]) -> Any:
    """The rows in the file at *path*; *types*: of the table's columns, as Delta writes them.

    Text has times and dates in ISO 8601, binary values hexadecimal, NaN and the infinities by name; an empty field of CSV is null.
    What is no text of its column's type stays text, so that it is refused with the others, by its index. Ends with exit code 2 for
    a file that cannot be read.
    """
    if path.suffix not in FORMATS:
        usage_error(f"found the file {path.name!r}, expected one that ends with {', '.join(FORMATS)}")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        with path.open(encoding="utf-8", newline="") as file:
            rows: Iterable[Any] = _csv(file) if path.suffix == ".csv" else _ndjson(file)
            return [{name: _value(value, types.get(name, "string")) for name, value in row.items()} for row in rows]
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        # of other errors the text may be a row's
        told = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        usage_error(f"could not read the file {path}: {told}. Nothing was written")


def _csv(lines: Iterable[str]) -> Iterable[dict[str, str | None]]:
    for row in csv.DictReader(lines, strict=True):
        if None in row or None in row.values():  # more or fewer fields than the first line
            raise ValueError(f"found {len(row)} fields")
        yield {name: text or None for name, text in row.items()}


def _ndjson(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        if line.strip():
            row = json.loads(line, parse_float=Decimal)
            if not isinstance(row, dict):
                raise ValueError("found no JSON object")
            yield row


def _value(value: Any, kind: str) -> Any:
    """A value of JSON or CSV as one of a column of the type *kind*, as it is if it is none."""
    if isinstance(value, list) and kind.startswith("array<"):
        return [_value(item, kind.removeprefix("array<").removesuffix(">")) for item in value]
    if isinstance(value, Decimal) and not kind.startswith("decimal"):
        return float(value)
    parse = PARSERS.get("decimal" if kind.startswith("decimal") else kind)
    if isinstance(value, str) and parse is not None:
        with suppress(ValueError, ArithmeticError):
            return parse(value)
    return value


def _number(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """As *parse*, without the underscores that Python's numbers may have."""
    return lambda text: text if "_" in text else parse(text)


def _time(text: str) -> Any:
    return partition_value(text, "timestamp_ntz")  # with the zone that it has, or none


PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(INTEGERS, _number(int)),
    **dict.fromkeys(("float", "double"), _number(float)),
    **dict.fromkeys(("timestamp", "timestamp_ntz"), _time),
    "decimal": _number(Decimal),
    "date": date.fromisoformat,
    "boolean": lambda text: {"true": True, "false": False}.get(text.lower(), text),
    "binary": bytes.fromhex,
}
