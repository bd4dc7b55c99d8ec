"""Runs suites of benchmarks and writes one report of them: a size in; Markdown, JSON and PNG out.

    .venv/bin/python benchmarks/report.py --scale bench --out docs/benchmarks

Each suite (`suites/`) runs as a process of its own, with a time limit. What it measured before it failed or was stopped stays in the
report, and so does why it ended; the other suites run all the same. The exit code is 1 when a suite failed, was stopped or found
wrong values; slow figures, and what cannot run on this machine, are no failure but a line of the report.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import figures
import lake
import render
import servers
from measure import HERE, Missing, Sample, Setting, Suite, progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: In the order in which they run.
SUITES = ("encode", "small", "latest", "incremental", "reads", "load")
SCALES = ("tiny", "bench", "large")
PACKAGES = ("polars", "deltalake", "pyarrow", "numpy", "redis", "hiredis", "boto3", "duckdb")
#: Seconds that a stopped suite has to end its servers.
END_SECONDS = 20.0
#: Loaded machines give figures that say nothing: warn above this many busy processes per core at the start.
BUSY = 0.25
HEAD = """\
# Benchmarks: {scale}

Written by `{command}` on {day}, seed {seed}, in {minutes:.0f} minutes. What is compared, and why that is fair: `benchmarks/README.md`.

{machine}

Every ratio is of two measurements of one round, minutes apart at most; ratios hold from machine to machine, seconds do not.
*Of its limit's speed* is the rate beside that of the line which no way can pass; *we are faster by* is our rate beside the peer's.
"""


@dataclass(frozen=True, slots=True)
class Chapter:
    """What came of one suite. ``state``: done, failed, stopped."""

    suite: Suite
    state: str
    why: str
    seconds: float
    samples: list[Sample]
    missing: list[Missing]
    headlines: list[tuple[str, str, str]]
    plots: list[tuple[str, Callable[[Path], None]]]


def suite_named(name: str) -> Suite:
    suite: Suite = importlib.import_module(f"suites.{name}").SUITE
    return suite


# --- one suite, in a process of its own --------------------------------------------------------------------------------


def run_one(name: str, setting: Setting, results: Path) -> None:
    """Write each sample of the suite to *results* as a line of JSON, as soon as it is there."""
    signal.signal(signal.SIGTERM, stopped)
    try:
        with results.open("a") as file:
            for each in suite_named(name).measure(setting):
                kind = "sample" if isinstance(each, Sample) else "missing"
                file.write(json.dumps({"kind": kind, **asdict(each)}) + "\n")
                file.flush()
    except (Exception, SystemExit) as error:  # whatever it was, the report says so
        told = str(error) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        with results.open("a") as file:
            file.write(json.dumps({"kind": "why", "why": in_a_line(told)}) + "\n")
        raise


def in_a_line(text: str) -> str:
    """The first and the last line of *text*, each at most 300 characters."""
    lines = [line.strip()[:300] for line in text.strip().splitlines()] or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


def stopped(_number: int, _frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows ends the servers
    raise SystemExit("stopped")


def run_suite(name: str, arguments: argparse.Namespace, work: Path) -> Chapter:
    """Run one suite until it ends, or its time is over; nothing that it started is left."""
    suite = suite_named(name)
    limit = arguments.suite_seconds or suite.seconds[arguments.scale]
    progress(f"--- {name}: at most {limit:.0f} s")
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=work) as made:
        results = Path(made) / "results.jsonl"
        results.touch()
        command = [sys.executable, __file__, "--one", name, "--results", str(results)]
        command += ["--scale", arguments.scale, "--seed", str(arguments.seed), "--work", str(work)]
        command += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
        command += ["--keep"] if arguments.work else []
        begin, state = time.monotonic(), "done"
        # what a killed process leaves in TMPDIR goes with it; the package that is measured is the one beside this file
        environ = os.environ | {"TMPDIR": made, "PYTHONPATH": str(HERE.parent)}
        process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, env=environ)
        try:
            if process.wait(limit) != 0:
                state = "failed"
        except subprocess.TimeoutExpired:
            state = "stopped"
        finally:
            end(process)
        seconds = time.monotonic() - begin
        samples, missing, why = read_results(results)
    if state == "stopped":
        why = f"its time of {limit:.0f} s was over"
    elif state == "failed":
        why = why or f"exit code {process.returncode}; its error is in the output of the run"
    progress(f"--- {name}: {state} after {seconds:.0f} s{': ' + why if why else ''}")
    try:
        headlines, plots = suite.headlines(samples), suite.plots(samples) if samples else []
    except (
        ArithmeticError,
        LookupError,
        ValueError,
    ) as error:  # of a suite that ended early: what it has must not be lost
        headlines, plots = [], []
        state, why = ("failed", f"no headlines and pictures: {error!r}") if state == "done" else (state, why)
    return Chapter(suite, state, why, seconds, samples, missing, headlines, plots)


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process, and whatever is left of the group that it leads: its servers and the commands that it runs."""
    if process.poll() is None:
        process.terminate()  # it ends its servers itself
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_results(path: Path) -> tuple[list[Sample], list[Missing], str]:
    samples, missing, why = [], [], ""
    for line in path.read_text().splitlines():
        found = json.loads(line)
        kind = found.pop("kind")
        if kind == "why":
            why = found["why"]
        elif kind == "sample":
            samples.append(Sample(**found))
        else:
            missing.append(Missing(**found))
    return samples, missing, why


# --- the report --------------------------------------------------------------------------------------------------------


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions, the command and the seed."""
    names = []
    for kind in servers.KINDS:
        with suppress(SystemExit), servers.running_server(kind) as server:
            names.append(server.name)
    setting = figures.environment(", ".join(names) or "no server")
    setting["packages"] = {name: version(name) for name in PACKAGES} | {"materialize": version("delta-materialize")}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    setting |= {"commit": commit.stdout.strip() or "unknown", "seed": arguments.seed, "scale": arguments.scale}
    return setting | {"day": datetime.now(timezone.utc).date().isoformat()}


def markdown(setting: dict[str, Any], chapters: Sequence[Chapter], pictures: dict[str, list[tuple[str, str]]]) -> str:
    """The report. *pictures*: by suite, what each shows and its file."""
    minutes = sum(chapter.seconds for chapter in chapters) / 60
    machine = (
        " ".join(figures.where(setting)[2:])
        + f" Commit {setting['commit']}, load {setting['load_at_start']} at the start."
    )
    lines = [HEAD.format(**setting, minutes=minutes, machine=machine)]
    if setting["busy"]:
        lines += ["**The machine was busy at the start: these figures say little.**", ""]
    lines += render.in_one_look([line for chapter in chapters for line in chapter.headlines])
    for chapter in chapters:
        lines += chapter_lines(chapter, pictures.get(chapter.suite.name, []))
    return "\n".join(lines).rstrip() + "\n"


def chapter_lines(chapter: Chapter, pictures: Sequence[tuple[str, str]]) -> list[str]:
    suite = chapter.suite
    lines = [f"## {suite.title}", "", suite.about, ""]
    if chapter.state != "done":
        ended = "was stopped" if chapter.state == "stopped" else chapter.state
        lines += [f"**This suite {ended}**, and what follows is what it measured before: {chapter.why}", ""]
    lines += [*render.missing_lines(chapter.missing), ""] if chapter.missing else []
    for shows, file in pictures:
        lines += [f"![{shows}]({file})", ""]
    for case in dict.fromkeys(each.case for each in chapter.samples):
        lines += render.table(case, [each for each in chapter.samples if each.case == case], suite.columns)
    return lines


def draw(chapters: Sequence[Chapter], out: Path, scale: str) -> dict[str, list[tuple[str, str]]]:
    """The pictures of each suite, as files beside the report."""
    found: dict[str, list[tuple[str, str]]] = {}
    for chapter in chapters:
        for number, (shows, drawn_by) in enumerate(chapter.plots, 1):
            file = f"{scale}-{chapter.suite.name}-{number}.png"
            drawn_by(path=out / file)  # type: ignore[call-arg]
            found.setdefault(chapter.suite.name, []).append((shows, file))
    return found


def write(out: Path, setting: dict[str, Any], chapters: Sequence[Chapter]) -> None:
    """Write the report, and remove pictures of an earlier one of the same scale."""
    out.mkdir(parents=True, exist_ok=True)
    scale = setting["scale"]
    for old in out.glob(f"{scale}-*.png"):
        old.unlink()
    pictures = draw(chapters, out, scale)
    (out / f"{scale}.md").write_text(markdown(setting, chapters, pictures))
    suites = {
        chapter.suite.name: {
            "state": chapter.state,
            "why": chapter.why,
            "seconds": round(chapter.seconds, 1),
            "headlines": chapter.headlines,
            "missing": [asdict(each) for each in chapter.missing],
            "samples": [asdict(each) for each in chapter.samples],
        }
        for chapter in chapters
    }
    (out / f"{scale}.json").write_text(json.dumps({"environment": setting, "suites": suites}, indent=1) + "\n")


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, kept for the next time, or one that is removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the benchmarks and write one report.")
    parser.add_argument("--scale", choices=SCALES, default="bench")
    parser.add_argument(
        "--suites", nargs="+", choices=SUITES, default=list(SUITES), metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the report")
    parser.add_argument("--seed", type=int, default=lake.SEED)
    parser.add_argument("--rounds", type=int, help="of every case (default: as the suite has it)")
    parser.add_argument("--suite-seconds", type=float, help="time limit of each suite (default: the suite's own)")
    parser.add_argument("--work", type=Path, help="folder for the tables, used again when their sizes fit")
    parser.add_argument("--one", choices=SUITES, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the chosen suites one after the other and write the report."""
    given = parsed()
    if given.one:
        run_one(given.one, Setting(given.scale, given.seed, given.work, given.rounds, given.keep), given.results)
        return
    setting = environment(given)
    setting["busy"] = setting["load_at_start"] > BUSY * setting["cores"]
    if setting["busy"]:
        progress(f"warning: the machine is busy, load {setting['load_at_start']}: the figures will say little")
    signal.signal(signal.SIGTERM, stopped)
    with work_folder(given.work) as work:
        chapters = []
        for name in (name for name in SUITES if name in given.suites):
            chapters.append(run_suite(name, given, work))
            write(given.out, setting, chapters)  # after each, so that nothing measured is lost
    progress(f"the report is {given.out / (given.scale + '.md')}")
    sys.exit(any(chapter.state != "done" for chapter in chapters))


if __name__ == "__main__":
    main()
