"""Entities that have no row any more: readers lose them, a tombstone keeps older runs away, and only what was seen is counted."""

from datetime import timedelta

import pytest

from materialize.decoder import Header
from materialize.errors import UnavailableError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, to_us
from materialize.online.memory import MemoryStore
from materialize.order import STALE, WRITTEN, stamp
from materialize.plan import Plan
from materialize.removal import AT_ONCE, remove, sweep
from materialize.testing import FOREVER, CrashingStore, Row, content, make_batch
from tests.tables import NOW

VIEW = FeatureView("view", "s", ("k",), "ts", {"x": FeatureType("int64")}, ("default",))
AT = stamp(2, 7)
PLAN = Plan(
    view="view",
    store="default",
    mode="incremental",
    run_id="r",
    table_id="t",
    from_version=6,
    to_version=7,
    generation=2,
    snapshot=False,
    pieces=1,
    rows=0,
    reason="",
    engine="",
)


@pytest.fixture
def filled(store):
    """Entities a, b, c and d of an older run, e of a newer one, t without a row."""
    store.replace("view", make_batch([Row(key) for key in (b"a", b"b", b"c", b"d")]), at=stamp(2, 5), retention=FOREVER)
    store.replace("view", make_batch([Row(b"e")]), at=stamp(2, 9), retention=FOREVER)
    store.replace("view", make_batch([Row(b"t", None)]), at=stamp(2, 5), retention=FOREVER)
    return store


def state(store):
    """What each entity is to readers, and the floor of its record."""
    heads = {key.decode(): Header.unpack(record) for key, record in content(store).items()}
    return {key: ("gone" if head.tombstone else "live", head.floor) for key, head in heads.items()}


def test_removed_entities_are_gone_with_the_floor_of_the_run_and_others_stay(filled):
    assert remove(VIEW, filled, PLAN, [b"a", b"c"], NOW) == 2

    found = state(filled)
    assert (found["a"], found["c"]) == (("gone", AT), ("gone", AT))
    assert [found[key][0] for key in "bde"] == ["live"] * 3


def test_entity_that_is_not_online_gets_a_tombstone_and_does_not_count(filled):
    assert remove(VIEW, filled, PLAN, [b"new", b"t"], NOW) == 0

    assert (state(filled)["new"], state(filled)["t"]) == (("gone", AT), ("gone", AT))
    late = make_batch([Row(b"new", version=stamp(2, 6)), Row(b"t", version=AT)])
    assert filled.merge("view", late, tie_wins=True, retention=FOREVER).tolist() == [STALE, STALE]
    newer = make_batch([Row(b"new", version=stamp(2, 8))])
    assert filled.merge("view", newer, tie_wins=True, retention=FOREVER).tolist() == [WRITTEN]


def test_entity_that_a_newer_run_wrote_stays(filled):
    assert remove(VIEW, filled, PLAN, [b"e"], NOW) == 0

    assert state(filled)["e"] == ("live", stamp(2, 9))


def test_removing_again_changes_and_counts_nothing(filled):
    remove(VIEW, filled, PLAN, [b"a", b"new"], NOW)
    before = content(filled)

    assert remove(VIEW, filled, PLAN, [b"a", b"new"], NOW) == 0
    assert content(filled) == before


def test_nothing_to_remove_asks_the_store_nothing():
    assert remove(VIEW, CrashingStore(MemoryStore(), after=0, effect=False, error=UnavailableError), PLAN, [], NOW) == 0


def test_many_entities_are_removed_in_parts(store):
    keys = [b"%d" % number for number in range(2 * AT_ONCE + 7)]
    store.replace("view", make_batch([Row(key) for key in keys[:-9]]), at=stamp(2, 5), retention=FOREVER)

    assert remove(VIEW, store, PLAN, keys, NOW) == len(keys) - 9
    assert set(state(store).values()) == {("gone", AT)}
    assert len(state(store)) == len(keys)


def test_entity_that_readers_did_not_see_any_more_does_not_count(store):
    view = FeatureView("view", "s", ("k",), "ts", VIEW.features, ("default",), ttl=timedelta(days=3))
    edge = to_us(NOW) - view.ttl_us
    rows = [Row(b"expired", edge), Row(b"fresh", edge + 1)]
    store.replace("view", make_batch(rows), at=stamp(2, 5), retention=view.retention(NOW))

    assert remove(view, store, PLAN, [b"expired", b"fresh"], NOW) == 1
    assert {what for what, _ in state(store).values()} == {"gone"}


def test_sweep_takes_what_is_below_the_snapshot(filled):
    filled.replace("view", make_batch([Row(b"b")]), at=AT, retention=FOREVER)

    assert sweep(VIEW, filled, PLAN, NOW) == 3

    found = state(filled)
    assert {key for key, (what, _) in found.items() if what == "live"} == {"b", "e"}
    assert min(floor for _, floor in found.values()) == AT
    assert sweep(VIEW, filled, PLAN, NOW) == 0
