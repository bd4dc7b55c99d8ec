"""The order rule: what may never happen, and planted bugs in the rule that random histories must catch."""

import types
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from materialize import order
from materialize.online import memory
from materialize.order import GENERATION, NO_CREATED, NO_FLOOR, STALE, UNCHANGED, WRITTEN, Record, merge, replace, stamp
from materialize.testing import histories

times = st.integers(1, 4)
versions = st.integers(1, 6)
live = st.builds(Record, times, times, versions, st.just(NO_FLOOR), st.binary(max_size=2))
tombstones = st.builds(Record, st.none(), st.just(0), versions, versions)
stored = st.one_of(st.none(), tombstones, st.builds(Record, times, times, versions, st.integers(0, 6)))


@given(stored, live, st.booleans())
def test_merging_twice_is_merging_once(held, new, tie_wins):
    _, once = merge(held, new, tie_wins=tie_wins)

    outcome, twice = merge(once, new, tie_wins=tie_wins)

    assert twice == once
    assert outcome != WRITTEN


@given(stored, st.one_of(live, tombstones), versions)
def test_replacing_twice_is_replacing_once(held, new, at):
    _, once = replace(held, new, at=at)

    outcome, twice = replace(once, new, at=at)

    assert twice == once
    assert outcome != WRITTEN


@given(
    st.lists(live, min_size=1, max_size=5, unique_by=lambda record: (record.event_us, record.created_us)), st.randoms()
)
def test_merges_end_alike_in_any_order(records, rng):
    ends = []
    for _ in range(3):
        rng.shuffle(records)
        held = None
        for record in records:
            _, held = merge(held, record, tie_wins=True)
        ends.append(held)

    assert ends[0] == ends[1] == ends[2] == max(records, key=lambda record: (record.event_us, record.created_us))


@given(stored, live, st.booleans())
def test_a_merge_never_lowers_order_version_floor_or_loses_a_tie_from_a_backfill(held, new, tie_wins):
    outcome, kept = merge(held, new, tie_wins=tie_wins)

    if held is None:
        assert (outcome, kept) == (WRITTEN, new)
        return
    assert kept.floor == held.floor
    assert not held.newer_than(kept)
    if outcome == WRITTEN:
        assert new.version > held.floor
        assert tie_wins or new.newer_than(held)
    else:
        assert kept == held
        assert outcome == (UNCHANGED if new.same_order(held) else STALE)


@given(stored, st.one_of(live, tombstones), versions)
def test_a_floor_never_falls(held, new, at):
    _, kept = replace(held, new, at=at)

    assert kept.floor == max(at, held.floor if held else NO_FLOOR)


def test_a_stamp_orders_generations_before_versions_and_is_exact_in_a_double():
    assert stamp(1, 0) > NO_FLOOR
    assert stamp(2, 0) > stamp(1, GENERATION - 1)
    assert float(stamp(2**13 - 1, GENERATION - 1)) == stamp(2**13 - 1, GENERATION - 1)
    assert float(NO_CREATED) == NO_CREATED


#: Deliberate bugs, each as (text in materialize/order.py, what a careless hand would write).
MUTANTS = {
    "the floor is ignored": ("new.version > stored.floor and newer", "newer"),
    "the floor is forgotten by a merge": ("altered(new, floor=stored.floor)", "new"),
    "a tie always wins": ("tie_wins and new.same_order", "new.same_order"),
    "an equal version wins a tie": ("new.version > stored.version", "new.version >= stored.version"),
    "an earlier commit wins a tie": ("new.version > stored.version", "new.version < stored.version"),
    "a tie never wins": ("tie_wins and", "False and"),
    "an older event time wins": ("(self.event_us, self.created_us) > (", "(self.event_us, self.created_us) < ("),
    "created time does not count": (
        "(self.event_us, self.created_us) > (other.event_us, other.created_us)",
        "self.event_us > other.event_us",
    ),
    "an older snapshot replaces": ("if at <= stored.floor:", "if at < 0:"),
    "replace ignores a newer row": ("if stored.version <= at:", "if True:"),
    "replace lowers the version": ("altered(new, version=stored.version)", "new"),
    "replace leaves the floor": ("return STALE, altered(stored, floor=at)", "return STALE, stored"),
    "a tombstone beats a newer row": (
        "if self.event_us is None:\n            return False",
        "if self.event_us is None:\n            return True",
    ),
}


def store_with(rule):
    store = memory.MemoryStore()
    store.merge = lambda view, batch, *, tie_wins, retention: store._apply(
        view, batch, retention, lambda held, new: rule.merge(held, new, tie_wins=tie_wins)
    )
    store.replace = lambda view, batch, *, at, retention: store._apply(
        view, batch, retention, lambda held, new: rule.replace(held, new, at=at)
    )
    return store


def caught(rule, seeds):
    """Whether a memory store with *rule* differs from the true rule, or from the table, in any of the histories."""
    try:
        for seed in seeds:
            histories.play_history(store_with(rule), seed, "view")
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_in_the_rule_is_caught_by_random_histories(name):
    before, after = MUTANTS[name]
    source = Path(order.__file__).read_text()
    assert before in source
    mutant = types.ModuleType("mutant")
    mutant.__dict__["__name__"] = order.__name__  # its Record is made of the same fields
    exec(compile(source.replace(before, after), "mutant", "exec"), mutant.__dict__)

    class Mutant:
        @staticmethod
        def merge(held, new, *, tie_wins):
            return _plain(mutant.merge(_as(mutant, held), _as(mutant, new), tie_wins=tie_wins))

        @staticmethod
        def replace(held, new, *, at):
            return _plain(mutant.replace(_as(mutant, held), _as(mutant, new), at=at))

    assert caught(Mutant, range(5_000))


def test_the_rule_itself_is_not_caught():
    assert not caught(order, range(5_000))


def _as(mutant, record):
    return record and mutant.Record(record.event_us, record.created_us, record.version, record.floor, record.payload)


def _plain(result):
    outcome, record = result
    return outcome, Record(record.event_us, record.created_us, record.version, record.floor, record.payload)
