"""The users of `materialize acl` can do what their role does on real servers, and no right of theirs is superfluous."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
from typer.testing import CliRunner

from materialize import lease, pipeline
from materialize.cli import app
from materialize.errors import ConfigError, MaterializeError, OnlineStoreError, UnavailableError
from materialize.model import Retention
from materialize.online.demand import Demand
from materialize.online.redis import RedisStore
from materialize.online.redis.acl import PLACEHOLDER, ROLES, acl_line, commands
from materialize.online.redis.answers import translated
from materialize.online.redis.following import RedisFollower
from materialize.order import STALE
from materialize.pipeline import Run
from materialize.testing import AT, FOREVER, OnlineStoreContract, Row, make_batch
from materialize.verify import verify
from tests import servers
from tests.projects import Project
from tests.stepping import vectors
from tests.tables import NOW, Table, row

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PASSWORD = "s3cret-p4ss"
DIGITS = hashlib.sha256(PASSWORD.encode()).hexdigest()
RUN = Run("default", "run", lambda: NOW)


def store_of(server: servers.Server, role: str, *, without: str | None = None, url: str | None = None) -> RedisStore:
    """A store whose user has only the rights of *role*, less one of them."""
    line = acl_line(url or server.url, role).replace(PLACEHOLDER, f"#{DIGITS}")
    words = [word for word in line.split() if word != f"+{without}"]
    server.client.execute_command(*words)
    server.client.execute_command("ACL", "LOG", "RESET")
    address = (url or server.url).replace("redis://", f"redis://materialize-{role}:{PASSWORD}@")
    return RedisStore(address)


def denied(server: servers.Server) -> list[Any]:
    return list(server.client.execute_command("ACL", "LOG"))


def used_by_runs(server: servers.Server, store: RedisStore, table: Table) -> None:
    """What runs do, with what only some do: cells, tombstones, keys with and without expiry, new and there."""
    pipeline.incremental(table.view, store, RUN)
    pipeline.rebuild(table.view, store, RUN)
    batch = make_batch([Row(b"k"), Row(b"l")])
    for _ in range(2):
        store.merge("other", batch, tie_wins=True, retention=FOREVER)
        store.merge("other", make_batch([Row(b"k", 9), Row(b"l", 9)]), tie_wins=True, retention=FOREVER)
        server.client.script_flush()
    used_by_long_records(store)
    used_by_layouts(store)
    used_by_sizing(store, table)
    assert store.record_bytes("other", [b"k"])  # asked where a server has a limit of memory
    store.describe()


def used_by_long_records(store: RedisStore) -> None:
    """Of a record of many bytes only the header is read, and written where it stays with another floor."""
    newer, older = Row(b"long", 9, version=AT + 9, payload=b"x" * 2_000), Row(b"long", 1, payload=b"x" * 2_000)
    store.merge("other", make_batch([newer]), tie_wins=True, retention=FOREVER)
    outcomes = store.replace("other", make_batch([older], floor=AT), at=AT, retention=FOREVER)
    assert outcomes.tolist() == [STALE]


def used_by_layouts(store: RedisStore) -> None:
    """What writes to hashes do: new ones, with an expiry, over strings, and one that stays and loses its expiry."""
    store.hashed = frozenset({"other"})
    expiring = Retention(ttl_us=4 * 10**15, keep_until_us=4 * 10**15)
    for event in (10, 11):
        store.merge(
            "other", make_batch([Row(b"k", event, version=AT + 9), Row(b"new")]), tie_wins=True, retention=expiring
        )
    store.replace("other", make_batch([Row(b"k", 1)], floor=AT), at=AT, retention=FOREVER)


def used_by_sizing(store: RedisStore, table: Table) -> None:
    """Weighing hashes; what it may not do becomes an estimate."""
    store.hashed = frozenset({table.view.name})
    how = store.size(table.view, make_batch([Row(b"k")]), Demand(1, None, 1.0))["how"]
    if "not measured" in how:
        raise OnlineStoreError(how)


def used_by_verify(_server: servers.Server, store: RedisStore, table: Table) -> None:
    assert store.read(table.view.name, [b"nobody"]) == [None]
    assert store.read(table.view.name, [b"nobody", b"else"]) == [None, None]
    assert verify(table.view, store, RUN).compared == 2
    assert lease.current(store, table.view.name) is None


def used_by_readers(_server: servers.Server, store: RedisStore, table: Table) -> None:
    found = vectors(table.view, store, [b"a", b"nobody"])
    assert [vector.status for vector in found] == ["present", "missing"]
    assert store.read(table.view.name, [b"nobody", b"else"]) == [None, None]


def used_by_plain_readers(server: servers.Server, store: RedisStore, _table: Table) -> None:
    server.client.hset("fs:plain:{a}", mapping={"amount": "1.5", "_": "record"})
    for call in (
        lambda: store.client.hget("fs:plain:{a}", "amount"),
        lambda: store.client.hmget("fs:plain:{a}", "amount", "count"),
        lambda: store.client.hgetall("fs:plain:{a}"),
    ):
        with translated("read", store.address):
            assert call()


class Heard:
    """Notes that changes are told."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def ready(self) -> None:
        self.told.set()

    def changed(self, view: str, keys: Any) -> None: ...
    def lost(self) -> None: ...


def used_by_caches(server: servers.Server, store: RedisStore, table: Table) -> None:
    used_by_readers(server, store, table)
    url = server.url.replace("redis://", f"redis://materialize-cache:{PASSWORD}@")
    heard = Heard()
    follower = RedisFollower(url, ["spending"], heard)
    follower.begin()
    try:
        end = time.monotonic() + 20
        while not (heard.told.is_set() or denied(server)) and time.monotonic() < end:
            time.sleep(0.01)
        if not heard.told.is_set():
            raise OnlineStoreError("could not follow changes")
        time.sleep(1.1)  # a sign of life was asked for
    finally:
        follower.close()


USES = {
    "run": used_by_runs,
    "read": used_by_readers,
    "cache": used_by_caches,
    "plain": used_by_plain_readers,
    "verify": used_by_verify,
}


@pytest.fixture
def loaded(server: servers.Server, table: Table) -> Iterator[Table]:
    """A table that is online; its users are removed at the end."""
    table.append(row("a", 1), row("b", 1))
    with RedisStore(server.url) as store:
        pipeline.incremental(table.view, store, RUN)
    yield table
    server.client.execute_command("ACL", "DELUSER", *(f"materialize-{role}" for role in ROLES))


class TestStoreOfARestrictedUser(OnlineStoreContract):
    """Everything that the contract promises, by a user that has the rights of runs alone."""

    @pytest.fixture
    def store(self, server: servers.Server) -> Iterator[RedisStore]:
        with store_of(server, "run") as store:
            yield store
        assert denied(server) == []
        server.client.execute_command("ACL", "DELUSER", "materialize-run")


@pytest.mark.parametrize("role", ROLES)
def test_a_role_can_do_what_it_does(server: servers.Server, loaded: Table, role: str) -> None:
    with store_of(server, role) as store:
        USES[role](server, store, loaded)

    assert denied(server) == []


@pytest.mark.parametrize(
    ("role", "command"), [(role, one) for role, all_of in ROLES.items() for one in all_of if one != "wait"]
)
def test_no_command_is_superfluous(server: servers.Server, loaded: Table, role: str, command: str) -> None:
    server.client.script_flush()

    with store_of(server, role, without=command) as store, pytest.raises(OnlineStoreError):
        USES[role](server, store, loaded)

    assert denied(server)


def test_waiting_for_replicas_needs_wait(server: servers.Server) -> None:
    url = f"{server.url}?replicas=1&replicas_timeout=0.01"
    with store_of(server, "run", url=url) as store, pytest.raises(UnavailableError, match="0 of 1 replicas"):
        store.settle("spending")
    with store_of(server, "run", without="wait", url=url) as store, pytest.raises(OnlineStoreError):
        store.settle("spending")
    server.client.execute_command("ACL", "DELUSER", "materialize-run")


@pytest.mark.parametrize("role", ["read", "plain", "verify"])
def test_who_only_reads_cannot_write(server: servers.Server, loaded: Table, role: str) -> None:
    before = sorted(server.client.keys())
    with store_of(server, role) as store:
        with pytest.raises(OnlineStoreError):
            store.merge("spending", make_batch([Row(b"z", version=AT)]), tie_wins=True, retention=FOREVER)
        with pytest.raises(OnlineStoreError):
            store.compare_and_set_cell("spending", "watermark", None, b"{}")

    assert sorted(server.client.keys()) == before


@pytest.mark.parametrize("role", ROLES)
def test_keys_of_others_are_out_of_reach(server: servers.Server, loaded: Table, role: str) -> None:
    server.client.set("session:1", "secret")
    with store_of(server, role) as store:
        with pytest.raises(redis.exceptions.NoPermissionError):
            store.client.get("session:1")
        for command in (
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
            ("KEYS", "*"),
            ("DEL", "fs:spending:{a}"),
            ("ACL", "LIST"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                store.client.execute_command(*command)


def test_another_database_needs_select(server: servers.Server, loaded: Table) -> None:
    url = server.url.removesuffix("/0") + "/3?prefix=other:x"
    assert commands(url, "read")[-1] == "select"

    with store_of(server, "run", url=url) as store:
        used_by_runs(server, store, loaded)
        assert denied(server) == []
    with store_of(server, "run", url=url, without="select") as store, pytest.raises(MaterializeError):
        store.read("view", [b"k"])


def test_a_line_that_nobody_filled_in_is_refused(server: servers.Server) -> None:
    with pytest.raises(redis.exceptions.ResponseError):
        server.client.execute_command(*acl_line(server.url, "run").split())

    assert b"materialize-run" not in server.client.execute_command("ACL", "USERS")


@pytest.mark.parametrize("prefix", ["a*", "a b", "a\nb", "", "a%20+@all"])
def test_a_prefix_cannot_widen_the_line(prefix: str) -> None:
    try:
        line = acl_line(f"redis://h/0?prefix={prefix}", "run")
    except ConfigError:
        return
    assert re.fullmatch(r"[A-Za-z0-9_.:-]+", line.split(" ~")[1].split(":*")[0]), line


def test_the_command_prints_lines_without_a_password(tmp_path: Path) -> None:
    made = Project(tmp_path, f"rediss://:{PASSWORD}@cache:6379/0?prefix=ml")

    result = CliRunner().invoke(app, ["acl"], env={"MATERIALIZE_CONFIG": str(made.config)})

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [acl_line("redis://h?prefix=ml", role) for role in ROLES]
    assert PASSWORD not in result.output
    assert "sha256sum" in result.stderr


@pytest.mark.parametrize(("url", "arguments"), [("sqlite:////tmp/x.db", ()), ("redis://h", ("--role", "admin"))])
def test_another_store_or_role_is_a_usage_error(tmp_path: Path, url: str, arguments: tuple[str, ...]) -> None:
    made = Project(tmp_path, url)

    result = CliRunner().invoke(app, ["acl", *arguments], env={"MATERIALIZE_CONFIG": str(made.config)})

    assert result.exit_code == 2
    assert "expected" in result.output
