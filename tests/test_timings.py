"""Where the seconds of a run went: they add up, and what is slow is what is told to be slow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from materialize import pipeline
from materialize.online.redis import RedisStore
from materialize.piece_report import PieceReport
from materialize.timings import PARTS, summed, timed, told
from tests.stepping import run
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from materialize.online.base import OnlineStore
    from tests import servers

ENCODING = PARTS["encoding"]
STAGES = {"plan", "commit", *PARTS["reading"], *ENCODING, *PARTS["sending"]}


def test_stages_of_the_thread_that_encodes_add_up(table: Table, any_store: OnlineStore) -> None:
    table.append(*(row(f"u{index}", 1) for index in range(1_000)))

    report = pipeline.incremental(table.view, any_store, run())

    assert set(report.timings) == STAGES
    assert sum(report.timings[stage] for stage in (*ENCODING, "commit")) == pytest.approx(report.seconds, abs=1e-4)
    assert min(report.timings.values()) >= 0.0
    assert sum(report.timings[stage] for stage in PARTS["reading"]) <= report.seconds


def test_run_with_nothing_new_plans_and_commits_only(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    pipeline.incremental(table.view, store, run())

    assert set(pipeline.incremental(table.view, store, run()).timings) == {"plan", "commit"}


def test_pieces_are_summed_and_travel_as_json(table: Table, store: OnlineStore) -> None:
    table.append(row("a", 1))
    table.append(row("b", 1))
    plan = pipeline.begin(
        table.view,
        store,
        pipeline.make_plan(table.view, store, mode="incremental", store_name="x", run_id="r"),
        now=NOW,
    )
    piece = pipeline.write_piece(table.view, store, plan, 0, now=NOW)

    report = pipeline.commit(table.view, store, plan, [PieceReport.from_dict(piece.to_dict())], now=NOW)

    assert report.timings["plan"] == pytest.approx(plan.seconds, abs=1e-5)
    assert {stage: report.timings[stage] for stage in piece.timings} == pytest.approx(piece.timings, abs=1e-5)
    assert summed([piece.timings, piece.timings])["encode"] == pytest.approx(2 * piece.timings["encode"], abs=1e-5)


def test_server_that_answers_late_is_told_as_server(table: Table, valkey: servers.Server) -> None:
    table.append(*(row(f"u{index}", 1) for index in range(100)))
    with RedisStore(valkey.url) as store:
        store.read_p99 = None
        pipeline.incremental(table.view, store, run())
        table.append(row("u1", 2))
        made = pipeline.make_plan(table.view, store, mode="incremental", store_name="x", run_id="r")
        plan = pipeline.begin(table.view, store, made, now=NOW)

        valkey.client.execute_command("CLIENT", "PAUSE", 1_000, "WRITE")
        timings = pipeline.write_piece(table.view, store, plan, 0, now=NOW).timings

    assert timings["server"] > 0.5
    assert timings["wait_store"] > 0.5
    assert timings["send"] < 0.5
    assert timings["encode"] < 0.5


def test_waiting_is_no_work() -> None:
    def wait() -> int:
        time.sleep(0.2)
        return 7

    def count() -> int:
        return sum(range(3_000_000))

    waited, worked = timed(wait)(), timed(count)()

    assert waited.result == 7
    assert waited.seconds >= 0.2
    assert waited.work < 0.1
    assert 0.0 < worked.work <= worked.seconds + 0.01


def test_call_that_fails_fails_with_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 // 0)()


def test_one_line_for_people_names_who_worked() -> None:
    line = told(
        {
            "plan": 0.1,
            "commit": 0.2,
            "read": 1.0,
            "winners": 0.5,
            "wait_read": 1.2,
            "encode": 2.0,
            "send": 0.3,
            "server": 4.0,
        }
    )

    assert line == (
        "plan 0.100 | reading: read 1.000, winners 0.500 | encoding: wait_read 1.200, encode 2.000 | "
        "sending: send 0.300, server 4.000 | commit 0.200"
    )
