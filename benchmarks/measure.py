"""What a suite of the report is made of: a command in, its wall time, CPU and peak memory out; and the samples that a suite gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "HERE",
    "MATERIALIZE",
    "MIB",
    "Measured",
    "Missing",
    "Sample",
    "Setting",
    "Suite",
    "WrongResult",
    "materialize",
    "measured",
    "progress",
    "turns",
]

HERE = Path(__file__).resolve().parent
MIB = 2**20
#: The command that is measured, beside this Python.
MATERIALIZE = Path(sys.executable).with_name("materialize")
#: Characters of a failed command's talk that are told.
TALK = 3_000


class WrongResult(SystemExit):
    """What was measured did something else than it was asked to; a figure of it would be worth nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One process from start to exit. ``found``: the JSON object in the last line of its output, if it is one."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    found: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of *what* in a *case*, in one *round*.

    ``rows`` were handled in ``seconds``. ``limit``: what of the same case and round no way can be faster than; ``ours``: what of the
    same case and round does the work of this peer. CPU is user and system time; both it and the peak memory are of the whole process.
    """

    case: str
    what: str
    round: int
    rows: int
    seconds: float
    limit: str | None = None
    ours: str | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


@dataclass(frozen=True, slots=True)
class Missing:
    """What could not be measured here, and why."""

    case: str
    why: str


@dataclass(frozen=True, slots=True)
class Setting:
    """What a suite is run with. ``work`` is a folder for tables; ``rounds`` None: as many as the suite has for each case.

    ``keep``: large tables stay in ``work`` after their last use.
    """

    scale: str
    seed: int
    work: Path
    rounds: int | None = None
    keep: bool = False

    def rounds_or(self, usual: int) -> int:
        return self.rounds or usual


@dataclass(frozen=True, slots=True)
class Suite:
    """One chapter of the report.

    ``measure`` yields samples as they are measured, so that a suite that is stopped keeps what it has. ``columns`` are names of
    `render.COLUMNS`. ``headlines``: from all samples, (what, found, aim) as text. ``plots``: from all samples, what the picture
    shows and what draws it to a file.
    """

    name: str
    title: str
    about: str
    columns: tuple[str, ...]
    seconds: dict[str, float]
    measure: Callable[[Setting], Iterator[Sample | Missing]]
    headlines: Callable[[Sequence[Sample]], list[tuple[str, str, str]]]
    plots: Callable[[Sequence[Sample]], list[tuple[str, Callable[[Path], None]]]]


def measured(command: Sequence[str | Path], *, environ: dict[str, str] | None = None, nice: int = 0) -> Measured:
    """Run *command* and measure exactly this child. Raises WrongResult when it fails.

    A child's peak memory on Linux starts with the most that its parent ever had: who measures memory imports and reads nothing large.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as talk:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=talk,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)} | (environ or {}),
            preexec_fn=(lambda: os.nice(nice)) if nice else None,  # type: ignore[arg-type,return-value]  # noqa: PLW1509 - one thread
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        talk.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
        if process.returncode != 0:
            told = ("\n".join(lines) + talk.read().decode(errors="replace"))[-TALK:]
            raise WrongResult(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{told}")
    return Measured(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        found=json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {},
    )


def materialize(*arguments: str | Path) -> Measured:
    """One run of the command line as a process of its own; ``found`` is its report."""
    return measured([MATERIALIZE, *arguments, "--json"])


def turns(number: int, steps: Sequence[Any]) -> list[Any]:
    """*steps* in the order of round *number*, from 1: every second round goes backwards, so that nobody gains by what the machine does meanwhile."""
    return list(steps) if number % 2 else list(reversed(steps))


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
