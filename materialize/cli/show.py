"""What commands print: results as text or JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from materialize.cli.terminal import output, talk
from materialize.json_value import json_value
from materialize.timings import told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.model import RunReport
    from materialize.serving import FeatureVector

__all__ = ["INTERNAL", "output", "print_facts", "print_json", "print_report", "print_table", "print_vector", "talk"]

#: Facts of a plan that are for machines.
INTERNAL = (
    "run_id",
    "watermark",
    "schema_id",
    "engine",
    "sweep",
    "force",
    "evidence",
    "positions",
    "repaired",
    "removed",
    "moved",
    "seconds",
    "rows_held",
)
#: The counters of a report that its line of text shows, in this order; quarantined rows get lines of their own.
SHOWN = ("rows_read", "entities", "written", "stale", "unchanged", "expired", "deleted", "quarantined")


def print_json(row: dict[str, Any]) -> None:
    """One JSON object on a line of its own, its values as `materialize.json_value` writes them."""
    print(json.dumps(json_value(row), allow_nan=False), flush=True)  # noqa: T201 - results go to standard output


def print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    """Named values, on one line."""
    if as_json:
        print_json(facts)
    else:
        shown = (f"{name}={value}" for name, value in facts.items() if value is not None)
        output.print("  ".join(shown), markup=False)


def print_table(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Rows with the same names."""
    if as_json:
        for row in rows:
            print_json(row)
    elif rows:
        from rich.table import Table  # noqa: PLC0415 - see cli/terminal.py

        table = Table(*rows[0])
        for row in rows:
            table.add_row(*("-" if value is None else str(value) for value in row.values()))
        output.print(table)


def print_report(report: RunReport, *, as_json: bool, verbose: bool = False) -> None:
    """What a run did; *verbose*: and where its seconds went."""
    if as_json:
        print_json(report.to_dict())
        return
    versions = f"to version {report.to_version}"
    if report.from_version is not None:
        versions = f"from version {report.from_version} {versions}"
    counts = ", ".join(f"{name} {report.counts[name]:,}" for name in SHOWN)
    held_back = f", held back {report.held_back:.2f} s" if report.held_back else ""
    rate = report.entities / report.seconds if report.seconds else 0
    output.print(
        f"{report.view} -> {report.store}: {report.mode} {versions}: {counts}, {report.seconds:.2f} s{held_back}, {rate:,.0f} entities/s",
        markup=False,
    )
    if verbose:
        talk.print(f"seconds: {told(report.timings)}")
    for reason, rows in report.quarantine_reasons.items():
        talk.print(f"warning: {report.view}: quarantined {rows:,} rows: {reason}", style="yellow", markup=False)


def print_vector(where: dict[str, str], key: str, vector: FeatureVector, *, as_json: bool) -> None:
    """The features of one entity."""
    event = None if vector.event_timestamp is None else vector.event_timestamp.isoformat()
    if as_json:
        print_json(
            {
                **where,
                "key": key,
                "status": vector.status,
                "event_timestamp": event,
                "table_version": vector.table_version,
                "features": vector.features if vector.status == "present" else {},
            }
        )
        return
    output.print(f"{key}: {vector.status}" + (f", event time {event}" if event else ""), markup=False)
    for name, value in vector.features.items() if vector.status == "present" else ():
        output.print(f"  {name} = {value!r}", markup=False)
