"""What a user types in, values out: the options that several commands have, and what their words mean."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from materialize.cli.targets import usage_error
from materialize.model import UNIT_SECONDS, Interval

__all__ = [
    "DEFAULT_CONFIG",
    "AsJson",
    "ConfigDir",
    "Force",
    "Keys",
    "MaxSpeed",
    "Moment",
    "StoreName",
    "Verbose",
    "View",
    "Views",
    "Wait",
    "interval",
    "seconds",
]

DEFAULT_CONFIG = Path("config")
Views = Annotated[list[str] | None, typer.Argument(metavar="[VIEW]...", help="Feature views; all of them by default.")]
View = Annotated[str, typer.Argument(metavar="VIEW", help="A feature view.")]
Keys = Annotated[
    list[str], typer.Argument(metavar="KEY...", help="Entity keys; a composite key as a|b, a '|' in a value as %7C.")
]
ConfigDir = Annotated[Path, typer.Option("--config", envvar="MATERIALIZE_CONFIG", help="The config folder.")]
StoreName = Annotated[str | None, typer.Option("--store", help="One online store; every store of a view by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per view and store on standard output.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="-v: log what is done; -vv: and tracebacks.")]
MaxSpeed = Annotated[bool, typer.Option("--max-speed", help="Do not hold back for readers of the store.")]
Force = Annotated[bool, typer.Option("--force", help="Do it although a check of source or store says no.")]
Wait = Annotated[str, typer.Option(metavar="5m", help="How long to wait for another run; not at all by default.")]
Moment = Annotated[str, typer.Option(metavar="TIME", help="An event time with its zone, such as 2025-01-01T00:00Z.")]


def seconds(text: str) -> float:
    """A duration such as ``5m``. Ends with exit code 2 for anything else."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text, flags=re.ASCII)
    if match is None:
        raise typer.BadParameter(f"found {text!r}, expected a duration such as 90s, 5m or 1h")
    return float(int(match[1]) * UNIT_SECONDS[match[2]])


def interval(start: str, end: str) -> Interval:
    """The event times [start, end). Ends with exit code 2 for times without a zone, or none at all."""
    moments = []
    for name, text in (("--start", start), ("--end", end)):
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not read the Z
        except ValueError:
            usage_error(f"{name}: found {text!r}, expected a time such as 2025-01-01T00:00Z")
        if moment.tzinfo is None:
            usage_error(f"{name}: found {text!r} without a time zone, expected one such as {text}Z")
        moments.append(moment)
    try:
        return Interval(*moments)
    except ValueError as error:
        usage_error(str(error))
