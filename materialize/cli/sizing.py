"""What ``materialize plan --sizing`` asks and prints."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from materialize.cli.show import output, print_json, print_table

if TYPE_CHECKING:
    from materialize.cli.targets import Options, Target
    from materialize.sizing import SizingReport

__all__ = ["Asked", "ChangesPerDay", "Entities", "NodePrice", "ReadsPerSecond", "show_size"]

Entities = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Size it for so many; those of the table by default.")
]
ChangesPerDay = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Entities written in a day; measured from the log by default.")
]
ReadsPerSecond = Annotated[float, typer.Option(min=0, metavar="N", help="Reads of single entities.")]
NodePrice = Annotated[
    float | None, typer.Option(min=0, metavar="MONEY", help="Of one Redis server for a month, in the prices' currency.")
]
UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
#: Facts that are bytes and large.
BYTES = {
    "records",
    "hash_tables",
    "memory",
    "a_table_that_doubles",
    "backlog_and_clients",
    "empty_server",
    "maxmemory",
    "replica_buffer",
    "ram",
    "file",
    "rule_of_thumb",
}
#: How the comparison's table is headed.
HEADS = {"reads_per_second": "reads/s", "eventual": "DynamoDB a month, eventual", "strong": "strong"}
HEADS |= {"a_server_below": "Redis is cheaper below, each server", "cheaper": "cheaper"}


class Asked(NamedTuple):
    """The options of the command."""

    entities: int | None
    changes_per_day: int | None
    reads_per_second: float
    node_price: float | None


def show_size(options: Options, asked: Asked, target: Target) -> None:
    """Size one view in one store."""
    from materialize.config import load
    from materialize.sizing import Ask, size

    stores = load(options.config).online_stores
    own = stores[target.store_name].prices
    prices = own or next((one.prices for one in stores.values() if one.prices is not None), None)
    report = size(
        target.view, target.store, target.store_name, Ask(*asked, prices=prices), now=datetime.now(timezone.utc)
    )
    if options.as_json:
        print_json(report.to_dict())
    else:
        _print(report)


def _print(report: SizingReport) -> None:
    _line(f"{report.view} in {report.store}, by {report.sample:,} of its entities")
    _line(f"  entities: {report.entities:,} ({report.entities_are})")
    changes = "" if report.changes_per_day is None else f"{report.changes_per_day:,}, "
    _line(f"  changes a day: {changes}{report.changes_are}")
    _lines(report.measured, "  ")
    thumb = f"{_bytes(report.rule_of_thumb)} for {report.features} features x 16 B x 1.5"
    ratio = "" if report.of_rule_of_thumb is None else f"; measured is {report.of_rule_of_thumb:g} times that"
    _line(f"  rule of thumb: {thumb}{ratio}")
    rows = report.compared.get("dynamodb_month", [])
    _lines({name: value for name, value in report.compared.items() if name != "dynamodb_month"}, "  ")
    print_table([{HEADS[name]: value for name, value in row.items()} for row in rows], as_json=False)


def _lines(facts: dict[str, Any], indent: str) -> None:
    for name, value in facts.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            _line(f"{indent}{label}:")
            _lines(value, indent + "  ")
        elif value is not None:
            _line(f"{indent}{label}: {_text(name, value)}")


def _text(name: str, value: Any) -> str:
    if name in BYTES:
        return f"{value:,} bytes ({_bytes(value)})" if value >= UNITS[-1][0] else f"{value:,} bytes"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _bytes(value: float) -> str:
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f} B"


def _line(text: str) -> None:
    output.print(text, markup=False)
