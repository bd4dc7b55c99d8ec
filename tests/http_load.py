"""A load of HTTP requests that nothing slows down but the server: requests in, statuses and latencies out; for tests and benchmarks.

Requests of HTTP/1.1 over kept connections, written and read by hand: 30 us each, so that the server and not the load has the machine.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Question", "Seen", "flood", "paced", "request"]

LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
CLOSES = re.compile(rb"\r\nconnection: close", re.IGNORECASE)
#: Seconds after which an answer is missing.
PATIENCE = 30.0


def request(path: str, body: bytes | None = None, token: str = "") -> bytes:
    """The bytes of a request; POST with a *body* of JSON, else GET."""
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: test"]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and what the body of a right answer has in it."""

    request: bytes
    expected: bytes


@dataclass(slots=True)
class Seen:
    """``seconds``: of each answer with 200, since its request was due. ``wrong``: answers with 200 that are not right. ``broken``:
    requests whose connection ended without an answer.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    broken: int = 0
    without_retry: int = 0

    def add(self, question: Question, answer: tuple[int, bytes, bytes] | None, seconds: float) -> None:
        if answer is None:
            self.broken += 1
            return
        status, head, body = answer
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(seconds)
            self.wrong += question.expected not in body
        elif status == 503:
            self.without_retry += b"retry-after" not in head.lower()

    def quantile(self, share: float) -> float:
        """Seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.data = b""
        self.waiting: asyncio.Future[tuple[int, bytes, bytes] | None] | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.open = transport, True

    def ask(self, content: bytes) -> asyncio.Future[tuple[int, bytes, bytes] | None]:
        self.waiting = asyncio.get_running_loop().create_future()
        if self.open:
            self.transport.write(content)  # type: ignore[attr-defined]
        else:
            self.waiting.set_result(None)
        return self.waiting

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, separator, rest = self.data.partition(b"\r\n\r\n")
        found = LENGTH.search(head)
        size = int(found[1]) if found else 0
        if separator and len(rest) >= size and self.waiting is not None and not self.waiting.done():
            self.data = rest[size:]
            if CLOSES.search(head):
                self.open = False
                self.transport.close()
            self.waiting.set_result((int(head[9:12]), head, rest[:size]))

    def connection_lost(self, _: Exception | None) -> None:
        self.open = False
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


async def _connected(port: int) -> Connection:
    _, protocol = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return protocol


async def paced(port: int, questions: Sequence[Question], rate: float, seconds: float, connections: int = 64) -> Seen:
    """Ask at fixed times, whatever becomes of what was asked before: open loop. A latency counts from when the request was due, so a
    server that stalls is charged for every request that had to wait.
    """
    seen = Seen()
    free = [await _connected(port) for _ in range(connections)]
    tasks: set[asyncio.Task[None]] = set()
    room = asyncio.Semaphore(connections)

    async def one(question: Question, due: float) -> None:
        async with room:
            connection = free.pop()
            if not connection.open:
                connection = await _connected(port)
            answer = await asyncio.wait_for(connection.ask(question.request), PATIENCE)
            seen.add(question, answer, time.perf_counter() - due)
            free.append(connection)

    began = time.perf_counter()
    for place in range(int(rate * seconds)):
        due = began + place / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        task = asyncio.create_task(one(questions[place % len(questions)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in free:
        connection.transport.close()
    return seen


async def flood(port: int, questions: Sequence[Question], connections: int, until: Callable[[Seen], bool]) -> Seen:
    """Ask over every one of *connections* again as soon as it has its answer, until *until* says so. A connection that the server
    ends is opened again.
    """
    seen = Seen()

    async def one(first: int) -> None:
        connection, place = await _connected(port), first
        while not until(seen):
            if not connection.open:
                connection = await _connected(port)
            question, asked = questions[place % len(questions)], time.perf_counter()
            answer = await asyncio.wait_for(connection.ask(question.request), PATIENCE)
            seen.add(question, answer, time.perf_counter() - asked)
            place += connections
        connection.transport.close()

    await asyncio.gather(*(one(place) for place in range(connections)))
    return seen
