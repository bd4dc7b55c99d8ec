"""Redis and Valkey, a cluster: one script call per hundred rows of a server, and one per row where slots are on their way.

Keys are those of one server. A batch is cut by server and not by slot: 10,000 rows have less than one row for each of 16,384 slots.
"""

from __future__ import annotations

from contextlib import contextmanager
from hashlib import sha1
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from redis import exceptions as driver

from materialize.online.base import EncodedBatch, OnlineStore
from materialize.online.redis.address import parse
from materialize.online.redis.answers import REFUSED, Patience, passes, translated
from materialize.online.redis.exchange import Call, each, exchange
from materialize.online.redis.framing import bulk, command, lua, outcomes_of, write_options
from materialize.online.redis.slots import SLOTS, entity_slots, slot_of, slot_tags
from materialize.online.redis.store import CURSORS, KEYS_PER_READ, Columns, framed
from materialize.online.redis.topology import TopologyKeeper

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from materialize.model import Retention
    from materialize.online.base import Outcomes
    from materialize.online.redis.topology import Node, Topology

__all__ = ["RedisClusterStore"]

#: Slots from one copy of a cell to the next: each primary with that many neighbouring slots has one.
SLOTS_PER_COPY = 128
#: Keys that may come to a slot between counting and listing them.
SLACK = 100


class RedisClusterStore(OnlineStore):
    """Records as plain string values in a cluster of Redis (7.0 or newer) or Valkey servers, on primaries only.

    *url*: see `materialize.online.redis.address`. Redirects, failovers and what passes by itself are followed and waited for until the
    deadline of the URL, in reads for its timeout.
    """

    parallel_writes = 2

    def __init__(self, url: str) -> None:
        self.address = parse(url)
        self.location, self.prefix = self.address.location, self.address.prefix
        self.keeper = TopologyKeeper(self.address)
        self._load, self._script = _loaded("#!lua flags=allow-cross-slot-keys\n" + lua("write"))
        self._cell_load, self._cell_script = _loaded(lua("compare_and_set"))

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
        replies = np.zeros(len(batch.keys), dtype=np.uint8)
        with self._translated(subject, patience):
            slots = entity_slots(batch.keys, name)
            topology = self._reached(patience)
            for _, call, reply in exchange(
                self.keeper, self._calls(name, batch, topology, topology.owner[slots], options), self._load
            ):
                if isinstance(reply, REFUSED):
                    raise reply
                if isinstance(reply, bytes):
                    replies[call.rows] = np.frombuffer(reply, dtype=np.uint8)
            if len(left := np.flatnonzero(replies == 0)):
                self._refresh(topology)
                columns = self._columns(name, batch, left)
                again = each(
                    self.keeper,
                    slots[left],
                    lambda row: columns.request(self._script, options, row, row + 1),
                    patience,
                    self._load,
                )
                replies[left] = np.frombuffer(b"".join(again), dtype=np.uint8)
        return outcomes_of(replies.tobytes(), subject, self.location, name)

    def _calls(
        self, name: str, batch: EncodedBatch, topology: Topology, owners: npt.NDArray[np.int64], options: bytes
    ) -> dict[Node, Iterator[Call]]:
        primaries = topology.primaries
        order = np.argsort(owners, kind="stable")
        ends = np.searchsorted(owners[order], np.arange(len(primaries) + 1))
        return {
            node: self._node_calls(name, batch, order[low:high], options)
            for node, low, high in zip(primaries, ends[:-1], ends[1:], strict=True)
            if high > low
        }

    def _node_calls(
        self, name: str, batch: EncodedBatch, rows: npt.NDArray[np.int64], options: bytes
    ) -> Iterator[Call]:
        columns = self._columns(name, batch, rows)
        for low, high in columns.calls():
            yield Call(rows[low:high], columns.undeclared(self._script, options, low, high))

    @staticmethod
    def _columns(name: str, batch: EncodedBatch, rows: npt.NDArray[np.int64]) -> Columns:
        keys = framed(batch.keys.take(pa.array(rows)), before=f"{name}:{{".encode(), after=b"}")
        return Columns(*keys, *framed(batch.values.take(pa.array(rows))))

    def read(self, view: str, keys: Sequence[bytes]) -> list[bytes | None]:
        return self.read_views({view: keys})[view]

    def read_views(self, keys: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes | None]]:
        names = [self._key(view, key) for view, some in keys.items() for key in some]
        slots = [entity_slots(pa.array(some, pa.binary()), f"{self.prefix}:{view}") for view, some in keys.items()]
        views, patience = ", ".join(map(repr, keys)), Patience(self.address.timeout)
        with self._translated(f"read {len(names):,} entities of feature view {views} from", patience):
            self._reached(patience)
            # MGET gives nothing for what is no string, where GET would fail.
            found = each(
                self.keeper,
                np.concatenate([*slots, np.empty(0, dtype=np.int64)]),
                lambda row: command(b"MGET", names[row]),
                patience,
            )
        records = iter([record for (record,) in found])
        return {view: [next(records) for _ in some] for view, some in keys.items()}

    def scan(self, view: str, *, start: float = 0.0) -> Iterator[tuple[list[bytes], list[bytes]]]:
        subject = f"scan feature view {view!r} in"
        with self._translated(subject):
            topology = self._reached(Patience(self.address.deadline))
            moving = self.keeper.moving(topology)
        place = start * len(topology.primaries)
        first = int(place)
        for number in range(len(topology.primaries)):
            node = topology.primaries[(first + number) % len(topology.primaries)]
            for names in self._scanned(subject, view, node, int((place - first) * CURSORS) if number == 0 else 0):
                yield from self._found(view, names)
        # A key may have gone from a server that was not scanned yet to one that had been. So slots that had another owner, or were on
        # their way, are read again whole: first where keys come from, then where they go.
        known = dict[int, tuple[Node, Node]]()
        suspects = set(moving)
        while True:
            with self._translated(subject):
                self._refresh(topology)
                now = self.keeper.topology()
                moves = self.keeper.moving(now)
            suspects |= {slot for slot in range(SLOTS) if topology.owner_of(slot) != now.owner_of(slot)}
            suspects |= {slot for slot in moves if known.get(slot) != moves[slot]}
            if not suspects:
                return
            for slot in sorted(suspects):
                for node in moves.get(slot) or filter(None, [now.owner_of(slot)]):
                    yield from self._found(view, self._in_slot(subject, node, slot))
            topology, known, suspects = now, moves, set()

    def _scanned(self, subject: str, view: str, node: Node, cursor: int) -> Iterator[list[bytes]]:
        """Names below *view* on *node*, from the bucket *cursor* around; from the start again when the server is another one then."""
        pattern, rounds, patience = (
            f"{self.prefix}:{view}:{{*}}".encode(),
            2 if cursor else 1,
            Patience(self.address.deadline),
        )
        words = (b"MATCH", pattern, b"COUNT", b"%d" % KEYS_PER_READ)
        while rounds:
            with self._translated(subject, patience):
                try:
                    told, names = self.keeper.ask(node, b"SCAN", b"%d" % cursor, *words)
                except (driver.RedisError, OSError) as error:
                    # The cursors of a server mean nothing after it started again.
                    cursor, rounds = 0, 1
                    if not passes(error, lost=True) or not patience.wait():
                        raise
                    self._refresh(self.keeper.topology())
                    if node not in self.keeper.topology().primaries:
                        return  # its slots have other owners, who are asked at the end
                    continue
            cursor = int(told)
            rounds -= not cursor
            yield names

    def _in_slot(self, subject: str, node: Node, slot: int) -> list[bytes]:
        with self._translated(subject):
            count = self.keeper.ask(node, b"CLUSTER", b"COUNTKEYSINSLOT", b"%d" % slot)
            names: list[bytes] = self.keeper.ask(
                node, b"CLUSTER", b"GETKEYSINSLOT", b"%d" % slot, b"%d" % (count + SLACK)
            )
        return names

    def _found(self, view: str, names: list[bytes]) -> Iterator[tuple[list[bytes], list[bytes]]]:
        head, tail = f"{self.prefix}:{view}:{{".encode(), b"}"
        keys = [name[len(head) : -len(tail)] for name in names if name.startswith(head) and name.endswith(tail)]
        there = [(key, record) for key, record in zip(keys, self.read(view, keys), strict=True) if record]
        if there:
            yield [key for key, _ in there], [record for _, record in there]

    def read_cell(self, view: str, name: str) -> bytes | None:
        return self._read_places(view, name, [self._cell(view, name)])[0]

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        cell, patience = self._cell(view, name), Patience(self.address.deadline)
        words = (b"EVALSHA", self._cell_script, b"1", cell, new, *([] if expected is None else [expected]))
        with self._translated(f"write the {name} of feature view {view!r} to", patience):
            self._reached(patience)
            request = command(words[0], words[1].split(b"\r\n")[1], *words[2:])
            (written,) = each(self.keeper, np.array([slot_of(cell)]), lambda _: request, patience, self._cell_load)
        # Where the reply was lost and the call made again, what stands there may be our own.
        return bool(written) or (patience.waits > 0 and self.read_cell(view, name) == new)

    def write_copies(self, view: str, name: str, content: bytes) -> None:
        patience = Patience(self.address.deadline)
        with self._translated(f"write the copies of the {name} of feature view {view!r} to", patience):
            self._reached(patience)
            places = self._copies(view, name)
            slots = np.array([slot_of(place) for place in places])
            each(self.keeper, slots, lambda row: command(b"SET", places[row], content), patience)

    def read_copies(self, view: str, name: str) -> list[bytes | None]:
        with self._translated(f"read the copies of the {name} of feature view {view!r} from"):
            places = self._copies(view, name)
        return self._read_places(view, name, [self._cell(view, name), *places])

    def _copies(self, view: str, name: str) -> list[bytes]:
        """One in each 128th slot, and one on each primary that owns none of these, in its first slot."""
        owner, slots = self.keeper.topology().owner, list(range(0, SLOTS, SLOTS_PER_COPY))
        lonely = set(np.unique(owner).tolist()) - set(owner[slots].tolist()) - {-1}
        slots += [int(np.argmax(owner == place)) for place in sorted(lonely)]
        return [b"%b:{%b}" % (self._cell(view, name), slot_tags()[slot]) for slot in slots]

    def _read_places(self, view: str, name: str, places: list[bytes]) -> list[bytes | None]:
        patience = Patience(self.address.timeout)
        slots = np.array([slot_of(place) for place in places])
        with self._translated(f"read the {name} of feature view {view!r} from", patience):
            self._reached(patience)
            return each(self.keeper, slots, lambda row: command(b"GET", places[row]), patience)

    def purge(self, view: str, now_us: int) -> None:
        """Nothing to do: keys carry their own expiry."""

    def describe(self) -> dict[str, str]:
        with self._translated("ask"):
            topology = self.keeper.refreshed(None)
            told = [self.keeper.info(node) for node in topology.primaries]
        kind = "valkey" if told[0].get("server_name") == "valkey" else "redis"
        versions = sorted({str(info.get("valkey_version") or info["redis_version"]) for info in told})
        return {
            "kind": f"{kind} {', '.join(versions)}",
            "role": f"cluster of {len(told)} primaries, {topology.replicas} replicas",
            "memory": " + ".join(info["used_memory_human"] for info in told),
            "maxmemory": " + ".join(str(info.get("maxmemory_human", "?")) for info in told),
            "maxmemory_policy": ", ".join(sorted({str(info.get("maxmemory_policy", "?")) for info in told})),
        }

    def close(self) -> None:
        self.keeper.close()

    def _key(self, view: str, entity_key: bytes) -> bytes:
        return b"%b:%b:{%b}" % (self.prefix.encode(), view.encode(), entity_key)

    def _cell(self, view: str, name: str) -> bytes:
        return f"{self.prefix}:{view}:{name}".encode()

    def _reached(self, patience: Patience) -> Topology:
        """The topology. Before the first one is known, a cluster that comes up is waited for; one that does not answer is told at once."""
        while (found := self._topology(patience)) is None:
            pass
        return found

    def _topology(self, patience: Patience) -> Topology | None:
        try:
            return self.keeper.topology()
        except driver.RedisError as error:
            if not passes(error, lost=False) or not patience.wait():
                raise
        return None

    def _refresh(self, seen: Topology) -> None:
        """Ask again who owns what; with nobody to answer the old knowledge has to do until the next time."""
        try:
            self.keeper.refreshed(seen)
        except REFUSED:
            raise
        except (driver.RedisError, OSError):
            return

    @contextmanager
    def _translated(self, doing: str, patience: Patience | None = None) -> Iterator[None]:
        with translated(doing, self.address, patience):
            yield


def _loaded(text: str) -> tuple[bytes, bytes]:
    """The request that loads a script, and its name as a RESP bulk string."""
    return command(b"SCRIPT", b"LOAD", text.encode()), bulk(
        sha1(text.encode(), usedforsecurity=False).hexdigest().encode()
    )
