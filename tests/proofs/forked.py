"""The command line in real processes that start in milliseconds: forked from one process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess
    from pathlib import Path

__all__ = ["ended", "start"]

#: What the commands import, also inside of functions. None of it may start a thread of its own that a fork would lose.
MODULES = [
    "polars",
    "deltalake",
    "pyarrow.parquet",
    "redis",
    "materialize.pipeline",
    "materialize.cli.commands",
    "materialize.config",
    "materialize.online.redis.store",
    "materialize.online.sqlite",
    "tests.proofs.forked",
]
SECONDS = 60.0


def command_line(arguments: list[str], config: str, talk: str) -> None:
    """In the child: what ``materialize ARGUMENTS`` does, its output in the file *talk*."""
    output = os.open(talk, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= {"MATERIALIZE_CONFIG": config, "NO_COLOR": "1"}
    sys.argv = ["materialize", *arguments]
    from materialize.cli import main

    main()


def start(config: Path, talk: Path, *arguments: str) -> ForkServerProcess:
    """A child that has begun; it is the caller's to wait for or to kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    process = context.Process(target=command_line, args=(list(arguments), str(config), str(talk)), daemon=True)
    process.start()
    return process


def ended(process: ForkServerProcess) -> int:
    """Its exit code; minus the number of the signal that killed it."""
    deadline = time.monotonic() + SECONDS
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"no end of process {process.pid} in {time.monotonic() - deadline + SECONDS:.0f} s")
    return process.exitcode
