"""The gate against slowness (`benchmarks/gate.py`) as ``make check`` runs it, on copies of the package: whole, and with slow code planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent
#: Slow code that is put around functions at the end of their file, so that it fits whatever they look like.
LOOP_IN_ENCODE = """
_planted = encode


def encode(keys, *arguments, **options):
    for _ in keys.to_list():
        pass
    return _planted(keys, *arguments, **options)
"""
LOOP_IN_NEWEST = """
_planted = newest


def newest(rows, join_keys):
    for _ in rows["position"].to_list():
        pass
    return _planted(rows, join_keys)
"""
WORK_IN_NEWEST = """
_planted = newest


def newest(rows, join_keys):
    return [_planted(rows, join_keys) for _ in range(4)][0]
"""


def gate(folder: Path, **planted: str) -> subprocess.CompletedProcess[str]:
    """The gate over a copy of the package, with *planted* code by file."""
    shutil.copytree(PROJECT / "materialize", folder / "materialize", ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in planted.items():
        with (folder / "materialize" / f"{name}.py").open("a") as file:
            file.write(code)
    command = [sys.executable, PROJECT / "benchmarks" / "gate.py"]
    environ = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=300)


def failures(done: subprocess.CompletedProcess[str], folder: Path) -> dict[str, str]:
    """What the gate says of each check that failed, by its name."""
    assert done.returncode == 1, done.stdout + done.stderr
    head, *lines = done.stderr.strip().splitlines()
    assert head == f"slower than it may be, in {folder / 'materialize'}:"
    return {line.partition(": found ")[0]: line for line in lines}


def test_gate_passes_where_nothing_got_slower(tmp_path: Path) -> None:
    done = gate(tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["found", "budget"]
    assert {line.partition(":")[0].partition(",")[0] for line in lines} >= {"encode", "decode", "winners", "plan"}


def test_gate_fails_by_name_for_a_loop_over_rows(tmp_path: Path) -> None:
    found = failures(gate(tmp_path, codec=LOOP_IN_ENCODE, latest=LOOP_IN_NEWEST), tmp_path)

    loop = found["encode: a row more"]
    assert "(most in codec.py, encode (" in loop
    assert "To look closer: make bench SUITES=encode" in loop
    assert "(most in latest.py, newest (" in found["winners: a row more"]
    assert not [name for name in found if name.startswith(("decode", "entity keys", "plan"))]


def test_gate_fails_by_name_for_more_work_without_a_loop(tmp_path: Path) -> None:
    found = failures(gate(tmp_path, latest=WORK_IN_NEWEST), tmp_path)

    slow = found["winners, times a sort of their rows"]
    assert "latest.valid_rows and latest.newest" in slow
    assert "To look closer: make bench SUITES=latest" in slow
