"""Nothing that is printed, logged, raised or pickled in a day with good and bad runs holds an entity key, a value or a password."""

from __future__ import annotations

import base64
import logging
import pickle
import sqlite3
import traceback
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from materialize import pipeline
from materialize.cli import app
from materialize.config import load
from materialize.errors import MaterializeError
from materialize.online import open_store
from materialize.pipeline import Run
from tests import servers
from tests.projects import PAST, Project
from tests.stepping import vectors
from tests.tables import NOW, SCHEMA, row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KEY, VALUE, NUMBER, PASSWORD = "keymark-7f3a", "valuemark-91bc", 918273645, "pw/mark@5e:d2"
#: What must not be anywhere, also not as other texts write it.
MARKERS = {
    form
    for secret in (KEY, VALUE, PASSWORD)
    for form in (
        secret,
        quote(secret, safe=""),
        repr(secret)[1:-1],
        secret.encode().hex(),
        base64.b64encode(secret.encode()).decode().rstrip("="),
    )
} | {str(NUMBER), f"{NUMBER:,}"}
FORMS = [(), ("--json",), ("-vv",), ("-vv", "--json")]


@dataclass(slots=True)
class Emitted:
    """Everything that was emitted, with where it came from."""

    logs: pytest.LogCaptureFixture
    texts: list[tuple[str, str]] = field(default_factory=list)

    def cli(self, project: Project, *arguments: str, code: int | None = None, forms: Any = FORMS) -> None:
        """A command in every form of its output."""
        for form in forms:
            env = {"MATERIALIZE_CONFIG": str(project.config), "NO_COLOR": "1", "COLUMNS": "400"}
            result = CliRunner().invoke(app, [*arguments, *form], env=env)
            assert code is None or result.exit_code == code, result.output
            self.texts.append((f"materialize {' '.join(arguments)} {form}", result.output))

    def errors(self, project: Project, *calls: Callable[..., Any]) -> None:
        """The error of each call by everything that shows one: text, repr, arguments, traceback, pickle; and of all before it."""
        config = load(project.config)
        view = config.feature_view("spending")
        self.texts.append(("repr", f"{config!r} {view!r} {config.online_stores!r}"))
        for call in calls:
            with open_store(config.online_store("default")) as store:
                self.texts.append(("repr of the store", f"{store!r} {store.location}"))
                try:
                    call(view, store)
                except MaterializeError as error:
                    shown = "".join(traceback.format_exception(error))
                    again = pickle.loads(pickle.dumps(error))
                    self.texts += [("error", f"{error} {error!r} {error.args} {again!r}"), ("traceback", shown)]
                    self.texts.append(("pickle", pickle.dumps(error).decode("latin-1")))

    def check(self) -> None:
        records = [(f"log {record.name}", record.getMessage()) for record in self.logs.records]
        found = [
            f"{marker!r} in {where}: {line.strip()[:400]}"
            for where, text in [*self.texts, *records]
            for line in text.splitlines()
            for marker in MARKERS
            if marker in line
        ]
        assert not found, "\n".join(found[:20])
        assert sum(len(text) for _, text in self.texts) > 500


@pytest.fixture
def emitted(caplog: pytest.LogCaptureFixture) -> Emitted:
    caplog.set_level(logging.DEBUG)
    return Emitted(caplog)


@contextmanager
def project_on(kind: str, folder: Path) -> Iterator[tuple[Project, servers.Server | None]]:
    (folder / "project").mkdir()
    if kind == "sqlite":
        yield Project(folder / "project", f"sqlite:///{folder}/online.db"), None
        return
    with servers.running("valkey", password=PASSWORD) as server:
        url = f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0?timeout=1&deadline=0.2&patience=0.2"
        yield Project(folder / "project", url), server


KINDS = ["sqlite", pytest.param("valkey", marks=pytest.mark.server)]


def marked(minutes: float | None = 1, **others: Any) -> dict[str, Any]:
    """A row of which key and values must not be told."""
    found = row(
        KEY, None if minutes is None else PAST + minutes, NUMBER, **{"country": VALUE, "count": NUMBER} | others
    )
    return found | {"created": row("x", PAST)["created"]}


def incremental(view: Any, store: Any) -> None:
    pipeline.incremental(view, store, Run("default", "run", lambda: NOW))


def rebuild(view: Any, store: Any) -> None:
    pipeline.rebuild(view, store, Run("default", "run", lambda: NOW))


def lookup(view: Any, store: Any) -> None:
    list(vectors(view, store, [KEY]))


@pytest.mark.parametrize("kind", KINDS)
def test_good_runs_tell_no_key_no_value_and_no_password(tmp_path: Path, emitted: Emitted, kind: str) -> None:
    with project_on(kind, tmp_path) as (project, _):
        project.table.append(marked(), marked(None), row("b", PAST + 1), {**marked(), "user_id": None})
        emitted.cli(project, "plan", code=0)
        emitted.cli(project, "incremental", code=0, forms=[("-vv",)])
        project.table.append(marked(2), {**marked(), "event_timestamp": row("x", 10**7)["event_timestamp"]})
        emitted.cli(project, "incremental", code=0, forms=[("-vv", "--json")])
        project.table.delta.delete(f"user_id = '{KEY}'")
        for command in ("incremental", "rebuild", "status", "doctor", "setup", "plan"):
            emitted.cli(project, command, code=0)
        emitted.cli(project, "verify", "--full", code=0)
        emitted.cli(
            project, "backfill", "spending", "--start", "2020-01-01T00:00Z", "--end", "2090-01-01T00:00Z", code=0
        )
        emitted.errors(project, incremental, rebuild, lookup)
        emitted.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_store_is_told_without_what_it_holds(tmp_path: Path, emitted: Emitted, kind: str) -> None:
    with project_on(kind, tmp_path) as (project, server):
        project.table.append(marked(), row("b", PAST + 1))
        emitted.cli(project, "incremental", code=0, forms=[()])
        if server is None:
            with closing(sqlite3.connect(tmp_path / "online.db")) as connection, connection:
                connection.execute("UPDATE records SET payload = ?", (f"{VALUE}{KEY}".encode(),))
                connection.execute(
                    "UPDATE cells SET content = ? WHERE name = 'watermark'", (f"{VALUE} {KEY}".encode(),)
                )
        else:
            server.client.set(
                f"fs:spending:{{{KEY}}}", f"{VALUE} is no record, but it is long enough for a header {KEY}"
            )
            server.client.set("fs:spending:watermark", f"{VALUE} {KEY}")
        project.table.append(marked(3))

        for command in ("incremental", "rebuild", "status", "doctor", "verify"):
            emitted.cli(project, command, code=1)
        emitted.errors(project, incremental, rebuild, lookup)
        if server is not None:
            server.client.delete("fs:spending:watermark")
            for command in ("incremental", "rebuild", "verify"):
                emitted.cli(project, command)
            server.client.set("fs:spending:schemas", f'{{"1": "{VALUE} {KEY}"}}')
            emitted.cli(project, "rebuild")
            emitted.errors(project, incremental, rebuild, lookup)
        emitted.check()


@pytest.mark.server
def test_a_server_that_refuses_is_told_without_password_and_key(tmp_path: Path, emitted: Emitted) -> None:
    with project_on("valkey", tmp_path) as (project, server):
        assert server is not None
        project.table.append(*(marked(minute, country=VALUE * 300) for minute in range(1, 5)), row("b", PAST + 1))
        for name in ("maxmemory", "min-replicas-to-write"):
            server.client.config_set(name, "1")
            emitted.cli(project, "incremental", code=1, forms=FORMS[-2:])
            emitted.errors(project, incremental, rebuild)
            server.client.config_set(name, "0")
        server.client.replicaof("127.0.0.1", "1")
        emitted.errors(project, incremental)
        server.client.replicaof("NO", "ONE")
        server.client.rpush(f"fs:spending:{{{KEY}}}", VALUE)
        emitted.cli(project, "incremental", code=1)
        emitted.errors(project, incremental, rebuild, lookup)
        server.client.delete(f"fs:spending:{{{KEY}}}")
        server.client.delete("fs:spending:watermark")
        server.client.rpush("fs:spending:watermark", VALUE)
        emitted.cli(project, "incremental", code=1)
        project.configure(url=f"redis://:{quote(PASSWORD + 'x', safe='')}@127.0.0.1:{server.port}/0")
        emitted.cli(project, "incremental", code=1)
        emitted.errors(project, incremental)
        project.configure(url=f"redis://{quote(KEY)}:{quote(PASSWORD, safe='')}@127.0.0.1:1/0?timeout=0.2")
        emitted.errors(project, incremental)
        emitted.check()


URLS = [
    f"redis://:{PASSWORD}@cache/0",
    f"redis://:{PASSWORD}@cache:port/0",
    f"redis://u:{quote(PASSWORD, safe='')}@cache:6379/database",
    f"redis://u:{quote(PASSWORD, safe='')}@cache:6379/0?prefix=*",
    f"redis://u:{quote(PASSWORD, safe='')}@cache:6379/0?timeout=soon",
    f"redis://u:{quote(PASSWORD, safe='')}@cache:6379/0?unheard_of=1",
    f"redis://cache:6379/0?password={quote(PASSWORD, safe='')}&timeout=x",
    f"mysql://:{PASSWORD}@cache/0",
    f"dynamodb://AKIA:{PASSWORD}@eu-central-1/fs",
    f"dynamodb://AKIA:{quote(PASSWORD, safe='')}@nowhere here/fs?share=7",
    PASSWORD,
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("way", ["yaml", "environment", "connection"])
def test_a_wrong_url_is_told_without_its_password(
    tmp_path: Path, emitted: Emitted, monkeypatch: pytest.MonkeyPatch, url: str, way: str
) -> None:
    project = Project(tmp_path, url)
    monkeypatch.setenv("ONLINE_STORE_URL", url)
    monkeypatch.setenv("AIRFLOW_CONN_CACHE", url)
    if way == "environment":
        project.configure(url="${ONLINE_STORE_URL}")
    if way == "connection":
        (project.config / "online_stores.yaml").write_text("default: {connection: cache}\n")
    project.table.append(row("b", PAST + 1))

    for command in (("incremental",), ("doctor",), ("acl",), ("iam-policy", "reader")):
        emitted.cli(project, *command, forms=[()] if command[0] in {"acl", "iam-policy"} else FORMS[1:3])
    emitted.texts.append(("padding", "." * 500))
    emitted.check()


#: How a secret may lie in the environment: by its name, by its form, and by where the file of the stores uses it.
ENVIRONMENTS = {
    "by name": ("CACHE_PASSWORD", PASSWORD, "sqlite:///online.db"),
    "by form": ("WHERE", f"redis://:{PASSWORD}@cache:6379/0", "sqlite:///online.db"),
    "by use": ("WHERE", quote(PASSWORD, safe=""), "redis://user:${WHERE}@127.0.0.1:1/0?timeout=0.1"),
    "whole": ("WHERE", f"redis://user:{quote(PASSWORD, safe='')}@127.0.0.1:1/0?timeout=0.1", "${WHERE}"),
}
PLACES = [
    "source: ${NAME}",
    "source: s3://${NAME}/x\nttl: ${NAME}",
    "schedule: ${NAME}",
    "'${NAME}': x",
    "online_stores: ['${NAME}']",
    "features: {a: '${NAME}'}",
    "features: {'${NAME}': float64}",
    "event_timestamp: ${NAME}",
    "join_keys: [user_id, '${NAME}']",
    "description: ${NAME}",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_who_writes_a_view_cannot_have_a_secret_of_the_environment_shown(
    tmp_path: Path, emitted: Emitted, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    name, value, url = ENVIRONMENTS[kind]
    project = Project(tmp_path, url)
    project.table.append(row("b", PAST + 1))
    monkeypatch.setenv(name, value)
    path, text = project.config / "feature_views" / "spending.yaml", place.replace("NAME", name)
    kept = [line for line in path.read_text().splitlines() if not line.startswith((text.partition(":")[0], "  "))]
    features = [] if text.startswith("features") else ["features: {amount: float64}"]
    path.write_text("\n".join([*(line for line in kept if line != "features:"), *features, text]) + "\n")

    for command in ("incremental", "status"):
        emitted.cli(project, command, code=1, forms=FORMS[1:3])
    emitted.texts.append(("padding", "." * 500))
    emitted.check()


@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_a_damaged_table_is_told_without_the_values_in_its_paths(tmp_path: Path, emitted: Emitted, damage: str) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(marked(), row("b", PAST + 1), partition_by=["user_id", "country"])
    for path in project.table.path.glob(f"user_id={KEY}/*/*.parquet"):
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-20] if damage == "cut" else f"{VALUE}{KEY}".encode())

    for command in ("incremental", "rebuild"):
        emitted.cli(project, command, code=1)
    emitted.errors(project, incremental, rebuild)
    emitted.check()


def test_a_column_of_another_type_is_told_without_its_values(tmp_path: Path, emitted: Emitted) -> None:
    project = Project(tmp_path, f"sqlite:///{tmp_path}/online.db")
    project.table.append(marked(), row("b", PAST + 1))
    project.configure(features={"country": "int64"})
    emitted.cli(project, "incremental", code=1)
    project.configure(features={"amount": "decimal(4,2)", "count": "int8"})
    emitted.cli(project, "incremental")
    emitted.errors(project, incremental, rebuild)
    emitted.check()


def test_the_harness_finds_what_it_looks_for(tmp_path: Path, emitted: Emitted) -> None:
    assert SCHEMA.names
    emitted.texts.append(("somewhere", f"{'.' * 500} {KEY}"))

    with pytest.raises(AssertionError, match="somewhere"):
        emitted.check()
