"""Every command, in the order of ``--help``; and the entry point."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

from materialize import metrics
from materialize.cli import pushing, rights, runs, state, upkeep
from materialize.cli.explain import explain
from materialize.cli.quarantine import quarantine
from materialize.cli.serve import serve
from materialize.stop import Stopped

__all__ = ["app", "main"]

app = typer.Typer(
    help="Move features from Delta Lake to the online store, exactly and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    runs.incremental,
    runs.rebuild,
    runs.backfill,
    runs.plan,
    pushing.push,
    state.setup,
    runs.bulk_load,
    rights.iam_policy,
    rights.acl,
    state.status,
    state.lookup,
    explain,
    serve,
    runs.verify,
    state.doctor,
    upkeep.forget,
    upkeep.release,
):
    app.command()(command)
app.add_typer(quarantine, name="quarantine")


@app.callback()
def every_command(
    metrics_dir: Annotated[
        Path | None,
        typer.Option(envvar=metrics.FOLDER_VARIABLE, help="Write Prometheus text files there (docs/metrics.md)."),
    ] = None,
) -> None:
    metrics.write_to(metrics_dir)


def main() -> None:
    """Run the command line; the console script ``materialize``."""
    # Nothing here does linear algebra, and the threads that numpy starts for it take a core for 50 ms.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # jemalloc, which polars has, else keeps freed pages resident until the machine is short of memory
    # (https://jemalloc.net/jemalloc.3.html#opt.muzzy_decay_ms). A load of a million rows takes 100 MB less and 4 % longer.
    os.environ.setdefault("_RJEM_MALLOC_CONF", "muzzy_decay_ms:0")
    # What is imported stays, and a run makes few objects: looking for garbage at Python's own pace took 0.3 s of a load of a million rows.
    gc.set_threshold(50_000, 20, 50)
    try:
        app(prog_name="materialize")
    except Stopped as stopped:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        # Not sys.exit, which waits for a read in the background: it can take minutes, and nobody wants its rows any more.
        metrics.flush()
        os._exit(128 + stopped.number)
    finally:
        metrics.flush()
