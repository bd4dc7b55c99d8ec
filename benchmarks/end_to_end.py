"""One table into one store, by the suite `load` of the report: sizes in, its Markdown out.

    .venv/bin/python benchmarks/end_to_end.py --entities 1000000 --rows-per-entity 3 --runs 5 --feast 100000

What is measured, and beside what, is said in `suites/load.py`. Wrong counts or wrong values end the script with exit code 1; slow
figures do not.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import lake
import render
import servers
from figures import environment, where
from measure import HERE, Missing, Sample, Setting
from report import BUSY, progress, work_folder
from suites import load

#: Below this an hour of the table may be empty.
FEWEST_ENTITIES = 1_000


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure materialize beside the store's own limit.")
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--rows-per-entity", type=int, default=3)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--kind", choices=lake.KINDS, default="float64")
    parser.add_argument("--ttl", help="ttl of the feature view, such as 3650d (default: none)")
    parser.add_argument("--server", choices=load.MEASURES, default="redis")
    parser.add_argument("--runs", type=int, default=3, help="rounds of all measurements")
    parser.add_argument("--feast", type=int, default=0, metavar="N", help="also measure Feast with N entities")
    parser.add_argument("--work", type=Path, help="folder for the table, used again when its sizes fit")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    if arguments.entities < FEWEST_ENTITIES:
        parser.error(f"--entities: expected at least {FEWEST_ENTITIES}, found {arguments.entities}")
    return arguments


def main() -> None:
    """Measure round by round, print."""
    given = parsed()
    os.environ["PYTHONPATH"] = str(HERE.parent)
    kind = given.server if given.server in servers.KINDS else servers.KINDS[0]
    with servers.running_server(kind) as server:
        setting = environment(server.name)
    if setting["load_at_start"] > BUSY * setting["cores"]:
        progress(f"warning: the machine is busy, load {setting['load_at_start']}: the figures will say little")
    point = load.Point(
        given.server,
        given.entities,
        given.features,
        given.kind,
        rows_per_entity=given.rows_per_entity,
        rounds=given.runs,
        feast=given.feast,
        ttl=given.ttl,
    )
    with work_folder(given.work) as work:
        found = list(load.MEASURES[given.server](point, Setting("one table", lake.SEED, work)))
    samples = [each for each in found if isinstance(each, Sample)]
    missing = [each for each in found if isinstance(each, Missing)]
    lines = [*where(setting), "", *render.missing_lines(missing)]
    lines += render.table(point.case, samples, load.SUITE.columns)
    lines += render.in_one_look(load.headlines(samples))
    print(text := "\n".join(lines).rstrip() + "\n", end="")
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        figures = {"environment": setting, "samples": [asdict(each) for each in samples]}
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
