"""What was measured, as data and as Markdown: rounds of measurements in, the tables of the README out."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from lake import Lake
    from servers import PipeLoad

__all__ = ["MIB", "Measured", "Round", "environment", "markdown", "where"]

MIB = 2**20
#: The aims of the figures, on one machine in one run.
AIM_OF_PIPE = 0.45
AIM_PEAK_BYTES = 1.5e9
AIM_TIMES_FEAST = 40
AIM_BYTES_PER_ENTITY = 600


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the product: the process from start to end, and what its report says."""

    wall_seconds: float
    report_seconds: float
    peak_bytes: int
    cpu_seconds: float
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Round:
    """One round of all measurements, close to each other in time."""

    first_load: Measured
    incremental: Measured
    all_stale: Measured
    pipe: PipeLoad
    pipe_over: PipeLoad
    bytes_per_entity: dict[str, float]


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Median and range, as ``4.40 (4.31-4.52)``."""
    if len(values) == 1:
        return form(values[0])
    return f"{form(statistics.median(values))} ({form(min(values))}-{form(max(values))})"


def seconds(value: float) -> str:
    return f"{value:.2f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def share(value: float) -> str:
    return f"{value:.1%}"


def processor() -> str:
    """The CPU model, from Linux where it is there."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def environment(server_name: str) -> dict[str, Any]:
    """The machine, the versions and the command: what a reader needs to judge and repeat the figures."""
    packages = ("polars", "deltalake", "pyarrow", "redis", "hiredis")
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "server": server_name,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def product_row(name: str, entities: int, measured: list[Measured], pipes: list[float]) -> str:
    """One row of the table; each ratio is of a run and the pipe load of the same round."""
    walls = [each.wall_seconds for each in measured]
    insides = [each.report_seconds for each in measured]
    cells = [
        name,
        spread(walls, seconds),
        spread(insides, seconds),
        count(entities / statistics.median(walls)),
        spread([pipe / wall for pipe, wall in zip(pipes, walls, strict=True)], share),
        spread([pipe / inside for pipe, inside in zip(pipes, insides, strict=True)], share),
        count(max(each.peak_bytes for each in measured) / MIB),
    ]
    return f"| {' | '.join(cells)} |"


def pipe_row(name: str, entities: int, pipes: list[float]) -> str:
    """The row of a limit."""
    return f"| {name} | {spread(pipes, seconds)} | - | {count(entities / statistics.median(pipes))} | 100% | 100% | - |"


def where(setting: dict[str, Any]) -> list[str]:
    """The command and the machine, as lines of Markdown."""
    packages = ", ".join(f"{name} {number}" for name, number in setting["packages"].items())
    machine = f"{setting['cpu']}, {setting['cores']} cores, {setting['memory_gib']} GiB, {setting['server']}"
    return [f"`{setting['command']}`", "", f"{machine}, Python {setting['python']}, {packages}."]


def markdown(setting: dict[str, Any], table: Lake, rounds: list[Round], feast: dict[str, Any] | None) -> str:
    """The figures as Markdown: where, what, how fast, and how far from the aims."""
    pipes = [each.pipe.seconds for each in rounds]
    over = [each.pipe_over.seconds for each in rounds]
    wall = statistics.median(each.first_load.wall_seconds for each in rounds)
    of_pipe = statistics.median(each.pipe.seconds / each.first_load.report_seconds for each in rounds)
    of_pipe_over = statistics.median(each.pipe_over.seconds / each.incremental.report_seconds for each in rounds)
    peak = max(each.incremental.peak_bytes for each in rounds)
    memory = {name: statistics.median(each.bytes_per_entity[name] for each in rounds) for name in ("dataset", "used")}
    sizes = f"{table.entities:,} entities x {table.features} float64, {table.rows_per_day:,} rows read per run"
    lines = [
        *where(setting),
        f"{sizes}; rounds: {len(rounds)}, median (min-max).",
        "",
        "| run | process, s | run, s | entities/s | process, of the pipe | run, of the pipe | peak MiB |",
        "|---|---|---|---|---|---|---|",
        pipe_row(f"{rounds[0].pipe.writer} of ready bytes, empty store", table.entities, pipes),
        product_row("incremental, empty store", table.entities, [each.first_load for each in rounds], pipes),
        pipe_row(f"{rounds[0].pipe.writer} of ready bytes, over every entity", table.entities, over),
        product_row("incremental, over every entity", table.entities, [each.incremental for each in rounds], over),
        product_row("backfill, all stale", table.entities, [each.all_stale for each in rounds], over),
    ]
    if feast:
        lines.append(
            f"| Feast {feast['feast']}, safe mode, {feast['entities']:,} entities | - | {feast['seconds']:.2f} "
            f"| {feast['entities_per_second']:,.0f} | - | - | {feast['peak_bytes'] / MIB:,.0f} |",
        )
    lines += [
        "",
        "| figure | measured | aim |",
        "|---|---|---|",
        f"| guarded incremental, of the pipe, empty store | {of_pipe:.1%} | at least {AIM_OF_PIPE:.0%} |",
        f"| guarded incremental, of the pipe, over every entity | {of_pipe_over:.1%} | - |",
        f"| peak memory of the guarded incremental | {peak / 1e9:.2f} GB | under {AIM_PEAK_BYTES / 1e9:.1f} GB |",
        f"| bytes per entity online, dataset | {memory['dataset']:.0f} | at most {AIM_BYTES_PER_ENTITY} |",
        f"| bytes per entity online, all used memory | {memory['used']:.0f} | - |",
    ]
    if feast:
        times = table.entities / wall / feast["entities_per_second"]
        lines.append(
            f"| guarded incremental, whole process, empty store, times Feast's safe mode | {times:.0f} | at least {AIM_TIMES_FEAST} |"
        )
        lines.append(f"| bytes per entity online, Feast (dataset) | {feast['bytes_per_entity']['dataset']:.0f} | - |")
    return "\n".join(lines) + "\n"
