"""The latest row per entity: the product's two passes beside reading every column, and beside duckdb, polars, pandas and Spark."""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import feast_materialize
import lake
import render
from measure import HERE, Missing, Sample, Setting, Suite, WrongResult, measured, progress, turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

OURS, READ = "two passes", "every row and column read (polars)"
WAYS = {
    "ours": OURS,
    "read": READ,
    "polars_sorted": "polars, sort and unique",
    "polars_max_by": "polars, group_by and max_by",
    "duckdb": "duckdb, QUALIFY row_number() = 1",
    "pandas": "pandas, sort_values and drop_duplicates",
    "spark": "Spark, row_number() = 1",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A table; the ways that it is given to, and those of them that take so long that they have a turn in the first round only."""

    entities: int
    rows_per_entity: int
    features: int
    rounds: int
    ways: tuple[str, ...] = tuple(WAYS)
    once: tuple[str, ...] = ()


SMALL = ("ours", "read", "polars_sorted", "polars_max_by", "duckdb", "pandas")
POINTS = {
    "tiny": (Point(1_000, 2, 10, 1, ("ours", "read", "polars_sorted", "duckdb")),),
    "bench": (Point(200_000, 3, 50, 3, once=("spark",)),),
    "large": (
        Point(1_000_000, 3, 10, 3),
        Point(1_000_000, 3, 50, 3),
        Point(1_000_000, 1, 200, 2, SMALL),
        Point(5_000_000, 1, 10, 2, SMALL),
    ),
}


def python_of(way: str) -> tuple[Path | str, str]:
    """The Python of a *way*, and why there is none: pandas may be had from Feast's environment alone."""
    if way != "pandas" or importlib.util.find_spec("pandas"):
        return sys.executable, ""
    try:
        return feast_materialize.feast_python(), ""
    except (OSError, subprocess.CalledProcessError) as error:
        return "", f"not installed, and Feast's environment, which has it, could not be made: {error}"


def lacking(way: str) -> str:
    """Why a *way* cannot be measured here."""
    if way == "spark":
        programs = [name for name in ("java", "javac", "mvn") if shutil.which(name) is None]
        return f"no {' and no '.join(programs)} on PATH" if programs else ""
    return python_of(way)[1]


def measure(setting: Setting) -> Iterator[Sample | Missing]:
    left_out = set(WAYS) - {way for point in POINTS[setting.scale] for way in point.ways}
    for way in sorted(left_out):
        yield Missing(WAYS[way], f"not at the size {setting.scale!r}")
    for point in POINTS[setting.scale]:
        ways = []
        for way in point.ways:
            if why := lacking(way):
                yield Missing(WAYS[way], why)
            else:
                ways.append(way)
        yield from measure_point(point, ways, setting)


def measure_point(point: Point, ways: Sequence[str], setting: Setting) -> Iterator[Sample | Missing]:
    """Each way once a round, in turns. Raises WrongResult where two do not give the same rows."""
    sizes = {"entities": point.entities, "rows_per_entity": point.rows_per_entity, "features": point.features}
    table = lake.generated(setting.work, **sizes, kind="float64", seed=setting.seed)
    lake.show_second_day(table)
    rows = 2 * table.rows_per_day
    case = f"{rows:,} rows of {point.entities:,} entities x {point.features} float64"
    digests: dict[str, str] = {}
    for number in range(1, setting.rounds_or(point.rounds) + 1):
        progress(f"{case}: round {number}")
        for way in turns(number, ways):
            if number > 1 and way in point.once:
                continue
            command = [python_of(way)[0], HERE / "latest_contenders.py", way, "--table", table.table]
            try:
                found = measured([*command, "--features", str(point.features)]).found
            except WrongResult as wrong:
                if way == "ours":
                    raise
                yield Missing(f"{case}: {WAYS[way]}", f"it failed: {str(wrong).strip().splitlines()[-1][:300]}")
                continue
            progress(f"  {WAYS[way]}: {found['seconds']:.2f} s")
            if way != "read":
                digests[way] = found["digest"]
                if found["rows"] != point.entities:
                    raise WrongResult(f"{case}: {WAYS[way]}: found {found['rows']:,} rows, expected {point.entities:,}")
            yield Sample(
                case=case,
                what=WAYS[way],
                round=number,
                rows=rows,
                seconds=found["seconds"],
                limit=READ,
                ours=None if way in {"ours", "read"} else OURS,
                cpu_seconds=found["cpu_seconds"],
                peak_bytes=found["peak_bytes"],
            )
        if len(set(digests.values())) != 1:
            raise WrongResult(f"{case}: the ways do not agree about the latest rows: {digests}")


def headlines(samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    """Of the last table."""
    if not samples:
        return []
    some = [each for each in samples if each.case == samples[-1].case]
    lines = []
    if found := render.ratios(some, OURS, READ, cost=True):
        lines.append(
            (
                f"latest per entity, time of reading every column ({some[0].case})",
                render.spread(found, render.times),
                "1.5 x",
            )
        )
    found = {what: render.ratios(some, OURS, what) for what in WAYS.values() if what not in {OURS, READ}}
    return lines + [
        (f"latest per entity, times the speed of {what}", render.spread(ratios, render.times), "-")
        for what, ratios in found.items()
        if ratios
    ]


def plots(samples: Sequence[Sample]) -> list[tuple[str, Callable[[Path], None]]]:
    some = [each for each in samples if each.case == samples[-1].case]
    whats = dict.fromkeys(each.what for each in some)
    seconds = {what: statistics.median(each.seconds for each in some if each.what == what) for what in whats}
    return [("seconds to the latest row per entity", partial(render.bars, seconds, xlabel="seconds"))]


SUITE = Suite(
    name="latest",
    title="Latest row per entity",
    about="""\
From the files of a Delta table to the latest row of each entity in memory, all columns. *Two passes* is what a run does: keys and times of all
rows, then the features of the winners. Each way is a process of its own, timed after its imports (Spark: after its session has answered, with
the result cached in its memory); files are in the page cache for all. All must give the same rows, bit for bit. CPU and memory of Spark, which
works in another process, are not told.""",
    columns=("rows", "seconds", "rate", "cpu", "peak", "cost", "ours"),
    seconds={"tiny": 240, "bench": 360, "large": 3600},
    measure=measure,
    headlines=headlines,
    plots=plots,
)
