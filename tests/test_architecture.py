"""The size of things: how far a row travels through our code, what modules say they give, how long files and functions are."""

from __future__ import annotations

import ast
import importlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
import pytest

import materialize
from materialize import pipeline
from materialize.online.base import EncodedBatch
from materialize.online.redis import RedisStore
from materialize.pipeline import Run
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from types import FrameType

    from typing_extensions import Self

    from tests import servers

PACKAGE = Path(materialize.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
MOST_FILES, DEEPEST = 10, 5
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
#: The airflow room needs Airflow to be imported, which other tests do.
IMPORTABLE = [
    path for path in SOURCES if "airflow" not in path.parts[len(PACKAGE.parts) :] and path.name != "__main__.py"
]


def ours(frame: FrameType) -> bool:
    """A call of a function of this package; a comprehension is no call, and Python 3.12 runs it without a frame."""
    code = frame.f_code
    return code.co_filename.startswith(str(PACKAGE)) and not code.co_name.startswith("<")


#: What rows travel in.
CARRIERS = (pl.DataFrame, pl.LazyFrame, pl.Series, pa.Array, pa.ChunkedArray, pa.Table, EncodedBatch, memoryview)


def carries(values: Any) -> bool:
    """Whether rows are among *values*, or in a tuple of them."""
    return any(isinstance(value, CARRIERS) or (isinstance(value, tuple) and carries(value)) for value in values)


class Journey:
    """Where rows go: our functions that take or give rows, how deep each is called, and the files of all calls above it.

    The first call of ours in a thread has the depth 1. What reads the table's log sees files and no rows.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.deepest: tuple[str, ...] = ()

    def watch(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in {"call", "return"} or not ours(frame):
            return
        if not carries(frame.f_locals.values() if event == "call" else [argument]):
            return
        way, at = [], frame
        while at is not None:
            if ours(at):
                way.append(at.f_code)
            at = at.f_back  # type: ignore[assignment]
        self.files |= {str(Path(code.co_filename).relative_to(PACKAGE)) for code in way}
        if len(way) > len(self.deepest):
            self.deepest = tuple(code.co_name for code in reversed(way))

    def __enter__(self) -> Self:
        threading.setprofile(self.watch)
        sys.setprofile(self.watch)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("snapshot", [True, False], ids=["first run", "incremental"])
def test_row_passes_few_files_at_a_small_depth(table: Table, valkey: servers.Server, *, snapshot: bool) -> None:
    table.append(row("a", 1), row("b", 2, country=None), row("a", 2, country="x" * 2_000_000))
    with RedisStore(valkey.url) as store:
        if not snapshot:
            pipeline.incremental(table.view, store, Run("default", "before", lambda: NOW))
            table.append(row("a", 3), row("c", 2, country=None))

        with Journey() as journey:
            report = pipeline.incremental(table.view, store, Run("default", "run", lambda: NOW))

    assert report.written == 2
    assert {
        "pipeline.py",
        "piece.py",
        "winners.py",
        "offline/rows.py",
        "latest.py",
        "codec.py",
        "online/redis/store.py",
    } <= journey.files
    assert len(journey.deepest) <= DEEPEST, " -> ".join(journey.deepest)
    stored = journey.files - {"offline/quarantine.py"}  # one row is kept there, and passes neither writer nor store
    assert len(stored) <= MOST_FILES, " ".join(sorted(stored))


@pytest.mark.parametrize("path", IMPORTABLE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_all_is_sorted_and_true(path: Path) -> None:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))

    names = getattr(module, "__all__", [])

    # The order of ruff's rule RUF022: constants, then classes, then the rest, each by name.
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[:1].isupper(), name)), names
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }

    assert len(text.splitlines()) <= LONGEST_FILE
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}
