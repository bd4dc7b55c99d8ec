"""A gate against slowness: instructions and ratios of encode, decode, winners and plan in, a table out; exit code 1 where one is above its budget.

Instructions are those of Python that our own code executes, counted one by one: the same in every run, on every machine, and about the same
in every version of Python. Those per row say exactly whether there is a loop over rows. Ratios are CPU time beside that of a yardstick which
does the same kind of work on the same data, in turns in this process. Nothing is compared with seconds.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import operator
import os
import struct
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["POLARS_MAX_THREADS"] = "1"  # before polars counts the cores

import numpy as np
import polars as pl
from deltalake import write_deltalake

import materialize
from materialize import codec, latest, pipeline
from materialize.decoder import Decoder
from materialize.feature_type import FeatureType
from materialize.model import FeatureView
from materialize.online.base import HEADER
from materialize.online.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

#: The most that each check may find; what it found when this was written is beside it, on Python 3.11. A budget is about one and a half
#: times that, and a loop over rows costs 3 instructions a row or more. ``python benchmarks/gate.py --measure`` prints this table anew.
BUDGETS = {
    # instructions: of each row, record or commit more; and of one call
    "encode: a row more": 1,  # 0.38: columns are laid out in blocks of 2,048 rows
    "encode: 1,000 rows": 11_000,  # 7,412
    "encode, texts and nulls: a row more": 1,  # 0.36
    "encode, texts and nulls: 1,000 rows": 23_000,  # 15,310
    "entity keys: a row more": 0,
    "decode: a record": 105,  # 71
    "decode: a feature more": 0,
    "decode to a matrix: a row more": 0,
    "winners: a row more": 0,
    "winners: 1,000 rows": 670,  # 450
    "plan: a commit more": 870,  # 581
    # CPU time, in times that of the yardstick
    "encode, times numpy turning its columns": 3.0,  # 1.5 to 1.9
    "encode, texts and nulls, times the same": 13.0,  # 6.4 to 8.8
    "decode, times struct.unpack": 12.0,  # 5.7 to 6.8
    "decode to a matrix, times numpy joining": 4.2,  # 2.0 to 2.3
    "winners, times a sort of their rows": 3.4,  # 1.7 to 1.9
}

PACKAGE = str(Path(materialize.__file__).parent)
#: Rows; the most are for winners, whose shape at a few thousand is another.
FEW, MANY, MOST = 1_000, 20_000, 200_000
#: Commits to plan over.
SHORT, LONG = 10, 200
FEATURES = 50
#: Turns of a ratio, of which the quickest count; and how often it may be taken anew where a busy machine made it too large.
ROUNDS, FEWEST, TRIES = 15, 4, 3
#: Seconds of one turn, at least, and of all about, at most.
TURN, SECONDS = 0.004, 0.6
NOW = datetime(2025, 3, 2, tzinfo=timezone.utc)
NOW_US = int(NOW.timestamp()) * 1_000_000
KEY_BYTES = 1_024


@dataclass(frozen=True, slots=True)
class Check:
    """``measure``: what is found, and what it is made of, for people. ``closer``: the command that looks closer."""

    name: str
    measure: Callable[[], tuple[float, str]]
    closer: str


def instructions(work: Callable[[], Any]) -> dict[CodeType, int]:
    """How many Python instructions each function of the package executes while *work* runs, also in threads that it starts."""
    # No other thread can get between the steps of such a count.
    counts: defaultdict[CodeType, Iterator[int]] = defaultdict(itertools.count)

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            next(counts[frame.f_code])
        return step

    def call(frame: FrameType, _: str, __: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    work()  # what is imported and remembered at the first time is not of interest
    threading.settrace(call)
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return {code: next(count) for code, count in counts.items()}


def once(work: Callable[[], Any]) -> tuple[float, str]:
    """The instructions of one call."""
    counts = instructions(work)
    return float(sum(counts.values())), most(counts, 1)


def growth(few: Callable[[], Any], many: Callable[[], Any], more: int) -> tuple[float, str]:
    """The instructions that *many* takes above *few*, for each of the *more* things that it handles."""
    before, after = instructions(few), instructions(many)
    grown = {code: count - before.get(code, 0) for code, count in after.items()}
    return sum(grown.values()) / more, most(grown, more)


def most(counts: dict[CodeType, int], things: int) -> str:
    """The functions with the most of it."""
    ranked = sorted(counts.items(), key=lambda part: part[1], reverse=True)[:3]
    return "most in " + ", ".join(
        f"{Path(code.co_filename).relative_to(PACKAGE)}, {code.co_name} ({count / things:,.4g})"
        for code, count in ranked
    )


def ratio(work: Callable[[], Any], yardstick: Callable[[], Any], what: str) -> tuple[float, str]:
    """The CPU time of *work*, in times that of the *yardstick*: their quickest of many turns, one after the other."""
    pair = (work, yardstick)
    first = [cpu_seconds(each, 1) for each in pair]
    times = [max(1, int(TURN / seconds)) for seconds in first]
    turns = max(FEWEST, min(ROUNDS, int(SECONDS / sum(map(operator.mul, first, times)))))
    best = [float("inf")] * 2
    gc.collect()
    gc.disable()
    try:
        for number in range(turns):
            for which in (0, 1) if number % 2 else (1, 0):
                best[which] = min(best[which], cpu_seconds(pair[which], times[which]))
    finally:
        gc.enable()
    return best[0] / best[1], f"{best[0] * 1e3:.2f} ms of CPU beside {best[1] * 1e3:.2f} ms: {what}"


def cpu_seconds(work: Callable[[], Any], times: int) -> float:
    """Of one call, from so many."""
    begin = time.process_time()
    for _ in range(times):
        work()
    return max((time.process_time() - begin) / times, 1e-6)


# --- what is measured --------------------------------------------------------------------------------------------------


class Rows:
    """So many rows with *features*, as a run has them when it encodes; and their records."""

    def __init__(self, kinds: dict[str, str], rows: int) -> None:
        rng = np.random.default_rng(7)
        types = {name: FeatureType(kind) for name, kind in kinds.items()}
        self.view = FeatureView("gate", "", ("user_id",), "event_timestamp", types, ("default",))
        self.features = pl.DataFrame({name: values(rng, kind, rows) for name, kind in kinds.items()})
        event_us = NOW_US - rng.integers(1, 10**9, rows)
        self.order = pl.DataFrame({"event_us": event_us, "created_us": event_us + 1, "version": np.full(rows, 2**40)})
        self.ids = pl.DataFrame({"user_id": np.arange(rows)}).with_columns(pl.col("user_id").cast(pl.String))
        self.keys = codec.entity_keys(self.ids, ("user_id",))
        self.records: list[bytes] = self.encoded().values.to_pylist()
        self.decoder = Decoder(types)
        self.numbers = [self.features[name].to_numpy() for name, kind in kinds.items() if kind == "float64"]
        self.layout = struct.Struct(f"<{len(kinds)}d")

    def encoded(self) -> Any:
        return codec.encode(self.keys, self.order, self.features, self.view, schema_id=1)

    def decoded(self) -> None:
        decode = self.decoder.decode
        for record in self.records:
            decode(record)

    def unpacked(self) -> None:
        unpack = self.layout.unpack_from
        for record in self.records:
            unpack(record, HEADER.size)

    def matrix(self) -> Any:
        return self.decoder.numbers(self.records, list(self.view.features), nulls=False)

    def viewed(self) -> Any:
        joined = np.frombuffer(b"".join(self.records), dtype=np.uint8).reshape(len(self.records), -1)
        return np.ascontiguousarray(joined[:, HEADER.size :]).view("<f8")

    def turned(self) -> Any:
        """Columns to rows, 2,048 at a time, which stay in the processor's cache."""
        found = np.empty((len(self.numbers[0]), len(self.numbers)))
        for low in range(0, len(found), 2_048):
            for index, column in enumerate(self.numbers):
                found[low : low + 2_048, index] = column[low : low + 2_048]
        return found


def values(rng: np.random.Generator, kind: str, rows: int) -> pl.Series:
    """A tenth of the texts are null."""
    if kind == "float64":
        return pl.Series(rng.standard_normal(rows))
    if kind == "int64":
        return pl.Series(rng.integers(-(2**62), 2**62, rows))
    words = pl.Series([f"größe-{number:03d}" for number in range(1_000)])[rng.integers(0, 1_000, rows)]
    return pl.select(pl.when(pl.Series(rng.random(rows) > 0.1)).then(words)).to_series()


class Candidates:
    """So many rows of a third as many entities, as the first pass reads them."""

    keys = ("user_id",)

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(7)
        event_us = NOW_US - rng.integers(1, 10**9, rows)
        self.view = FeatureView("gate", "", self.keys, "event_timestamp", {"a": FeatureType("float64")}, ("default",))
        self.frame = pl.DataFrame(
            {
                "user_id": rng.integers(0, rows // 3, rows),
                "event_us": event_us,
                "created_us": event_us + 1,
                "version": np.full(rows, 7),
                "position": np.arange(rows),
            }
        )

    def winners(self) -> pl.DataFrame:
        valid, _ = latest.valid_rows(self.frame, self.view, now=NOW, max_key_bytes=KEY_BYTES)
        return latest.newest(valid, self.keys)

    def sorted(self) -> pl.DataFrame:
        return self.frame.sort("event_us", "created_us", "version", "position")


class Commits:
    """A table with so many commits of one file each after the one that a store has; the files of all but the first are not there."""

    def __init__(self, folder: Path, commits: int) -> None:
        made = pl.DataFrame({"user_id": ["a"], "event_timestamp": [NOW], "a": [1.0]})
        self.log = folder / "_delta_log"
        write_deltalake(str(folder), made.to_arrow())
        types = {"a": FeatureType("float64")}
        self.view = FeatureView("gate", str(folder), ("user_id",), "event_timestamp", types, ("default",))
        self.store, self.commits = MemoryStore(), commits
        pipeline.incremental(self.view, self.store, pipeline.Run("default", "first", lambda: NOW))
        actions = [json.loads(line) for line in self._file(0).read_text().splitlines()]
        add = next(action["add"] for action in actions if "add" in action)
        for version in range(1, commits + 1):
            info = {"commitInfo": {"timestamp": NOW_US // 1_000, "operation": "WRITE"}}
            one = {"add": {**add, "path": f"part-{version}.parquet"}}
            self._file(version).write_text(json.dumps(info) + "\n" + json.dumps(one) + "\n")

    def _file(self, version: int) -> Path:
        return self.log / f"{version:020d}.json"

    def planned(self) -> None:
        plan = pipeline.make_plan(self.view, self.store, mode="incremental", store_name="default", run_id="gate")
        if (plan.from_version, plan.to_version, plan.rows) != (0, self.commits, self.commits):
            raise SystemExit(f"planned {plan}, expected {self.commits} commits of a row")


def checks(folder: Path) -> list[Check]:
    """Every check, its data made."""
    floats = {f"f{number}": "float64" for number in range(FEATURES)}
    mixed = floats | {"text": "string", "word": "string", "number": "int64"}
    encode = "make bench SUITES=encode"
    few, many = Rows(floats, FEW), Rows(floats, MANY)
    mixed_few, mixed_many = Rows(mixed, FEW), Rows(mixed, MANY)
    narrow = Rows({"f0": "float64"}, FEW)
    candidates, more, most_rows = (Candidates(rows) for rows in (FEW, MANY, MOST))
    short, long = Commits(folder / "short", SHORT), Commits(folder / "long", LONG)
    wide, rows = FEATURES - 1, MANY - FEW
    key_few, key_many = (partial(codec.entity_keys, each.ids, ("user_id",)) for each in (few, many))
    return [
        Check("encode: a row more", partial(growth, few.encoded, many.encoded, rows), encode),
        Check("encode: 1,000 rows", partial(once, few.encoded), encode),
        Check(
            "encode, texts and nulls: a row more", partial(growth, mixed_few.encoded, mixed_many.encoded, rows), encode
        ),
        Check("encode, texts and nulls: 1,000 rows", partial(once, mixed_few.encoded), encode),
        Check("entity keys: a row more", partial(growth, key_few, key_many, rows), encode),
        Check("decode: a record", partial(once, partial(few.decoder.decode, few.records[0])), encode),
        Check(
            "decode: a feature more",
            partial(
                growth,
                partial(narrow.decoder.decode, narrow.records[0]),
                partial(few.decoder.decode, few.records[0]),
                wide,
            ),
            encode,
        ),
        Check("decode to a matrix: a row more", partial(growth, few.matrix, many.matrix, rows), encode),
        Check(
            "winners: a row more", partial(growth, candidates.winners, more.winners, rows), "make bench SUITES=latest"
        ),
        Check("winners: 1,000 rows", partial(once, candidates.winners), "make bench SUITES=latest"),
        Check(
            "plan: a commit more",
            partial(growth, short.planned, long.planned, LONG - SHORT),
            "python benchmarks/changes.py",
        ),
        Check(
            "encode, times numpy turning its columns", partial(ratio, many.encoded, many.turned, "codec.encode"), encode
        ),
        Check(
            "encode, texts and nulls, times the same",
            partial(ratio, mixed_many.encoded, mixed_many.turned, "codec.encode"),
            encode,
        ),
        Check("decode, times struct.unpack", partial(ratio, few.decoded, few.unpacked, "Decoder.decode"), encode),
        Check(
            "decode to a matrix, times numpy joining",
            partial(ratio, many.matrix, many.viewed, "Decoder.numbers"),
            encode,
        ),
        Check(
            "winners, times a sort of their rows",
            partial(ratio, most_rows.winners, most_rows.sorted, "latest.valid_rows and latest.newest"),
            "make bench SUITES=latest",
        ),
    ]


def passed(check: Check) -> tuple[bool, float, str]:
    """Whether it is within its budget, what was found and what that is made of. What depends on the machine has more than one try."""
    budget, found, parts = BUDGETS[check.name], float("inf"), ""
    for _ in range(TRIES):
        again, told = check.measure()
        if again < found:
            found, parts = again, told
        if found <= budget or "CPU" not in parts:
            break
    return found <= budget, found, parts


def main() -> None:
    parser = argparse.ArgumentParser(description="The gate: fails where something got slower (benchmarks/README.md).")
    parser.add_argument("--measure", action="store_true", help="print what is found, in the form of BUDGETS, and pass")
    given = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        made = checks(Path(folder))
        if given.measure:
            for check in made:
                print(f'    "{check.name}": {figure(check.measure()[0]).replace(",", "_")},', flush=True)
            return
        print(f"{'':42} {'found':>8} {'budget':>8}")
        for check in made:
            well, found, parts = passed(check)
            found_, budget = figure(found), figure(BUDGETS[check.name])
            print(f"{check.name:42} {found_:>8} {budget:>8} {'' if well else 'FAILED'}".rstrip(), flush=True)
            if not well:
                failed.append(
                    f"{check.name}: found {found_}, expected at most {budget} ({parts}). To look closer: {check.closer}"
                )
    if failed:
        raise SystemExit("\n".join(["", f"slower than it may be, in {PACKAGE}:", *failed]))


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
