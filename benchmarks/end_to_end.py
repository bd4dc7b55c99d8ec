"""Measures the product from a Delta table to Redis or Valkey beside the store's own limit; sizes in, figures out.

    .venv/bin/python benchmarks/end_to_end.py --entities 1000000 --rows-per-entity 3

Each of the runs does, on fresh servers and as processes of their own:

- first load: `materialize incremental` of the table's first day into an empty store;
- guarded incremental: `materialize incremental` of the second day, with newer rows of all entities, over the first;
- all stale: `materialize backfill` of the first day, which must lose everywhere;
- the limit: a blind load of ready ``SET key value`` bytes, the very keys and values that the product left.

Wrong counts or wrong bytes end the script with exit code 1; slow figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import feast_materialize
import lake
import servers
from figures import MIB, Measured, Round, environment, markdown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lake import Lake
    from servers import Server

VIEW = "bench_user_features"
HERE = Path(__file__).parent
#: docs/format.md: format version, flags, schema id, event_us, created_us, version, floor; without nulls the features
#: follow.
HEADER = struct.Struct("<BBHqqqq")
FORMAT_VERSION = 1
#: Loaded machines give figures that say nothing: warn above this many busy processes per core at the start.
BUSY = 0.25
#: Below this an hour of the table may be empty.
FEWEST_ENTITIES = 1_000


class WrongResult(SystemExit):
    """The product's counts or bytes are not what the table says; a figure of such a run would be worth nothing."""


def run_product(command: Path, arguments: list[str]) -> Measured:
    """Run the CLI once and measure it with the resource usage of exactly this child.

    A child's peak memory on Linux starts with its parent's at the fork: this process imports nothing large.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as talk:
        begin = time.perf_counter()
        process = subprocess.Popen([str(command), *arguments], stdout=out, stderr=talk)
        _, status, usage = os.wait4(process.pid, 0)
        wall_seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        talk.seek(0)
        if process.returncode != 0:
            tail = talk.read().decode(errors="replace")[-3000:]
            raise WrongResult(f"materialize {' '.join(arguments)} ended with {process.returncode}:\n{tail}")
        report = json.loads(out.read().splitlines()[-1])
    return Measured(
        wall_seconds=wall_seconds,
        report_seconds=report["seconds"],
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        report=report,
    )


def write_config(folder: Path, table: Lake, server: Server, ttl: str | None) -> None:
    """A config folder with one feature view and one online store."""
    view = [
        f"source: {table.table}",
        "join_keys: [user_id]",
        "event_timestamp: event_timestamp",
        "created_timestamp: created_timestamp",
        "features:",
        *(f"  {name}: float64" for name in table.feature_names),
        *([f"ttl: {ttl}"] if ttl else []),
        "schedule: hourly",
        "online_stores: [default]",
    ]
    (folder / "feature_views").mkdir(parents=True)
    (folder / "feature_views" / f"{VIEW}.yaml").write_text("\n".join(view) + "\n")
    (folder / "online_stores.yaml").write_text(f'default: {{url: "{server.url}"}}\n')


def check_counts(name: str, report: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the report with what must have happened: every entity counted, nothing dropped."""
    found = {key: report[key] for key in expected}
    if found != expected:
        raise WrongResult(f"{name}: found {found}, expected {expected}")
    if report["entities"] != report["written"] + report["stale"] + report["unchanged"] + report["expired"]:
        raise WrongResult(f"{name}: the counts do not add up: {report}")


def check_bytes(name: str, server: Server, expected: dict[str, tuple[int, int, bytes]]) -> None:
    """Compare sampled entities' records in the store with the values computed from the table without the product."""
    records = server.client.mget([f"fs:{VIEW}:{{{key}}}" for key in expected])
    for record, (key, (event_us, created_us, features)) in zip(records, expected.items(), strict=True):
        if record is None:
            raise WrongResult(f"{name}: entity {key!r} is not in the store")
        format_version, flags, _, found_event_us, found_created_us, _, _ = HEADER.unpack_from(record)
        found = (format_version, flags & 1, found_event_us, found_created_us, record[HEADER.size :])
        if found != (FORMAT_VERSION, 0, event_us, created_us, features):
            raise WrongResult(f"{name}: entity {key!r}: found {found}, expected {(event_us, created_us, features)}")


def one_round(arguments: argparse.Namespace, table: Lake, ready: tuple[Path, Path]) -> Round:
    """Measure the product on one fresh server, then the limits on another; check counts and bytes after each step.

    Each run has the limit of its own store: the first load an empty one, the others one that holds every entity.
    """
    clean = {"rows_read": table.rows_per_day, "quarantined": 0, "deleted": 0, "expired": 0, "unchanged": 0}
    wins = {**clean, "entities": table.entities, "written": table.entities, "stale": 0}
    newer = {**wins, "from_version": lake.FIRST_DAY_VERSION, "to_version": 2 * lake.HOURS - 1}
    loses = {**clean, "written": 0}
    fresh_config = tempfile.TemporaryDirectory(prefix="bench-config-")
    with servers.running_server(arguments.server) as server, fresh_config as config:

        def product(name: str, command: list[str], counts: dict[str, Any], *, day: int) -> Measured:
            measured = run_product(arguments.materialize, [*command, "--config", config, "--json"])
            check_counts(name, measured.report, counts)
            check_bytes(name, server, table.expected(day))
            progress(f"{name}: {measured.wall_seconds:.2f} s, {measured.peak_bytes / MIB:,.0f} MiB")
            return measured

        write_config(Path(config), table, server, arguments.ttl)
        empty = server.memory()
        lake.hide_second_day(table)
        first_load = product("first load", ["incremental", VIEW], wins, day=0)
        lake.show_second_day(table)
        incremental = product("guarded incremental", ["incremental", VIEW], newer, day=1)
        full = server.memory()
        past = ["--start", lake.FIRST_DAY.isoformat(), "--end", (lake.FIRST_DAY + lake.DAY).isoformat()]
        all_stale = product("all stale", ["backfill", VIEW, *past], loses, day=1)
        commands = [
            servers.write_ready_bytes(server, f"fs:{VIEW}:{{*", path, seed=seed) for seed, path in enumerate(ready)
        ]
    if commands != [table.entities] * len(ready):
        raise WrongResult(f"the store holds {commands} records, expected {table.entities}")
    with servers.running_server(arguments.server) as server:
        pipe, pipe_over = (servers.pipe_load(server, path, table.entities) for path in ready)
    progress(f"{pipe.writer}: {pipe.seconds:.2f} s, over older records {pipe_over.seconds:.2f} s")
    return Round(
        first_load=first_load,
        incremental=incremental,
        all_stale=all_stale,
        pipe=pipe,
        pipe_over=pipe_over,
        bytes_per_entity={name: (used - empty[name]) / table.entities for name, used in full.items()},
    )


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The given folder, kept for the next time, or one that is removed at the end."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure materialize beside the store's own limit.")
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--rows-per-entity", type=int, default=3)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--ttl", help="ttl of the feature view, such as 3650d (default: none)")
    parser.add_argument("--server", choices=servers.KINDS, default="redis")
    parser.add_argument("--runs", type=int, default=3, help="rounds of all measurements")
    parser.add_argument("--feast", type=int, metavar="N", help="also measure Feast's safe mode with N entities")
    parser.add_argument("--work", type=Path, help="folder for the table, used again when its sizes fit")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    beside_python = Path(sys.executable).with_name("materialize")
    parser.add_argument("--materialize", type=Path, default=beside_python, help="the command to measure")
    arguments = parser.parse_args()
    if arguments.entities < FEWEST_ENTITIES:
        parser.error(f"--entities: expected at least {FEWEST_ENTITIES}, found {arguments.entities}")
    if not arguments.materialize.exists():
        parser.error(f"--materialize: {arguments.materialize} is not there. Install the project first.")
    return arguments


def main() -> None:
    """Generate, measure round by round, print."""
    arguments = parsed()
    with servers.running_server(arguments.server) as server:
        setting = environment(server.name)
    if setting["load_at_start"] > BUSY * setting["cores"]:
        progress(f"warning: the machine is busy, load {setting['load_at_start']}: the figures will say little")
    with work_folder(arguments.work) as work:
        sizes = {name: getattr(arguments, name) for name in ("entities", "rows_per_entity", "features")}
        table = lake.Lake(folder=work / "-".join(["lake", *map(str, sizes.values())]), **sizes)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
        subprocess.run([sys.executable, str(HERE / "generate_lake.py"), str(table.folder), *options], check=True)
        rounds = []
        for number in range(1, arguments.runs + 1):
            progress(f"round {number} of {arguments.runs}")
            rounds.append(one_round(arguments, table, (work / "ready.resp", work / "ready_again.resp")))
    feast = None
    if arguments.feast:
        progress(f"Feast, {arguments.feast:,} entities")
        with servers.running_server(arguments.server) as server:
            feast = feast_materialize.measure(server, {**sizes, "entities": arguments.feast})
    text = markdown(setting, table, rounds, feast)
    print(text, end="")
    if arguments.markdown:
        arguments.markdown.write_text(text)
    if arguments.json:
        figures = {"environment": setting, "sizes": sizes, "rounds": [asdict(each) for each in rounds], "feast": feast}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
