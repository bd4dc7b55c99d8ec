"""``materialize push``: the rows of a file into a view's table, and online."""

from __future__ import annotations

import secrets
from datetime import datetime, timezone
from functools import partial
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from materialize.cli.options import DEFAULT_CONFIG, AsJson, ConfigDir, StoreName, Verbose, View
from materialize.cli.show import print_facts
from materialize.cli.targets import Options, Target, for_each, usage_error

if TYPE_CHECKING:
    from materialize.push import Where

__all__ = ["push"]

#: What of a report is for people.
SHOWN = ("view", "store", "to", "version", "rows", "written", "stale", "unchanged", "expired", "online_version")
ID_BYTES = 8


def push(
    view: View,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows as Parquet, NDJSON or CSV.")],
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    to: Annotated[str, typer.Option(metavar="both|offline", help="Table and store, or the table alone.")] = "both",
    push_id: Annotated[
        str | None, typer.Option("--push-id", help="Of these rows: pushed again with it, they are committed once.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Commit the rows of a file to the view's table, and bring them online at once."""
    if to not in {"both", "offline"}:
        usage_error(f"--to: found {to!r}, expected both or offline")
    where: Where = "offline" if to == "offline" else "both"
    work = partial(_push, file, where, push_id, [], as_json=as_json)
    for_each(Options(config, store, as_json, verbose), [view], work)


def _push(file: Path, to: Where, push_id: str | None, ids: list[str | None], target: Target, *, as_json: bool) -> None:
    """*ids*: of the push into the store before this one; with it, this one commits nothing more."""
    from materialize.cli.rows_file import read_rows
    from materialize.offline import open_table
    from materialize.pipeline import Run
    from materialize.push import push as pushed

    if ids and to == "offline":
        return  # the table has them
    if not ids:
        several = to == "both" and len(target.view.online_stores) > 1
        ids.append(push_id or (secrets.token_hex(ID_BYTES) if several else None))
    columns = open_table(target.view).columns
    rows = read_rows(file, {name: column.type for name, column in columns.items()})
    run_id = f"push-{secrets.token_hex(ID_BYTES)}"
    run = Run(target.store_name, run_id, lambda: datetime.now(timezone.utc))
    report = pushed(target.view, target.store, rows, run, to=to, push_id=ids[0])
    told = report.to_dict()
    if as_json:
        print_facts(told, as_json=True)
        return
    state = "online" if report.online else "online with the next run"
    shown = {name: told[name] for name in SHOWN if told[name] is not None}
    again = {"again": "committed before"} if report.again else {}
    print_facts(shown | again | {"state": state, "seconds": f"{report.seconds:.3f}"}, as_json=False)
