"""Positions move by compare-and-set, once per run, and schemas have one id in a store."""

import json

import pytest

from materialize import watermark
from materialize.errors import WatermarkError
from materialize.model import FeatureType, FeatureView, Watermark
from materialize.online.memory import MemoryStore


def at(version, run_id="run", generation=1):
    return Watermark(generation, "table", version, "[]", run_id)


def view(**features):
    return FeatureView("v", "s", ("k",), "ts", {name: FeatureType.parse(kind) for name, kind in features.items()}, ())


def test_a_watermark_is_read_as_it_was_written():
    store = MemoryStore()
    assert watermark.read(store, "v") is None

    text = watermark.move(store, "v", None, at(5))

    assert watermark.read(store, "v") == at(5)
    assert watermark.read_text(store, "v") == text


def test_the_second_of_two_runs_from_one_watermark_is_refused_and_told_why():
    store = MemoryStore()
    start = watermark.move(store, "v", None, at(411))
    watermark.move(store, "v", start, at(415, "winner"))

    with pytest.raises(
        WatermarkError, match=r"'v'.*at version 415, this run started from version 411.*nothing to repair"
    ):
        watermark.move(store, "v", start, at(414, "loser"))
    assert watermark.read(store, "v") == at(415, "winner")


def test_the_same_run_may_move_it_again():
    store = MemoryStore()
    start = watermark.move(store, "v", None, at(1))
    moved = watermark.move(store, "v", start, at(2))

    assert watermark.move(store, "v", start, at(2)) == moved


def test_a_run_whose_claim_was_taken_over_cannot_finish():
    store = MemoryStore()
    first = watermark.move(store, "v", None, at(None, "first"))
    watermark.move(store, "v", first, at(None, "second"))

    with pytest.raises(WatermarkError, match=r"at an unfinished snapshot run \(second\)"):
        watermark.move(store, "v", first, at(3, "first"))


def test_a_wiped_store_refuses_the_commit_of_a_run_that_began_before():
    store = MemoryStore()
    start = watermark.move(store, "v", None, at(1))

    with pytest.raises(WatermarkError, match=r"it is at no version, this run started from version 1"):
        watermark.move(MemoryStore(), "v", start, at(2))


def test_a_schema_has_one_id_and_every_schema_is_known_to_readers():
    store = MemoryStore()
    first, second = view(a="int64"), view(a="int64", b="list<float32,4>")

    ids = [watermark.register_schema(store, each) for each in (first, second, first)]

    assert ids[0] == ids[2] != ids[1]
    assert watermark.schemas(store, "v") == {ids[0]: first.features, ids[1]: second.features}
    assert 0 not in ids


def test_two_schemas_with_one_hash_get_two_ids():
    store, mine = MemoryStore(), view(a="int64")
    taken = watermark.register_schema(MemoryStore(), mine)
    store.compare_and_set_cell("v", "schemas", None, json.dumps({str(taken): view(z="bool").schema_text}).encode())

    given = watermark.register_schema(store, mine)

    assert given == taken % 65_535 + 1
    assert watermark.schemas(store, "v")[given] == mine.features
