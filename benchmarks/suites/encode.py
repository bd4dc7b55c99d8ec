"""Rows to records and back on one core: rows and bytes a second, beside what numpy and struct can do at best."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import render
from measure import HERE, Missing, Sample, Setting, Suite, measured, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

ENCODE, MATRIX, DECODE = "encode", "decode to a matrix", "decode to dicts, one by one"
#: Way of `codec_contenders.py` -> what, its limit, and ours that it stands beside.
WAYS = {
    "encode": (ENCODE, "columns to rows by numpy, no header", None),
    "columns to rows": ("columns to rows by numpy, no header", "columns to rows by numpy, no header", None),
    "struct.pack": ("struct.pack row by row, no header", "columns to rows by numpy, no header", ENCODE),
    "entity keys": ("entity keys", None, None),
    "decode": (DECODE, "struct.unpack alone", None),
    "decode matrix": (MATRIX, "records joined, seen by numpy", None),
    "viewed": ("records joined, seen by numpy", "records joined, seen by numpy", None),
    "struct.unpack": ("struct.unpack alone", "struct.unpack alone", None),
    "hash fields": ("a hash's fields by struct, one by one", "struct.unpack alone", DECODE),
}


@dataclass(frozen=True, slots=True)
class Point:
    rows: int
    features: int
    kind: str
    rounds: int = 5


POINTS = {
    "tiny": (Point(1_000, 10, "mixed", 2),),
    "bench": (Point(100_000, 50, "float64"), Point(50_000, 50, "mixed")),
    "large": tuple(
        Point(rows, features, kind)
        for features, rows in ((10, 1_000_000), (50, 500_000), (200, 100_000))
        for kind in ("float64", "mixed")
    ),
}


def measure(setting: Setting) -> Iterator[Sample | Missing]:
    for point in POINTS[setting.scale]:
        case = f"{point.rows:,} rows x {point.features} {point.kind}, one core"
        command = [sys.executable, HERE / "codec_contenders.py", f"--rows={point.rows}", f"--features={point.features}"]
        command += [f"--kind={point.kind}", f"--rounds={setting.rounds_or(point.rounds)}", f"--seed={setting.seed}"]
        done = measured(command, environ={"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"})
        progress(f"{case}: {done.seconds:.0f} s in all")
        width = done.found["bytes"] / done.found["records"]
        for way, rounds in done.found["ways"].items():
            what, limit, ours = WAYS[way]
            rows = done.found["rows"][way]
            for number, each in enumerate(rounds, 1):
                more = {} if way == "entity keys" else {"megabytes_per_second": rows * width / each["seconds"] / 1e6}
                yield Sample(case, what, number, rows, each["seconds"], limit, ours, each["cpu_seconds"], more=more)


def headlines(samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    """Of 50 floats, the table of the aims, or of what there is."""
    if not samples:
        return []
    chosen = next((each.case for each in samples if "x 50 float64" in each.case), samples[0].case)
    some = [each for each in samples if each.case == chosen]
    rate = statistics.median(each.rate for each in some if each.what == ENCODE)
    limit = WAYS["encode"][1]
    return [
        (f"encode, one core ({chosen})", f"{rate / 1e6:.2f} M rows/s", "3 M rows/s"),
        (f"encode, of the speed of {limit}", render.spread(render.ratios(some, ENCODE, str(limit)), render.share), "-"),
        (
            "encode, times the speed of struct.pack",
            render.spread(render.ratios(some, ENCODE, WAYS["struct.pack"][0]), render.times),
            "-",
        ),
    ]


def plots(samples: Sequence[Sample]) -> list[tuple[str, Callable[[Path], None]]]:
    some = [each for each in samples if each.case == samples[0].case]
    rates = {
        what: statistics.median(each.rate for each in some if each.what == what)
        for what in dict.fromkeys(each.what for each in some)
    }
    return [(f"rows a second: {samples[0].case}", partial(render.bars, rates, xlabel="rows/s", log=True))]


SUITE = Suite(
    name="encode",
    title="Encode and decode",
    about="""\
`codec.encode` in the batches of a run, and the decoder, in one process that is held to one core. The limit of encoding is numpy turning as many
float64 columns into rows, without headers, nulls and strings; the limit of decoding is `struct.unpack` of the fixed part to tuples, without nulls,
strings and names, and of a matrix numpy that joins the records and looks at them. MB are of records. Before anything is timed all records must hold the rows, by a decoder of its own.""",
    columns=("rows", "seconds", "rate", "megabytes", "cpu", "of_limit", "ours"),
    seconds={"tiny": 240, "bench": 120, "large": 1200},
    measure=measure,
    headlines=headlines,
    plots=plots,
)
