"""Readers: present, missing or expired, whatever schema a record has."""

from datetime import datetime, timedelta, timezone

import polars as pl
import pytest

from materialize import codec, watermark
from materialize.errors import OnlineStoreError
from materialize.model import FeatureType, FeatureView, to_us
from materialize.online.memory import MemoryStore
from materialize.order import stamp
from materialize.serving import FeatureReader, FeatureVector
from materialize.testing import FOREVER

NOW = datetime(2025, 6, 1, tzinfo=timezone.utc)


def view(ttl=None, **features):
    kinds = {name: FeatureType.parse(kind) for name, kind in features.items()}
    return FeatureView("v", "s", ("k",), "ts", kinds, (), ttl=ttl)


def put(store, of, key, event, *values):
    schema_id = watermark.register_schema(store, of)
    order = pl.DataFrame({"event_us": [to_us(event)], "created_us": [0], "version": [stamp(1, 1)]})
    frame = pl.DataFrame({name: [value] for name, value in zip(of.features, values, strict=True)})
    batch = codec.encode(pl.Series([key]), order, frame, of, schema_id=schema_id)
    store.merge("v", batch, tie_wins=True, retention=FOREVER)


def test_vectors_come_in_the_order_asked_for_with_their_status():
    store, mine = MemoryStore(), view(a="int64", b="string")
    put(store, mine, b"1", NOW, 5, None)
    at = stamp(1, 2)
    store.replace("v", codec.tombstones([b"2"], at), at=at, retention=FOREVER)

    found = FeatureReader(mine, store).lookup([b"2", b"1", b"3"], now=NOW)

    missing = FeatureVector("missing", None, {})
    assert found == [missing, FeatureVector("present", NOW, {"a": 5, "b": None}), missing]


def test_chosen_features_come_in_the_order_asked_for():
    store, mine = MemoryStore(), view(a="int64", b="int64", c="int64")
    put(store, mine, b"1", NOW, 1, 2, 3)

    (vector,) = FeatureReader(mine, store).lookup([b"1"], now=NOW, features=["c", "a"])

    assert list(vector.features.items()) == [("c", 3), ("a", 1)]


def test_a_vector_expires_with_its_ttl_even_if_the_store_still_has_it():
    store, mine = MemoryStore(), view(ttl=timedelta(hours=1), a="int64")
    put(store, mine, b"1", NOW, 1)
    reader = FeatureReader(mine, store)

    (before,) = reader.lookup([b"1"], now=NOW + timedelta(minutes=59))
    (after,) = reader.lookup([b"1"], now=NOW + timedelta(hours=1))

    assert (before.status, before.features) == ("present", {"a": 1})
    assert after == FeatureVector("expired", NOW, {})


def test_old_and_new_readers_and_records_never_mix_up_bytes():
    store, old, new = MemoryStore(), view(a="int64", b="float64"), view(b="float64", c="string", a="int64")
    old_reader = FeatureReader(old, store)
    put(store, old, b"old", NOW, 1, 2.5)
    assert old_reader.lookup([b"old"], now=NOW)[0].features == {"a": 1, "b": 2.5}
    put(store, new, b"new", NOW, 3.5, "x", 4)

    for_new = [vector.features for vector in FeatureReader(new, store).lookup([b"old", b"new"], now=NOW)]
    for_old = [vector.features for vector in old_reader.lookup([b"old", b"new"], now=NOW)]

    assert for_new == [{"b": 2.5, "c": None, "a": 1}, {"b": 3.5, "c": "x", "a": 4}]
    assert for_old == [{"a": 1, "b": 2.5}, {"a": 4, "b": 3.5}]


def test_an_unknown_feature_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"found 'z', expected features out of a, b"):
        FeatureReader(view(a="int64", b="int64"), MemoryStore()).lookup([b"1"], now=NOW, features=["a", "z"])


def test_a_record_whose_schema_was_lost_is_refused():
    store, other, mine = MemoryStore(), MemoryStore(), view(a="int64")
    put(other, mine, b"1", NOW, 1)
    store.content.records.update(other.content.records)

    with pytest.raises(OnlineStoreError, match=r"'v'.*found the schema id \d+.*materialize rebuild v"):
        FeatureReader(mine, store).lookup([b"1"], now=NOW)


def test_a_record_of_a_newer_release_is_refused_and_the_others_are_read():
    store, mine = MemoryStore(), view(a="int64")
    put(store, mine, b"1", NOW, 1)
    content = store.read_cell("v", "schemas")
    newer = content[:-1] + b', "9": "[[\\"a\\",\\"map<string,int8>\\"]]"}'
    assert store.compare_and_set_cell("v", "schemas", content, newer)
    order = pl.DataFrame({"event_us": [to_us(NOW)], "created_us": [0], "version": [stamp(1, 1)]})
    batch = codec.encode(pl.Series([b"2"]), order, pl.DataFrame({"a": [1]}), mine, schema_id=9)
    store.merge("v", batch, tie_wins=True, retention=FOREVER)

    assert FeatureReader(mine, store).lookup([b"1"], now=NOW)[0].features == {"a": 1}
    with pytest.raises(OnlineStoreError, match=r"found the schema id 9, .*newer release"):
        FeatureReader(mine, store).lookup([b"2"], now=NOW)
