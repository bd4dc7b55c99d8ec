"""Commands of operators beside runs: ``materialize forget`` and ``materialize release``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from materialize.cli.options import DEFAULT_CONFIG, AsJson, ConfigDir, Keys, StoreName, Verbose, View
from materialize.cli.show import print_facts, print_json
from materialize.cli.targets import Options, Target, for_each, usage_error
from materialize.process import here, person

if TYPE_CHECKING:
    from typing import TextIO

__all__ = ["forget", "release"]


def forget(
    view: View,
    keys: Keys,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    receipt: Annotated[
        Path | None, typer.Option(help="Append the receipts to this file, one JSON object per line.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Erase entities online for good: no later run brings them back. Delete their rows in the Delta table first."""
    outcomes: dict[bytes, dict[str, str]] = {}
    with ExitStack() as stack:
        file = _opened(stack, receipt)
        try:
            for_each(Options(config, store, as_json, verbose), [view], partial(_forget, keys, outcomes))
        finally:
            for key, told in outcomes.items():
                _print_receipt(view, key, told, file, as_json=as_json)


def release(
    view: View,
    config: ConfigDir = DEFAULT_CONFIG,
    store: StoreName = None,
    *,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Free the view from a run that is dead, so that the next one need not wait until its lease is over."""
    for_each(Options(config, store, as_json, verbose), [view], partial(_release, as_json=as_json))


def _forget(keys: list[str], outcomes: dict[bytes, dict[str, str]], target: Target) -> None:
    from materialize import forget as forgetting
    from materialize.entity_key import parse_key
    from materialize.offline import erase

    try:
        entity_keys = [parse_key(key, target.view.join_keys) for key in keys]
    except ValueError as error:
        usage_error(str(error))
    for key in dict.fromkeys(entity_keys):
        told = outcomes.setdefault(key, {})
        told[target.store_name] = "not known to be erased"
        done = forgetting.forget(target.store, target.view.name, key)
        told[target.store_name] = f"{done}; its quarantined rows are not known to be erased"
        rows = erase(target.view, target.store_name, key)
        told[target.store_name] = f"{done}; quarantined rows: {rows:,}" if rows else done


def _opened(stack: ExitStack, path: Path | None) -> TextIO | None:
    """The file of receipts, opened before anything is erased."""
    try:
        return None if path is None else stack.enter_context(path.open("a", encoding="utf-8"))
    except OSError as error:
        usage_error(f"could not open the file of receipts: {error.strerror}: {path}. Nothing was erased")


def _print_receipt(view: str, key: bytes, outcomes: dict[str, str], file: TextIO | None, *, as_json: bool) -> None:
    from materialize.forget import receipt

    made = receipt(view, key, outcomes, when=datetime.now(timezone.utc), by=person(), host=here())
    if file is not None:
        file.write(json.dumps(made) + "\n")
    if as_json:
        print_json(made)
    else:
        stores = "; ".join(f"{store}: {outcome}" for store, outcome in outcomes.items())
        print_facts(made | {"stores": stores}, as_json=False)


def _release(target: Target, *, as_json: bool) -> None:
    from materialize.lease import free

    held = free(target.store, target.view.name)
    freed = "nobody held it" if held is None else f"freed from {held}"
    print_facts({**target.names, "lease": freed}, as_json=as_json)
