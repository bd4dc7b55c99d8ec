"""What every request passes first: who asks, whether there is room, how much and how long it may send; and what is counted of it.

A request that there is no room for is refused at once. None waits for another: there is no queue that could grow.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import anyio

from materialize.server.problems import Problem, problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from materialize.metrics.served import Served
    from materialize.server.error_log import ErrorLog
    from materialize.server.settings import Limits, Tokens

__all__ = ["Guard"]

#: Asked by what watches the server, which has no token and must get an answer from a busy one too.
PROBES = ("/healthz", "/readyz")
METRICS = "/metrics"
BUSY = "The server has as many requests under way as it takes at once. Nothing was read; try again."
LATE = "No answer within the server's deadline. Try again."
SLOW = "The request's body did not arrive within the server's deadline."
BROKEN = "The server failed at this request. Its log says more."


class Guard:
    """An ASGI application around *app*."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        tokens: Tokens,
        metrics: Served,
        errors: ErrorLog,
        open_metrics: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*open_metrics*: whether metrics are told without a token. *clock*: seconds."""
        self.app, self.limits, self.tokens, self.metrics, self.errors, self.clock = (
            app,
            limits,
            tokens,
            metrics,
            errors,
            clock,
        )
        self.public = {*PROBES, METRICS} if open_metrics else set(PROBES)
        self.in_flight = self.peak = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = self.clock(), 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, sent)
        except Problem as refused:
            self.metrics.refused(refused.reason)
            await self._tell(refused, scope, receive, sent)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request; uvicorn would log a message that may hold values
            self.errors.add(error)
            if not status:
                await self._tell(Problem(500, BROKEN), scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path_format", "other")
            if status:  # else the client went away
                self.metrics.answered(route, status, self.clock() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path not in self.public and not self.tokens.admit(_header(scope, b"authorization")):
            raise Problem(
                401, "Expected the header Authorization: Bearer TOKEN with a token of this server.", "unauthorized"
            )
        if path in PROBES or path == METRICS:
            await self.app(scope, receive, send)
            return
        if self.in_flight >= self.limits.in_flight:
            raise Problem(503, BUSY, "busy")
        self._count(1)
        try:
            await self._in_time(scope, receive, send)
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        self.in_flight += more
        self.metrics.in_flight.set(self.in_flight)
        if self.in_flight > self.peak:
            self.peak = self.in_flight
            self.metrics.peak.set(self.peak)

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = Problem(408, SLOW, "slow")
        began = False

        async def sent(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        with anyio.move_on_after(self.limits.deadline) as waiting:
            again = await self._body(scope, receive)
            if again is None:
                return
            refusal = Problem(503, LATE, "late")
            await self.app(scope, again, sent)
        if waiting.cancelled_caught and not began:
            raise refusal

    async def _body(self, scope: Scope, receive: Receive) -> Receive | None:
        """The body, whole, as the application will receive it; None when the client went away."""
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.limits.body:
            raise self._large()
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > self.limits.body:
                raise self._large()
            chunks.append(chunk)
        whole: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again

    def _large(self) -> Problem:
        return Problem(
            413, f"The request's body is larger than {self.limits.body:,} bytes. Ask for less at once.", "large"
        )

    async def _tell(self, refused: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        # A body that was not read to its end makes the connection useless for another request.
        headers = {"connection": "close"} if refused.status in {408, 413} else None
        await problem(refused.status, refused.detail, headers=headers)(scope, receive, send)


def _header(scope: Scope, name: bytes) -> bytes:
    for found, value in scope["headers"]:
        if found == name:
            content: bytes = value
            return content
    return b""
