"""The memory limit of a view: what follows from it, and that a process keeps it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from materialize.memory import FIXED, SMALLEST, rows_compared, rows_held, shares_compared
from materialize.offline import open_table, read_order, read_parts
from materialize.online.memory import MemoryStore
from materialize.pipeline import Run, incremental, make_plan
from tests.tables import at, row

if TYPE_CHECKING:
    from pathlib import Path

    from tests.tables import Table

#: The command line; at its end the greatest resident memory of the process, which getrusage would mix up with that of its parent.
MEASURED = """\
import sys
from materialize.cli import main
try:
    main()
finally:
    with open("/proc/self/status") as status:
        print(*[line for line in status if line.startswith("VmHWM")], file=sys.stderr)
"""
VIEW = """\
source: lake/visits
join_keys: [user]
event_timestamp: at
features: {{visits: float64}}
memory_limit: {limit}
ttl: 7300d
"""
#: Event times that are expired, and that are not for twenty years: 2000 and 2025.
OLD_US, NEW_US = 946_684_800_000_000, 1_740_787_200_000_000


def test_rows_grow_with_the_limit_and_shrink_with_the_keys() -> None:
    assert rows_held(10**9, ["long"]) == (10**9 - FIXED) // 124
    assert rows_held(10**9, ["long"]) > 3_000_000  # in one go
    assert rows_held(10**9, ["long", "string"]) < rows_held(10**9, ["string"]) < rows_held(10**9, ["integer"])
    assert rows_held(SMALLEST, ["long"]) > 1_200_000
    assert rows_held(FIXED, ["long"]) == 1
    assert rows_compared(rows_held(10**9, ["long"])) > 9_000_000
    assert rows_compared(1) == 2


def test_more_rows_are_compared_in_more_shares() -> None:
    assert [shares_compared(rows, 1_000) for rows in (0, 400, 454, 455, 833, 834, rows_compared(1_000))] == [
        *(1, 1, 1, 2, 2, 3, 8)
    ]
    assert shares_compared(10**9, 1) == 8


def test_a_plan_says_how_many_shares_its_pieces_have(table: Table) -> None:
    table.append(*(row(f"u{number}", 1) for number in range(20)))
    names = {"store_name": "default", "run_id": "run"}

    plan = make_plan(table.view, MemoryStore(), mode="incremental", **names)

    assert (plan.rows, plan.shares, plan.rows_held) == (20, 1, rows_held(10**9, ["string"]))


def test_a_commit_that_cannot_be_compared_within_the_limit_is_read_from_the_snapshot(table: Table) -> None:
    table.append(*(row(f"u{number}", 1) for number in range(20)))
    store = MemoryStore()
    incremental(table.view, store, Run("default", "first", lambda: at(60)))
    table.append(*(row(f"u{number}", 2) for number in range(20)), mode="overwrite")

    plan = make_plan(
        table.change_view(memory_limit=FIXED), store, mode="incremental", store_name="default", run_id="second"
    )

    assert plan.snapshot
    assert "within the memory limit of the view no more than 2 are compared at once" in plan.reason


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 100])
def test_parts_of_files_are_together_all_their_rows_in_place(table: Table, rows: int) -> None:
    for number, many in enumerate((4, 1, 7, 2)):
        table.append(*(row(f"u{number}.{one}", one) for one in range(many)))
    table.delta.delete("user_id = 'u2.3'")
    opened = open_table(table.view)
    files = opened.snapshot_files()
    whole = read_order(opened, files)

    parts = list(read_parts(opened, files, rows=rows))
    joined = type(whole).concat(parts)

    assert max(part.frame.height for part in parts) <= max(rows, 1)
    assert joined.frame.equals(whole.frame)
    assert joined.counts.tolist() == whole.counts.tolist()
    assert [file.uri for file in joined.files] == [file.uri for file in whole.files]


def test_a_table_whose_keys_are_much_larger_than_the_limit_is_loaded_within_it(tmp_path: Path) -> None:
    """12 million entities, most of them expired: with the rows of a piece held at once, 6 million, the process takes 1.0 GB."""
    million, fresh = 1_000_000, 100_000
    for number in range(12):
        rows = np.arange(million, dtype=np.int64)
        old = rows < (million if number else million - fresh)
        moments = pa.array(np.where(old, OLD_US, NEW_US), pa.timestamp("us", "UTC"))
        visits = pa.array((number * million + rows).astype(np.float64))
        columns = {"user": pa.array(number * million + rows), "at": moments, "visits": visits}
        write_deltalake(str(tmp_path / "lake/visits"), pa.table(columns), mode="append")
    config = tmp_path / "config"
    (config / "feature_views").mkdir(parents=True)
    (config / "feature_views/visits.yaml").write_text(VIEW.format(limit="600MB"))
    (config / "online_stores.yaml").write_text(f'default: {{url: "sqlite:///{tmp_path}/online.db"}}\n')
    command = [sys.executable, "-c", MEASURED, "incremental", "visits", "--config", str(config), "--json"]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    (report,) = json.loads(ended.stdout) if ended.stdout.startswith("[") else [json.loads(ended.stdout)]
    told = {name: report[name] for name in ("rows_read", "entities", "expired", "written")}
    assert told == {
        "rows_read": 12 * million,
        "entities": 12 * million,
        "expired": 12 * million - fresh,
        "written": fresh,
    }
    peak = int(next(line for line in ended.stderr.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    assert peak < 600_000_000, f"{peak:,} bytes"
