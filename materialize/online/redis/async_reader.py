"""Reads of Redis and Valkey for asyncio: the same requests, retries and errors as for threads, over connections of an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from redis import asyncio as aio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from materialize.online.reading import AsyncReader
from materialize.online.redis.address import parse
from materialize.online.redis.serving import reading_of, under
from materialize.online.redis.wire import READONLY, Wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from materialize.online.reading import ReadTerms

__all__ = ["AsyncRedisReader"]

#: Bytes that a socket takes at once as a rule: more are sent with a timeout, which costs a task of asyncio.
AT_ONCE = 32 * 2**10


class AsyncRedisReader(AsyncReader):
    """Reads at *url* (`materialize.online.redis.address`) under *terms*. Raises ConfigError as `open_reader` does."""

    def __init__(self, url: str, terms: ReadTerms, hashed: frozenset[str] = frozenset()) -> None:
        address = under(terms, parse(url))
        self.location, self.hashed = address.location, hashed
        self.reading = reading_of(address, TaskWire, terms)

    async def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        return await self.reading.views(keys, self.hashed)

    async def read_cell(self, view: str, name: str) -> bytes | None:
        return await self.reading.cell(view, name)

    async def close(self) -> None:
        self.reading.close()


class TaskWire(Wire):
    """For the tasks of one event loop."""

    async def _open(self, node: Any, seconds: float, read: float) -> Any:
        where = {} if self.dials.here else {"host": node[0], "port": node[1]}
        # The driver's classes for asyncio have the names of the others.
        kind: Any = getattr(aio, self.dials.kind.__name__)
        connection = kind(**self.dials.options | where | {"retry": Retry(NoBackoff(), 0)})
        connection.socket_connect_timeout, connection.socket_timeout = seconds, read
        try:
            await connection.connect()
            if self.dials.readonly:
                await connection.send_packed_command(READONLY, check_health=False)
                await connection.read_response(disable_decoding=True)
        except BaseException:
            self._drop(connection)
            raise
        return connection

    async def _send(self, connection: Any, request: bytes, seconds: float) -> None:
        connection.socket_timeout = seconds if len(request) > AT_ONCE else None
        await connection.send_packed_command(request, check_health=False)

    async def _reply(self, connection: Any, seconds: float) -> Any:
        # Told as an argument, the driver would answer a timeout by None, as if there were no record.
        connection.socket_timeout = seconds
        return await connection.read_response(disable_decoding=True)

    async def _quiet(self, connection: Any) -> bool:
        return not await connection.can_read()

    def _drop(self, connection: Any) -> None:
        connection._close()  # noqa: SLF001 - the public one has to be awaited, which a cancelled task cannot

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
