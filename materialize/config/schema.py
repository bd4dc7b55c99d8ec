"""One file's content in, a feature view or online stores out, after adding what is wrong with it to the file's problems."""

from __future__ import annotations

import os
import re
from datetime import date, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, PositiveInt, ValidationError

from materialize.config.connections import checked_url
from materialize.config.document import one_of
from materialize.config.limits import connection_problem, path_problem, source_problem
from materialize.feature_type import FeatureType
from materialize.memory import SMALLEST
from materialize.model import (
    APPROVE_ABOVE_ROWS,
    MEMORY_LIMIT,
    READ_P99,
    RECORD_FIELD,
    FeatureView,
    OnlineStoreConfig,
    Prices,
    TableSettings,
    VerifySettings,
)

if TYPE_CHECKING:
    from pathlib import Path

    from materialize.config.document import Document, Loc

__all__ = ["FEATURE_NAME", "NAME", "NAMES", "NAME_RULE", "Keys", "checked_keys", "stores_of", "view_of"]

#: Names of views and stores: they become parts of keys, DAG task ids and file names.
NAME, NAME_RULE = r"[a-z][a-z0-9_]{0,62}", "a name of at most 63 lower-case letters, digits and '_', a letter first"
#: Seconds per unit of a duration.
UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
#: One hundred years: beyond it, event times plus durations leave what a timestamp can hold.
LONGEST = timedelta(days=36_500)
#: The URLs of stores whose reads are measured during a load (OnlineStore.open_probe).
MEASURED = ("redis", "unix")
#: Bytes per unit of a size.
SIZES = {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in ((2, "M"), (3, "G"))
}
#: In percent.
WHOLE = 100


def _duration(value: object) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,9})([smhdw])", str(value), flags=re.ASCII)
    if match is None:
        raise ValueError("a duration such as '24h'")
    seconds = int(match[1]) * UNITS[match[2]]
    if seconds > LONGEST.total_seconds():
        raise ValueError(f"a duration of at most {LONGEST.days}d")
    return timedelta(seconds=seconds)


def _memory(value: object) -> int:
    match = re.fullmatch(r"([1-9]\d{0,6}(?:\.\d{1,3})?) ?([MG]i?B)", str(value), flags=re.ASCII)
    found = 0 if match is None else int(float(match[1]) * SIZES[match[2]])
    if found < SMALLEST:
        raise ValueError(
            f"a size such as 1GB or 768MiB, at least {SMALLEST // SIZES['MB']}MB, which a process needs for any table"
        )
    return found


def _percentage(value: object) -> float:
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,9})?) ?%", str(value), flags=re.ASCII)
    if match is None or float(match[1]) > WHOLE:
        raise ValueError("a percentage such as 0.1%")
    return float(match[1]) / WHOLE


def _pace(value: object) -> float | None:
    if value == "max-speed":
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})ms", str(value), flags=re.ASCII)
    if match is None:
        raise ValueError("milliseconds of read p99 such as 5ms, or max-speed")
    return int(match[1]) / 1000


def _feature_type(value: object) -> FeatureType:
    try:
        return FeatureType.parse(str(value))
    except ValueError as error:
        raise ValueError(str(error).partition(", found ")[0].removeprefix("expected ")) from None


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("text on one line without control characters")
    return text


Text = Annotated[str, Field(min_length=1)]
#: Names and places: they become parts of messages, of log lines and of what Airflow shows.
Line = Annotated[Text, AfterValidator(_line)]
Duration = Annotated[timedelta, PlainValidator(_duration)]
Percentage = Annotated[float, PlainValidator(_percentage)]
Memory = Annotated[int, PlainValidator(_memory)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FEATURE_NAME = r"[A-Za-z_][A-Za-z0-9_ .-]{0,127}"
FeatureName = Annotated[str, Field(pattern=f"^{FEATURE_NAME}$")]
#: What a key of a mapping is, for messages.
NAMES = {
    "features": "a feature name of at most 128 letters, digits, '_', ' ', '.' and '-', a letter or '_' first",
    "tags": "a tag's name",
}
#: What an item of a list or of a mapping is, for messages.
ITEMS = {
    "features": "a list of features",
    "join_keys": "a column name",
    "online_stores": "the name of an online store",
    "tags": "a tag's text",
}


class Keys(BaseModel):
    """The keys of a mapping; each description reads well after the word 'expected'."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ViewKeys(Keys):
    description: str = Field("", description="text")
    owner: str = Field("", description="text")
    source: Line = Field(description="the path or URI of a Delta table")
    source_connection: Line | None = Field(None, description="the id of an Airflow connection")
    join_keys: list[Line] = Field(description="a list of column names such as [user_id]", min_length=1)
    event_timestamp: Line = Field(description="a column name")
    created_timestamp: Line | None = Field(None, description="a column name")
    features: dict[FeatureName, Annotated[FeatureType, PlainValidator(_feature_type)]] = Field(
        description="a mapping of feature names to types such as {total_spend: float64}", min_length=1
    )
    ttl: Duration | None = Field(None, description="a duration such as '24h'")
    schedule: Literal["hourly", "daily"] = Field("hourly", description="hourly or daily")
    online_stores: list[Line] = Field(
        ["default"], description="a list of online stores such as [default]", min_length=1
    )
    max_future: Duration = Field(timedelta(days=1), description="a duration such as '24h'")
    tombstone_ttl: Duration = Field(timedelta(days=14), description="a duration such as '14d'")
    timestamp_ntz: Literal["UTC"] | None = Field(None, description="UTC, if times without a zone are that")
    on_rebuild_needed: Literal["fail", "auto"] = Field("fail", description="fail or auto")
    freshness: Duration | None = Field(None, description="a duration such as '2h'")
    on_commit: bool = Field(default=False, description="true or false")
    verify: dict[str, Any] | None = Field(None, description="a mapping such as {compare: full, max_mismatched: 0.1%}")
    quarantine: Line | None = Field(None, description="the path or URI of a Delta table of its own, or none")
    max_quarantined: Percentage | None = Field(None, description="a percentage such as 0.1%")
    layout: Literal["vector", "hash"] = Field("vector", description="vector or hash")
    realtime: bool = Field(default=False, description="true or false")
    cache_ttl: Duration | None = Field(None, description="a duration such as '30s'")
    memory_limit: Memory = Field(MEMORY_LIMIT, description="a size such as 1GB")


class VerifyKeys(Keys):
    compare: Literal["sample", "full"] | None = Field(None, description="sample or full")
    max_mismatched: Percentage = Field(0.0, description="a percentage such as 0.1%")
    repair: bool = Field(default=False, description="true or false")


class StoreKeys(Keys):
    url: Line | None = Field(None, description="the URL of an online store")
    connection: Line | None = Field(None, description="the id of an Airflow connection")
    pool: Line | None = Field(None, description="the name of an Airflow pool")
    tables: dict[str, Any] | None = Field(None, description="a mapping such as {point_in_time_recovery: true}")
    prices: dict[str, Any] | None = Field(None, description="a mapping such as {as_of: 2026-11-01, ...}")
    approve_above_rows: PositiveInt = Field(
        APPROVE_ABOVE_ROWS,
        description="the rows of a run of the backfill form that nobody has to approve, such as 1000000",
    )
    pace: Annotated[float | None, PlainValidator(_pace)] = Field(READ_P99, description="")


class TableKeys(Keys):
    write_units: PositiveInt | None = Field(None, description="provisioned write units a second, such as 1000")
    read_units: PositiveInt | None = Field(None, description="provisioned read units a second, such as 1000")
    point_in_time_recovery: bool = Field(default=False, description="true or false")
    tags: dict[Text, Text] = Field({}, description="a mapping of texts such as {team: fraud}")


class PriceKeys(Keys):
    as_of: date = Field(description="the day of the price list, such as 2026-11-01")
    currency: Text = Field(description="a currency such as USD")
    million_write_units: Price = Field(description="the price of a million write units, such as 0.625")
    million_read_units: Price = Field(description="the price of a million read units, such as 0.125")
    bulk_gigabyte: Price | None = Field(None, description="the price of a gigabyte of bulk-load, such as 0.15")
    gigabyte_month: Price | None = Field(None, description="the price of a gigabyte kept for a month, such as 0.25")


def checked_keys(document: Document, keys: type[Keys], data: Any, parent: Loc = ()) -> Any:
    """*data* as *keys*, or None after adding what is wrong with it."""
    try:
        return keys.model_validate(data)
    except ValidationError as error:
        for found in error.errors(include_url=False):
            loc = found["loc"]
            _add_shape(document, keys, (*parent, *loc), len(parent), found)
    return None


def _add_shape(document: Document, keys: type[Keys], loc: Loc, depth: int, found: Any) -> None:
    """Add one of pydantic's errors in our words."""
    key, nested = loc[depth], len(loc) > depth + 1
    if found["type"] in {"extra_forbidden", "invalid_key"}:
        document.add(loc, f"unknown key, expected {one_of(keys.model_fields, key)}")
    elif loc[-1] == "[key]":
        document.expected(loc[:-1], NAMES[key], found["input"])
    elif "error" in found.get("ctx", {}):
        document.expected(loc, str(found["ctx"]["error"]), found["input"])
    else:
        what = ITEMS[key] if nested else keys.model_fields[key].description
        document.expected(loc, str(what), None if found["type"] == "missing" else found["input"])


def view_of(document: Document, root: Path, stores: list[str] | None) -> FeatureView | None:
    """The feature view of one file, or None after adding what is wrong with it. *stores* are the known ones, if they are."""
    name = document.path.stem
    if not re.fullmatch(NAME, name):
        document.problems.append(f"expected a file name that is {NAME_RULE}, before .yaml, found {name!r}")
    if not document.usable:
        return None
    keys: ViewKeys | None = checked_keys(document, ViewKeys, document.data)
    _check_columns(document)
    _check_caching(document)
    listed = document.data.get("online_stores", ["default"])
    for position, store in enumerate(listed if isinstance(listed, list) else ()):
        if stores is not None and isinstance(store, str) and store and store not in stores:
            document.expected(("online_stores", position), one_of(stores, store), store)
        if store in listed[:position]:
            document.twice(("online_stores", position), store)
    if keys is not None:
        for key, expected in (
            ("source", source_problem(keys.source, root)),
            ("source_connection", connection_problem(keys.source_connection)),
            ("quarantine", source_problem(keys.quarantine or "none", root)),
        ):
            if expected:
                document.expected((key,), expected, getattr(keys, key))
    verify = None if keys is None else _verification(document, keys)
    if keys is None or document.problems:
        return None
    fields = dict(keys) | {"verify": verify}
    fields |= {"join_keys": tuple(keys.join_keys), "online_stores": tuple(keys.online_stores)}
    fields |= {"source": _address(root, keys.source), "quarantine": _quarantine(document, root, keys)}
    return None if document.problems else FeatureView(name=name, **fields)


def _address(root: Path, text: str) -> str:
    """A URI as it is, a path from *root*."""
    return text if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) else os.path.normpath(root / text)


def _quarantine(document: Document, root: Path, view: ViewKeys) -> str | None:
    if view.quarantine is None or view.quarantine == "none":
        return view.quarantine
    address = _address(root, view.quarantine)
    if address.rstrip("/") == _address(root, view.source).rstrip("/"):
        document.expected(("quarantine",), "another table than the source", view.quarantine)
    return address


def _verification(document: Document, view: ViewKeys) -> VerifySettings:
    keys: VerifyKeys | None = checked_keys(document, VerifyKeys, view.verify or {}, ("verify",))
    if keys is None:
        return VerifySettings()
    if keys.repair and keys.compare == "sample":
        document.expected(("verify", "compare"), "full, because a sample cannot be repaired", keys.compare)
    compare = keys.compare or ("full" if keys.repair else "sample")
    return VerifySettings(compare, keys.max_mismatched, keys.repair)


def _check_columns(document: Document) -> None:
    """Every column has one role: join key, time stamp or feature."""
    data = document.data
    join_keys, features = data.get("join_keys"), data.get("features")
    roles: dict[str, str] = {}
    for position, column in enumerate(join_keys if isinstance(join_keys, list) else ()):
        if column in list(roles):
            document.twice(("join_keys", position), column)
        elif isinstance(column, str):
            roles[column] = "a join key"
    for key in ("event_timestamp", "created_timestamp"):
        column = data.get(key)
        if isinstance(column, str) and roles.setdefault(column, f"the {key}") != f"the {key}":
            document.expected((key,), f"another column, because this one is {roles[column]}", column)
    for column in features if isinstance(features, dict) else ():
        if column == RECORD_FIELD and data.get("layout") == "hash":
            what = "another name, because the layout hash keeps the record in a field of this name"
            document.expected(("features", column), what, column)
        if column in roles:
            document.expected(("features", column), f"another feature, because this column is {roles[column]}", column)


def _check_caching(document: Document) -> None:
    if document.data.get("realtime") is True and (found := document.data.get("cache_ttl")) is not None:
        document.expected(("cache_ttl",), "none, because the view is realtime", found)


def stores_of(document: Document, root: Path) -> dict[str, OnlineStoreConfig]:
    """The online stores of one file, after adding what is wrong with them."""
    stores = {}
    for name, data in document.data.items() if document.usable else ():
        if not re.fullmatch(NAME, str(name)):
            document.add((name,), f"expected {NAME_RULE}, found {name!r}")
        if not isinstance(data, dict):
            document.expected((name,), "{url: ...} or {connection: ...}", data)
            continue
        keys: StoreKeys | None = checked_keys(document, StoreKeys, data, (name,))
        if keys is None:
            continue
        if (keys.url is None) == (keys.connection is None):
            document.add((name,), f"expected either url or connection, found {'none' if keys.url is None else 'both'}")
            continue
        tables, prices = _settings(document, keys, name)
        try:
            url = _url(keys.url, root) if keys.url else ""
            stores[name] = OnlineStoreConfig(
                name, url, keys.connection, keys.pool, tables, prices, keys.approve_above_rows, keys.pace
            )
        except ValueError as error:
            what, _, found = str(error).removeprefix("expected ").partition(", found ")
            hidden = document.variables.get((name, "url"))
            document.add(
                (name, "url"), f"expected {what}, found {document.show((name, 'url'), '') if hidden else found}"
            )
    return stores


def _url(url: str, root: Path) -> str:
    checked = checked_url(url, root)
    if url.startswith("sqlite:") and (expected := path_problem(url.removeprefix("sqlite:///"), root)):
        raise ValueError(f"expected sqlite:/// and {expected}, found another place")
    return checked


def _settings(document: Document, keys: StoreKeys, name: str) -> tuple[TableSettings, Prices | None]:
    """What DynamoDB alone has; and that only a store whose reads are measured has a pace."""
    tables, prices = TableSettings(), None
    if "pace" in keys.model_fields_set and keys.url is not None and not keys.url.startswith(MEASURED):
        document.add((name, "pace"), "unknown key, expected with a redis://, rediss:// or unix:// URL only")
    for given, of in (("tables", TableKeys), ("prices", PriceKeys)):
        data = getattr(keys, given)
        if data is None:
            continue
        if keys.url is not None and not keys.url.startswith("dynamodb://"):
            document.add((name, given), "unknown key, expected with a dynamodb:// URL only")
            continue
        found = checked_keys(document, of, data, (name, given))
        if isinstance(found, TableKeys):
            if (found.write_units is None) != (found.read_units is None):
                lacking = "write_units" if found.write_units is None else "read_units"
                document.add((name, given), f"expected both write_units and read_units or neither, found no {lacking}")
            tables = TableSettings(**dict(found))
        elif isinstance(found, PriceKeys):
            prices = Prices(**dict(found))
    return tables, prices
