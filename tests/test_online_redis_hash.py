"""The layout `hash`: the contract holds for it, plain readers see what the record says, and views change their layout without a gap."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from materialize import codec, pipeline, watermark
from materialize.errors import OnlineStoreError, RebuildNeeded
from materialize.feature_type import FeatureType
from materialize.forget import forget
from materialize.model import FeatureView, Interval, Retention
from materialize.online.base import HEADER
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.order import STALE, WRITTEN
from materialize.pipeline import Run
from materialize.plain import plain_texts
from materialize.testing import AT, FOREVER, OnlineStoreContract, Row, content, make_batch
from materialize.verify import verify
from tests.cluster import wait_until
from tests.stepping import vectors
from tests.tables import NOW, T0, row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from materialize.online.base import EncodedBatch, Outcomes
    from tests.cluster import Cluster
    from tests.servers import Server
    from tests.tables import Table

pytestmark = pytest.mark.server

HISTORIES = 100
#: All views that the contract writes.
VIEWS = frozenset({"view", "view_2", "vie", "vi", "other", *(f"view{number}" for number in range(HISTORIES))})
RUN = Run("default", "run", lambda: NOW)
KEYS = [f"user{number}".encode() for number in range(40)]


def hashed(store: RedisStore, *views: str) -> RedisStore:
    """*store*, which keeps *views* as hashes from now on."""
    store.hashed = frozenset(views)
    return store


def with_fields(rows: list[Row], texts: Mapping[str, list[str | None]], *, floor: int = 0) -> EncodedBatch:
    fields = {
        name: pa.array([None if text is None else text.encode() for text in column], pa.binary())
        for name, column in texts.items()
    }
    return replace(make_batch(rows, floor=floor), fields=fields)


def plain(fields: dict[bytes, bytes]) -> dict[str, str]:
    """What a plain reader takes from HGETALL."""
    return {name.decode(): text.decode() for name, text in fields.items() if name != b"_"}


# --- the contract ------------------------------------------------------------------------------------------------------


class TestHashes(OnlineStoreContract):
    histories = HISTORIES

    @pytest.fixture
    def store(self, server: Server) -> Iterator[RedisStore]:
        with RedisStore(server.url) as store:
            store.hashed = VIEWS
            yield store
            assert {server.client.type(name) for name in server.client.scan_iter("*{*")} <= {b"hash"}


class TestHashesOfACluster(OnlineStoreContract):
    histories = HISTORIES

    @pytest.fixture
    def store(self, cluster: Cluster) -> Iterator[RedisClusterStore]:
        with RedisClusterStore(cluster.url) as store:
            store.hashed = VIEWS
            yield store


class Undecided:
    """Each write in a layout drawn at random: as runs of old and new configurations do that write at the same time."""

    hashed: frozenset[str]
    draw = random.Random(7)

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        self.hashed = self.draw.choice((frozenset(), VIEWS))
        return super().merge(view, batch, tie_wins=tie_wins, retention=retention)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:
        self.hashed = self.draw.choice((frozenset(), VIEWS))
        return super().replace(view, batch, at=at, retention=retention)


class UndecidedStore(Undecided, RedisStore):
    pass


class UndecidedClusterStore(Undecided, RedisClusterStore):
    pass


class TestBothLayoutsAtOnce(OnlineStoreContract):
    histories = HISTORIES

    @pytest.fixture
    def store(self, server: Server) -> Iterator[RedisStore]:
        with UndecidedStore(server.url) as store:
            yield store


class TestBothLayoutsAtOnceInACluster(OnlineStoreContract):
    histories = HISTORIES

    @pytest.fixture
    def store(self, cluster: Cluster) -> Iterator[RedisClusterStore]:
        with UndecidedClusterStore(cluster.url) as store:
            yield store


# --- fields ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(server: Server) -> Iterator[RedisStore]:
    with RedisStore(server.url) as store:
        yield hashed(store, "view", "spending")


def fields_of(server: Server, key: str = "k", view: str = "view") -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = server.client.hgetall(f"fs:{view}:{{{key}}}")
    return found


def write(store: RedisStore, batch: EncodedBatch, retention: Retention = FOREVER) -> list[int]:
    outcomes: list[int] = store.merge("view", batch, tie_wins=True, retention=retention).tolist()
    return outcomes


def test_each_feature_has_a_field_and_a_null_has_none(store: RedisStore, server: Server) -> None:
    rows = [Row(b"k"), Row(b"l"), Row(b"m")]
    batch = with_fields(rows, {"a": ["1", None, ""], "b": [None, None, "x\r\ny"], "c": ["2", "3", "4"]})

    assert write(store, batch) == [WRITTEN] * 3

    assert fields_of(server, "k") == {b"_": batch.values[0].as_py(), b"a": b"1", b"c": b"2"}
    assert fields_of(server, "l") == {b"_": batch.values[1].as_py(), b"c": b"3"}
    assert fields_of(server, "m") == {b"_": batch.values[2].as_py(), b"a": b"", b"b": b"x\r\ny", b"c": b"4"}


def test_a_row_leaves_no_field_of_an_older_one(store: RedisStore, server: Server) -> None:
    write(store, with_fields([Row(b"k", 1)], {"a": ["1"], "b": ["1"], "old": ["1"]}))

    write(store, with_fields([Row(b"k", 2)], {"a": [None], "b": ["2"], "new": ["2"]}))
    assert plain(fields_of(server)) == {"b": "2", "new": "2"}
    write(store, with_fields([Row(b"k", 3)], {"a": ["3"], "b": [None], "new": [None]}))
    assert plain(fields_of(server)) == {"a": "3"}


def test_a_refused_row_changes_no_field(store: RedisStore, server: Server) -> None:
    write(store, with_fields([Row(b"k", 2)], {"a": ["2"]}))
    before = fields_of(server)

    assert write(store, with_fields([Row(b"k", 1)], {"a": ["1"], "b": ["1"]})) == [STALE]

    assert fields_of(server) == before


def test_a_tombstone_has_the_record_alone(store: RedisStore, server: Server) -> None:
    write(store, with_fields([Row(b"k")], {"a": ["1"]}))

    gone = make_batch([Row(b"k", None, version=AT + 1, payload=b"")], floor=AT + 1)
    store.replace("view", gone, at=AT + 1, retention=FOREVER)

    assert fields_of(server) == {b"_": gone.values[0].as_py()}


def test_a_row_that_stays_with_a_greater_floor_keeps_its_fields(store: RedisStore, server: Server) -> None:
    write(store, with_fields([Row(b"k", 5, version=AT + 5, payload=b"newer")], {"a": ["5"]}))

    older = with_fields([Row(b"k", 4, version=AT + 2)], {"a": ["4"]}, floor=AT + 2)
    assert store.replace("view", older, at=AT + 2, retention=FOREVER).tolist() == [STALE]

    assert plain(fields_of(server)) == {"a": "5"}
    assert fields_of(server)[b"_"][HEADER.size :] == b"newer"


def test_expiry_is_that_of_the_key_and_goes_with_the_ttl(store: RedisStore, server: Server) -> None:
    event = 4_000_000_000_000_000  # in 2096
    retention = Retention(ttl_us=1_000_000, keep_until_us=event)
    batch = with_fields([Row(b"k", event)], {"a": ["1"]})

    write(store, batch, retention)
    assert server.client.pexpiretime("fs:view:{k}") == event // 1000 + 1000
    write(store, with_fields([Row(b"k", event + 1_000)], {"a": ["2"]}), retention)
    assert server.client.pexpiretime("fs:view:{k}") == event // 1000 + 1001
    write(store, with_fields([Row(b"k", event + 2_000, version=AT + 9)], {"a": ["3"]}))
    assert server.client.pttl("fs:view:{k}") == -1
    older = with_fields([Row(b"k", event, version=AT + 2)], {"a": ["4"]}, floor=AT + 2)
    store.replace("view", older, at=AT + 2, retention=retention)  # stays, and has an expiry again
    assert server.client.pexpiretime("fs:view:{k}") == event // 1000 + 1002
    store.replace("view", replace_version(older, AT + 3), at=AT + 3, retention=FOREVER)
    assert server.client.pttl("fs:view:{k}") == -1
    assert plain(fields_of(server)) == {"a": "3"}


def replace_version(batch: EncodedBatch, at: int) -> EncodedBatch:
    return with_fields([Row(b"k", int(batch.event_us[0]), version=at)], {"a": ["5"]}, floor=at)


def test_thousands_of_features_and_long_values_are_stored(store: RedisStore, server: Server) -> None:
    texts = {f"f{number}": [str(number)] for number in range(4_500)}

    write(store, with_fields([Row(b"k")], texts))
    write(store, with_fields([Row(b"l", payload=b"x" * 900_000)], {"a": ["y" * 900_000]}))

    assert plain(fields_of(server)) == {name: text for name, (text,) in texts.items()}
    assert plain(fields_of(server, "l")) == {"a": "y" * 900_000}


def test_a_batch_maps_every_reply_and_every_text_to_its_row(server: Server, cluster: Cluster) -> None:
    rows = [Row(b"%d" % number, 10, payload=b"%d" % number) for number in range(3_000)]
    texts = {"a": [None if number % 3 else str(number) for number in range(3_000)], "b": list(map(str, range(3_000)))}
    for store in (RedisStore(server.url), RedisClusterStore(cluster.url)):
        with store:
            hashed(store, "view")
            write(store, make_batch(rows[::3]))

            outcomes = write(
                store, with_fields([one._replace(event_us=9 + n % 3) for n, one in enumerate(rows)], texts)
            )

            assert outcomes == [WRITTEN if number % 3 else STALE for number in range(3_000)]
            for number in range(0, 3_000, 97):
                client = store._client_of(b"fs:view:{%d}" % number)
                found = plain(client.hgetall(b"fs:view:{%d}" % number))
                assert found == ({"b": str(number)} if number % 3 else {})


@pytest.mark.parametrize("value", ["list", "hash", "string"])
@pytest.mark.parametrize("layout", ["hash", "vector"])
def test_what_is_no_record_is_left_alone_and_told(store: RedisStore, server: Server, value: str, layout: str) -> None:
    {
        "list": lambda: server.client.rpush("fs:view:{b}", "theirs"),
        "hash": lambda: server.client.hset("fs:view:{b}", "field", "theirs"),
        "string": lambda: server.client.set("fs:view:{b}", "theirs"),
    }[value]()
    before = server.client.dump("fs:view:{b}")
    hashed(store, *(["view"] if layout == "hash" else []))

    with pytest.raises(OnlineStoreError, match="found 1 keys below fs:view:"):
        write(store, make_batch([Row(b"a"), Row(b"b"), Row(b"c")]))

    assert server.client.dump("fs:view:{b}") == before
    assert {b"a", b"c"} <= set(content(store))
    if value != "string":
        assert store.read("view", [b"b"]) == [None]


def test_forgetting_erases_every_field(store: RedisStore, server: Server) -> None:
    write(store, with_fields([Row(b"k")], {"secret": ["42"]}))

    assert forget(store, "view", b"k") == "erased"

    assert set(fields_of(server)) == {b"_"}
    assert forget(store, "view", b"k") == "erased before"


def test_the_size_of_a_hash_is_that_of_all_its_fields(store: RedisStore, server: Server) -> None:
    write(store, with_fields([Row(b"k", payload=b"x" * 5_000)], {f"f{n}": ["1"] for n in range(200)}))

    told = store.record_bytes("view", [b"k", b"nobody"])

    assert told == server.client.memory_usage("fs:view:{k}", samples=0)
    assert told is not None
    assert told > 5_000 + 200 * 20


# --- texts -------------------------------------------------------------------------------------------------------------

FLOATS = [0.0, -0.0, 1.0, 0.1, 1 / 3, 1e16, 1e15, 1e22, 1e-5, 1e-7, 5e-324, 1.7976931348623157e308, 2.0**53, -2.5e-9]
FLOATS += [
    float("nan"),
    float("inf"),
    float("-inf"),
    *(random.Random(3).uniform(-1, 1) * 10**n for n in range(-30, 30)),
]
TIMES = [timedelta(0), timedelta(microseconds=-1), timedelta(microseconds=7), timedelta(days=20_000, hours=13)]
MOMENTS = [datetime(1970, 1, 1, tzinfo=timezone.utc) + delta for delta in TIMES]
MOMENTS += [datetime(1, 1, 1, tzinfo=timezone.utc), datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone.utc)]
COLUMNS: dict[str, tuple[Any, list[Any]]] = {
    "bool": (pl.Boolean, [True, False]),
    **{
        f"int{bits}": (getattr(pl, f"Int{bits}"), [0, -1, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))])
        for bits in (8, 16, 32, 64)
    },
    **{f"uint{bits}": (getattr(pl, f"UInt{bits}"), [0, 1, 2**bits - 1]) for bits in (8, 16, 32, 64)},
    "float64": (pl.Float64, FLOATS),
    "float32": (
        pl.Float32,
        [*map(float, np.array(FLOATS[:11] + FLOATS[12:], dtype=np.float32)), 3.4028234663852886e38],
    ),
    "string": (pl.String, ["", "hé", "a\0b\r\n", '"', "x" * 300]),
    "binary": (pl.Binary, [b"", b"\xff\x00", bytes(range(256))]),
    "date": (pl.Date, [date(1, 1, 1), date(999, 2, 28), date(1970, 1, 1), date(9999, 12, 31)]),
    "timestamp": (pl.Datetime("us", "UTC"), MOMENTS),
    "decimal(9,2)": (pl.Decimal(9, 2), [Decimal("0.00"), Decimal("-0.05"), Decimal("1234567.80")]),
    "decimal(38,0)": (pl.Decimal(38, 0), [Decimal(10**38 - 1), Decimal(-1)]),
    "decimal(38,38)": (pl.Decimal(38, 38), [Decimal("-0." + "9" * 38)]),
    "list<int64>": (pl.List(pl.Int64), [[], [1, -2], [2**63 - 1]]),
    "list<uint8,2>": (pl.List(pl.UInt8), [[1, 255], [0, 0]]),
    "list<float64>": (pl.List(pl.Float64), [[], FLOATS]),
    "list<float32>": (pl.List(pl.Float32), [[0.5, float(np.float32(0.1)), float("nan"), float("-inf"), -0.0]]),
}


def same_float(text: str, value: float, kind: str) -> bool:
    """Whether *text* has the digits of the shortest one that Python or numpy has for *value*, and so reads back as it."""
    shortest = repr(value) if kind == "float64" else str(np.float32(value))
    if not np.isfinite(value):
        return text == shortest
    return Decimal(text) == Decimal(shortest) and text.startswith("-") == shortest.startswith("-")


def says(text: str, value: Any, kind: FeatureType) -> bool:
    """Whether *text* is what docs/format.md says of *value*; shares no code with the product."""
    if kind.kind == "list":
        items = json.loads(text, parse_float=str, parse_int=str, parse_constant=pytest.fail)
        pairs = zip(items, value, strict=True)
        return all(says(item, one, FeatureType(kind.item)) for item, one in pairs)
    if kind.kind in {"float32", "float64"}:
        return same_float(text, value, kind.kind)
    if kind.kind == "decimal":
        return Decimal(text) == value and len(text.partition(".")[2]) == kind.scale
    told = {
        "bool": lambda: str(value).lower(),
        "timestamp": lambda: value.isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }
    return text == told.get(kind.kind, lambda: str(value))()


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_text_of_a_value_says_exactly_that_value(kind: str) -> None:
    dtype, values = COLUMNS[kind]
    feature = FeatureType.parse(kind)
    frame = pl.DataFrame({"f": pl.Series([*values, None], dtype=dtype)})

    texts = plain_texts(frame, {"f": feature})["f"].to_pylist()

    assert texts[-1] is None
    if kind == "binary":
        assert texts[:-1] == values
        return
    for text, value in zip(texts, values, strict=False):
        assert says(text.decode(), value, feature), (text, value)


@pytest.mark.parametrize(
    ("dtype", "kind", "value", "text"),
    [
        (pl.Float32, "float64", 0.1, b"0.10000000149011612"),
        (pl.Float64, "float32", 0.1, b"0.1"),
        (pl.Int32, "float64", 3, b"3.0"),
        (pl.Decimal(10, 1), "decimal(12,3)", Decimal("1.5"), b"1.500"),
        (pl.List(pl.Float64), "list<float32>", [0.1], b"[0.1]"),
        (pl.List(pl.Int64), "list<float64>", [1], b"[1.0]"),
        (pl.List(pl.Int64), "list<int8>", [1], b"[1]"),
    ],
)
def test_a_text_is_of_the_features_type_and_not_of_the_columns(dtype: Any, kind: str, value: Any, text: bytes) -> None:
    frame = pl.DataFrame({"f": pl.Series([value], dtype=dtype)})

    assert plain_texts(frame, {"f": FeatureType.parse(kind)})["f"].to_pylist() == [text]


def test_texts_belong_to_their_rows_when_nulls_move_rows() -> None:
    features = {"a": FeatureType("int64"), "b": FeatureType("string")}
    view = FeatureView("view", "s", ("k",), "ts", features, ("default",), layout="hash")
    frame = pl.DataFrame({"a": [None, 2, 3, 4], "b": ["w", "x", None, "z"]})
    order = pl.DataFrame({name: [1, 2, 3, 4] for name in ("event_us", "created_us", "version")})

    batch = codec.encode(pl.Series([b"k1", b"k2", b"k3", b"k4"]), order, frame, view, schema_id=1)

    found = dict(
        zip(batch.keys.to_pylist(), zip(*(batch.fields[n].to_pylist() for n in "ab"), strict=True), strict=True)
    )
    assert batch.keys.to_pylist() == [b"k2", b"k4", b"k1", b"k3"]
    assert found == {b"k1": (None, b"w"), b"k2": (b"2", b"x"), b"k3": (b"3", None), b"k4": (b"4", b"z")}
    vectors = codec.encode(pl.Series([b"k1"]), order[:1], frame[:1], replace(view, layout="vector"), schema_id=1)
    assert not vectors.fields


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(table: Table) -> Table:
    table.append(*(row(key.decode(), 1, amount=float(place)) for place, key in enumerate(KEYS)))
    table.view = replace(table.view, layout="hash")
    return table


def types(server: Server) -> set[bytes]:
    return {server.client.type(name) for name in server.client.scan_iter("fs:spending:{*")}


def test_a_run_brings_plain_fields_that_any_client_reads(store: RedisStore, server: Server, loaded: Table) -> None:
    pipeline.incremental(loaded.view, store, RUN)
    loaded.append(row("user3", 2, amount=None, count=7, country=None))
    pipeline.incremental(loaded.view, store, RUN)

    assert server.client.hmget("fs:spending:{user2}", "amount", "count", "country") == [b"2.0", b"1", b"DE"]
    assert plain(fields_of(server, "user3", "spending")) == {"count": "7"}
    vector = vectors(loaded.view, store, ["user3"])[0]
    assert vector.features == {"amount": None, "count": 7, "country": None}
    assert verify(loaded.view, store, RUN).mismatched == 0


def test_a_feature_that_comes_or_goes_is_a_field_that_does(store: RedisStore, server: Server, loaded: Table) -> None:
    less = replace(loaded.view, features={"count": loaded.view.features["count"]})
    pipeline.incremental(less, store, RUN)
    assert plain(fields_of(server, "user1", "spending")) == {"count": "1"}

    pipeline.incremental(loaded.view, store, RUN)
    assert plain(fields_of(server, "user1", "spending")) == {"count": "1", "amount": "1.0", "country": "DE"}
    pipeline.rebuild(less, store, RUN)
    assert plain(fields_of(server, "user1", "spending")) == {"count": "1"}


def test_verify_finds_and_mends_a_damaged_record(store: RedisStore, server: Server, loaded: Table) -> None:
    pipeline.incremental(loaded.view, store, RUN)
    record = fields_of(server, "user5", "spending")[b"_"]
    server.client.hset("fs:spending:{user5}", "_", record[:-1] + b"?")
    server.client.delete("fs:spending:{user6}")

    found = verify(loaded.view, store, RUN, repair=True)

    assert (found.wrong, found.missing, found.repaired) == (1, 1, 2)
    assert fields_of(server, "user5", "spending")[b"_"][HEADER.size :] == record[HEADER.size :]
    assert verify(loaded.view, store, RUN).mismatched == 0


def test_a_changed_layout_asks_for_a_rebuild_which_converts_every_key(
    store: RedisStore, server: Server, loaded: Table
) -> None:
    vectors = replace(loaded.view, layout="vector")
    hour = Interval(T0, T0 + timedelta(hours=1))
    hashed(store)
    pipeline.incremental(vectors, store, RUN)
    loaded.append(row("user0", 2, amount=99.0))
    assert types(server) == {b"string"}

    for view, views, kind in ((loaded.view, ["spending"], b"hash"), (vectors, [], b"string")):
        before = types(server)
        hashed(store, *views)
        for refused in (
            lambda view=view: pipeline.incremental(view, store, RUN),
            lambda view=view: pipeline.backfill(view, store, RUN, hour),
        ):
            with pytest.raises(RebuildNeeded, match=r"the layout changed from \w+ to \w+.*Run: materialize rebuild"):
                refused()
        with pytest.raises(OnlineStoreError, match="the layout changed"):
            verify(view, store, RUN)
        assert types(server) == before

        assert pipeline.rebuild(view, store, RUN).written == len(KEYS)

        assert types(server) == {kind}
        mark = watermark.read(store, "spending")
        assert mark is not None
        assert mark.layout == view.layout
        assert verify(view, store, RUN).mismatched == 0
        assert pipeline.incremental(view, store, RUN).entities == 0
    assert server.client.strlen("fs:spending:{user0}") > HEADER.size


def test_a_view_that_allows_it_is_rebuilt_by_the_next_run(store: RedisStore, server: Server, loaded: Table) -> None:
    hashed(store)
    pipeline.incremental(replace(loaded.view, layout="vector"), store, RUN)
    hashed(store, "spending")

    report = pipeline.incremental(replace(loaded.view, on_rebuild_needed="auto"), store, RUN)

    assert "the layout changed from vector to hash" in report.reason
    assert types(server) == {b"hash"}


def test_a_zombie_of_the_other_layout_loses_against_what_is_newer(store: RedisStore, server: Server) -> None:
    for views in (["view"], []):
        server.client.flushall()
        hashed(store, *views)
        store.replace(
            "view",
            with_fields([Row(b"k", 5, version=AT + 9)], {"a": ["5"]}, floor=AT + 9),
            at=AT + 9,
            retention=FOREVER,
        )
        before = server.client.dump("fs:view:{k}")
        hashed(store, *([] if views else ["view"]))

        zombie = with_fields([Row(b"k", 9, version=AT)], {"a": ["9"]})
        assert write(store, zombie) == [STALE]
        assert store.replace(
            "view", with_fields([Row(b"k", 9)], {"a": ["9"]}, floor=AT), at=AT, retention=FOREVER
        ).tolist() == [STALE]

        assert server.client.dump("fs:view:{k}") == before


def test_a_row_that_wins_brings_its_key_into_its_layout(store: RedisStore, server: Server) -> None:
    ttl = Retention(ttl_us=10**15, keep_until_us=4 * 10**15)
    for retention in (FOREVER, ttl):
        server.client.flushall()
        for event, views in enumerate((["view"], [], ["view"], []), start=3 * 10**15):
            hashed(store, *views)
            assert write(store, with_fields([Row(b"k", event)], {"a": [str(event)]}), retention) == [WRITTEN]
            assert server.client.type("fs:view:{k}") == (b"hash" if views else b"string")
            assert (server.client.pttl("fs:view:{k}") > 0) == (retention is ttl)
            if views:
                assert plain(fields_of(server)) == {"a": str(event)}


# --- readers while keys change their type ------------------------------------------------------------------------------


def converted_while_read(store: RedisStore, readers: list[RedisStore]) -> list[int]:
    """How many of the entities that are there were missing in each read while their keys changed to and fro."""
    batches = [with_fields([Row(key, event) for key in KEYS], {"a": ["1"] * len(KEYS)}) for event in range(1, 60)]
    write(store, batches[0])
    missing: list[list[int]] = [[] for _ in readers]
    over = threading.Event()

    def reads(number: int) -> None:
        while not over.is_set():
            missing[number].append(readers[number].read("view", KEYS).count(None))

    def all_read_again() -> None:
        """So that a key changes its type once or twice within a read, which is more often than a rebuild does."""
        before = [len(some) for some in missing]
        wait_until(
            lambda: all(len(some) > count for some, count in zip(missing, before, strict=True)), "all read again"
        )

    threads = [threading.Thread(target=reads, args=(number,)) for number in range(len(readers))]
    for thread in threads:
        thread.start()
    try:
        for number, batch in enumerate(batches[1:]):
            hashed(store, *(["view"] if number % 2 else []))
            assert write(store, batch) == [WRITTEN] * len(KEYS)
            all_read_again()
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert all(missing)
    return [count for some in missing for count in some]


def test_no_read_misses_an_entity_whose_key_changes_its_type(server: Server) -> None:
    with RedisStore(server.url) as store, RedisStore(server.url) as vectors, RedisStore(server.url) as hashes:
        assert set(converted_while_read(store, [vectors, hashed(hashes, "view")])) == {0}


def test_no_read_of_a_cluster_misses_an_entity_whose_key_changes_its_type(cluster: Cluster) -> None:
    stores = [RedisClusterStore(cluster.url) for _ in range(3)]
    try:
        assert set(converted_while_read(stores[0], [stores[1], hashed(stores[2], "view")])) == {0}
    finally:
        for store in stores:
            store.close()


def test_views_of_both_layouts_are_read_at_once(server: Server, cluster: Cluster) -> None:
    for store in (RedisStore(server.url), RedisClusterStore(cluster.url)):
        with store:
            hashed(store, "two")
            for view in ("one", "two"):
                batch = make_batch([Row(b"a", payload=view.encode())])
                store.merge(view, batch, tie_wins=True, retention=FOREVER)

            found = store.read_views({"one": [b"a", b"b"], "two": [b"b", b"a"]})

            assert [record and record[HEADER.size :] for record in found["one"]] == [b"one", None]
            assert [record and record[HEADER.size :] for record in found["two"]] == [None, b"two"]


def calls(server: Server) -> dict[str, int]:
    told = server.client.info("commandstats")
    names = ("get", "mget", "hget")
    return {name: told[f"cmdstat_{name}"]["calls"] for name in names if f"cmdstat_{name}" in told}


def test_a_read_asks_once_where_keys_are_what_they_should_be_and_again_for_what_mget_denies(
    server: Server,
) -> None:
    with RedisStore(server.url) as store:
        store.hashed = frozenset({"two"})
        for view in ("one", "two"):
            store.merge(view, make_batch([Row(b"a", 1), Row(b"b", 1)]), tie_wins=True, retention=FOREVER)
        server.client.config_resetstat()

        found = store.read_views({"one": [b"a", b"b"], "two": [b"a", b"none"]})

        assert [record is None for some in found.values() for record in some] == [False, False, False, True]
        assert calls(server) == {"mget": 1, "hget": 2}
        assert store.read("one", [b"none"]) == [None]  # one key alone is asked for by GET, which tells of a hash
        assert calls(server) == {"mget": 1, "hget": 2, "get": 1}
        assert store.read("one", [b"a", b"none"])[1] is None
        assert calls(server) == {"mget": 2, "hget": 3, "get": 1}


@pytest.mark.parametrize("hashed", [True, False])
def test_a_read_gives_up_what_is_neither_a_string_nor_a_hash(server: Server, *, hashed: bool) -> None:
    with RedisStore(server.url) as store:
        store.hashed = frozenset({"one"} if hashed else ())
        store.merge("one", make_batch([Row(b"a", 1)]), tie_wins=True, retention=FOREVER)
        server.client.rpush("fs:one:{list}", "x")

        assert [record is None for record in store.read("one", [b"list", b"a", b"list"])] == [True, False, True]
        assert store.read("one", [b"list"]) == [None]
