"""What an incremental run costs, by the size and kind of the change, beside a rebuild of the same table; time and memory."""

from __future__ import annotations

import json
import statistics
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lake
import records
import render
import servers
from measure import HERE, Missing, Sample, Setting, Suite, WrongResult, materialize, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FEATURES = 10
REBUILD, FIRST = "rebuild", "first load"
#: What each kind is called.
KINDS = {
    "append": "append",
    "merge": "MERGE",
    "scattered": "MERGE, scattered over five times as many files",
    "update": "UPDATE",
    "delete": "DELETE",
    "late": "append of late rows, which all lose",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A table of one row per entity in *files* files, clustered by entity, and the changes: kind and share of the rows, or `REBUILD`, in order."""

    entities: int
    files: int
    rounds: int
    changes: tuple[tuple[str, float], ...]


SHARES = (0.0001, 0.001, 0.01, 0.1)
FULL = (
    *((kind, share) for share in SHARES for kind in ("append", "merge")),
    (REBUILD, 1.0),  # in the middle, so that nothing it stands beside is far away in time
    *(("late", 0.01), ("scattered", 0.01), ("update", 0.01), ("delete", 0.01)),
    *(("append", 1.0), ("merge", 1.0)),
)
POINTS = {
    "tiny": Point(2_000, 10, 1, (("append", 0.01), (REBUILD, 1.0), ("late", 0.01), ("delete", 0.01))),
    "bench": Point(500_000, 100, 2, FULL),
    "large": Point(5_000_000, 100, 3, FULL),
}


@contextmanager
def commits(table: Path, point: Point) -> Iterator[Callable[..., dict[str, Any]]]:
    """The process that makes the table and its commits (`changes.py`): it imports much, which ours would give to every run's peak memory."""
    command = [sys.executable, str(HERE / "changes.py"), "--commits", str(table)]
    command += [f"--entities={point.entities}", f"--files={point.files}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def answer() -> dict[str, Any]:
            line = process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise WrongResult("changes.py ended; its error is in the output of the run")
            found: dict[str, Any] = json.loads(line)
            return found

        def commit(kind: str, share: float) -> dict[str, Any]:
            process.stdin.write(json.dumps({"kind": kind, "share": share}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return answer()

        try:
            answer()
            yield commit
        finally:
            process.terminate()


def write_config(folder: Path, table: Path, url: str) -> None:
    view = [f"source: {table}", "join_keys: [user_id]", "event_timestamp: event_timestamp", "features:"]
    view += [f"  feature_{number}: float64" for number in range(FEATURES)]
    (folder / "feature_views").mkdir(parents=True)
    (folder / "feature_views" / f"{lake.VIEW}.yaml").write_text("\n".join(view) + "\n")
    (folder / "online_stores.yaml").write_text(f'default: {{url: "{url}"}}\n')


def check(
    what: str, found: dict[str, Any], kind: str, rows: int, sample: Sequence[Any], server: servers.Server
) -> None:
    """The report counts exactly the changed entities, and the rows that the change brought are what readers get."""
    names = ("written", "deleted", "stale", "unchanged")
    expected = dict.fromkeys(names, 0) | {{"delete": "deleted", "late": "stale"}.get(kind, "written"): rows}
    if {name: found[name] for name in names} != expected or found["quarantined"]:
        raise WrongResult(f"{what}: found { ({name: found[name] for name in names}) }, expected {expected}")
    stored = records.in_redis(server.client, [key for key, *_ in sample]) if sample else []
    for (_, event_us, values), record in zip(sample, stored, strict=True):
        if record is None or (record[2], record[4]) != (event_us, struct.pack(f"<{FEATURES}d", *values)):
            raise WrongResult(f"{what}: an entity of the sample does not hold the row that the change brought")


def measure(setting: Setting) -> Iterator[Sample | Missing]:
    point, kind = POINTS[setting.scale], "redis"
    try:
        servers.server_binary(kind)
    except SystemExit as missing:
        yield Missing(kind, f"{missing}; Valkey takes its place")
        kind = "valkey"
    case = f"{point.entities:,} rows x {FEATURES} float64 in {point.files} files, {kind}"
    for number in range(1, setting.rounds_or(point.rounds) + 1):
        progress(f"{case}: round {number}")
        with (
            tempfile.TemporaryDirectory(prefix="changes-", dir=setting.work) as made,
            servers.running_server(kind) as server,
            commits(Path(made) / "table", point) as commit,
        ):
            config = Path(made) / "config"
            write_config(config, Path(made) / "table", server.url)

            def run(what: str, command: str, rows: int, how: Callable[[dict[str, Any]], None], share: float) -> Sample:
                done = materialize(command, lake.VIEW, "--config", config, "--max-speed")  # noqa: B023 - called in this round
                how(done.found)
                progress(
                    f"  {what}: {done.seconds:.2f} s, run {done.found['seconds']:.2f} s, {done.peak_bytes / 1e6:,.0f} MB"
                )
                return Sample(
                    case=case,
                    what=what,
                    round=number,  # noqa: B023
                    rows=rows,
                    seconds=done.seconds,
                    limit=REBUILD,
                    cpu_seconds=done.cpu_seconds,
                    peak_bytes=done.peak_bytes,
                    more={"run_seconds": done.found["seconds"], "share": share},
                )

            def whole(found: dict[str, Any]) -> None:
                if (found["entities"], found["quarantined"]) != (point.entities, 0):
                    raise WrongResult(f"{case}: found {found['entities']:,} entities, expected {point.entities:,}")

            yield run(FIRST, "incremental", point.entities, whole, 1.0)
            for change, share in point.changes:
                if change == REBUILD:
                    yield run(REBUILD, "rebuild", point.entities, whole, 1.0)
                    continue
                told = commit(change, share)
                rows = max(1, round(point.entities * share))
                what = f"{KINDS[change]}, {100 * share:g} %"
                how = partial(check, what, kind=change, rows=rows, sample=told["sample"], server=server)
                yield run(what, "incremental", rows, how, share)


def headlines(samples: Sequence[Sample]) -> list[tuple[str, str, str]]:
    found = {
        what: render.ratios(samples, what, REBUILD, cost=True)
        for what in ("append, 0.1 %", "append, 1 %", "MERGE, 1 %")
    }
    return [
        (f"incremental run after {what}, of a rebuild's time", render.spread(ratios, render.share), "-")
        for what, ratios in found.items()
        if ratios
    ]


def curves(samples: Sequence[Sample], value: Callable[[Sample], float]) -> dict[str, list[tuple[float, float]]]:
    """By kind of change, the median of *value* over the changed rows in percent; kinds of one size, and the rebuild, are left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    shares = {each.what: each.more["share"] for each in samples}
    for what, share in shares.items():
        kind = what.rpartition(", ")[0]
        if kind:
            middle = statistics.median(value(each) for each in samples if each.what == what)
            found.setdefault(kind, []).append((100 * share, middle))
    sizes = Counter({kind: len(points) for kind, points in found.items()})
    return {kind: points for kind, points in found.items() if sizes[kind] > 1 or len(sizes) == sum(sizes.values())}


def plots(samples: Sequence[Sample]) -> list[tuple[str, Callable[[Path], None]]]:
    axes = {"xlabel": "rows changed, %", "log_x": True}
    seconds = curves(samples, lambda each: each.seconds)
    own = curves(samples, lambda each: each.more["run_seconds"])
    seconds |= {f"{kind}, the run's own": points for kind, points in own.items()}
    memory = curves(samples, lambda each: (each.peak_bytes or 0) / 1e9)
    whole = [each for each in samples if each.what == REBUILD]
    if whole and seconds:
        shares = [share for points in seconds.values() for share, _ in points]
        ends = (min(shares), max(shares))
        seconds["rebuild"] = [(end, statistics.median(each.seconds for each in whole)) for end in ends]
        memory["rebuild"] = [(end, statistics.median((each.peak_bytes or 0) / 1e9 for each in whole)) for end in ends]
    return [
        (
            "seconds of an incremental run over the share of rows changed",
            partial(render.lines, seconds, ylabel="seconds", log_y=True, **axes),
        ),
        ("its peak memory", partial(render.lines, memory, ylabel="peak memory, GB", **axes)),
    ]


SUITE = Suite(
    name="incremental",
    title="What a change costs",
    about="""\
A table of one row per entity in files that are clustered by entity. Each commit appends, merges, updates or deletes a share of the rows in as few
files as hold them, and one `materialize incremental` process follows it, from start to exit, with `--max-speed`; *run* is the time in its own
report. Beside them stands one `materialize rebuild` of the same table. After each run exactly the changed entities must be counted, and sampled rows of the change must be online.""",
    columns=("rows", "seconds", "run_seconds", "rate", "cpu", "peak", "cost"),
    seconds={"tiny": 240, "bench": 300, "large": 3600},
    measure=measure,
    headlines=headlines,
    plots=plots,
)
