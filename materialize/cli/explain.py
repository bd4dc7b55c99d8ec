"""``materialize explain``: why readers get what they get for one entity."""

from __future__ import annotations

from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from materialize.cli.options import DEFAULT_CONFIG, AsJson, ConfigDir, StoreName, Verbose, View
from materialize.cli.show import output, print_json
from materialize.cli.targets import Options, Target, for_each, usage_error

if TYPE_CHECKING:
    from materialize.explain import Explanation

__all__ = ["explain"]


def explain(
    view: View,
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="An entity key; a composite key as a|b, a '|' in a value as %7C.")
    ],
    feature: Annotated[str | None, typer.Option(metavar="NAME", help="One feature; all by default.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table that are shown, newest first.")] = 20,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Say why an entity has its values online: commit, file, run, order, and what became of its other rows. Changes nothing."""
    options = Options(config, store, as_json, verbose)
    for_each(options, [view], partial(_explain, key, feature, rows, as_json=as_json))


def _explain(key: str, feature: str | None, rows: int, target: Target, *, as_json: bool) -> None:
    from materialize import explain as explaining
    from materialize.entity_key import parse_key

    try:
        entity = parse_key(key, target.view.join_keys)
        found = explaining.explain(
            target.view,
            target.store,
            target.store_name,
            entity,
            now=datetime.now(timezone.utc),
            feature=feature,
            most=rows,
        )
    except ValueError as error:
        usage_error(str(error))
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, key)


def _print(found: Explanation, key: str) -> None:
    _line(f"{found.view} in {found.store}, {key}: {found.status}")
    for name, value in found.features.items():
        _line(f"  {name} = {value!r}")
    _facts("record", found.record)
    _facts("commit of its version", found.commit)
    _facts("brought by", found.brought_by)
    _facts("watermark", found.watermark)
    _line(
        f"  table: version {found.table_version}, {len(found.rows) + found.more_rows:,} rows of this entity, newest first"
    )
    for row in found.rows:
        _line(f"    {_told(row)}")
    if found.more_rows:
        _line(f"  and {found.more_rows:,} more rows: --rows shows them")
    if found.quarantined:
        _line("  in quarantine:")
        for one in found.quarantined:
            met = f"run {one['run_id']}, {_text(one['at'])}, commit {_text(one['commit_version'])}"
            _line(f"    {one['reason']}: event {_text(one['event_timestamp'])}, met by {met}")
    for note in found.notes:
        _line(f"  note: {note}")
    if found.disagrees is not None:
        _line(f"  online and offline DISAGREE: {found.disagrees}")
    if found.next is not None:
        _line(f"  run: {found.next}")


def _facts(title: str, facts: dict[str, Any] | None) -> None:
    if facts is not None:
        _line(f"  {title}:")
        for name, value in facts.items():
            if value is not None:
                _line(f"    {name.replace('_', ' ')}: {_text(value)}")


def _told(row: dict[str, Any]) -> str:
    """A row of the table in a line; its values where one feature was asked for."""
    values = "".join(f", {name}={value!r}" for name, value in row["features"].items() if len(row["features"]) == 1)
    commit = "an unknown commit" if row["commit"] is None else f"commit {row['commit']}"
    times = f"event {_text(row['event_time'])}, created {_text(row['created_time'])}"
    return f"{row['verdict']}: {times}, {commit}{values}, {row['file']}"


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    return "-" if value is None else str(value)


def _line(text: str) -> None:
    output.print(text, markup=False)
