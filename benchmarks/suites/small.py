"""Runs that have little to do: from the command line, start of Python and all, and in a process that is warm."""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lake
import render
import servers
from measure import HERE, Measured, Missing, Sample, Setting, Suite, WrongResult, materialize, measured, progress, turns

from suites import incremental

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROWS = 1_000
COLD, WARM = "command line", "warm process"
NOTHING, THOUSAND = "nothing new", f"{ROWS:,} new rows"
PASS, IMPORTS = "python -c pass", "the imports alone"
OPEN, BARE = "the table opened, one PING", f"the new file read, {ROWS:,} ready SETs by redis-py"
#: What such a run loads.
NEEDED = "import materialize.cli.runs, materialize.pipeline, materialize.config, materialize.online.redis.store"


@dataclass(frozen=True, slots=True)
class Point:
    entities: int
    files: int
    rounds: int
    warm_rounds: int


POINTS = {"tiny": Point(2_000, 10, 1, 2), "bench": Point(200_000, 20, 4, 20), "large": Point(1_000_000, 100, 10, 50)}


def measure(setting: Setting) -> Iterator[Sample | Missing]:
    point, kind = POINTS[setting.scale], "redis"
    try:
        servers.server_binary(kind)
    except SystemExit as missing:
        yield Missing(kind, f"{missing}; Valkey takes its place")
        kind = "valkey"
    of = f"a table of {point.entities:,} rows, {kind}"
    shape = incremental.Point(point.entities, point.files, 1, ())
    with (
        tempfile.TemporaryDirectory(prefix="small-", dir=setting.work) as made,
        servers.running_server(kind) as server,
    ):
        config, table = Path(made) / "config", Path(made) / "table"
        incremental.write_config(config, table, server.url)

        def run(expected: int) -> Measured:
            done = materialize("incremental", lake.VIEW, "--config", config)
            if done.found["written"] != expected:
                raise WrongResult(f"{of}: found {done.found['written']:,} entities written, expected {expected:,}")
            return done

        with incremental.commits(table, shape) as commit:
            run(point.entities)

            def thousand() -> Measured:
                told = commit("append", ROWS / point.entities)
                done = run(ROWS)
                incremental.check(f"{COLD}: {THOUSAND}", done.found, "append", ROWS, told["sample"], server)
                return done

            steps = (
                (PASS, 1, lambda: measured([sys.executable, "-c", "pass"])),
                (IMPORTS, 1, lambda: measured([sys.executable, "-c", NEEDED])),
                (NOTHING, 1, lambda: run(0)),
                (THOUSAND, ROWS, thousand),
            )
            for number in range(1, setting.rounds_or(point.rounds) + 1):
                for what, rows, step in turns(number, steps):
                    done = step()
                    progress(f"{COLD}, {what}: {done.seconds:.2f} s")
                    more = {"run_seconds": done.found["seconds"]} if done.found else {}
                    yield Sample(
                        case=f"{COLD}, {of}",
                        what=what,
                        round=number,
                        rows=rows,
                        seconds=done.seconds,
                        limit=IMPORTS,
                        cpu_seconds=done.cpu_seconds,
                        peak_bytes=done.peak_bytes,
                        more=more,
                    )
        command = [sys.executable, HERE / "small_runs.py", "--table", table, f"--entities={point.entities}"]
        command += [f"--port={server.port}", f"--rows={ROWS}", f"--rounds={point.warm_rounds}"]
        found = measured(command).found
        names = (
            ("nothing", NOTHING, 1, OPEN),
            ("open", OPEN, 1, OPEN),
            ("rows", THOUSAND, ROWS, BARE),
            ("bare", BARE, ROWS, BARE),
        )
        for name, what, rows, limit in names:
            progress(f"{WARM}, {what}: {statistics.median(found[name]):.3f} s")
            for number, seconds in enumerate(found[name], 1):
                yield Sample(f"{WARM}, {of}", what, number, rows, seconds, limit=limit)


def headlines(samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    lines = []
    for case, what, beside, aim in (
        (COLD, NOTHING, IMPORTS, "0.5 s"),
        (COLD, THOUSAND, IMPORTS, "1 s"),
        (WARM, NOTHING, OPEN, "0.1 s"),
        (WARM, THOUSAND, BARE, "-"),
    ):
        some = [each for each in samples if each.case.startswith(case)]
        if found := [each.seconds for each in some if each.what == what]:
            ratio = render.spread(render.ratios(some, what, beside, cost=True), render.times)
            lines.append((f"{case}, {what}", f"{render.spread(found, render.short)} s, {ratio} of {beside}", aim))
    return lines


def plots(samples: Sequence[Sample]) -> list[tuple[str, Callable[[Path], None]]]:
    names = dict.fromkeys((each.case.split(",")[0], each.what) for each in samples)
    middle = {
        f"{case}: {what}": statistics.median(
            each.seconds for each in samples if each.case.startswith(case) and each.what == what
        )
        for case, what in names
    }
    return [("seconds of small runs", partial(render.bars, middle, xlabel="seconds", log=True))]


SUITE = Suite(
    name="small",
    title="Small runs",
    about="""\
`materialize incremental` from start to exit, imports included, when nothing is new and after a commit of 1,000 rows, beside a Python that only imports
what such a run needs; and the same in a process that did it before, beside the least that could do it. Reads of the store are paced as they come, by default.""",
    columns=("rows", "seconds", "run_seconds", "cpu", "peak", "cost"),
    seconds={"tiny": 240, "bench": 180, "large": 600},
    measure=measure,
    headlines=headlines,
    plots=plots,
)
