"""Positions move by compare-and-set, once per run, and schemas have one id in a store."""

import itertools
import json
import zlib

import pytest

from materialize import watermark
from materialize.errors import OnlineStoreError, StoreChangedError, WatermarkError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, Watermark
from materialize.online.memory import MemoryStore


def at(version, run_id="run", generation=1):
    return Watermark(generation, "table", version, "[]", "[]", run_id)


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


@pytest.mark.parametrize("winner", [at(415, "winner"), at(415, "loser", generation=2), at(414, "loser")])
def test_a_watermark_that_is_not_what_this_run_wrote_is_not_taken_for_it(winner):
    store = MemoryStore()
    start = watermark.move(store, "v", None, at(411))
    watermark.move(store, "v", start, winner)

    with pytest.raises(WatermarkError):
        watermark.move(store, "v", start, at(415, "loser"))
    assert watermark.read(store, "v") == winner


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

    with pytest.raises(StoreChangedError, match=r"it is at no version, this run started from version 1.*lost it"):
        watermark.move(MemoryStore(), "v", start, at(2))


def test_a_store_that_went_back_refuses_the_commit_of_a_run_that_began_before():
    store, older = MemoryStore(), MemoryStore()
    watermark.move(older, "v", None, at(1))
    start = watermark.move(store, "v", watermark.move(store, "v", None, at(1)), at(2))

    with pytest.raises(StoreChangedError, match=r"it is at version 1, this run started from version 2.*went back"):
        watermark.move(older, "v", start, at(3))
    assert watermark.read(older, "v") == at(1)


class Copying(MemoryStore):
    """A store that keeps a second copy of each cell, as one of several servers does."""

    def __init__(self):
        super().__init__()
        self.copies = {}

    def write_copies(self, view, name, content):
        self.copies[view, name] = content

    def read_copies(self, view, name):
        return [self.read_cell(view, name), self.copies.get((view, name))]


def test_the_oldest_copy_counts_and_a_missing_one_is_no_watermark():
    store = Copying()
    first = watermark.move(store, "v", None, at(1))
    second = watermark.move(store, "v", first, at(2))
    assert watermark.read(store, "v") == at(2)

    store.write_copies("v", "watermark", first.encode())
    assert watermark.read(store, "v") == at(1)
    with pytest.raises(StoreChangedError, match="went back"):
        watermark.move(store, "v", second, at(3))
    assert watermark.move(store, "v", first, at(2, "again"))
    assert watermark.read(store, "v") == at(2, "again")

    store.copies.clear()
    assert watermark.read(store, "v") is None
    watermark.move(store, "v", None, at(None, "snapshot"))
    assert watermark.read(store, "v") == at(None, "snapshot")


def test_a_schema_has_one_id_and_every_schema_is_known_to_readers():
    store = MemoryStore()
    first, second = view(a="int64"), view(a="int64", b="list<float32,4>")

    ids = [watermark.register_schema(store, each) for each in (first, second, first)]

    assert ids[0] == ids[2] != ids[1]
    assert watermark.schemas(store, "v") == {ids[0]: first.features, ids[1]: second.features}
    assert 0 not in ids


def test_schema_ids_are_from_1_to_65535_for_every_hash():
    found = {}
    for number in itertools.count():
        schema = view(**{f"f{number}": "int64"})
        found.setdefault(zlib.crc32(schema.schema_text.encode()) % 65_535, schema)
        if {0, 65_534} <= found.keys():
            break

    ids = [watermark.register_schema(MemoryStore(), found[crc]) for crc in (0, 65_534)]

    assert ids == [1, 65_535]


def test_two_schemas_with_one_hash_get_two_ids():
    store, mine = MemoryStore(), view(a="int64")
    taken = watermark.register_schema(MemoryStore(), mine)
    store.compare_and_set_cell("v", "schemas", None, json.dumps({str(taken): view(z="bool").schema_text}).encode())

    given = watermark.register_schema(store, mine)

    assert given == taken % 65_535 + 1
    assert watermark.schemas(store, "v")[given] == mine.features


UNREADABLE = [b"", b"[]", b"hello", b"\xff\xfe", b'{"a":1}', b"7", b'"text"', b"null"]


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_watermark_that_something_else_wrote_is_refused_and_left_alone(content):
    store = MemoryStore()
    store.compare_and_set_cell("v", "watermark", None, content)

    for read in (watermark.read, watermark.read_text):
        with pytest.raises(OnlineStoreError, match=r"'v'.*cell 'watermark'.*Upgrade, or delete.*materialize rebuild v"):
            read(store, "v")
    with pytest.raises(OnlineStoreError, match="cell 'watermark'"):
        watermark.move(store, "v", None, at(1))
    assert store.read_cell("v", "watermark") == content


@pytest.mark.parametrize("content", UNREADABLE)
def test_schemas_that_something_else_wrote_are_refused_and_left_alone(content):
    store = MemoryStore()
    store.compare_and_set_cell("v", "schemas", None, content)

    with pytest.raises(OnlineStoreError, match=r"'v'.*cell 'schemas'.*Upgrade, or delete.*materialize rebuild v"):
        watermark.schemas(store, "v")
    with pytest.raises(OnlineStoreError, match="cell 'schemas'"):
        watermark.register_schema(store, view(a="int64"))
    assert store.read_cell("v", "schemas") == content


def test_a_schema_of_a_newer_release_hides_no_other():
    store, mine = MemoryStore(), view(a="int64")
    newer = json.dumps({"9": '[["a","map<string,int8>"]]'}).encode()
    store.compare_and_set_cell("v", "schemas", None, newer)

    given = watermark.register_schema(store, mine)

    assert watermark.schemas(store, "v") == {given: mine.features}
    assert json.loads(store.read_cell("v", "schemas"))["9"] == '[["a","map<string,int8>"]]'


def test_a_schema_registered_at_the_same_time_by_another_run_is_kept():
    class Race(MemoryStore):
        def compare_and_set_cell(self, view_name, name, expected, new):
            if expected is None:
                other = json.dumps({"9": view(z="bool").schema_text}).encode()
                super().compare_and_set_cell(view_name, name, None, other)
            return super().compare_and_set_cell(view_name, name, expected, new)

    store = Race()

    given = watermark.register_schema(store, view(a="int64"))

    assert set(watermark.schemas(store, "v")) == {9, given}
