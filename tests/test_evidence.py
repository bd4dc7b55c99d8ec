"""What two answers of a server, then and now, say about what was written in between. The same on real servers: tests/proofs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from materialize.evidence import (
    Evidence,
    during_run,
    facts_from_json,
    facts_to_json,
    position,
    since_watermark,
)

A, B, NONE = "a" * 40, "b" * 40, "0" * 40
THEN = Evidence("run1", A, NONE, -1, 1_000, 5, 100, 1_000, "noeviction")
LATER: dict[str, Any] = {"offset": 2_000}
RESTARTED: dict[str, Any] = {"run_id": "run2", "replid": B, "offset": 10, "evicted": 0}


def taken_over(survived: int) -> dict[str, Any]:
    """A replica took over that had *survived* bytes of the history."""
    return RESTARTED | {"replid2": A, "second_offset": survived + 1, "offset": survived + 500}


@pytest.mark.parametrize(
    ("changes", "lost", "words"),
    [
        (LATER, False, ""),
        ({"offset": 999}, True, "went back by 1 bytes"),
        (LATER | {"evicted": 8}, True, "evicted 3 keys"),
        (LATER | {"evicted": 0}, False, ""),  # CONFIG RESETSTAT on a server that evicts nothing
        (LATER | {"evicted": 0, "policy": "allkeys-lru"}, True, "its count began anew"),
        (LATER | {"run_id": "run2", "evicted": 0}, False, "restarted with all it had"),
        (LATER | {"run_id": "run2", "evicted": 2}, True, "evicted 2 keys"),
        (taken_over(1_000), False, "has all that is older than its watermark"),
        (taken_over(999), True, "1 bytes written before the watermark are lost"),
        (RESTARTED, False, "may have gone back; this goes on from the watermark that it has"),
        ({"replid": B}, False, ""),
        ({"replid": B, "replid2": "c" * 40, "second_offset": 5_000}, True, "was a replica of another one"),
    ],
)
def test_between_a_watermark_and_the_next_run(changes: dict[str, Any], words: str, *, lost: bool) -> None:
    verdict = since_watermark({"server": THEN}, {"server": replace(THEN, **changes)})

    assert verdict.lost is lost
    assert words in verdict.words
    assert bool(verdict.words) is bool(words)


@pytest.mark.parametrize(
    ("changes", "lost", "words"),
    [
        (LATER, False, ""),
        ({"offset": 1_499}, True, "may have lost what the run wrote"),
        (LATER | {"evicted": 6}, True, "evicted 1 keys"),
        (LATER | {"run_id": "run2", "evicted": 0}, False, "with all that the run wrote"),
        (taken_over(1_500), False, "by its offsets has all that the run wrote"),
        (taken_over(1_499), True, "the last 1 bytes that the run wrote to it are lost"),
        (RESTARTED, True, "may have lost what the run wrote"),
        ({"replid": B, "offset": 0}, False, ""),  # its first replica came, and its history got a name
    ],
)
def test_during_a_run(changes: dict[str, Any], words: str, *, lost: bool) -> None:
    verdict = during_run({"server": THEN}, {"server": replace(THEN, **changes)}, {position("run1", A): 1_500})

    assert verdict.lost is lost
    assert words in verdict.words
    assert bool(verdict.words) is bool(words)


def test_each_server_of_several_is_compared_with_itself() -> None:
    then = {"one": THEN, "two": replace(THEN, run_id="run9", replid=B, evicted=0)}

    assert since_watermark(then, then).words == ""
    assert since_watermark(then, then | {"two": replace(then["two"], evicted=7)}).words == "the server evicted 7 keys"
    assert since_watermark(then, {"one": THEN}).words == "the store had 2 servers and has 1, or others"


def test_a_replica_of_another_name_goes_on_for_the_server_whose_history_it_has() -> None:
    then = {"10.0.0.1": THEN, "10.0.0.2": replace(THEN, run_id="run9", replid="d" * 40)}
    others = {"10.0.0.2": then["10.0.0.2"]}

    kept = since_watermark(then, others | {"10.0.0.9": replace(THEN, **taken_over(1_000))})
    lost = since_watermark(then, others | {"10.0.0.9": replace(THEN, **taken_over(900))})

    assert (kept.lost, kept.words) == (
        False,
        since_watermark({"s": THEN}, {"s": replace(THEN, **taken_over(1_000))}).words,
    )
    assert lost.lost
    assert "100 bytes written before the watermark are lost" in lost.words


def test_facts_are_read_as_they_were_written_and_those_of_another_release_are_none() -> None:
    facts = {"server": THEN}
    told = facts_to_json(facts)
    assert told is not None

    assert facts_from_json(told) == facts
    assert facts_from_json(None) is None
    assert facts_from_json({"server": told["server"] | {"more": 1}}) == facts
    assert facts_from_json({"server": {"run_id": "run1"}}) is None


def test_a_server_without_a_limit_evicts_nothing_and_has_room() -> None:
    unlimited = replace(THEN, maxmemory=0, policy="allkeys-lru")
    assert (unlimited.evicts, unlimited.free) == (False, float("inf"))
    assert (replace(THEN, policy="allkeys-lru").evicts, THEN.free) == (True, 900)
