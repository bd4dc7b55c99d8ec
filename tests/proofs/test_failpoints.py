"""Runs that die at each step of the protocol, once and again in the run after: nothing is lost, stale or claimed too early."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from materialize import pipeline
from materialize.model import Interval, from_us
from materialize.online.base import OnlineStore
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisStore
from tests.proofs.oracle import Lake, unpacked, wrong_keys
from tests.proofs.stepped import READS, Died, Failpoint, Step, Stepped
from tests.proofs.story import FIRST_US, STEP_US, Story
from tests.stepping import plan_of, records, run
from tests.tables import NOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.model import FeatureView
    from tests import servers

SEED = 1
#: What a store does for people and before the first run of a view, and not in a run's protocol.
BESIDE = {"bulk", "close", "describe", "estimate", "prepare", "read_views", "record_bytes", "setup", "size"}
VIEW = "spending"


@dataclass(frozen=True, slots=True)
class Play:
    """Runs after each other. ``before``: finished ones. ``dies``, ``again``: the two that die. Each: a mode, and the book it reads."""

    before: tuple[tuple[str, int], ...]
    dies: tuple[str, int]
    again: tuple[str, int]


#: The table of book 0 has a snapshot, book 1 has late rows, ties, updates and deletes since then, book 2 even more of these.
PLAYS = {
    "first": Play((), ("incremental", 1), ("incremental", 1)),
    "first, table goes on": Play((), ("incremental", 1), ("incremental", 2)),
    "incremental": Play((("incremental", 0),), ("incremental", 1), ("incremental", 1)),
    "incremental, table goes on": Play((("incremental", 0),), ("incremental", 1), ("incremental", 2)),
    "incremental in pieces": Play((("incremental", 0),), ("pieces", 1), ("pieces", 1)),
    "rebuild": Play((("incremental", 0),), ("rebuild", 1), ("rebuild", 1)),
    "rebuild, then incremental": Play((("incremental", 0),), ("rebuild", 1), ("incremental", 2)),
    "incremental, then rebuild": Play((("incremental", 0),), ("incremental", 1), ("rebuild", 1)),
    "backfill": Play((("incremental", 0),), ("backfill", 1), ("backfill", 1)),
    "backfill, then incremental": Play((("incremental", 0),), ("backfill", 1), ("incremental", 2)),
}


#: Plays for a real server too.
ON_A_SERVER = ("first", "incremental, table goes on", "rebuild, then incremental")


@dataclass(slots=True)
class Books:
    """One table at three of its versions, as views and as the oracle sees it. ``hour``: of its newest rows."""

    views: list[FeatureView]
    lakes: list[Lake]
    hour: int


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Books:
    folder = tmp_path_factory.mktemp("books")
    story = Story(folder / "book", SEED, entities=30)
    for number in range(3):
        story.append(0.6)
        story.grow(2)
        if number:
            story.update()
            story.delete()
            story.delete_entities()
        shutil.copytree(folder / "book", folder / str(number))
    paths = [folder / str(number) for number in range(3)]
    return Books([replace(story.table.view, source=str(path)) for path in paths], [Lake(p) for p in paths], story.hour)


class Memory:
    """Copies what a store in memory holds, and puts it back."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def copy(self) -> Any:
        content = self.store.content
        return dict(content.records), dict(content.cells), dict(content.due)

    def put(self, copy: Any) -> None:
        content = self.store.content
        for held, found in zip((content.records, content.cells, content.due), copy, strict=True):
            held.clear()
            held.update(found)


class Valkey:
    """As Memory, with a real server."""

    def __init__(self, server: servers.Server) -> None:
        self.client, self.store = server.client, RedisStore(server.url)

    def copy(self) -> Any:
        keys = sorted(self.client.keys())
        return dict(zip(keys, self.client.mget(keys), strict=True)) if keys else {}

    def put(self, copy: Any) -> None:
        self.client.flushdb()
        if copy:
            self.client.mset(copy)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Memory | Valkey]:
    found = Memory() if request.param == "memory" else Valkey(request.getfixturevalue("valkey"))
    with found.store:
        yield found


@dataclass(frozen=True, slots=True)
class Passed:
    """The steps of a run, and what the store held at each point where it could have died."""

    steps: list[Step]
    left: dict[Failpoint, Any]

    def told(self, point: Failpoint) -> str:
        return f"dies {point.way} step {point.number} ({self.steps[point.number].name})"


class Stage:
    """Plays one play in one store."""

    def __init__(self, books: Books, place: Memory | Valkey) -> None:
        self.books, self.place = books, place

    def run(self, mode: str, book: int, name: str, dies: Failpoint | None = None) -> Passed:
        """One run, which dies there or comes to its end."""
        passed = Passed([], {})

        def passes(point: Failpoint, half: Callable[[], Any] | None) -> None:
            if half is None:
                passed.left[point] = self.place.copy()
                return
            before = self.place.copy()
            half()
            passed.left[point] = self.place.copy()
            self.place.put(before)

        store = Stepped(self.place.store, dies, passes)
        try:
            RUNS[mode](self.books, self.books.views[book], store, name)
        except Died:
            assert dies is not None
        else:
            assert dies is None, f"{dies} was not reached"
        passed.steps.extend(store.steps)
        return passed

    def watermark(self) -> int | None:
        cell = self.place.store.read_cell(VIEW, "watermark")
        return None if cell is None else json.loads(cell)["version"]

    def facts(self) -> dict[bytes, Any]:
        found = records(self.books.views[0], self.place.store)
        return {key: unpacked(record) for key, record in found.items()}

    def check(self, told: str, claimed: int) -> int:
        """The store has everything that the watermark says or ever said. Returns: the greatest version that it ever said."""
        claimed = max(claimed, -1 if (version := self.watermark()) is None else version)
        if claimed >= 0:
            behind = self.books.lakes[2].behind(claimed, self.facts())
            assert not behind, f"{told}: {len(behind)} entities are behind version {claimed}"
        return claimed

    def finish(self, told: str, book: int) -> None:
        """A run that ends leaves every key exact."""
        self.run("incremental", book, "last")
        wrong = wrong_keys(self.books.lakes[book], self.facts())
        assert not wrong, f"{told}: {dict(wrong)}"
        assert self.watermark() == self.books.lakes[book].head, told


def whole(mode: str) -> Callable[[Books, FeatureView, Any, str], Any]:
    return lambda _books, view, store, name: getattr(pipeline, mode)(view, store, run(name))


def backfill(books: Books, view: FeatureView, store: Any, name: str) -> None:
    ends = [from_us(FIRST_US + hour * STEP_US) for hour in (books.hour - 25, books.hour - 5)]
    pipeline.backfill(view, store, run(name), Interval(*ends))


def in_pieces(_books: Books, view: FeatureView, store: Any, name: str) -> None:
    """The run as a scheduler cuts it: two pieces, the second one first."""

    @dataclass
    class Read:
        view: FeatureView

    plan = pipeline.begin(view, store, replace(plan_of(Read(view), store, "incremental", name), pieces=2))
    done = [pipeline.write_piece(view, store, plan, piece, now=NOW) for piece in (1, 0)]
    pipeline.commit(view, store, plan, done, now=NOW)


RUNS = {
    "incremental": whole("incremental"),
    "rebuild": whole("rebuild"),
    "backfill": backfill,
    "pieces": in_pieces,
}


def same(copy: Any) -> str:
    """Equal for contents that runs treat alike: all but a lease, which ends with its process, and what a server says of itself."""
    parts = copy if isinstance(copy, tuple) else (copy,)
    kept = [sorted((str(name), value) for name, value in part.items() if "lease" not in str(name)) for part in parts]
    return repr([[(name, plain(value) if "watermark" in name else value) for name, value in part] for part in kept])


def plain(cell: bytes) -> str:
    return json.dumps(json.loads(cell) | {"evidence": None}, sort_keys=True)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(("memory", name) for name in PLAYS),
        *(pytest.param("valkey", name, marks=pytest.mark.server) for name in ON_A_SERVER),
    ],
    indirect=["place"],
)
def test_runs_that_die_at_any_step_and_again_at_any_step_lose_nothing(
    books: Books, place: Memory | Valkey, name: str
) -> None:
    """The first death is one of a real run, at each of its failpoints (of reads, those that leave a store of their own). What it leaves
    is run again, and at each failpoint of that run its store is what a second death leaves, from where a last run ends exact.
    Equal stores are looked at once.
    """
    play, stage = PLAYS[name], Stage(books, place)
    for mode, book in play.before:
        stage.run(mode, book, "before")
    start, claimed = place.copy(), stage.check("before", -1)
    calm = stage.run(*play.dies, "dies")
    counts, once, twice = Counter[str](), dict[str, int](), set[tuple[int, str]]()
    for first, left in calm.left.items():
        after, told = left, calm.told(first)
        if calm.steps[first.number].method not in READS or same(left) not in once:
            place.put(start)
            stage.run(*play.dies, "dies", first)
            after = place.copy()
            assert same(after) == same(left), f"{told}: something was written after the death"
        if same(after) not in once:
            place.put(after)
            had = stage.check(told, claimed)
            later = stage.run(*play.again, "again")
            stage.finish(f"{told}, run again", play.again[1])
            for second, content in later.left.items():
                if (had, same(content)) not in twice:
                    twice.add((had, same(content)))
                    place.put(content)
                    pair = f"{told}, again {later.told(second)}"
                    stage.check(pair, had)
                    stage.finish(pair, play.again[1])
            once[same(after)] = len(later.left)
        counts["single"] += 1
        counts["pairs"] += once[same(after)]
    counts["stores after one"], counts["stores after two"] = len(once), len(twice)
    print(f"\n{name}, {type(place).__name__}: {dict(counts)}: {', '.join(step.name for step in calm.steps)}")
    assert counts["pairs"] >= counts["single"] >= len(calm.steps)


def test_every_call_that_a_store_has_is_a_step_of_some_play(books: Books) -> None:
    found = set()
    for play in PLAYS.values():
        stage = Stage(books, Memory())
        for mode, book in (*play.before, play.dies, play.again):
            found |= set(stage.run(mode, book, mode).steps)

    calls = {name for name in vars(OnlineStore) if name[0] != "_" and callable(getattr(OnlineStore, name))}
    assert calls - BESIDE <= {step.method for step in found}
    assert {"compare_and_set_cell schemas", "compare_and_set_cell watermark"} <= {step.name for step in found}
    assert {"merge", "replace", "replace tombstones"} <= {step.name for step in found}


@pytest.mark.parametrize("name", PLAYS)
def test_the_watermark_is_claimed_before_any_row_and_moved_after_all(books: Books, name: str) -> None:
    """In the steps of every run themselves."""
    play, stage = PLAYS[name], Stage(books, Memory())
    for mode, book in (*play.before, play.dies, play.again):
        names = [step.name for step in stage.run(mode, book, mode).steps]
        rows = [number for number, step in enumerate(names) if step.startswith(("merge", "replace"))]
        moves = [number for number, step in enumerate(names) if step == "compare_and_set_cell watermark"]
        if mode == "backfill":
            assert moves == []
        elif moves:
            assert moves[-1] > max(rows)
            assert all(move < min(rows) for move in moves[:-1])
            assert mode != "rebuild" or len(moves) == 2
