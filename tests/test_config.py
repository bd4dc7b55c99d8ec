"""The configuration: what loads, and what every mistake is answered with."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import materialize.config
from materialize.config import (
    STORE_SCHEMES,
    Config,
    environment_connection,
    load,
    resolve,
    resolve_source,
    storage_options,
    store_url,
)
from materialize.config.yaml import parse
from materialize.errors import ConfigError
from materialize.feature_type import FeatureType
from materialize.model import FeatureView, OnlineStoreConfig, Prices, TableSettings, VerifySettings
from materialize.online import open_store

REPOSITORY = Path(__file__).parents[1]

SMALLEST = """\
source: lake/user_spending
join_keys: [user_id]
event_timestamp: event_timestamp
features: {total_spend: float64}
"""
STORES = 'default: {url: "sqlite:///online.db"}\n'
SECRET = "hunter2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config folder with one small view and one store."""
    folder = tmp_path / "config"
    (folder / "feature_views").mkdir(parents=True)
    (folder / "online_stores.yaml").write_text(STORES)
    (folder / "feature_views" / "user_spending.yaml").write_text(SMALLEST)
    return folder


def write_view(folder: Path, text: str, name: str = "user_spending") -> Path:
    path = folder / "feature_views" / f"{name}.yaml"
    path.write_text(text)
    return path


def changed(**values: str | None) -> str:
    """The smallest view with these keys set to YAML text, or left out for None."""
    lines = dict(line.split(": ", 1) for line in SMALLEST.splitlines())
    return "".join(f"{key}: {value}\n" for key, value in (lines | values).items() if value is not None)


def problems(folder: Path) -> list[str]:
    """What is wrong, line by line."""
    with pytest.raises(ConfigError) as caught:
        load(folder)
    return str(caught.value).splitlines()


def view_problems(folder: Path, text: str) -> list[str]:
    """What is wrong with a view of this text and nothing else."""
    path = write_view(folder, text)
    head, *lines = problems(folder)
    assert head == f"{path}: {len(lines)} problem{'s' * (len(lines) > 1)}"
    return [line.removeprefix("  ") for line in lines]


def store_problems(folder: Path, text: str) -> list[str]:
    path = folder / "online_stores.yaml"
    path.write_text(text)
    lines = problems(folder)
    return [
        line.removeprefix("  ") for line in lines[lines.index(next(x for x in lines if x.startswith(str(path)))) + 1 :]
    ]


# What loads ------------------------------------------------------------------------------------------------------------


def test_smallest_view_gets_the_documented_defaults(folder: Path) -> None:
    config = load(folder)

    assert config.feature_views == {
        "user_spending": FeatureView(
            name="user_spending",
            source=str(folder.parent / "lake" / "user_spending"),
            join_keys=("user_id",),
            event_timestamp="event_timestamp",
            features={"total_spend": FeatureType("float64")},
            online_stores=("default",),
            created_timestamp=None,
            ttl=None,
            schedule="hourly",
            max_future=timedelta(days=1),
            tombstone_ttl=timedelta(days=14),
            timestamp_ntz=None,
            on_rebuild_needed="fail",
        )
    }
    assert config.root == folder.parent


def test_every_key_reaches_the_view(folder: Path) -> None:
    (folder / "online_stores.yaml").write_text('default: {url: "memory://"}\nbackup: {url: "redis://cache:6379/1"}\n')
    write_view(
        folder,
        """\
        description: Spending
        owner: fraud-team
        source: s3://lake/user_spending
        source_connection: aws_lake
        join_keys: [user_id, country]
        event_timestamp: at
        created_timestamp: made
        features:
          spend: decimal(18,2)
          embedding: list<float32, 8>
        ttl: 30d
        schedule: daily
        online_stores: [default, backup]
        max_future: 15m
        tombstone_ttl: 2w
        timestamp_ntz: UTC
        on_rebuild_needed: auto
        freshness: 90m
        verify: {max_mismatched: 0.5%, repair: true}
        """,
    )

    view = load(folder).feature_views["user_spending"]

    assert (view.description, view.owner, view.source) == ("Spending", "fraud-team", "s3://lake/user_spending")
    assert (view.source_connection, view.join_keys) == ("aws_lake", ("user_id", "country"))
    assert (view.event_timestamp, view.created_timestamp, view.schedule) == ("at", "made", "daily")
    assert [str(kind) for kind in view.features.values()] == ["decimal(18,2)", "list<float32,8>"]
    assert (view.ttl, view.max_future, view.tombstone_ttl) == (
        timedelta(days=30),
        timedelta(minutes=15),
        timedelta(weeks=2),
    )
    assert (view.timestamp_ntz, view.on_rebuild_needed, view.freshness) == ("UTC", "auto", timedelta(minutes=90))
    assert view.verify == VerifySettings(compare="full", max_mismatched=0.005, repair=True)
    assert view.online_stores == ("default", "backup")


@pytest.mark.parametrize(
    ("value", "setting", "table"),
    [
        (None, None, "{root}/lake/user_spending_quarantine"),
        ("none", "none", None),
        ("lake/bad", "{root}/lake/bad", "{root}/lake/bad"),
        ("s3://lake/bad", "s3://lake/bad", "s3://lake/bad"),
    ],
)
def test_rows_that_cannot_be_stored_are_kept_beside_the_source_or_where_the_view_says(
    folder: Path, value: str | None, setting: str | None, table: str | None
) -> None:
    write_view(folder, changed(quarantine=value, max_quarantined="0.1%"))

    view = load(folder).feature_views["user_spending"]

    assert view.max_quarantined == 0.001
    root = str(folder.parent)
    assert view.quarantine == (setting and setting.format(root=root))
    assert view.quarantine_table == (table and table.format(root=root))


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (None, 10**9),
        ("1GB", 10**9),
        ("600MB", 600 * 10**6),
        ("1.5 GB", 15 * 10**8),
        ("2GiB", 2**31),
        ("600MiB", 600 * 2**20),
    ],
)
def test_a_memory_limit_is_a_size(folder: Path, value: str | None, limit: int) -> None:
    write_view(folder, changed(memory_limit=value))

    assert load(folder).feature_views["user_spending"].memory_limit == limit


@pytest.mark.parametrize("value", ["599MB", "1", "1 GBs", "-1GB", "[1GB]", "1e9", "0GB", "1TB"])
def test_a_memory_limit_that_is_no_size_or_too_small_says_what_a_process_needs(folder: Path, value: str) -> None:
    write_view(folder, changed(memory_limit=value))

    with pytest.raises(ConfigError) as error:
        load(folder)

    needed = "memory_limit: expected a size such as 1GB or 768MiB, at least 600MB, which a process needs for any table, found"
    assert needed in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("quarantine", "lake/user_spending/", "quarantine: expected another table than the source, found"),
        ("quarantine", "[a]", "quarantine: expected the path or URI of a Delta table of its own, or none, found"),
        ("max_quarantined", "0.1", "max_quarantined: expected a percentage such as 0.1%, found 0.1"),
    ],
)
def test_a_wrong_quarantine_is_a_problem(folder: Path, key: str, value: str, problem: str) -> None:
    write_view(folder, changed(**{key: value}))

    with pytest.raises(ConfigError, match=re.escape(problem)):
        load(folder)


@pytest.mark.parametrize(
    ("verify", "expected"),
    [
        ("{compare: full}", VerifySettings("full", 0.0, repair=False)),
        ("{max_mismatched: 12.5%}", VerifySettings("sample", 0.125, repair=False)),
        ("{max_mismatched: 100 %}", VerifySettings("sample", 1.0, repair=False)),
        ("{}", VerifySettings()),
    ],
)
def test_verify_says_how_a_view_is_verified(folder: Path, verify: str, expected: VerifySettings) -> None:
    write_view(folder, changed(verify=verify))

    assert load(folder).feature_views["user_spending"].verify == expected


@pytest.mark.parametrize(
    ("verify", "problem"),
    [
        ("full", "verify: expected a mapping such as {compare: full, max_mismatched: 0.1%}, found 'full'"),
        ("{compare: all}", "verify.compare: expected sample or full, found 'all'"),
        ("{max_mismatched: 0.1}", "verify.max_mismatched: expected a percentage such as 0.1%, found 0.1"),
        ("{max_mismatched: 101%}", "verify.max_mismatched: expected a percentage such as 0.1%, found '101%'"),
        (
            "{compare: sample, repair: true}",
            "verify.compare: expected full, because a sample cannot be repaired, found 'sample'",
        ),
        ("{when: daily}", "verify.when: unknown key, expected one of compare, max_mismatched, repair"),
    ],
)
def test_wrong_verify_is_told(folder: Path, verify: str, problem: str) -> None:
    assert view_problems(folder, changed(verify=verify)) == [problem]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("24h", 86_400), ("30d", 2_592_000), ("2w", 1_209_600)]
)
def test_durations_have_five_units(folder: Path, text: str, seconds: int) -> None:
    write_view(folder, changed(ttl=text))

    assert load(folder).feature_views["user_spending"].ttl == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "source",
    ["s3://b/t", "gs://b/t", "az://c/t", "abfss://c@a.dfs.core.windows.net/t", "file:///t", "memory://t", "/abs/t"],
)
def test_source_with_a_scheme_or_an_absolute_path_stays(folder: Path, source: str) -> None:
    write_view(folder, changed(source=source))

    assert load(folder).feature_views["user_spending"].source == source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2026-11-01T10:00", "2026-11-01T10:00"),
        ("0b1", "0b1"),
    ],
)
def test_scalars_are_those_of_yaml_1_2_and_no_more(folder: Path, text: str, value: str) -> None:
    write_view(folder, changed(description=text))

    assert load(folder).feature_views["user_spending"].description == value


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("0o10", 8), ("0x10", 16), ("1e3", 1000.0), ("TRUE", True), ("-.inf", -math.inf)]
)
def test_numbers_are_read_as_yaml_1_2_says(text: str, value: object) -> None:
    assert parse(f"a: {text}") == ({"a": value}, [])


def test_relative_paths_start_at_the_parent_of_the_config_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    config = load("../config")

    assert config.root == tmp_path
    assert config.feature_views["user_spending"].source == str(tmp_path / "lake" / "user_spending")
    assert config.online_stores["default"].url == f"sqlite:///{tmp_path}/online.db"


def test_config_folder_may_be_the_current_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    assert load(".").root == folder.parent


@pytest.mark.parametrize(
    "url",
    [
        "memory://",
        "sqlite:////var/lib/online.db",
        "redis://cache",
        "redis://user:p%40ss@cache:6379/3?prefix=x&timeout=2",
        "redis://[::1]:6379/0",
        "rediss://cache:6380",
        "unix:///run/redis.sock?db=1",
        "redis+cluster://a:7000",
        "rediss+cluster://a:7000",
        "rediss+cluster://user:pa%2Css@a:7000,b:7000,[::1]:7000?ca=/tls/ca.pem",
        "redis+sentinel://a,b:26380/2?service=cache",
        "dynamodb://eu-west-1",
    ],
)
def test_known_store_urls_stay_as_they_are(folder: Path, url: str) -> None:
    (folder / "online_stores.yaml").write_text(f"default: {{url: {json.dumps(url)}}}\n")

    assert load(folder).online_stores == {"default": OnlineStoreConfig("default", url)}


def test_hidden_and_other_files_are_not_views(folder: Path) -> None:
    (folder / "feature_views" / ".user.yaml").write_text("[")
    (folder / "feature_views" / "README.md").write_text("# Views")

    assert list(load(folder).feature_views) == ["user_spending"]


def test_files_may_have_a_byte_order_mark_and_windows_line_ends(folder: Path) -> None:
    (folder / "feature_views" / "user_spending.yaml").write_bytes(
        b"\xef\xbb\xbf" + SMALLEST.replace("\n", "\r\n").encode()
    )

    assert list(load(folder).feature_views) == ["user_spending"]


def test_the_configuration_in_this_repository_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATERIALIZE_LAKE", raising=False)
    monkeypatch.delenv("MATERIALIZE_ONLINE_STORE", raising=False)

    config = load(REPOSITORY / "config")

    assert {name: view.join_keys for name, view in config.feature_views.items()} == {
        "merchant_risk": ("merchant_id", "country"),
        "user_spending_stats": ("user_id",),
    }
    assert config.feature_views["merchant_risk"].source == str(REPOSITORY / "lake" / "merchant_risk")
    assert config.online_stores["default"].url == f"sqlite:///{REPOSITORY}/online.db"


# The environment -------------------------------------------------------------------------------------------------------


def test_environment_fills_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE", "s3://lake")
    monkeypatch.setenv("STORE", "redis://cache:6379/0")
    (folder / "online_stores.yaml").write_text('default: {url: "${STORE}"}\n')
    write_view(folder, changed(source="${LAKE}/${TABLE:-user_spending}", ttl="${TTL:-30d}"))

    config = load(folder)

    assert config.feature_views["user_spending"].source == "s3://lake/user_spending"
    assert config.feature_views["user_spending"].ttl == timedelta(days=30)
    assert config.online_stores["default"].url == "redis://cache:6379/0"


def test_default_stands_for_an_empty_variable_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAKE", "")
    write_view(folder, changed(source="${LAKE:-/lake}/t"))

    assert load(folder).feature_views["user_spending"].source == "/lake/t"


def test_unset_variable_is_one_problem(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)

    assert view_problems(folder, changed(ttl="${NOWHERE}", online_stores='["${NOWHERE}"]')) == [
        "ttl: expected the environment variable NOWHERE, found it unset. Set it, or write ${NOWHERE:-default}",
        "online_stores[0]: expected the environment variable NOWHERE, found it unset. Set it, or write ${NOWHERE:-default}",
    ]


@pytest.mark.parametrize("text", ["${", "${LAKE", "${1}", "${A B}", "${LAKE-x}", "${}"])
def test_unreadable_variable_is_a_problem(folder: Path, text: str) -> None:
    assert view_problems(folder, changed(source=f'"{text}"')) == [
        "source: expected ${NAME} or ${NAME:-default}, found something else after ${"
    ]


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("ttl", "${HIDDEN}"),
        ("schedule", "x${HIDDEN}"),
        ("features", "{a: '${HIDDEN}'}"),
        ("online_stores", "['${HIDDEN}', '${HIDDEN}']"),
        ("join_keys", "['${HIDDEN}', '${HIDDEN}']"),
        ("created_timestamp", "event_${HIDDEN}"),
    ],
)
def test_what_the_environment_holds_is_never_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, text: str
) -> None:
    monkeypatch.setenv("HIDDEN", SECRET)

    lines = view_problems(folder, changed(event_timestamp=f"event_{SECRET}", **{key: text}))

    assert lines
    assert all("found the value of ${HIDDEN}" in line for line in lines)
    assert SECRET not in "".join(lines)


# Problems of a view ----------------------------------------------------------------------------------------------------


def test_every_problem_of_every_file_is_reported_at_once(folder: Path) -> None:
    store = folder / "online_stores.yaml"
    store.write_text('default: {url: "postgres://db"}\n')
    first = write_view(folder, changed(ttl="24", online_stores="[defualt]", join_keys=None))
    second = write_view(folder, changed(tll="24h"), "merchant_risk")

    assert problems(folder) == [
        f"{second}: 1 problem",
        (
            "  tll: unknown key, expected one of description, owner, source, source_connection, join_keys, event_timestamp, "
            "created_timestamp, features, ttl, schedule, online_stores, max_future, tombstone_ttl, timestamp_ntz, "
            "on_rebuild_needed, freshness, on_commit, verify, quarantine, max_quarantined, layout, realtime, cache_ttl, memory_limit (did you mean 'ttl'?)"
        ),
        f"{first}: 3 problems",
        "  join_keys: expected a list of column names such as [user_id], found nothing",
        "  ttl: expected a duration such as '24h', found 24",
        "  online_stores[0]: expected one of default (did you mean 'default'?), found 'defualt'",
        f"{store}: 1 problem",
        (
            "  default.url: expected a URL that begins with one of memory://, sqlite://, redis://, rediss://, unix://, "
            "redis+cluster://, rediss+cluster://, redis+sentinel://, rediss+sentinel://, dynamodb://, found postgres://"
        ),
    ]


@pytest.mark.parametrize(
    ("key", "text", "problem"),
    [
        ("description", "[a]", "description: expected text, found a list"),
        ("owner", "7", "owner: expected text, found 7"),
        ("source", "''", "source: expected the path or URI of a Delta table, found ''"),
        ("source", "", "source: expected the path or URI of a Delta table, found nothing"),
        ("source", None, "source: expected the path or URI of a Delta table, found nothing"),
        ("source_connection", "1", "source_connection: expected the id of an Airflow connection, found 1"),
        ("join_keys", "user_id", "join_keys: expected a list of column names such as [user_id], found 'user_id'"),
        ("join_keys", "[]", "join_keys: expected a list of column names such as [user_id], found an empty list"),
        ("join_keys", "[a, 2]", "join_keys[1]: expected a column name, found 2"),
        ("join_keys", "['']", "join_keys[0]: expected a column name, found ''"),
        ("join_keys", "[[a]]", "join_keys[0]: expected a column name, found a list"),
        ("join_keys", "[a, b, a]", "join_keys[2]: expected each name once, found 'a' again"),
        ("event_timestamp", "2024-01-01", "event_timestamp: expected a column name, found datetime.date(2024, 1, 1)"),
        ("created_timestamp", "{}", "created_timestamp: expected a column name, found an empty mapping"),
        ("features", "[a]", "features: expected a mapping of feature names to types such as {total_spend: float64}, found a list"),
        ("features", "{}", "features: expected a mapping of feature names to types such as {total_spend: float64}, found an empty mapping"),
        ("ttl", "24", "ttl: expected a duration such as '24h', found 24"),
        ("ttl", "0d", "ttl: expected a duration such as '24h', found '0d'"),
        ("ttl", "-1d", "ttl: expected a duration such as '24h', found '-1d'"),
        ("ttl", "1.5h", "ttl: expected a duration such as '24h', found '1.5h'"),
        ("ttl", "true", "ttl: expected a duration such as '24h', found True"),
        ("ttl", "5300w", "ttl: expected a duration of at most 36500d, found '5300w'"),
        ("ttl", "9999999999d", "ttl: expected a duration of at most 36500d, found '9999999999d'"),
        ("max_future", "soon", "max_future: expected a duration such as '24h', found 'soon'"),
        ("tombstone_ttl", "", "tombstone_ttl: expected a duration such as '24h', found nothing"),
        ("timestamp_ntz", "utc", "timestamp_ntz: expected UTC, if times without a zone are that, found 'utc'"),
        ("timestamp_ntz", "Europe/Berlin", "timestamp_ntz: expected UTC, if times without a zone are that, found 'Europe/Berlin'"),
        ("timestamp_ntz", "true", "timestamp_ntz: expected UTC, if times without a zone are that, found True"),
        ("on_rebuild_needed", "rebuild", "on_rebuild_needed: expected fail or auto, found 'rebuild'"),
        ("on_rebuild_needed", "false", "on_rebuild_needed: expected fail or auto, found False"),
        ("on_rebuild_needed", "", "on_rebuild_needed: expected fail or auto, found nothing"),
        ("schedule", "weekly", "schedule: expected hourly or daily, found 'weekly'"),
        ("schedule", "1", "schedule: expected hourly or daily, found 1"),
        ("online_stores", "[]", "online_stores: expected a list of online stores such as [default], found an empty list"),
        ("online_stores", "[1]", "online_stores[0]: expected the name of an online store, found 1"),
        ("online_stores", "[default, default]", "online_stores[1]: expected each name once, found 'default' again"),
        ("online_stores", "[cache]", "online_stores[0]: expected one of default, found 'cache'"),
    ],
)  # fmt: skip
def test_wrong_value_names_key_found_and_expected(folder: Path, key: str, text: str | None, problem: str) -> None:
    assert view_problems(folder, changed(**{key: text})) == [problem]


@pytest.mark.parametrize("kind", ["float", "int", "list<string>", "decimal(39,2)", "7", "list<float32,0>", ""])
def test_unknown_feature_type_lists_the_known_ones(folder: Path, kind: str) -> None:
    (problem,) = view_problems(folder, changed(features=f"{{a: {kind if kind == '7' else repr(kind)}, b: int8}}"))

    assert problem.startswith("features.a: expected one of bool, int8, ")
    assert problem.endswith(f"list<NUMBER,LENGTH>, found {kind if kind == '7' else repr(kind)}")


@pytest.mark.parametrize("name", ["1st", "a|b", "naïve", "a{b", "x" * 129, "7"])
def test_bad_feature_name_is_a_problem(folder: Path, name: str) -> None:
    (problem,) = view_problems(folder, changed(features=f'{{"{name}": int8}}'))

    assert problem.startswith(f"features.{name}: expected a feature name of at most 128 letters")


@pytest.mark.parametrize("name", ["_a", "Total Spend", "total.spend-30d", "x" * 128])
def test_feature_names_may_have_spaces_dots_and_dashes(folder: Path, name: str) -> None:
    write_view(folder, changed(features=f'{{"{name}": int8}}'))

    assert list(load(folder).feature_views["user_spending"].features) == [name]


def test_feature_name_that_is_no_text_is_a_problem(folder: Path) -> None:
    (problem,) = view_problems(folder, changed(features="{7: int8}"))

    assert "expected a feature name" in problem
    assert problem.endswith("found 7")


def test_key_that_is_no_text_is_unknown(folder: Path) -> None:
    (problem,) = view_problems(folder, SMALLEST + "7: x\n")

    assert "unknown key" in problem


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"features": "{user_id: int64}"}, "features.user_id: expected another feature, because this column is a join key, found 'user_id'"),
        ({"features": "{event_timestamp: timestamp}"}, "features.event_timestamp: expected another feature, because this column is the event_timestamp, found 'event_timestamp'"),
        ({"created_timestamp": "made", "features": "{made: timestamp}"}, "features.made: expected another feature, because this column is the created_timestamp, found 'made'"),
        ({"created_timestamp": "event_timestamp"}, "created_timestamp: expected another column, because this one is the event_timestamp, found 'event_timestamp'"),
        ({"event_timestamp": "user_id"}, "event_timestamp: expected another column, because this one is a join key, found 'user_id'"),
    ],
)  # fmt: skip
def test_a_column_has_one_role(folder: Path, values: dict[str, str], problem: str) -> None:
    assert view_problems(folder, changed(**values)) == [problem]


def test_columns_are_checked_beside_other_mistakes(folder: Path) -> None:
    assert view_problems(folder, changed(ttl="7", features="{user_id: float}"))[0].startswith("features.user_id: ")
    assert any("join key" in line for line in view_problems(folder, changed(ttl="7", features="{user_id: float}")))


@pytest.mark.parametrize("name", ["User", "1user", "user-spending", "user.spending", "u" * 64, "_user"])
def test_bad_view_name_is_a_problem(folder: Path, name: str) -> None:
    path = write_view(folder, SMALLEST, name)

    assert problems(folder) == [
        f"{path}: 1 problem",
        (
            "  expected a file name that is a name of at most 63 lower-case letters, digits and '_', a letter first, "
            f"before .yaml, found {name!r}"
        ),
    ]


def test_long_values_are_cut_and_stay_on_one_line(folder: Path) -> None:
    (problem,) = view_problems(folder, changed(schedule='"' + r"long\n" * 100 + '"'))

    assert len(problem) < 150


def test_credentials_in_a_source_are_not_shown(folder: Path) -> None:
    (problem,) = view_problems(folder, changed(schedule=f"redis://user:{SECRET}@cache"))

    assert SECRET not in problem


# Problems of files -----------------------------------------------------------------------------------------------------


def test_missing_folder_names_path_and_option(tmp_path: Path) -> None:
    assert problems(tmp_path / "config") == [
        f"{tmp_path / 'config'}: 1 problem",
        (
            "  expected a folder with feature_views/*.yaml and online_stores.yaml, found nothing. "
            "Name the folder with --config DIR or MATERIALIZE_CONFIG"
        ),
    ]


def test_a_file_in_the_place_of_the_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")

    assert "found a file" in problems(tmp_path / "config")[1]


def test_missing_stores_file_and_no_views_are_reported_together(folder: Path) -> None:
    (folder / "online_stores.yaml").unlink()
    (folder / "feature_views" / "user_spending.yaml").unlink()

    assert problems(folder) == [
        f"{folder / 'feature_views'}: 1 problem",
        "  expected a file VIEW.yaml for each feature view, found none",
        f"{folder / 'online_stores.yaml'}: 1 problem",
        "  expected a file, found none. It belongs to the folder given with --config DIR or MATERIALIZE_CONFIG",
    ]


def test_missing_stores_file_makes_no_store_unknown(folder: Path) -> None:
    (folder / "online_stores.yaml").unlink()

    assert len(problems(folder)) == 2


def test_other_ending_is_a_problem(folder: Path) -> None:
    (folder / "feature_views" / "merchant.yml").write_text(SMALLEST)

    assert problems(folder) == [
        f"{folder / 'feature_views'}: 1 problem",
        "  merchant.yml: expected the ending .yaml, found .yml",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected a mapping such as 'source: ...', found an empty file"),
        ("# nothing\n", "expected a mapping such as 'source: ...', found an empty file"),
        ("- a\n", "expected a mapping such as 'source: ...', found a list"),
        ("{}", "expected a mapping such as 'source: ...', found an empty mapping"),
        ("text", "expected a mapping such as 'source: ...', found 'text'"),
        ("a: 2024-99-99\n", "expected YAML with text, lists and mappings, found a character or a value that cannot be read"),
        ("a: \x01\n", "expected YAML with text, lists and mappings, found a character or a value that cannot be read"),
        ("a: " + "[" * 5000, "line 2: expected YAML, found an error in it: did not find expected node content"),
        ("[a]: b\n", "line 1: expected YAML, found an error in it: a list or a mapping as a key"),
    ],
)  # fmt: skip
def test_file_without_a_mapping_is_a_problem(folder: Path, text: str, problem: str) -> None:
    assert view_problems(folder, text) == [problem]


@pytest.mark.parametrize(
    ("text", "line"),
    [("source: x\njoin_keys: [a\nttl: 1d\n", 3), ("a: b: c\n", 1), ("a: *missing\n", 1), ("a: 1\n\tb: 2\n", 2)],
)
def test_invalid_yaml_has_its_line(folder: Path, text: str, line: int) -> None:
    (problem,) = view_problems(folder, text)

    assert problem.startswith(f"line {line}: expected YAML, found an error in it: ")


def test_objects_in_yaml_are_refused(folder: Path) -> None:
    (problem,) = view_problems(folder, "source: !!python/object/apply:os.system [ls]\n")

    assert problem.startswith("line 1: expected YAML")


def test_every_duplicate_key_has_its_line_beside_other_problems(folder: Path) -> None:
    text = changed(features="{a: int8, a: int16}") + f"ttl: 1d\nttl: {SECRET}\n"

    lines = view_problems(folder, text)

    assert sorted(lines[:2]) == ["line 4: 'a' appears twice", "line 6: 'ttl' appears twice"]
    assert SECRET not in "".join(lines)


def test_file_that_is_no_utf8_is_a_problem(folder: Path) -> None:
    (folder / "feature_views" / "user_spending.yaml").write_bytes(b"owner: \xff\n")

    assert problems(folder)[1] == "  expected UTF-8 text, found another byte at position 7"


def test_folder_in_the_place_of_a_file_is_a_problem(folder: Path) -> None:
    (folder / "feature_views" / "user_spending.yaml").unlink()
    (folder / "feature_views" / "user_spending.yaml").mkdir()

    assert problems(folder)[1] == "  expected a file that can be read, found: Is a directory"


# Problems of stores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entry", "read_p99"), [("", 0.005), (", pace: 20ms", 0.02), (", pace: max-speed", None)])
def test_a_store_opens_with_its_pace(folder: Path, entry: str, read_p99: float | None) -> None:
    (folder / "online_stores.yaml").write_text(f"default: {{url: 'redis://localhost'{entry}}}\n")

    with open_store(load(folder).online_store("default")) as store:
        assert store.read_p99 == read_p99


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("default: redis://x", "default: expected {url: ...} or {connection: ...}, found other text"),
        ("default:", "default: expected {url: ...} or {connection: ...}, found nothing"),
        ("default: {}", "default: expected either url or connection, found none"),
        ("default: {url: 'memory://', connection: a}", "default: expected either url or connection, found both"),
        ("default: {url: 7}", "default.url: expected the URL of an online store, found 7"),
        ("default: {url: 'memory://', approve_above_rows: 0}", "default.approve_above_rows: expected the rows of a run of the backfill form that nobody has to approve, such as 1000000, found 0"),
        ("default: {url: 'redis://a', pace: fast}", "default.pace: expected milliseconds of read p99 such as 5ms, or max-speed, found other text"),
        ("default: {url: 'redis://a', pace: 0ms}", "default.pace: expected milliseconds of read p99 such as 5ms, or max-speed, found other text"),
        ("default: {url: 'memory://', pace: 5ms}", "default.pace: unknown key, expected with a redis://, rediss:// or unix:// URL only"),
        ("default: {uri: x}", "default.uri: unknown key, expected one of url, connection, pool, tables, prices, approve_above_rows, pace (did you mean 'url'?)"),
        ("default: {url: 'redis://'}", "default.url: expected SCHEME://[USER:PASSWORD@]HOST[:PORT][/DATABASE] with special characters of the password percent-encoded, found a URL of another form"),
        ("default: {url: 'redis://a/x'}", "default.url: expected SCHEME://[USER:PASSWORD@]HOST[:PORT][/DATABASE] with a number as the database, found other text"),
        ("default: {url: 'sqlite://online.db'}", "default.url: expected sqlite:///relative/path.db or sqlite:////absolute/path.db (memory:// for none), found another URL"),
        ("default: {url: 'sqlite:///:memory:'}", "default.url: expected sqlite:///relative/path.db or sqlite:////absolute/path.db (memory:// for none), found another URL"),
    ],
)  # fmt: skip
def test_wrong_store_names_key_found_and_expected(folder: Path, text: str, problem: str) -> None:
    assert store_problems(folder, text + "\n") == [problem]


def test_bad_store_name_is_a_problem(folder: Path) -> None:
    lines = store_problems(folder, STORES + 'My-Store: {url: "memory://"}\n7: {url: "memory://"}\n')

    assert [line.split(":")[0] for line in lines] == ["My-Store", "[7]"]


@pytest.mark.parametrize(
    "text",
    [
        f"default: redis://:{SECRET}@cache",
        f"default: [redis://:{SECRET}@cache]",
        f"default: {{url: 'redis://:{SECRET}/x@cache'}}",
        f"default: {{url: 'redis://:{SECRET}#x@cache'}}",
        f"default: {{url: 'redis://:{SECRET}?x@cache'}}",
        f"default: {{url: 'redis://:a@{SECRET}@cache'}}",
        f"default: {{url: 'redis://:{SECRET}@cache:port'}}",
        f"default: {{url: 'redis://:{SECRET}@cache/db'}}",
        f"default: {{url: 'postgres://u:{SECRET}@cache'}}",
        f"default: {{url: '{SECRET}'}}",
        f"default: {{url: 'sqlite://{SECRET}'}}",
        f"default: {{url: ['{SECRET}']}}",
        f"default: {{url: 'memory://', password: {SECRET}}}",
        f"default: {{url: 'memory://', url: 'redis://:{SECRET}@cache'}}",
        f"default: {{url: 'redis://:{SECRET}@cache'",
        f"{SECRET}",
    ],
)
def test_passwords_of_stores_are_never_shown(folder: Path, text: str) -> None:
    lines = store_problems(folder, text + "\n")

    assert lines
    assert SECRET not in "".join(lines)


@pytest.mark.parametrize("url", [SECRET, f"{SECRET}://cache", f"redis://:{SECRET}@cache/x"])
def test_url_from_the_environment_is_never_shown(folder: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("STORE", url)

    (line,) = store_problems(folder, 'default: {url: "${STORE}"}\n')

    assert line.endswith("found the value of ${STORE}")
    assert SECRET not in line


def test_repr_of_a_configuration_has_no_url(folder: Path) -> None:
    (folder / "online_stores.yaml").write_text(f'default: {{url: "redis://:{SECRET}@cache"}}\n')

    assert SECRET not in repr(load(folder))


# Settings of a DynamoDB store --------------------------------------------------------------------------------------------

PRICES = "{as_of: 2026-11-01, currency: USD, million_write_units: 0.625, million_read_units: 0.125}"
BOTH = "expected both write_units and read_units or neither, found no"
WRITE_UNITS = "tables.write_units: expected provisioned write units a second, such as 1000"
READ_UNITS = "tables.read_units: expected provisioned read units a second, such as 1000"
RECOVERY = "tables.point_in_time_recovery: expected true or false"
TAGS = "tables.tags: expected a mapping of texts such as {team: fraud}"
AS_OF = "prices.as_of: expected the day of the price list, such as 2026-11-01"
CURRENCY = "prices.currency: expected a currency such as USD"
WRITE_PRICE = "prices.million_write_units: expected the price of a million write units, such as 0.625"
READ_PRICE = "prices.million_read_units: expected the price of a million read units, such as 0.125"


def dynamodb(settings: str) -> str:
    """A DynamoDB store with more keys."""
    return f'default: {{url: "dynamodb://eu-west-1/fs", {settings}}}\n'


def prices_with(**values: str) -> str:
    """Right prices but for these."""
    given = {"as_of": "2026-11-01", "currency": "USD", "million_write_units": "1", "million_read_units": "1"} | values
    return "prices: {" + ", ".join(f"{name}: {value}" for name, value in given.items()) + "}"


def test_settings_reach_the_store(folder: Path) -> None:
    (folder / "online_stores.yaml").write_text(
        """\
        default:
          url: dynamodb://eu-west-1/fs
          tables:
            write_units: 1000
            read_units: 500
            point_in_time_recovery: true
            tags: {team: fraud, "cost centre": "7"}
          prices:
            as_of: 2026-11-01
            currency: EUR
            million_write_units: 0.625
            million_read_units: 0
            bulk_gigabyte: 0.15
            gigabyte_month: 0.25
        """
    )

    store = load(folder).online_stores["default"]

    assert store.tables == TableSettings(1000, 500, True, {"team": "fraud", "cost centre": "7"})  # noqa: FBT003 - as its fields
    assert store.prices == Prices(date(2026, 11, 1), "EUR", 0.625, 0.0, 0.15, 0.25)


def test_without_settings_tables_are_on_demand_and_nothing_has_a_price(folder: Path) -> None:
    (folder / "online_stores.yaml").write_text('default: {url: "dynamodb://eu-west-1"}\n')

    store = load(folder).online_stores["default"]

    assert (store.tables, store.prices) == (TableSettings(None, None, False, {}), None)  # noqa: FBT003 - as its fields


@pytest.mark.parametrize(
    ("settings", "tables", "prices"),
    [
        ("tables: {}", TableSettings(), None),
        ("tables: {write_units: 1, read_units: 1}", TableSettings(1, 1), None),
        ("tables: {point_in_time_recovery: false}", TableSettings(), None),
        ("tables: {tags: {}}", TableSettings(), None),
        ("tables: {tags: {team: '${TEAM}'}}", TableSettings(tags={"team": "fraud"}), None),
        (f"prices: {PRICES}", TableSettings(), Prices(date(2026, 11, 1), "USD", 0.625, 0.125, None)),
    ],
)
def test_settings_may_be_given_in_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: str, tables: TableSettings, prices: Prices | None
) -> None:
    monkeypatch.setenv("TEAM", "fraud")
    (folder / "online_stores.yaml").write_text(dynamodb(settings))

    store = load(folder).online_stores["default"]

    assert (store.tables, store.prices) == (tables, prices)


def test_settings_stay_when_an_airflow_connection_gives_the_url(folder: Path) -> None:
    (folder / "online_stores.yaml").write_text(
        f"default: {{connection: aws, tables: {{tags: {{team: fraud}}}}, prices: {PRICES}}}\n"
    )

    store = load(folder, connections=lambda _: "aws://?region_name=eu-west-1").online_store("default")

    assert store.url == "dynamodb://eu-west-1"
    assert store.tables == TableSettings(tags={"team": "fraud"})
    assert store.prices == Prices(date(2026, 11, 1), "USD", 0.625, 0.125)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("tables: 7", "tables: expected a mapping such as {point_in_time_recovery: true}, found 7"),
        ("tables: [write_units]", "tables: expected a mapping such as {point_in_time_recovery: true}, found a list"),
        ("tables: on_demand", "tables: expected a mapping such as {point_in_time_recovery: true}, found other text"),
        ("tables: {write_units: 0, read_units: 5}", f"{WRITE_UNITS}, found 0"),
        ("tables: {write_units: -5, read_units: 5}", f"{WRITE_UNITS}, found -5"),
        ("tables: {write_units: 1.5, read_units: 5}", f"{WRITE_UNITS}, found 1.5"),
        ("tables: {write_units: true, read_units: 5}", f"{WRITE_UNITS}, found True"),
        ("tables: {write_units: '5', read_units: 5}", f"{WRITE_UNITS}, found other text"),
        ("tables: {write_units: [5], read_units: 5}", f"{WRITE_UNITS}, found a list"),
        ("tables: {write_units: 5, read_units: 0}", f"{READ_UNITS}, found 0"),
        ("tables: {write_units: 5, read_units: many}", f"{READ_UNITS}, found other text"),
        ("tables: {write_units: 5}", f"tables: {BOTH} read_units"),
        ("tables: {read_units: 5}", f"tables: {BOTH} write_units"),
        ("tables: {point_in_time_recovery: yes}", f"{RECOVERY}, found other text"),  # YAML 1.2 knows no yes
        ("tables: {point_in_time_recovery: 1}", f"{RECOVERY}, found 1"),
        ("tables: {point_in_time_recovery: }", f"{RECOVERY}, found nothing"),
        ("tables: {tags: [team]}", f"{TAGS}, found a list"),
        ("tables: {tags: fraud}", f"{TAGS}, found other text"),
        ("tables: {tag: {team: fraud}}", "tables.tag: unknown key, expected one of write_units, read_units, point_in_time_recovery, tags (did you mean 'tags'?)"),
        ("tables: {billing: on_demand}", "tables.billing: unknown key, expected one of write_units, read_units, point_in_time_recovery, tags"),
        ("prices: 0.625", "prices: expected a mapping such as {as_of: 2026-11-01, ...}, found 0.625"),
        ("prices: [USD]", "prices: expected a mapping such as {as_of: 2026-11-01, ...}, found a list"),
        (prices_with(as_of="2026-11"), f"{AS_OF}, found other text"),
        (prices_with(as_of="'2026-11-01'"), f"{AS_OF}, found other text"),
        (prices_with(as_of="2026"), f"{AS_OF}, found 2026"),
        (prices_with(as_of="2026-11-01 10:00:00"), f"{AS_OF}, found other text"),
        (prices_with(as_of=""), f"{AS_OF}, found nothing"),
        (prices_with(currency="7"), f"{CURRENCY}, found 7"),
        (prices_with(currency="''"), f"{CURRENCY}, found ''"),
        (prices_with(million_write_units="-0.1"), f"{WRITE_PRICE}, found -0.1"),
        (prices_with(million_write_units="cheap"), f"{WRITE_PRICE}, found other text"),
        (prices_with(million_write_units=".nan"), f"{WRITE_PRICE}, found nan"),
        (prices_with(million_write_units="'0.625'"), f"{WRITE_PRICE}, found other text"),
        (prices_with(million_read_units="-1"), f"{READ_PRICE}, found -1"),
        (prices_with(million_read_units="true"), f"{READ_PRICE}, found True"),
        (prices_with(bulk_gigabyte="-1"), "prices.bulk_gigabyte: expected the price of a gigabyte of bulk-load, such as 0.15, found -1"),
        (prices_with(gigabyte="1"), "prices.gigabyte: unknown key, expected one of as_of, currency, million_write_units, million_read_units, bulk_gigabyte, gigabyte_month (did you mean 'bulk_gigabyte'?)"),
    ],
)  # fmt: skip
def test_wrong_setting_names_key_found_and_expected(folder: Path, settings: str, problem: str) -> None:
    assert store_problems(folder, dynamodb(settings)) == [f"default.{problem}"]


@pytest.mark.parametrize("value", ["7", "''", "[fraud]", "{a: b}", "2026-11-01", "true"])
def test_tag_that_is_no_text_is_a_problem(folder: Path, value: str) -> None:
    (problem,) = store_problems(folder, dynamodb(f"tables: {{tags: {{team: {value}}}}}"))

    assert problem.startswith("default.tables.tags.team: expected ")


def test_tag_whose_name_is_no_text_is_a_problem_of_a_tag(folder: Path) -> None:
    (problem,) = store_problems(folder, dynamodb("tables: {tags: {7: fraud}}"))

    assert problem.startswith("default.tables.tags[7]: expected ")
    assert "feature" not in problem


def test_price_without_an_end_is_a_problem(folder: Path) -> None:
    assert store_problems(folder, dynamodb(prices_with(million_read_units=".inf"))) == [
        f"default.{READ_PRICE}, found inf"
    ]


def test_every_lacking_price_is_reported(folder: Path) -> None:
    assert store_problems(folder, dynamodb("prices: {}")) == [
        f"default.{expected}, found nothing" for expected in (AS_OF, CURRENCY, WRITE_PRICE, READ_PRICE)
    ]


@pytest.mark.parametrize("url", ["redis://cache", "sqlite:///online.db", "memory://"])
def test_other_stores_have_no_such_settings(folder: Path, url: str) -> None:
    text = f'default: {{url: "{url}", tables: {{write_units: 5, read_units: 5}}, prices: {PRICES}}}\n'

    assert store_problems(folder, text) == [
        "default.tables: unknown key, expected with a dynamodb:// URL only",
        "default.prices: unknown key, expected with a dynamodb:// URL only",
    ]


def test_several_mistakes_in_settings_are_reported_at_once_with_their_store(folder: Path) -> None:
    path = folder / "online_stores.yaml"
    path.write_text(
        """\
default: {url: "dynamodb://eu-west-1", tables: {write_units: x, tag: {a: b}}, prices: {as_of: today, currency: USD}}
backup: {url: "dynamodb://eu-west-1", tables: {write_units: 5}}
cache: {url: "redis://cache", tables: {}}
"""
    )

    assert problems(folder) == [
        f"{path}: 7 problems",
        f"  default.{WRITE_UNITS}, found other text",
        "  default.tables.tag: unknown key, expected one of write_units, read_units, point_in_time_recovery, tags (did you mean 'tags'?)",
        f"  default.{AS_OF}, found other text",
        f"  default.{WRITE_PRICE}, found nothing",
        f"  default.{READ_PRICE}, found nothing",
        f"  backup.tables: {BOTH} read_units",
        "  cache.tables: unknown key, expected with a dynamodb:// URL only",
    ]


def test_setting_that_appears_twice_has_its_line(folder: Path) -> None:
    text = (
        "default:\n  url: dynamodb://eu-west-1\n  tables:\n    read_units: 5\n    write_units: 5\n    write_units: 6\n"
    )

    assert store_problems(folder, text) == ["line 6: 'write_units' appears twice"]


def test_setting_from_the_environment_is_never_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITS", SECRET)
    monkeypatch.delenv("NOWHERE", raising=False)

    lines = store_problems(folder, dynamodb("tables: {write_units: '${UNITS}', read_units: '${NOWHERE}'}"))

    assert lines == [
        "default.tables.read_units: expected the environment variable NOWHERE, found it unset. Set it, or write ${NOWHERE:-default}",
        f"default.{WRITE_UNITS}, found the value of ${{UNITS}}",
    ]


def test_text_in_the_place_of_a_setting_is_never_shown(folder: Path) -> None:
    text = dynamodb(f"tables: {SECRET}, prices: {{as_of: {SECRET}, currency: [{SECRET}]}}")

    lines = store_problems(folder, text)

    assert lines
    assert SECRET not in "".join(lines)


# Airflow connections ---------------------------------------------------------------------------------------------------


def connection(**fields: object) -> SimpleNamespace:
    names = ("conn_type", "host", "schema", "login", "password", "port", "extra")
    return SimpleNamespace(**dict.fromkeys(names) | fields)


def test_connections_are_not_read_before_they_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "online_stores.yaml").write_text("default: {connection: cache}\n")
    write_view(folder, changed(source="s3://lake/t", source_connection="aws_lake"))
    monkeypatch.delenv("AIRFLOW_CONN_CACHE", raising=False)
    asked: list[str] = []

    def connections(name: str) -> str:
        asked.append(name)
        return "redis://cache:6380/2" if name == "cache" else "aws://KEY:SECRET@/?region_name=eu-west-1"

    config = load(folder, connections=connections)

    assert asked == []
    assert config.online_stores["default"] == OnlineStoreConfig("default", connection="cache")
    assert config.online_store("default").url == "redis://cache:6380/2"
    assert config.feature_views["user_spending"].storage_options == {}
    assert config.feature_view("user_spending").storage_options["AWS_REGION"] == "eu-west-1"
    assert asked == ["cache", "aws_lake"]


def test_without_airflow_connections_come_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "online_stores.yaml").write_text("default: {connection: my_cache}\n")
    monkeypatch.setenv("AIRFLOW_CONN_MY_CACHE", "redis://:pw@cache:6380/2")

    assert load(folder).online_store("default").url == "redis://:pw@cache:6380/2"
    assert environment_connection("my_cache") == "redis://:pw@cache:6380/2"


def test_unset_connection_names_its_variable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "online_stores.yaml").write_text("default: {connection: my_cache}\n")
    monkeypatch.delenv("AIRFLOW_CONN_MY_CACHE", raising=False)

    with pytest.raises(ConfigError, match="AIRFLOW_CONN_MY_CACHE, found it unset"):
        load(folder).online_store("default")


def test_stores_and_views_without_a_connection_are_given_as_they_are(folder: Path) -> None:
    config = load(folder)

    assert config.online_store("default") is config.online_stores["default"]
    assert config.feature_view("user_spending") is config.feature_views["user_spending"]


def test_unknown_store_or_view_lists_the_known_ones(folder: Path) -> None:
    config = load(folder)

    with pytest.raises(ConfigError, match=r"online store 'defualt': expected one of default \(did you mean 'default'"):
        config.online_store("defualt")
    with pytest.raises(ConfigError, match="feature view 'x': expected one of user_spending"):
        config.feature_view("x")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("redis://cache", "redis://cache:6379"),
        ("redis://user:p%40%2Fss@cache:6380/1", "redis://user:p%40%2Fss@cache:6380/1"),
        ("redis://user@cache", "redis://user@cache:6379"),
        ("redis://:pw@cache:6380/1?ssl=true", "rediss://:pw@cache:6380/1"),
        ("redis://cache/?db=4&ssl=false", "redis://cache:6379/4"),
        ("redis://cache/?__extra__=%7B%22ssl%22%3A+true%2C+%22db%22%3A+0%7D", "rediss://cache:6379/0"),
        ("redis://cache/?cluster=1&ssl=1&prefix=x", "rediss+cluster://cache:6379?prefix=x"),
        ("redis://[::1]:6380", "redis://[::1]:6380"),
        ("rediss+cluster://cache", "rediss+cluster://cache:6379"),
        (
            '{"conn_type": "redis", "host": "a:7000,b", "port": 7001, "password": "p,w", "extra": {"cluster": true, "ssl": true}}',
            "rediss+cluster://:p%2Cw@a:7000,b:7001",
        ),
        (
            '{"conn_type": "redis", "host": "a,b:26380", "schema": "1", "extra": {"service": "cache"}}',
            "redis+sentinel://a:26379,b:26380/1?service=cache",
        ),
        ("memory://", "memory://"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        (
            '{"conn_type": "redis", "host": "cache", "port": 6380, "password": "p@ss", "extra": {"ssl": true, "ssl_cert_reqs": "required"}}',
            "rediss://:p%40ss@cache:6380?ssl_cert_reqs=required",
        ),
        ('{"conn_type": "redis", "host": "cache", "port": "6380", "extra": "{\\"db\\": 2}"}', "redis://cache:6380/2"),
        ('{"conn_type": "redis"}', "redis://localhost:6379"),
        ("aws://KEY:SE%2FCRET@/?region_name=eu-west-1", "dynamodb://KEY:SE%2FCRET@eu-west-1"),
        ("aws://", "dynamodb://"),
        (
            ('{"conn_type": "aws", "extra": {"region_name": "eu-west-1", "endpoint_url": "http://general", '
            '"service_config": {"dynamodb": {"endpoint_url": "http://localhost:8000"}}}}'),
            "dynamodb://eu-west-1?endpoint_url=http%3A%2F%2Flocalhost%3A8000",
        ),
    ],
)  # fmt: skip
def test_connection_becomes_a_store_url(given: str, url: str) -> None:
    assert store_url(given) == url


def test_connection_object_becomes_a_store_url() -> None:
    given = connection(conn_type="redis", host="cache", port=6380, password="p@ss", extra='{"ssl": true, "db": 3}')

    assert store_url(given) == "rediss://:p%40ss@cache:6380/3"


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (
            "aws://KEY:SE%2FCRET@/?region_name=eu-west-1",
            {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "SE/CRET", "AWS_REGION": "eu-west-1"},
        ),
        (
            "aws://?endpoint_url=http%3A%2F%2Fminio%3A9000",
            {"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_ALLOW_HTTP": "true"},
        ),
        ("aws://?endpoint_url=https%3A%2F%2Fminio", {"AWS_ENDPOINT_URL": "https://minio"}),
        (
            ('{"conn_type": "aws", "extra": {"aws_access_key_id": "K", "aws_secret_access_key": "S", "aws_session_token": "T", '
            '"role_arn": "R", "service_config": {"s3": {"endpoint_url": "https://s3"}}, "storage_options": {"AWS_S3_ALLOW_UNSAFE_RENAME": true}}}'),
            {
                "AWS_ACCESS_KEY_ID": "K",
                "AWS_SECRET_ACCESS_KEY": "S",
                "AWS_SESSION_TOKEN": "T",
                "AWS_IAM_ROLE_ARN": "R",
                "AWS_ENDPOINT_URL": "https://s3",
                "AWS_S3_ALLOW_UNSAFE_RENAME": "True",
            },
        ),
        ("aws://", {}),
        ('{"conn_type": "generic", "extra": {"storage_options": {"account": "x"}}}', {"account": "x"}),
        ('{"conn_type": "aws", "extra": {"service_config": {"s3": "odd"}}}', {}),
    ],
)  # fmt: skip
def test_connection_becomes_storage_options(given: str, options: dict[str, str]) -> None:
    assert storage_options(given) == options


@pytest.mark.parametrize(
    "given",
    [
        f"postgres://u:{SECRET}@db",
        f"redis://:{SECRET}/x@cache",
        f'{{"conn_type": "redis", "password": "{SECRET}"',
        f'{{"conn_type": "redis", "extra": "{SECRET}"}}',
        f'{{"conn_type": "redis", "password": "{SECRET}", "schema": "x"}}',
        f'{{"password": "{SECRET}"}}',
        "sqlite:///online.db",
        "",
    ],
)
def test_connection_that_does_not_serve_is_named_and_not_shown(given: str) -> None:
    store = OnlineStoreConfig("default", connection="cache")

    with pytest.raises(ConfigError, match="online store 'default', Airflow connection 'cache': expected ") as caught:
        resolve(store, lambda _: given)

    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_source_connection_that_does_not_serve_is_named_and_not_shown(folder: Path) -> None:
    write_view(folder, changed(source_connection="lake"))
    view = load(folder).feature_views["user_spending"]

    with pytest.raises(
        ConfigError, match="feature view 'user_spending', Airflow connection 'lake': expected "
    ) as caught:
        resolve_source(view, lambda _: f"redis://:{SECRET}@cache")

    assert SECRET not in str(caught.value)


def test_credentials_of_a_source_are_not_in_the_repr(folder: Path) -> None:
    write_view(folder, changed(source_connection="lake"))

    view = load(folder, connections=lambda _: f"aws://KEY:{SECRET}@").feature_view("user_spending")

    assert view.storage_options["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert SECRET not in repr(view)


# The module ------------------------------------------------------------------------------------------------------------


def test_public_names_are_sorted_and_exist() -> None:
    names = materialize.config.__all__

    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(materialize.config, name) for name in names)
    assert isinstance(STORE_SCHEMES, tuple)
    assert Config.__name__ in names


def test_importing_the_configuration_loads_no_heavy_library() -> None:
    heavy = "{'polars', 'deltalake', 'pyarrow', 'numpy', 'redis', 'boto3', 'airflow', 'typer', 'rich'}"
    script = f"import sys, materialize.config; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"

    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


# --- feature services ----------------------------------------------------------------------------------------------------

MERCHANT = SMALLEST.replace("user_spending", "merchant").replace("user_id", "merchant_id")


def write_services(folder: Path, text: str) -> None:
    write_view(folder, MERCHANT, "merchant")
    (folder / "feature_services.yaml").write_text(text)


def test_feature_services_name_features_of_several_views(folder: Path) -> None:
    write_services(
        folder,
        "fraud:\n  description: before a payment\n  features:\n    merchant: [{total_spend: merchant_spend}]\n    user_spending: [total_spend]\n",
    )

    service = load(folder).feature_services["fraud"]

    assert list(service.features.items()) == [
        ("merchant", {"total_spend": "merchant_spend"}),
        ("user_spending", {"total_spend": "total_spend"}),
    ]
    assert service.description == "before a payment"


def test_without_a_file_there_are_no_feature_services(folder: Path) -> None:
    assert load(folder).feature_services == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fraud: {features: {merchent: [total_spend]}}", "did you mean 'merchant'?"),
        ("fraud: {features: {merchant: [total_spent]}}", "fraud.features.merchant[0]: expected one of total_spend"),
        (
            "fraud: {features: {merchant: []}}",
            "fraud.features.merchant: expected at least one feature, found an empty list",
        ),
        (
            "fraud: {features: {merchant: total_spend}}",
            "fraud.features.merchant: expected a list of features, found 'total_spend'",
        ),
        ("fraud: {features: {merchant: [3]}}", "fraud.features.merchant[0]: expected a feature, or"),
        ("fraud: {features: {merchant: [{total_spend: 'a|b'}]}}", "fraud.features.merchant[0]: expected a feature, or"),
        (
            "fraud: {features: {merchant: [total_spend, total_spend]}}",
            "fraud.features.merchant[1]: expected each name once",
        ),
        ("fraud: {features: {}}", "fraud.features: expected a mapping of feature views"),
        ("fraud: {feature: {}}", "fraud.feature: unknown key, expected one of description, features"),
        ("Fraud: {features: {merchant: [total_spend]}}", "Fraud: expected a name of at most 63"),
        (
            "fraud: {features: {merchant: [total_spend], user_spending: [total_spend]}}",
            "fraud.features.user_spending: expected each name once, found 'total_spend', which merchant has",
        ),
        ("[1]", "expected a mapping such as"),
    ],
)  # fmt: skip - a line each
def test_mistakes_in_feature_services_are_told(folder: Path, text: str, problem: str) -> None:
    write_services(folder, text)

    with pytest.raises(ConfigError) as refused:
        load(folder)

    assert "feature_services.yaml: " in str(refused.value)
    assert problem in str(refused.value)


def test_views_of_a_service_share_an_online_store(folder: Path) -> None:
    (folder / "online_stores.yaml").write_text(STORES + 'other: {url: "sqlite:///other.db"}\n')
    write_services(folder, "fraud: {features: {merchant: [total_spend], user_spending: [{total_spend: spent}]}}")
    write_view(folder, MERCHANT + "online_stores: [other]\n", "merchant")

    with pytest.raises(ConfigError, match="expected views that share an online store"):
        load(folder)
