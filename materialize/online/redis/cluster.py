"""Redis and Valkey, a cluster: one script call per hundred rows of a server, and one per row where slots are on their way.

A batch is cut by server and not by slot: 10,000 rows have less than one row for each of 16,384 slots.
"""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha1
from typing import TYPE_CHECKING, Any

import numpy as np
from redis import exceptions as driver

from materialize.online.redis.answers import Patience, passes, translated
from materialize.online.redis.columns import columns_of
from materialize.online.redis.evidence import position_of
from materialize.online.redis.framing import bulk, command, lua, outcomes_of, weigh_script, write_options, write_script
from materialize.online.redis.hashes import weigh_words
from materialize.online.redis.lanes import exchange
from materialize.online.redis.probe import RedisProbe, SlowestProbe
from materialize.online.redis.reading import ASKING, NOT_LOCAL, QUICK_ROUNDS, redirect
from materialize.online.redis.shared import CURSORS, RedisServers, apart, scanned
from materialize.online.redis.sizing import EXPIRY_MS
from materialize.online.redis.slots import SLOTS, entity_slots, slot_of, slot_tags
from materialize.online.redis.topology import ClusterServers
from materialize.online.redis.wire import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt
    import redis

    from materialize.model import Layout, Retention
    from materialize.online.base import EncodedBatch, Outcomes
    from materialize.online.pace import Probe
    from materialize.online.reading import ReadTerms
    from materialize.online.redis.topology import Node, Topology

__all__ = ["RedisClusterStore"]

#: Slots from one copy of a cell to the next: each primary with that many neighbouring slots has one.
SLOTS_PER_COPY = 128
#: Keys that may come to a slot between counting and listing them.
SLACK = 100
#: Before a script whose keys are of several slots.
FLAGS = b"#!lua flags=allow-cross-slot-keys\n"
LAYOUTS: tuple[Layout, ...] = ("vector", "hash")
#: Asked after the writes on their own connection: where they ended.
POSITION = (command(b"INFO", b"server"), command(b"INFO", b"replication"))


class RedisClusterStore(RedisServers):
    """Records as strings, of views in ``hashed`` in hashes, in a cluster of Redis (7.0 or newer) or Valkey servers, on primaries only.

    *url*: see `materialize.online.redis.address`. Redirects, failovers and what passes by itself are followed and waited for until the
    deadline of the URL, in reads for its timeout. Where a call had to be made again, a row that the first one wrote counts as unchanged.
    """

    parallel_writes = 2
    taken_over = True

    def __init__(self, url: str, terms: ReadTerms | None = None) -> None:
        super().__init__(url, terms)
        self.servers = ClusterServers(self.address)
        texts = {layout: FLAGS + write_script(layout).encode() for layout in LAYOUTS}
        self._loads = [command(b"SCRIPT", b"LOAD", text) for text in texts.values()]
        self._scripts = {layout: bulk(sha1(text).hexdigest().encode()) for layout, text in texts.items()}  # noqa: S324 - its name

    def _clients(self) -> dict[str, redis.Redis]:
        return {f"{host}:{port}": self.servers.client((host, port)) for host, port in self.servers.topology().primaries}

    def _client_of(self, name: bytes) -> redis.Redis:
        slot = slot_of(name)
        if (node := self.servers.topology().owner_of(slot)) is None:
            raise driver.ClusterDownError(f"no server owns the hash slot {slot}")
        return self.servers.client(node)

    def _renew(self) -> None:
        """Ask again who owns what; with nobody to answer the old knowledge has to do until the next time."""
        with suppress(driver.RedisError, OSError):
            self.servers.refreshed(self.servers.topology())

    def _settle_cell(self, view: str, node: str) -> bytes:
        topology = self.servers.topology()
        place = [f"{host}:{port}" for host, port in topology.primaries].index(node)
        return self._copy(view, "settled", int(np.argmax(topology.owner == place)))

    # --- writing ---

    def merge(self, view: str, batch: EncodedBatch, *, tie_wins: bool, retention: Retention) -> Outcomes:
        return self._write(view, batch, "merge_tie" if tie_wins else "merge", retention)

    def replace(self, view: str, batch: EncodedBatch, *, at: int, retention: Retention) -> Outcomes:  # noqa: ARG002 - in the records
        return self._write(view, batch, "replace", retention)

    def _write(self, view: str, batch: EncodedBatch, mode: str, retention: Retention) -> Outcomes:
        """Calls of hundred rows first. The rows of a call that failed, which may be stored in part, are sent again one by one."""
        if not len(batch.keys):
            return np.empty(0, dtype=np.uint8)
        subject, name = f"write {len(batch.keys):,} rows of feature view {view!r} to", f"{self.prefix}:{view}"
        options, patience = write_options(mode, retention), Patience(self.address.deadline)
        outcomes = np.zeros(len(batch.keys), dtype=np.uint8)
        hashed = view in self.hashed
        script = self._scripts["hash" if hashed else "vector"]
        with translated(subject, self.address, patience, self._figures):
            slots = entity_slots(batch.keys, name)
            topology = self._reached(patience)
            owners = topology.owner[slots]
            calls: dict[Node, list[tuple[npt.NDArray[np.int64], bytes]]] = {}
            for place in np.unique(owners[owners >= 0]):
                rows = np.flatnonzero(owners == place)
                columns = columns_of(name, batch.take(rows), hashed=hashed)
                calls[topology.primaries[place]] = [
                    (rows[low:high], columns.undeclared(script, options, low, high)) for low, high in columns.calls()
                ]
            told = self._written({node: [request for _, request in some] for node, some in calls.items()})
            for node, replies in told.items():
                for (rows, _), reply in zip(calls[node], replies, strict=True):
                    if isinstance(reply, bytes):
                        outcomes[rows] = np.frombuffer(reply, dtype=np.uint8)
            if len(left := np.flatnonzero(outcomes == 0)):
                columns = columns_of(name, batch.take(left), hashed=hashed)
                requests = [columns.request(script, options, row, row + 1) for row in range(len(left))]
                again = self._each(slots[left], requests, patience, write=True)
                outcomes[left] = np.frombuffer(b"".join(again), dtype=np.uint8)
        return outcomes_of(outcomes.tobytes(), subject, self.location, name)

    def _written(self, requests: Mapping[Node, list[bytes]]) -> dict[Node, list[Any]]:
        """The replies to calls of the script. Those of a server that does not tell then how far it has written are errors too."""
        pools = {node: self.servers.client(node).connection_pool for node in requests}
        told = exchange(pools, {node: [*self._loads, *some, *POSITION] for node, some in requests.items()}, self.brake)
        replies: dict[Node, list[Any]] = {}
        for node, (_, _, *some, server, replication) in told.items():
            lost = next((reply for reply in (server, replication) if isinstance(reply, Exception)), None)
            if lost is None:
                self._wrote(*position_of(server, replication))
            replies[node] = some if lost is None else [lost] * len(some)
        return replies

    def _exchange(self, requests: Mapping[Node, Sequence[bytes]]) -> dict[Node, list[Any]]:
        return exchange({node: self.servers.client(node).connection_pool for node in requests}, requests)

    def _each(
        self,
        slots: npt.NDArray[np.int64],
        requests: Sequence[bytes],
        patience: Patience,
        *,
        write: bool,
        lost: bool = True,
    ) -> list[Any]:
        """The reply to each request, a command with one key, from whoever owns its slot in *slots*.

        Follows MOVED and ASK, and asks again what passes by itself, until *patience* is over. *lost*: a lost connection too. Raises the
        driver's last error then, and other errors at once.
        """
        replies: list[Any] = [None] * len(slots)
        redirects: dict[int, tuple[Node, bool]] = {}
        pending, rounds = list(range(len(slots))), 0
        while pending:
            topology, rounds = self._reached(patience), rounds + 1
            errors: dict[int, Exception] = {}
            calls: dict[bool, dict[Node, list[int]]] = {False: {}, True: {}}
            for row in pending:
                node, asking = redirects.pop(row, (topology.owner_of(int(slots[row])), False))
                if node is None:
                    errors[row] = driver.ClusterDownError(f"no server owns the hash slot {slots[row]}")
                else:
                    calls[asking].setdefault(node, []).append(row)
            for asking, lanes in calls.items():
                told = self._told(
                    {node: [requests[row] for row in rows] for node, rows in lanes.items()}, asking=asking, write=write
                )
                for node, rows in lanes.items():
                    for row, reply in zip(rows, told[node], strict=True):
                        if not isinstance(reply, Exception):
                            replies[row] = reply
                            continue
                        errors[row] = reply
                        if isinstance(reply, driver.AskError):
                            redirects[row] = redirect(reply, node)
            pending = sorted(errors)
            self._settle_errors(
                topology, [errors[row] for row in pending], patience, quick=rounds <= QUICK_ROUNDS, lost=lost
            )
        return replies

    def _told(self, requests: Mapping[Node, list[bytes]], *, asking: bool, write: bool) -> dict[Node, list[Any]]:
        if asking:
            requests = {node: [part for one in some for part in (ASKING, one)] for node, some in requests.items()}
        told = self._written(requests) if write else self._exchange(requests)
        return {node: replies[1::2] for node, replies in told.items()} if asking else told

    def _settle_errors(
        self, topology: Topology, errors: Sequence[Exception], patience: Patience, *, quick: bool, lost: bool
    ) -> None:
        """Wait where waiting helps, and learn who owns what now. Raises the one that does not pass, or when *patience* is over."""
        if not errors:
            return
        others = [error for error in errors if not isinstance(error, driver.AskError)]
        for error in others:
            if not (passes(error, lost=lost) or NOT_LOCAL in str(error)):
                raise error
        if (others or not quick) and not patience.wait():
            raise others[-1] if others else driver.TryAgainError(f"servers disagree about who owns slot {errors[-1]}")
        if any(type(error) is not driver.AskError for error in errors):
            with suppress(driver.RedisError, OSError):
                self.servers.refreshed(topology)

    def _reached(self, patience: Patience) -> Topology:
        """The topology. Before the first one is known, a cluster that comes up is waited for; one that does not answer is told at once."""
        while True:
            try:
                return self.servers.topology()
            except (driver.RedisError, OSError) as error:  # noqa: PERF203 - each time is a wait
                if not passes(error, lost=False) or not patience.wait():
                    raise

    # --- scanning ---

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """As every store does. Raises UnavailableError when a server is lost on the way: its keys may be elsewhere then."""
        subject, pattern = f"scan feature view {view!r} in", f"{self.prefix}:{view}:{{*}}".encode()
        with translated(subject, self.address):
            topology, moving = self.servers.claimed()
            place = start * len(topology.primaries)
            first = int(place)
            for number in range(len(topology.primaries)):
                node = topology.primaries[(first + number) % len(topology.primaries)]
                cursor = int((place - first) * CURSORS) if number == 0 else 0
                for names in scanned(self.servers.client(node).connection_pool, pattern, cursor):
                    yield from self._found(view, names)
            # A key may have gone from a server that was not scanned yet to one that had been.
            read: dict[int, tuple[Node, Node]] = {}
            while True:
                before, (topology, moves) = topology, self.servers.claimed()
                suspects = {
                    *moving,
                    *topology.differing(before),
                    *(slot for slot in moves if read.get(slot) != moves[slot]),
                }
                if not suspects:
                    return
                for slot in sorted(suspects):
                    # First where keys come from, then where they go: so each is met at least once.
                    for node in moves.get(slot) or filter(None, [topology.owner_of(slot)]):
                        yield from self._found(view, self._in_slot(node, slot))
                read, moving = moves, {}

    def _in_slot(self, node: Node, slot: int) -> list[bytes]:
        count = int(self._cluster_reply(node, b"COUNTKEYSINSLOT", b"%d" % slot))
        return list(self._cluster_reply(node, b"GETKEYSINSLOT", b"%d" % slot, b"%d" % (count + SLACK)))

    def _cluster_reply(self, node: Node, *words: bytes) -> Any:
        """What *node* says of CLUSTER, as bytes; the driver would make texts of keys."""
        (reply,) = self._exchange({node: [command(b"CLUSTER", *words)]})[node]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def _found(self, view: str, names: Sequence[bytes]) -> Iterator[tuple[list[bytes], list[bytes]]]:
        head, tail = f"{self.prefix}:{view}:{{".encode(), b"}"
        keys = [name[len(head) : -len(tail)] for name in names if name.startswith(head) and name.endswith(tail)]
        there = [(key, record) for key, record in zip(keys, self.read(view, keys), strict=True) if record]
        if there:
            yield [key for key, _ in there], [record for _, record in there]

    def record_bytes(self, view: str, keys: Sequence[bytes]) -> float | None:
        names, patience = [self._key(view, key) for key in keys], Patience(self.address.timeout)
        with translated(f"ask for the size of records of feature view {view!r} in", self.address, patience):
            requests = [command(b"MEMORY", b"USAGE", name, b"SAMPLES", b"0") for name in names]
            there = [size for size in self._each(_slots(names), requests, patience, write=False) if size]
        return sum(there) / len(there) if there else None

    def _weigh(self, name: str, sample: EncodedBatch, subject: str, *, expires: bool, hashed: bool) -> list[list[int]]:
        patience, expiry = Patience(self.address.deadline), b"%d" % EXPIRY_MS if expires else b""
        names, script = [self._key(name, key) for key in sample.keys.to_pylist()], weigh_script().encode()
        rows, shared = weigh_words(sample, hashed=hashed)
        requests = [
            command(b"EVAL", script, b"1", key, expiry, *shared, *words) for key, words in zip(names, rows, strict=True)
        ]
        with translated(subject, self.address, patience, self._figures):
            return self._each(_slots(names), requests, patience, write=True)

    def _most_slots(self, subject: str) -> int:
        with translated(subject, self.address):
            owner = self.servers.topology().owner
        return int(np.bincount(owner[owner >= 0]).max(initial=1))

    # --- cells ---

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        cell, patience = self._cell(view, name), Patience(self.address.deadline)
        request = command(
            b"EVAL", lua("compare_and_set").encode(), b"1", cell, new, *([] if expected is None else [expected])
        )
        with translated(f"write the {name} of feature view {view!r} to", self.address, patience, self._figures):
            # Once a connection is lost nobody knows whether the cell was written: asking again could take our own write for another's.
            (written,) = self._each(_slots([cell]), [request], patience, write=True, lost=False)
        return bool(written)

    def write_copies(self, view: str, name: str, content: bytes) -> None:
        patience, places = Patience(self.address.deadline), self._copies(view, name)
        with translated(
            f"write the copies of the {name} of feature view {view!r} to", self.address, patience, self._figures
        ):
            requests = [command(b"SET", place, content) for place in places]
            self._each(_slots(places), requests, patience, write=True)

    def read_copies(self, view: str, name: str) -> list[bytes | None]:
        cells = [self._cell(view, name), *self._copies(view, name)]
        return run(self.reading.get(cells, lambda: f"read the {name} of feature view {view!r} from", records=False))

    def _copies(self, view: str, name: str) -> list[bytes]:
        return [self._copy(view, name, slot) for slot in range(0, SLOTS, SLOTS_PER_COPY)]

    def _copy(self, view: str, name: str, slot: int) -> bytes:
        """A key beside the cell that hashes to *slot*."""
        return b"%b:{%b}" % (self._cell(view, name), slot_tags()[slot])

    def open_probe(self, view: str) -> SlowestProbe:
        def opened() -> list[Probe]:
            with translated("measure the reads of", self.address):
                clients = self._clients()
                pools = {node: apart(client.connection_pool) for node, client in clients.items()}
                return [
                    RedisProbe(connection, self._settle_cell(view, node), self.address)
                    for node, connection in pools.items()
                ]

        return SlowestProbe(opened)

    def close(self) -> None:
        self.reading.close()
        self.servers.close()


def _slots(names: Sequence[bytes]) -> npt.NDArray[np.int64]:
    return np.array([slot_of(name) for name in names], dtype=np.int64)
