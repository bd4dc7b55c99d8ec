"""An address and the terms of a model server in, what reads there out: by threads or by asyncio."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from materialize.errors import ConfigError
from materialize.online.redis.reading import Reading
from materialize.online.redis.routes import ByOne, BySentinels
from materialize.online.redis.wire import dials

if TYPE_CHECKING:
    from collections.abc import Callable

    from materialize.online.reading import ReadTerms
    from materialize.online.redis.address import Address
    from materialize.online.redis.routes import Routes
    from materialize.online.redis.wire import Dials, Wire

__all__ = ["reading_of", "under"]


def under(terms: ReadTerms, address: Address) -> Address:
    """*address* with the timeouts of *terms*. Raises ConfigError for replicas of one server."""
    if terms.replicas and address.kind == "single":
        raise ConfigError(
            f"online store {address.location}: could not read from replicas: found the address of one server, expected redis+sentinel://, "
            "rediss+sentinel://, redis+cluster://, rediss+cluster:// or dynamodb://. Or give the URL of a replica to a store that is only read."
        )
    seconds = {"socket_timeout": terms.read, "socket_connect_timeout": min(terms.connect, terms.deadline)}
    sentinel = address.sentinel | seconds if address.sentinel else {}
    return replace(
        address, timeout=terms.read, deadline=terms.deadline, driver=address.driver | seconds, sentinel=sentinel
    )


def reading_of(address: Address, wire: Callable[[Dials], Wire], terms: ReadTerms | None) -> Reading:
    """What reads at *address* over wires of one kind; without *terms* as runs do."""
    replicas = terms is not None and terms.replicas
    routes: Routes = ByOne()
    if address.kind == "sentinel":
        routes = BySentinels(address, wire(dials(address, sentinels=True)), replicas=replicas)
    if address.kind == "cluster":
        from materialize.online.redis.slot_routes import BySlots

        routes = BySlots(address, replicas=replicas)
    return Reading(address, routes, wire(dials(address, readonly=replicas)), hard=terms is not None)
