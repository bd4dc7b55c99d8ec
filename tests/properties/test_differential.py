"""Random histories on every store end with each entity's latest row; planted bugs do not get past them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.properties.histories import play, shards

if TYPE_CHECKING:
    from tests import servers

#: Histories per store; more with MATERIALIZE_DIFFERENTIAL=1000. The first seed is MATERIALIZE_SEED, 0 by default.
COUNT = int(os.environ.get("MATERIALIZE_DIFFERENTIAL", "60"))
FIRST = int(os.environ.get("MATERIALIZE_SEED", "0"))
#: Histories that a planted bug may survive at most.
MUTANT_HISTORIES = 80
PROJECT = Path(__file__).parents[2]
HISTORIES = Path(__file__).with_name("histories.py")

#: Planted bugs: file, what is there, what is put there. Each must make a history fail.
MUTANTS = {
    "created time ignored": (
        "latest.py",
        '.sort("event_us", "created_us", "version", "position")',
        '.sort("event_us", "version", "position")',
    ),
    "later commit does not win a tie in a run": (
        "latest.py",
        '.sort("event_us", "created_us", "version", "position")',
        '.sort("event_us", "created_us", "position")',
    ),
    "later commit does not win a tie in the store": (
        "piece.py",
        'tie_wins=plan.mode == "incremental"',
        "tie_wins=False",
    ),
    "rows without an event time are stored": (
        "latest.py",
        '"null event timestamp": event.is_null()',
        '"null event timestamp": pl.lit(value=False)',
    ),
    "older rows win": ("order.py", "> (other.event_us, other.created_us)", "< (other.event_us, other.created_us)"),
    "deleted entities stay": ("pipeline.py", "if plan.sweep else 0", "if False else 0"),
    "deletes are not noticed": (
        "offline/table.py",
        'if any(remove["dataChange"] for remove in commit.removes)',
        "if False",
    ),
    "compaction counts as new rows": (
        "offline/table.py",
        'for add in commit.adds if add["dataChange"]',
        "for add in commit.adds",
    ),
    "the last commit is left out": ("offline/log.py", "range(first, last + 1)", "range(first, last)"),
    "partition values of another file": (
        "offline/table.py",
        "np.repeat(np.arange(len(files)), counts)",
        "np.repeat(np.arange(len(files))[::-1], counts[::-1])",
    ),
    "no older row for an unstorable one": ("piece.py", "if not rejected:", "if True:"),
    "null bitmap the wrong way round": ("codec.py", 'bitorder="little"', 'bitorder="big"'),
}


@pytest.mark.parametrize("seeds", shards(COUNT, 4), ids=str)
@pytest.mark.parametrize("url", ["memory://", "sqlite:///FOLDER/online.db"])
def test_random_histories_end_right(url: str, seeds: range) -> None:
    for seed in seeds:
        play(url, FIRST + seed)


@pytest.mark.parametrize("seeds", shards(COUNT, 4), ids=str)
def test_random_histories_end_right_on_valkey(valkey: servers.Server, seeds: range) -> None:
    for seed in seeds:
        play(f"{valkey.url}?prefix=sSEED", FIRST + seed)


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(tmp_path: Path, name: str) -> None:
    file, there, planted = MUTANTS[name]
    shutil.copytree(PROJECT / "materialize", tmp_path / "materialize", ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "materialize" / file).read_text()
    assert there in source, f"{file} has changed: plant this bug anew"
    (tmp_path / "materialize" / file).write_text(source.replace(there, planted))
    shutil.copy(HISTORIES, tmp_path)

    command = [sys.executable, str(tmp_path / HISTORIES.name), "memory://", "0", str(MUTANT_HISTORIES)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )

    assert ended.returncode == 1, f"the bug survived {MUTANT_HISTORIES} histories"
    assert "Divergence: seed" in ended.stderr
    assert "ImportError" not in ended.stderr
    assert "SyntaxError" not in ended.stderr


def test_unchanged_copy_of_the_package_passes(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "materialize", tmp_path / "materialize", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HISTORIES, tmp_path)
    with (tmp_path / "materialize" / "__init__.py").open("a") as source:
        source.write('\nprint("the copy")\n')

    command = [sys.executable, str(tmp_path / HISTORIES.name), "memory://", "0", "3"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )

    assert (ended.returncode, ended.stdout) == (0, "the copy\n"), ended.stderr
