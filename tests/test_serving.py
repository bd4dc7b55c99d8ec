"""Readers: each value present, null, missing, expired or a default; as dicts, numbers and Arrow; whatever schema a record has."""

from __future__ import annotations

import asyncio
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from materialize import codec, watermark
from materialize.config import load
from materialize.errors import ConfigError, OnlineStoreError, UnavailableError
from materialize.feature_service import FeatureService
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, from_us, to_us
from materialize.online import open_store
from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisStore
from materialize.order import stamp
from materialize.serving import STATUSES, AsyncOnlineFeatures, CacheSettings, Lookup, OnlineFeatures
from materialize.serving.core import MOST_SELECTIONS, Core
from materialize.serving.request import entity_key_bytes
from materialize.testing import FOREVER
from tests import servers
from tests.projects import PAST, Project
from tests.stepping import PATIENT, incremental
from tests.tables import NOW as FAR, Table, row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from materialize.online.base import OnlineStore

NOW = datetime(2025, 6, 1, tzinfo=timezone.utc)
EVERY_TYPE = {
    "b": ("bool", pl.Boolean, [True, False]),
    "i": ("int64", pl.Int64, [2**63 - 1, 2**53 + 1]),
    "u": ("uint64", pl.UInt64, [2**64 - 1, 0]),
    "f": ("float64", pl.Float64, [-0.0, 1e-308]),
    "h": ("float32", pl.Float32, [0.5, -1.5]),
    "s": ("string", pl.String, ["ä|{}", ""]),
    "r": ("binary", pl.Binary, [b"\0\xff", b""]),
    "d": ("date", pl.Date, [date(1, 1, 1), date(9999, 12, 31)]),
    "t": (
        "timestamp",
        pl.Datetime("us", "UTC"),
        [datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc), NOW],
    ),
    "m": ("decimal(38,4)", pl.Decimal(38, 4), [Decimal("1234567890123456789012345678901234.5678"), Decimal("-0.0001")]),
    "l": ("list<float32>", pl.List(pl.Float32), [[0.5], []]),
    "e": ("list<int64,2>", pl.List(pl.Int64), [[2**62, -1], [0, 1]]),
}

#: Columns of the types with one name.
COLUMNS: dict[str, Any] = (
    {"int16": pl.Int16}
    | {kind: column for kind, column, _ in EVERY_TYPE.values() if kind.isalnum()}
    | {
        "int32": pl.Int32,
        "uint16": pl.UInt16,
    }
)


def view(
    ttl: timedelta | None = None, name: str = "v", join_keys: Sequence[str] = ("k",), **features: str
) -> FeatureView:
    kinds = {feature: FeatureType.parse(kind) for feature, kind in features.items()}
    return FeatureView(name, "s", tuple(join_keys), "ts", kinds, ("default",), ttl=ttl)


def column(name: str, kind: FeatureType) -> Any:
    if kind.kind == "list":
        return pl.List(COLUMNS[kind.item])
    return COLUMNS.get(kind.kind) or EVERY_TYPE[name][1]


def put(store: OnlineStore, of: FeatureView, key: bytes, event: datetime, *values: Any, at: int = 1) -> None:
    schema_id = watermark.register_schema(store, of)
    order = pl.DataFrame({"event_us": [to_us(event)], "created_us": [0], "version": [stamp(1, at)]})
    frame = pl.DataFrame(
        {
            name: pl.Series([value], dtype=column(name, kind))
            for (name, kind), value in zip(of.features.items(), values, strict=True)
        }
    )
    batch = codec.encode(pl.Series([key]), order, frame, of, schema_id=schema_id)
    store.merge(of.name, batch, tie_wins=True, retention=FOREVER)


def bury(store: OnlineStore, of: FeatureView, key: bytes) -> None:
    at = stamp(1, 2)
    store.replace(of.name, codec.tombstones([key], at), at=at, retention=FOREVER)


def reader(store: OnlineStore, *views: FeatureView, now: datetime = NOW, **options: Any) -> OnlineFeatures:
    core = Core(views, "default", store.location, clock_us=lambda: to_us(now), **options)
    return OnlineFeatures(core, store)


# --- what a vector says ---


def test_vectors_come_in_the_order_asked_for_with_their_status(store: OnlineStore) -> None:
    mine = view(a="int64", b="string")
    put(store, mine, b"1", NOW - timedelta(hours=2), 5, None, at=7)
    bury(store, mine, b"2")

    deleted, there, never = reader(store, mine).batch_read("v", [2, 1, 3])

    assert [vector.status for vector in (deleted, there, never)] == ["missing", "present", "missing"]
    assert (there.features, there.statuses) == ({"a": 5, "b": None}, {"a": "present", "b": "null"})
    assert (there["a"], there.age, there.table_version) == (5, timedelta(hours=2), 7)
    assert there.event_timestamp == NOW - timedelta(hours=2)
    for vector in (deleted, never):
        assert (vector.features, vector.statuses) == ({"a": None, "b": None}, {"a": "missing", "b": "missing"})
        assert (vector.age, vector.event_timestamp, vector.table_version) == (None, None, None)


def test_chosen_features_come_in_the_order_asked_for(store: OnlineStore) -> None:
    mine = view(a="int64", b="int64", c="int64")
    put(store, mine, b"1", NOW, 1, 2, 3)
    features = reader(store, mine)

    assert list(features.read_features("v", 1, ["c", "a"]).features.items()) == [("c", 3), ("a", 1)]
    assert features.read_features("v", 1, ["b"]).features == {"b": 2}
    assert features.read_features("v", 1, []).features == {}


def test_choices_of_features_are_not_remembered_without_end(store: OnlineStore) -> None:
    names = [f"f{place}" for place in range(20)]
    mine = view(**dict.fromkeys(names, "int64"))
    core = Core([mine], "default", store.location)

    for many in range(3 * MOST_SELECTIONS):
        chosen = [name for place, name in enumerate(names) if many >> place & 1]
        assert core.selection("v", chosen).names == tuple(chosen)

    assert len(core.selections) <= MOST_SELECTIONS


def test_every_type_comes_back_exactly_one_by_one_and_as_arrow(any_store: OnlineStore) -> None:
    mine = view(**{name: kind for name, (kind, _, _) in EVERY_TYPE.items()})
    for place in range(2):
        put(any_store, mine, b"%d" % place, NOW, *(values[place] for _, _, values in EVERY_TYPE.values()))
    put(any_store, mine, b"2", NOW, *[None] * len(EVERY_TYPE))

    batch = reader(any_store, mine).batch_read("v", [0, 1, 2])

    expected = [{name: values[place] for name, (_, _, values) in EVERY_TYPE.items()} for place in range(2)]
    assert batch.to_dicts() == [*expected, dict.fromkeys(EVERY_TYPE)]
    assert math.copysign(1, batch[0]["f"]) == -1
    assert all(type(batch[0][name]) is type(values[0]) for name, (_, _, values) in EVERY_TYPE.items())
    arrow = batch.to_arrow()
    assert arrow.select(list(EVERY_TYPE)).to_pylist() == batch.to_dicts()
    assert arrow.schema.field("i").type == pa.int64()
    assert arrow.schema.field("m").type == pa.decimal128(38, 4)
    assert arrow.schema.field("t").type == pa.timestamp("us", tz="UTC")
    assert arrow.schema.field("e").type == pa.list_(pa.int64(), 2)
    assert arrow["__status"].to_pylist() == ["present"] * 3
    assert arrow["__event_timestamp"].to_pylist() == [NOW] * 3
    assert arrow["__table_version"].to_pylist() == [1] * 3
    assert [{STATUSES[code] for code in codes} for codes in arrow["__statuses"].to_pylist()] == [
        {"present"},
        {"present"},
        {"null"},
    ]


def test_a_vector_expires_with_its_ttl_even_if_the_store_still_has_it(store: OnlineStore) -> None:
    mine = view(ttl=timedelta(hours=1), a="int64")
    put(store, mine, b"1", NOW, 1)

    before = reader(store, mine, now=NOW + timedelta(hours=1) - timedelta(microseconds=1)).read_features("v", 1)
    after = reader(store, mine, now=NOW + timedelta(hours=1)).read_features("v", 1)

    assert (before.status, before.features) == ("present", {"a": 1})
    assert (after.status, after.features, after.statuses) == ("expired", {"a": None}, {"a": "expired"})
    assert (after.age, after.event_timestamp) == (timedelta(hours=1), NOW)


@pytest.mark.parametrize(("ttl", "late", "status"), [(None, 0, "present"), (None, 1, "expired"), (timedelta(1), 0, "present"), (timedelta(seconds=5), 0, "expired")])  # fmt: skip
def test_a_read_may_want_younger_vectors_than_the_ttl(
    store: OnlineStore, ttl: timedelta | None, late: int, status: str
) -> None:
    mine = view(ttl=ttl, a="int32")
    put(store, mine, b"1", NOW, 1)
    features = reader(store, mine, now=NOW + timedelta(seconds=10, microseconds=late))

    assert features.read_features("v", 1, max_age=timedelta(seconds=10)).status == status
    statuses = features.batch_read("v", [1], max_age=timedelta(seconds=10)).to_numpy().statuses
    assert STATUSES[statuses[0, 0]] == status


def test_a_feature_that_is_newer_than_the_record_is_missing_and_the_others_are_there(store: OnlineStore) -> None:
    old, new = view(a="int64"), view(b="float64", a="int64")
    put(store, old, b"old", NOW, 1)
    old_reader = reader(store, old)
    assert old_reader.read_features("v", "old").features == {"a": 1}
    put(store, new, b"new", NOW, 2.5, 2)

    found = reader(store, new).batch_read("v", ["old", "new"])

    assert found.to_dicts() == [{"b": None, "a": 1}, {"b": 2.5, "a": 2}]
    assert [vector.statuses["b"] for vector in found] == ["missing", "present"]
    # A reader that has the old view takes what it knows out of new records.
    assert old_reader.read_features("v", "new").features == {"a": 2}


# --- as numbers ---


def test_numbers_are_a_matrix_with_nan_and_the_reason_where_there_is_none(any_store: OnlineStore) -> None:
    old = view(ttl=timedelta(hours=1), text="string", f="float64", h="float32", i="int32", b="bool")
    new = replace(old, features=old.features | {"late": FeatureType("uint16")})
    put(any_store, old, b"old", NOW, "x", 1.5, 0.5, -3, True)  # noqa: FBT003 - a value
    put(any_store, new, b"null", NOW, None, None, 2.5, None, False, 9)  # noqa: FBT003 - a value
    put(any_store, new, b"nan", NOW, "long" * 9, math.nan, math.inf, 2**31 - 1, None, 65535)
    put(any_store, new, b"expired", NOW - timedelta(hours=1), "y", 1.0, 1.0, 1, True, 1)  # noqa: FBT003 - a value
    bury(any_store, new, b"dead")
    keys = ["dead", "nan", "old", "nobody", "null", "expired", "old"]

    batch = reader(any_store, new).batch_read("v", keys, ["late", "b", "f", "h", "i"])
    found = batch.to_numpy()

    nan = math.nan
    expected = [
        [nan] * 5,
        [65535, nan, nan, math.inf, 2**31 - 1],
        [nan, 1, 1.5, 0.5, -3],
        [nan] * 5,
        [9, 0, nan, 2.5, nan],
        [nan] * 5,
        [nan, 1, 1.5, 0.5, -3],
    ]
    np.testing.assert_array_equal(found.values, expected)
    assert found.values.dtype == np.float64
    told = [[STATUSES[code] for code in row] for row in found.statuses]
    assert told == [list(vector.statuses.values()) for vector in batch]
    assert told[1] == ["present", "null", "present", "present", "present"]
    np.testing.assert_array_equal(found.mask, found.statuses != 0)
    assert found.names == ("late", "b", "f", "h", "i")


def test_matrix_agrees_with_the_vectors_for_random_records(store: OnlineStore) -> None:
    rng = np.random.default_rng(5)
    names = [f"f{number}" for number in range(17)]
    mine = view(**dict.fromkeys(names, "float64"), text="string")
    for key in range(60):
        values = [None if rng.random() < 0.1 * (key % 3) else float(rng.normal()) for _ in names]
        put(store, mine, b"%d" % key, NOW, *values, "x" * int(rng.integers(5)))
    wanted = [str(name) for name in rng.permutation(names)[:11]]
    keys = [int(key) for key in rng.integers(0, 70, 100)]

    batch = reader(store, mine).batch_read("v", keys, wanted)

    dicts = [[math.nan if value is None else value for value in one.values()] for one in batch.to_dicts()]
    np.testing.assert_array_equal(batch.to_numpy().values, dicts)


@pytest.mark.parametrize("kind", ["int64", "uint64", "string", "date", "timestamp", "decimal(9,2)", "list<float32,3>"])
def test_a_matrix_of_what_float64_does_not_hold_exactly_is_refused(store: OnlineStore, kind: str) -> None:
    batch = reader(store, view(a="float64", other=kind)).batch_read("v", [1])

    with pytest.raises(ValueError, match=r"'other' is .*expected features out of bool, int8.*to_arrow"):
        batch.to_numpy()
    assert batch.to_arrow().num_rows == 1


def test_no_entities_give_nothing_in_every_form(any_store: OnlineStore) -> None:
    batch = reader(any_store, view(a="float64")).batch_read("v", [])

    assert (len(batch), list(batch), batch.to_dicts(), batch.to_numpy().values.shape) == (0, [], [], (0, 1))
    assert batch.to_arrow().num_rows == 0


def test_a_batch_is_a_sequence(store: OnlineStore) -> None:
    mine = view(a="int64")
    for key in range(5):
        put(store, mine, b"%d" % key, NOW, key)

    batch = reader(store, mine).batch_read("v", range(5))

    assert [vector["a"] for vector in batch[1:4:2]] == [1, 3]
    assert (batch[-1]["a"], len(batch)) == (4, 5)
    with pytest.raises(IndexError):
        batch[5]


# --- what is asked for ---


def test_one_lookup_reads_several_views_and_the_same_view_twice(any_store: OnlineStore) -> None:
    users, shops = view(name="users", a="int64"), view(name="shops", join_keys=["shop", "land"], b="string")
    put(any_store, users, b"1", NOW, 10)
    put(any_store, users, b"2", NOW, 20)
    put(any_store, shops, b"9|DE", NOW, "x")

    found = reader(any_store, users, shops).lookup(
        [
            Lookup("users", [2, 1]),
            Lookup("shops", [(9, "DE"), {"land": "DE", "shop": 9, "other": 1}, [8, "DE"]], ["b"]),
            Lookup("users", [1], ["a"], timedelta(0)),
        ]
    )

    assert [batch.to_dicts() for batch in found] == [
        [{"a": 20}, {"a": 10}],
        [{"b": "x"}, {"b": "x"}, {"b": None}],
        [{"a": 10}],
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((7, "a|b"), b"7|a%7Cb"),
        ((np.int64(7), np.str_("x")), b"7|x"),
        ((True, date(2025, 1, 2)), b"true|2025-01-02"),
        ((np.False_, "x"), b"false|x"),
        ({"k": 1, "l": "{x}"}, b"1|%7Bx%7D"),
        (b"raw|key", b"raw|key"),
    ],
)
def test_entity_keys_are_what_the_writer_writes(key: Any, expected: bytes) -> None:
    assert entity_key_bytes(view(join_keys=["k", "l"], a="int64"), key) == expected


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ((1,), "1 value(s)"),
        ("secret", "1 value(s)"),
        ((1, 2, 3), "3 value(s)"),
        ({"k": 1}, "no 'l'"),
        ((1, None), "a NoneType"),
        ((1, 2.0), "a float"),
        ((1, NOW), "a datetime"),
        ((1, ["secret"]), "a list"),
        (None, "1 value(s)"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused_without_its_values(store: OnlineStore, key: Any, found: str) -> None:
    features = reader(store, view(join_keys=["k", "l"], a="int64"))

    with pytest.raises(ValueError, match=r"feature view 'v': found .* join key: k, l") as refused:
        features.read_features("v", key)

    assert found in str(refused.value)
    assert "secret" not in str(refused.value)


def test_unknown_names_are_refused_with_those_there_are(store: OnlineStore) -> None:
    features = reader(store, view(a="int64", b="int64"))

    with pytest.raises(ValueError, match="'z', expected features out of a, b"):
        features.read_features("v", 1, ["a", "z"])
    with pytest.raises(ValueError, match="a feature name twice"):
        features.read_features("v", 1, ["a", "a"])
    with pytest.raises(ConfigError, match=r"feature view of the online store 'default' 'w': expected one of v"):
        features.read_features("w", 1)
    with pytest.raises(ConfigError, match="feature service 's'"):
        features.read_service("s", {"k": 1})


# --- feature services ---


SERVICE = FeatureService("pay", {"users": {"a": "a", "t": "text"}, "shops": {"a": "shop_a"}})


def test_a_feature_service_is_one_vector_of_several_views(any_store: OnlineStore) -> None:
    users = view(name="users", join_keys=["user"], t="string", a="float64")
    shops = view(name="shops", join_keys=["shop"], ttl=timedelta(hours=5), a="float32")
    put(any_store, users, b"1", NOW - timedelta(hours=3), None, 1.5)
    put(any_store, shops, b"9", NOW - timedelta(hours=1), 2.5)
    put(any_store, shops, b"8", NOW - timedelta(hours=6), 2.5)
    features = reader(any_store, users, shops, services={"pay": SERVICE})

    first, second = batch = features.batch_read_service("pay", [{"user": 1, "shop": 9}, {"user": 2, "shop": 8}])

    assert list(first.features.items()) == [("a", 1.5), ("text", None), ("shop_a", 2.5)]
    assert first.statuses == {"a": "present", "text": "null", "shop_a": "present"}
    assert (first["shop_a"], first.age, first.vectors["shops"].age) == (2.5, timedelta(hours=3), timedelta(hours=1))
    assert second.statuses == {"a": "missing", "text": "missing", "shop_a": "expired"}
    assert features.read_service("pay", {"user": 1, "shop": 9}) == first
    assert batch.to_dicts() == [first.features, second.features]
    assert [vector.features for vector in batch[0:2]] == batch.to_dicts()
    arrow = batch.to_arrow()
    assert arrow.select(["a", "text", "shop_a"]).to_pylist() == batch.to_dicts()
    assert arrow["__status.shops"].to_pylist() == ["present", "expired"]
    with pytest.raises(ValueError, match="'t' is string"):
        batch.to_numpy()
    with pytest.raises(ValueError, match="feature view 'shops': found no 'shop'"):
        features.read_service("pay", {"user": 1})


def test_a_feature_service_of_numbers_is_a_matrix(store: OnlineStore) -> None:
    users, shops = view(name="users", join_keys=["user"], t="string", a="float64"), view(name="shops", a="float32")
    put(store, users, b"1", NOW, "x", 1.5)
    service = FeatureService("pay", {"shops": {"a": "shop_a"}, "users": {"a": "a"}})
    features = reader(store, users, shops, services={"pay": service})

    found = features.batch_read_service("pay", [{"user": 1, "k": 9}]).to_numpy()

    assert found.names == ("shop_a", "a")
    np.testing.assert_array_equal(found.values, [[math.nan, 1.5]])
    assert found.mask.tolist() == [[True, False]]


# --- from a config folder; sync and asyncio ---


def test_both_clients_read_what_a_run_wrote(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("a", PAST, 1.5, country=None), row("b", PAST + 1, 2.5))
    project.run("incremental")

    with OnlineFeatures.connect(project.config, terms=PATIENT) as features:
        found = features.batch_read("spending", ["b", "a", "c"], ["amount", "country"])

    assert found.to_dicts() == [
        {"amount": 2.5, "country": "DE"},
        {"amount": 1.5, "country": None},
        {"amount": None, "country": None},
    ]
    assert awaited(project.config) == found.to_dicts()


def awaited(config: Path) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        async with AsyncOnlineFeatures.connect(config, terms=PATIENT) as features:
            one = await features.read_features("spending", "b", ["amount", "country"])
            batch = await features.batch_read("spending", ["b", "a", "c"], ["amount", "country"])
            several = await asyncio.gather(*(features.lookup([Lookup("spending", ["a"])]) for _ in range(20)))
            assert one.features == batch[0].features
            assert {batch[0]["amount"] for (batch,) in several} == {1.5}
            return batch.to_dicts()

    return asyncio.run(read())


# --- pushing through a reader ---


def test_a_pushed_row_is_read_at_once_also_by_a_reader_that_remembers(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(row("a", PAST, 1.0), row("b", PAST, 2.0))
    project.run("incremental")
    with OnlineFeatures.connect(project.config, cache=CacheSettings(ttl=timedelta(hours=1)), terms=PATIENT) as features:
        before = [features.read_features("spending", key)["amount"] for key in ("a", "c")]

        report = features.push("spending", [row("a", PAST + 1, 5.0), row("c", PAST + 1, 7.0)], push_id="one")
        again = features.push("spending", [row("a", PAST + 1, 5.0), row("c", PAST + 1, 7.0)], push_id="one")
        behind = features.push("spending", [row("a", PAST + 2, 9.0)], "offline")

        assert before == [1.0, None]
        assert (report.version, report.written, report.online) == (1, 2, True)
        assert (again.version, again.again, again.unchanged) == (1, True, 2)
        assert (behind.version, behind.online, project.table.version) == (2, False, 2)
        assert features.batch_read("spending", ["a", "b", "c"], ["amount"]).to_dicts() == [
            {"amount": 5.0},
            {"amount": 2.0},
            {"amount": 7.0},
        ]
        assert features.read_features("spending", "a").table_version == 1
        project.run("incremental")
    assert awaited_push(project.config) == 11.0


def awaited_push(config: Path) -> float:
    async def push() -> float:
        async with AsyncOnlineFeatures.connect(config, terms=PATIENT) as features:
            await features.push("spending", [row("a", PAST + 3, 11.0)])
            return (await features.read_features("spending", "a"))["amount"]  # type: ignore[no-any-return]

    return asyncio.run(push())


def test_pushing_where_it_cannot_be_is_refused(tmp_path: Path, store: OnlineStore) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    with (
        OnlineFeatures.connect(project.config, terms=PATIENT) as features,
        pytest.raises(ConfigError, match="'default' 'nothing'"),
    ):
        features.push("nothing", [row("a", PAST)])
    with pytest.raises(ConfigError, match="found a reader of a store that was open already"):
        OnlineFeatures.over([view(a="int64")], store).push("v", [])


def test_a_reader_loads_nothing_that_only_writing_needs(tmp_path: Path) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    code = (
        "import sys; from materialize.serving import OnlineFeatures\n"
        f"OnlineFeatures.connect({str(project.config)!r}).read_features('spending', 'a')\n"
        "print([name for name in ('deltalake', 'polars', 'boto3', 'redis', 'airflow', 'typer') if name in sys.modules])"
    )

    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


# --- when the store does not answer, or holds something else ---


class Silent(MemoryStore):
    """A store that does not answer: a fake, because the real ones are made silent in tests/test_reading.py."""

    def read_views(self, keys: Any) -> Any:  # noqa: ARG002 - never answered
        raise UnavailableError("no answer")


def test_without_defaults_a_silent_store_is_an_error() -> None:
    with pytest.raises(UnavailableError, match="no answer"):
        reader(Silent(), view(a="int64")).read_features("v", 1)


def test_defaults_stand_for_every_vector_while_the_store_is_silent() -> None:
    users, shops = view(name="users", a="float64", b="float64", c="string"), view(name="shops", a="float64")
    defaults = {"users": {"a": 0.5, "b": None}}
    features = reader(Silent(), users, shops, defaults=defaults)

    batch = features.batch_read("users", [1, 2], ["c", "b", "a"])

    assert batch.to_dicts() == [{"c": None, "b": None, "a": 0.5}] * 2
    assert batch[0].status == "default"
    assert batch[0].statuses == {"c": "missing", "b": "null", "a": "default"}
    numbers = features.batch_read("users", [1], ["b", "a"]).to_numpy()
    np.testing.assert_array_equal(numbers.values, [[math.nan, 0.5]])
    assert numbers.mask.tolist() == [[True, False]]
    # A view without defaults makes the whole lookup fail: half an answer is none.
    with pytest.raises(UnavailableError):
        features.lookup([Lookup("users", [1]), Lookup("shops", [1])])


def test_defaults_are_not_for_what_is_missing(store: OnlineStore) -> None:
    features = reader(store, view(a="float64"), defaults={"v": {"a": 0.5}})

    assert features.read_features("v", 1).statuses == {"a": "missing"}


@pytest.mark.parametrize(("defaults", "error"), [({"w": {"a": 1}}, ConfigError), ({"v": {"z": 1}}, ValueError)])
def test_defaults_of_what_there_is_not_are_refused(store: OnlineStore, defaults: Any, error: Any) -> None:
    with pytest.raises(error):
        reader(store, view(a="float64"), defaults=defaults)


@pytest.mark.parametrize(
    "content", [b"", b"\x09" + bytes(40), b"x" * 400, b"longer"], ids=["nothing", "format", "text", "longer"]
)
def test_something_else_under_the_key_is_told(valkey: servers.Server, content: bytes) -> None:
    mine = view(a="int32")
    with RedisStore(valkey.url) as store:
        put(store, mine, b"1", NOW, 1)
        features = reader(store, mine)
        assert features.read_features("v", 1)["a"] == 1
        record = valkey.client.get("fs:v:{1}")
        valkey.client.set("fs:v:{1}", record + b"x" if content == b"longer" else content)

        with pytest.raises(OnlineStoreError, match="could not decode a stored value"):
            features.batch_read("v", [1])[0]
        with pytest.raises(OnlineStoreError, match="could not decode a stored value"):
            features.batch_read("v", [1]).to_numpy()


def test_a_record_of_an_unknown_schema_is_told_and_the_cell_is_read_again_when_it_appears(store: OnlineStore) -> None:
    mine = view(a="int64")
    put(store, mine, b"1", NOW, 1)
    cell = store.read_cell("v", watermark.SCHEMAS)
    features = reader(store, mine)
    assert store.compare_and_set_cell("v", watermark.SCHEMAS, cell, b"{}")

    with pytest.raises(OnlineStoreError, match=r"found the schema id \d+, expected one of \[\]"):
        features.batch_read("v", [1])[0]

    assert store.compare_and_set_cell("v", watermark.SCHEMAS, b"{}", cell or b"")
    assert features.read_features("v", 1).features == {"a": 1}


def test_reads_go_on_while_a_run_has_crashed(table: Table, any_store: OnlineStore) -> None:
    table.append(row("a", 1, 1.0))
    incremental(table, any_store)
    content = any_store.read_cell("spending", "watermark") or b""
    assert any_store.compare_and_set_cell("spending", "watermark", content, b"half a wat")

    assert reader(any_store, table.view, now=FAR).read_features("spending", "a")["amount"] == 1.0


def test_times_of_vectors_are_in_utc(store: OnlineStore) -> None:
    mine = view(a="timestamp")
    frame_time = datetime(2025, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    put(store, mine, b"1", NOW, frame_time)

    value = reader(store, mine).read_features("v", 1)["a"]

    assert (value, value.tzinfo) == (frame_time, timezone.utc)
    assert from_us(to_us(value)) == value


def test_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = Path(__file__).parents[1]
    shutil.copytree(repository / "config", tmp_path / "config")
    monkeypatch.setenv("MATERIALIZE_ONLINE_STORE", f"sqlite:///{tmp_path}/online.db")
    monkeypatch.chdir(tmp_path)
    config = load("config")
    users, shops = config.feature_views["user_spending_stats"], config.feature_views["merchant_risk"]
    numbers = {"transaction_count_30d": 7, "total_spend_7d": 12.5, "risk_score": 0.25}
    with open_store(config.online_store("default")) as store:
        for of, key in ((users, b"42"), (shops, b"9|DE")):
            put(store, of, key, datetime.now(timezone.utc), *(numbers.get(name) for name in of.features))
    examples = re.findall(r"```python\n(.*?)```", (repository / "docs" / "serving.md").read_text(), re.DOTALL)
    first: dict[str, Any] = {}

    for code, names in zip(examples, (first, {}), strict=True):
        exec(code, names)  # the repository's own documentation

    assert (first["vector"]["total_spend_7d"], first["vector"].statuses["home_country"]) == (12.5, "null")
    assert first["matrix"].mask.tolist() == [[False], [True]]
    assert first["payment"]["user_transactions_30d"] == 7
    assert [vector.status for vector in first["users"]] == ["present", "missing"]
