"""What servers say about themselves, then and now, in; whether they may have lost what we wrote, in words, out. Pure: no I/O, no clock.

On one server the records and their watermark are in one log. A restart from an old file, or a failover that lost the tail, gives
back a beginning of it, whose own watermark is older: the next run goes on from there and is exact. Keys that leave by themselves
(eviction) break that, and so does a log that lost something *before* the watermark.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Evidence",
    "Facts",
    "Verdict",
    "during_run",
    "facts_from_json",
    "facts_to_json",
    "position",
    "since_watermark",
]

#: The replication id of a server that has no second history.
NO_HISTORY = "0" * 40


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one server said about itself at one moment.

    ``run_id``: of its process. ``replid``, ``offset``: of its replication history, and how many bytes it has. ``replid2``: the history
    that this one continues, up to the byte before ``second_offset``. ``evicted``: keys, since the process began. ``used``,
    ``maxmemory``: bytes; a ``maxmemory`` of 0 is no limit.
    """

    run_id: str
    replid: str
    replid2: str
    second_offset: int
    offset: int
    evicted: int
    used: int
    maxmemory: int
    policy: str

    @property
    def evicts(self) -> bool:
        """Whether the server may remove keys to make room."""
        return self.maxmemory > 0 and self.policy not in {"noeviction", ""}

    @property
    def free(self) -> float:
        """Bytes that more records may take."""
        return max(self.maxmemory - self.used, 0) if self.maxmemory else math.inf


#: Evidence by node name; a store of one server has one node, a cluster one for each primary.
Facts = dict[str, Evidence]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``words``: what happened, empty when nothing did. ``lost``: data may be missing. ``evicted``: because keys were evicted."""

    words: str = ""
    lost: bool = False
    evicted: bool = False


def facts_to_json(facts: Facts | None) -> dict[str, Any] | None:
    return None if facts is None else {node: asdict(evidence) for node, evidence in facts.items()}


def facts_from_json(values: Mapping[str, Any] | None) -> Facts | None:
    """The facts in a watermark; None where it has none, or those of another release."""
    if values is None:
        return None
    names = [field.name for field in fields(Evidence)]
    try:
        return {node: Evidence(*(told[name] for name in names)) for node, told in values.items()}
    except KeyError:
        return None


def since_watermark(then: Facts, now: Facts) -> Verdict:
    """What happened to the servers between the facts in a watermark and a later run that reads this watermark."""
    pairs = _paired(then, now)
    verdicts = [_joined(_eviction(before, after), _history(before, after)) for before, after in pairs]
    if len(pairs) < len(then) or len(now) > len(then):
        # Each server that holds a part has its own copy of the watermark, and the oldest counts.
        verdicts.append(Verdict(f"the store had {len(then)} servers and has {len(now)}, or others"))
    return _joined(*verdicts)


def during_run(then: Facts, now: Facts, positions: Mapping[str, int]) -> Verdict:
    """What happened to what a run wrote: *positions* are its last writes, as `position` names histories -> the offset after it."""
    verdicts = [_eviction(before, after) for before, after in _paired(then, now)]
    verdicts += [_survived(name, offset, now) for name, offset in positions.items()]
    return _joined(*verdicts)


def position(run_id: str, replid: str) -> str:
    """The name of a history in a process, as a key of *positions*."""
    return f"{run_id}/{replid}"


def _paired(then: Facts, now: Facts) -> list[tuple[Evidence, Evidence]]:
    """Each server of *then* that is there, with what it says now: the one that goes on with its history, else the one of its name."""
    pairs = []
    for node, before in then.items():
        heirs = [after for after in now.values() if before.replid in {after.replid, after.replid2}]
        if after := next(iter(heirs), now.get(node)):
            pairs.append((before, after))
    return pairs


def _eviction(then: Evidence, now: Evidence) -> Verdict:
    if then.run_id == now.run_id and now.evicted >= then.evicted:
        evicted = now.evicted - then.evicted
        return Verdict(f"the server evicted {evicted:,} keys", lost=True, evicted=True) if evicted else Verdict()
    # The counter began anew, with the process or by CONFIG RESETSTAT.
    if now.evicted:
        return Verdict(f"the server evicted {now.evicted:,} keys", lost=True, evicted=True)
    if then.evicts or now.evicts:
        policy = now.policy if now.evicts else then.policy
        return Verdict(f"the server evicts keys ({policy}) and its count began anew", lost=True, evicted=True)
    return Verdict()


def _history(then: Evidence, now: Evidence) -> Verdict:
    """Whether what was there *then* is there *now*, when the watermark with the facts of *then* is."""
    if now.replid == then.replid:
        if now.offset < then.offset:
            behind = then.offset - now.offset
            return Verdict(f"the server went back by {behind:,} bytes of its own history", lost=True)
        return Verdict() if now.run_id == then.run_id else Verdict("the server restarted with all it had")
    if now.replid2 == then.replid:
        survived = now.second_offset - 1
        if then.offset > survived:
            # The watermark was written after the change of servers, with the facts of before.
            return Verdict(
                f"the store failed over and {then.offset - survived:,} bytes written before the watermark are lost",
                lost=True,
            )
        return Verdict(
            "the store failed over or restarted, and by its offsets has all that is older than its watermark"
        )
    if now.run_id == then.run_id:
        # A server that has its first replica, or has had none for long, gives its history a new name.
        continues = now.replid2 == NO_HISTORY
        return Verdict() if continues else Verdict("the server was a replica of another one in between", lost=True)
    return Verdict(
        "the server restarted or was replaced, and may have gone back; this goes on from the watermark that it has"
    )


def _survived(name: str, offset: int, now: Facts) -> Verdict:
    """Whether the write after which the history *name* had *offset* is still there."""
    run_id, _, replid = name.partition("/")
    for one in now.values():
        if one.replid == replid and one.offset >= offset:
            return Verdict() if one.run_id == run_id else Verdict("the store failed over, with all that the run wrote")
        if one.run_id == run_id and one.replid != replid and one.replid2 == NO_HISTORY:
            return Verdict()
    for one in now.values():
        if one.replid2 == replid and offset < one.second_offset:
            return Verdict("the store failed over or restarted, and by its offsets has all that the run wrote")
        if one.replid2 == replid:
            lost = offset - one.second_offset + 1
            return Verdict(
                f"the store failed over, and the last {lost:,} bytes that the run wrote to it are lost", lost=True
            )
    return Verdict("the server restarted or was replaced, and may have lost what the run wrote", lost=True)


def _joined(*verdicts: Verdict) -> Verdict:
    words = dict.fromkeys(verdict.words for verdict in verdicts if verdict.words)
    return Verdict(
        "; ".join(words), any(verdict.lost for verdict in verdicts), any(verdict.evicted for verdict in verdicts)
    )
