"""Samples to the Markdown and the pictures of the report; every ratio is of two samples of one case and one round."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import MIB, Missing, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "COLUMNS",
    "bars",
    "count",
    "free_memory",
    "in_one_look",
    "lines",
    "missing_lines",
    "ratios",
    "share",
    "short",
    "spread",
    "table",
    "times",
]


# --- figures -----------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Median and range, as ``4.40 (4.31-4.52)``; a dash for none."""
    if not values:
        return "-"
    if len(values) == 1:
        return form(values[0])
    return f"{form(statistics.median(values))} ({form(min(values))}-{form(max(values))})"


def share(value: float) -> str:
    return f"{value:.1%}"


def times(value: float) -> str:
    """A factor with two digits that say something."""
    return f"{value:.0f} x" if value >= 20 else f"{value:.1f} x" if value >= 2 else f"{value:.2f} x"


def short(value: float) -> str:
    """Seconds with three digits that say something."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def ratios(
    samples: Iterable[Sample], what: str, beside: str, *, run_alone: bool = False, cost: bool = False
) -> list[float]:
    """The rate of *what* in those of *beside*, round by round. *run_alone*: by the seconds in the run's own report.

    *cost*: the seconds of *what* in those of *beside* instead, whatever their rows.
    """
    by_round = {(each.what, each.round): each for each in samples if each.what in {what, beside}}
    found = []
    for (name, number), each in by_round.items():
        other = by_round.get((beside, number))
        if name != what or other is None:
            continue
        seconds = each.more["run_seconds"] if run_alone and "run_seconds" in each.more else each.seconds
        found.append(seconds / other.seconds if cost else each.rows / seconds / other.rate)
    return found


# --- a case as a table -------------------------------------------------------------------------------------------------


def of_limit(some: Sequence[Sample], case: Sequence[Sample], *, run_alone: bool = False, cost: bool = False) -> str:
    limit = some[0].limit
    if limit is None or (run_alone and "run_seconds" not in some[0].more):
        return "-"
    return spread(ratios(case, some[0].what, limit, run_alone=run_alone, cost=cost), share)


def ours_is(some: Sequence[Sample], case: Sequence[Sample], *, run_alone: bool = False) -> str:
    ours = some[0].ours
    return "-" if ours is None else spread(ratios(case, ours, some[0].what, run_alone=run_alone), times)


def per_row(some: Sequence[Sample], seconds: Callable[[Sample], float | None]) -> str:
    found = [1e6 * used / each.rows for each in some if (used := seconds(each)) is not None]
    return spread(found, short)


def more(name: str, form: Callable[[float], str]) -> Any:
    return lambda some, _case: spread([each.more[name] for each in some if name in each.more], form)


def milliseconds(value: float) -> str:
    return f"{1e3 * value:.3f}"


#: Name -> heading and cell.
COLUMNS: dict[str, tuple[str, Any]] = {
    "rows": ("rows", lambda some, _: count(some[0].rows)),
    "seconds": ("seconds", lambda some, _: spread([each.seconds for each in some], short)),
    "rate": ("rows/s", lambda some, _: count(statistics.median(each.rate for each in some))),
    "cpu": ("CPU us/row", lambda some, _: per_row(some, lambda each: each.cpu_seconds)),
    "server_cpu": (
        "server CPU us/row",
        lambda some, _: per_row(some, lambda each: each.more.get("server_cpu_seconds")),
    ),
    "peak": ("peak MiB", lambda some, _: spread([each.peak_bytes / MIB for each in some if each.peak_bytes], count)),
    "bytes": ("stored bytes/row", more("bytes_per_entity", count)),
    "run_seconds": ("run, s", more("run_seconds", short)),
    "megabytes": ("MB/s", more("megabytes_per_second", count)),
    "of_limit": ("of its limit's speed", of_limit),
    "run_of_limit": ("the run's own", lambda some, case: of_limit(some, case, run_alone=True)),
    "cost": ("time, of the limit's", lambda some, case: of_limit(some, case, cost=True)),
    "ours": ("we are faster by", ours_is),
    "run_ours": ("the run alone by", lambda some, case: ours_is(some, case, run_alone=True)),
    "p50": ("p50 ms", more("p50", milliseconds)),
    "p99": ("p99 ms", more("p99", milliseconds)),
    "p99.9": ("p99.9 ms", more("p99.9", milliseconds)),
}


def table(case: str, samples: Sequence[Sample], columns: Sequence[str]) -> list[str]:
    """One case: a line for each what, in the order in which they were first measured; columns without a figure are left out."""
    whats = list(dict.fromkeys(each.what for each in samples))
    rounds = max(each.round for each in samples)
    cells = {}
    for what in whats:
        some = [each for each in samples if each.what == what]
        cells[what] = [COLUMNS[name][1](some, samples) for name in columns]
    used = [index for index in range(len(columns)) if any(row[index] != "-" for row in cells.values())]
    lines = [f"### {case}", "", f"Median (least-most) of {rounds} rounds." if rounds > 1 else "One round.", ""]
    lines += [f"| | {' | '.join(COLUMNS[columns[index]][0] for index in used)} |", f"|---|{'---|' * len(used)}"]
    lines += [f"| {named(what, samples)} | {' | '.join(row[index] for index in used)} |" for what, row in cells.items()]
    return [*lines, ""]


def named(what: str, samples: Sequence[Sample]) -> str:
    notes = dict.fromkeys(each.note for each in samples if each.what == what and each.note)
    return f"{what} ({'; '.join(notes)})" if notes else what


def in_one_look(headlines: Sequence[tuple[str, str, str]]) -> list[str]:
    lines = ["| in one look | measured | to reach |", "|---|---|---|"]
    return [*lines, *(f"| {' | '.join(line)} |" for line in headlines), ""]


def missing_lines(missing: Sequence[Missing]) -> list[str]:
    return [f"- Not measured, {each.case}: {each.why}" for each in missing]


# --- pictures ----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcdefaults()
    plt.rcParams.update(
        {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
    )
    return plt.subplots(figsize=(width, height), dpi=100)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, bbox_inches="tight", metadata={"Software": None}, pil_kwargs={"optimize": True})
    plt.close(figure)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    log_y: bool = False,
) -> None:
    """A line for each of *series*, points ascending in x."""
    figure, axes = _figure(7, 3.6)
    for index, (name, points) in enumerate(series.items()):
        ordered = sorted(points)
        axes.plot(
            [x for x, _ in ordered],
            [y for _, y in ordered],
            marker="osv^Dx"[index % 6],
            linestyle=("-", "--", ":")[index // 10 % 3],
            markersize=4,
            label=name,
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    if not log_y:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.2)
    if series:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def bars(values: Mapping[str, float], path: Path, *, xlabel: str, log: bool = False) -> None:
    """A bar for each of *values*, from the top."""
    figure, axes = _figure(7, 0.6 + 0.28 * max(len(values), 1))
    drawn = axes.barh(list(values), list(values.values()), color="#4878a8", height=0.7)
    axes.bar_label(drawn, labels=[short(value) for value in values.values()], padding=3, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, xscale="log" if log else "linear")
    axes.margins(x=0.12)
    _save(figure, path)


# --- the machine -------------------------------------------------------------------------------------------------------


def free_memory() -> int | None:
    """Bytes that new processes can have, where Linux tells."""
    told = Path("/proc/meminfo")
    if not told.exists():
        return None
    for line in told.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None
