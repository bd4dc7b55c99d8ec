"""TLS, mutual TLS, ACL users and Sentinel with real servers and certificates; and what their URLs must say."""

from __future__ import annotations

import hashlib
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import redis

from materialize.errors import ConfigError, OnlineStoreError, UnavailableError
from materialize.online.redis import RedisClusterStore, RedisStore
from materialize.online.redis.acl import PLACEHOLDER, acl_line
from materialize.online.redis.address import parse
from materialize.order import UNCHANGED, WRITTEN
from materialize.testing import FOREVER, Row, make_batch
from tests import cluster as clusters, servers
from tests.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from materialize.online.base import OnlineStore

PASSWORD = "s3cret-p4ss"


def write(store: OnlineStore, *keys: bytes) -> list[int]:
    outcomes: list[int] = store.merge(
        "view", make_batch([Row(key) for key in keys]), tie_wins=True, retention=FOREVER
    ).tolist()
    return outcomes


# --- the URL ---


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("redis+cluster://a:1,b,[::1]:3/0", (("a", 1), ("b", 6379), ("::1", 3))),
        ("redis+sentinel://user:p%40ss@a,b:2/3?service=cache", (("a", 26379), ("b", 2))),
        ("rediss://cache:6380/1?ca=/ca.pem&cert=/c.pem&key=/k.pem", (("cache", 6380),)),
        ("rediss://cache?ssl_cert_reqs=required&ssl_ca_certs=/ca.pem", (("cache", 6379),)),
    ],
)
def test_a_url_names_its_servers(url: str, found: tuple[tuple[str, int], ...]) -> None:
    assert parse(url).hosts == found


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis+cluster://", "found no host or a database"),
        ("redis+cluster://a/1", "found no host or a database"),
        ("redis+sentinel://a", r"expected \?service=NAME"),
        ("redis://a?service=cache", r"expected \?service=NAME"),
        ("redis://a?ca=/ca.pem", "expected it with a scheme that begins with rediss"),
        ("rediss://a?cert=/c.pem", "found one of the options cert and key"),
        ("rediss://a?ssl_cert_reqs=none", "certificates are always verified"),
        ("rediss+cluster://a?ssl_check_hostname=false", "certificates are always verified"),
        ("redis://a?deadline=0", "found the deadline '0', expected seconds above 0"),
        ("redis://a?replicas=many", "found replicas='many', expected how many"),
        ("redis+cluster://a:x", "expected HOST"),
    ],
)
def test_a_url_that_is_wrong_is_told_without_its_password(url: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse(url.replace("://", f"://user:{PASSWORD}@"))

    assert PASSWORD not in str(caught.value)


# --- TLS ---


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def tls_options(authority: Authority, *, port: int, clients: str = "no", address: str = "127.0.0.1") -> list[str]:
    certificate, key = authority.certificate(f"server-{port}", address=address)
    return [
        *("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
        *("--tls-ca-cert-file", str(authority.file), "--tls-auth-clients", clients),
    ]


@contextmanager
def secure(authority: Authority, *, clients: str = "no", address: str = "127.0.0.1") -> Iterator[int]:
    """A Redis with TLS; Valkey's wheel has none. Yields its port."""
    if servers.binary("redis") is None:
        pytest.skip("NOT TESTED with TLS: no redis-server on PATH")
    port = servers.free_port()
    with servers.running("redis", *tls_options(authority, port=port, clients=clients, address=address)):
        yield port


@pytest.mark.server
def test_tls_works_with_the_right_authority_only(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    with secure(authority) as port:
        with RedisStore(f"rediss://127.0.0.1:{port}/0?ca={authority.file}") as store:
            assert write(store, b"k") == [WRITTEN]
            assert store.read("view", [b"k"]) != [None]
        for url in (f"rediss://127.0.0.1:{port}/0?ca={stranger.file}", f"rediss://127.0.0.1:{port}/0"):
            with RedisStore(url) as store, pytest.raises(UnavailableError, match="certificate verify failed"):
                write(store, b"k")


@pytest.mark.server
def test_a_certificate_for_another_address_is_refused(authority: Authority) -> None:
    with (
        secure(authority, address="127.0.0.9") as port,
        RedisStore(f"rediss://127.0.0.1:{port}/0?ca={authority.file}") as store,
        pytest.raises(UnavailableError, match="certificate verify failed"),
    ):
        write(store, b"k")


@pytest.mark.server
def test_mutual_tls_needs_a_certificate_of_the_client(authority: Authority) -> None:
    certificate, key = authority.certificate("client")
    with secure(authority, clients="yes") as port:
        url = f"rediss://127.0.0.1:{port}/0?ca={authority.file}"
        with RedisStore(f"{url}&cert={certificate}&key={key}") as store:
            assert write(store, b"k") == [WRITTEN]
            assert str(key) not in store.location
        with RedisStore(url) as store, pytest.raises(UnavailableError):
            write(store, b"k")


@pytest.mark.server
def test_a_cluster_with_mutual_tls_and_a_password(authority: Authority) -> None:
    if servers.binary("redis") is None:
        pytest.skip("NOT TESTED with TLS: no redis-server on PATH")
    certificate, key = authority.certificate("client")

    def options(port: int) -> list[str]:
        return [*tls_options(authority, port=port, clients="yes"), "--tls-cluster", "yes"]

    with clusters.running("redis", password=PASSWORD, tls=options) as cluster:
        url = f"rediss+cluster://:{PASSWORD}@127.0.0.1:{cluster.tls[0]}?ca={authority.file}"
        with RedisClusterStore(f"{url}&cert={certificate}&key={key}") as store:
            keys = [b"%d" % number for number in range(500)]
            assert write(store, *keys) == [WRITTEN] * 500
            assert None not in store.read("view", keys)
            assert len(store.describe()["memory"].split("+")) == 3
        with RedisClusterStore(url) as store, pytest.raises(UnavailableError):
            write(store, b"k")


# --- users ---


@pytest.mark.server
def test_a_user_with_the_printed_rights_can_do_all(cluster: clusters.Cluster) -> None:
    digits = hashlib.sha256(PASSWORD.encode()).hexdigest()
    for one in cluster.servers:
        for role in ("run", "read"):
            one.client.execute_command(*acl_line(cluster.url, role).replace(PLACEHOLDER, f"#{digits}").split())
    try:
        for role in ("run", "read"):
            with RedisClusterStore(cluster.url.replace("//", f"//materialize-{role}:{PASSWORD}@")) as store:
                assert store.read("view", [b"never"]) == [None]
                assert store.read_cell("view", "schemas") is None
                if role == "read":
                    with pytest.raises(OnlineStoreError, match="ACL") as caught:
                        write(store, b"k")
                    assert not isinstance(caught.value, UnavailableError)
                    assert PASSWORD not in str(caught.value)
                    continue
                assert write(store, *(b"%d" % number for number in range(300))) == [WRITTEN] * 300
                assert sum(len(keys) for keys, _ in store.scan("view")) == 300
                assert store.compare_and_set_cell("view", "watermark", None, b"1")
                store.write_copies("view", "watermark", b"1")
                assert set(store.read_copies("view", "watermark")) == {b"1"}
                assert store.settle("view") == ""
                assert store.record_bytes("view", [b"1"])
                assert len(store.evidence() or {}) == 3
                assert abs(store.now_us("view") / 1e6 - time.time()) < 60
                assert store.describe()["role"] == "cluster of 3 primaries"
    finally:
        for one in cluster.servers:
            one.client.execute_command("ACL", "DELUSER", "materialize-run", "materialize-read")


@pytest.mark.server
def test_a_wrong_password_of_a_cluster_is_refused_at_once(cluster: clusters.Cluster) -> None:
    with RedisClusterStore(cluster.url.replace("//", f"//nobody:{PASSWORD}@")) as store:
        for call in (lambda: write(store, b"k"), lambda: store.read("view", [b"k"]), lambda: list(store.scan("view"))):
            with pytest.raises(OnlineStoreError, match="user, the password") as caught:
                call()
            assert not isinstance(caught.value, UnavailableError)
            assert PASSWORD not in str(caught.value)


# --- Sentinel ---


@contextmanager
def sentinel_of(kind: str, primary: servers.Server, folder: Path) -> Iterator[int]:
    """A sentinel that watches *primary* as the service ``cache``. Yields its port."""
    port, file = servers.free_port(), folder / "sentinel.conf"
    file.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor cache 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds cache 300\nsentinel failover-timeout cache 2000\n"
    )
    program = servers.binary(kind)
    assert program is not None
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen([program, str(file), "--sentinel"], cwd=folder, stdout=output, stderr=output)
    client = redis.Redis(port=port, protocol=2)
    try:
        assert servers._ready(process, client)
        clusters.wait_until(lambda: client.sentinel_slaves("cache"), "the sentinel knows the replica")
        yield port
    finally:
        client.close()
        process.kill()
        process.wait()


@pytest.mark.server
@pytest.mark.parametrize("kind", servers.KINDS)
def test_sentinel_leads_to_the_primary_also_after_a_failover(kind: str, tmp_path: Path) -> None:
    if servers.binary(kind) is None:
        pytest.skip(f"no {kind}")
    with servers.running(kind) as primary, servers.running(kind, "--replicaof", f"127.0.0.1 {primary.port}") as replica:
        clusters.wait_until(
            lambda: replica.client.info("replication").get("master_link_status") == "up", "the replica is up"
        )
        with (
            sentinel_of(kind, primary, tmp_path) as port,
            RedisStore(f"redis+sentinel://127.0.0.1:{servers.free_port()},127.0.0.1:{port}/0?service=cache") as store,
        ):
            assert write(store, b"a") == [WRITTEN]
            assert primary.client.exists("fs:view:{a}")
            assert store.settle("view") == ""
            primary.process.kill()

            started = time.monotonic()
            assert write(store, b"a", b"b") == [UNCHANGED, WRITTEN]

            assert replica.client.info("replication")["role"] == "master"
            assert replica.client.exists("fs:view:{b}")
            assert time.monotonic() - started < 25


def test_sentinels_that_do_not_answer_are_told_after_the_deadline() -> None:
    url = f"redis+sentinel://127.0.0.1:{servers.free_port()}/0?service=cache&deadline=0.3"
    with RedisStore(url) as store, pytest.raises(UnavailableError, match=r"still so after 0\.\d s"):
        write(store, b"k")
