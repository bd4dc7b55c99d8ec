"""A command in, its run out: the id, how long it waits for another run of the view; and who that is."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Annotated

import typer

from materialize.model import UNIT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from materialize.cli.targets import Target
    from materialize.pipeline import Run

__all__ = ["Wait", "holder", "new_run", "seconds"]


Wait = Annotated[str, typer.Option(metavar="5m", help="How long to wait for another run; not at all by default.")]


def seconds(text: str) -> float:
    """A duration such as ``5m``. Ends with exit code 2 for anything else."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text, flags=re.ASCII)
    if match is None:
        raise typer.BadParameter(f"found {text!r}, expected a duration such as 90s, 5m or 1h")
    return float(int(match[1]) * UNIT_SECONDS[match[2]])


def new_run(
    target: Target,
    now: Callable[[], datetime],
    progress: Callable[[int], None],
    *,
    wait: float = 0.0,
    force: bool = False,
) -> Run:
    """A run of its own id."""
    from materialize.lease import Terms
    from materialize.pipeline import Run

    return Run(target.store_name, f"cli-{uuid.uuid4().hex[:12]}", now, progress, Terms(wait=wait), force)


def holder(target: Target) -> str | None:
    """The run that holds the view in the store now, for people; None: nobody."""
    from materialize.lease import current

    held = current(target.store, target.view.name)
    return None if held is None else str(held)
