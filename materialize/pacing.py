"""A store that is about to be written in, a load that its readers hardly feel out: their latency is measured and decides the pace.

The rule is that of TCP: a load that makes reads slow gets a smaller share of the time at once, and a larger one step by step. So
several loads of one store, which do not know of each other, come to equal shares.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from materialize import metrics
from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.pace import Brake

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from typing_extensions import Self

    from materialize.online.base import OnlineStore
    from materialize.online.pace import Probe

__all__ = ["Controller", "Histogram", "Pacer", "merged"]

log = logging.getLogger(__name__)

#: Seconds between two reads of the probe: 200 a second, which a server that can do 100,000 does not feel.
EVERY = 0.005
#: Seconds of reads, of which a share may be slow: what makes the target a p99. After so long without more the pace rises.
WINDOW, MAY_BE_SLOW = 1.0, 0.01
#: Reads before the load from which on they tell how many are slow without it.
ENOUGH_BEFORE = 100
#: Seconds after a change of the share in which reads say nothing about it.
SETTLING = 0.1
#: A share that was too large is multiplied by the first; each good window adds the second; it is never below the third.
SLOWER, FASTER, LEAST_SHARE = 0.7, 0.1, 0.1
#: Bytes that a replica may be behind: far below what makes the server drop it (64 MiB for a minute, client-output-buffer-limit).
MOST_BEHIND = 16 * 2**20
#: Seconds between two looks at the replicas, and before a probe that got no answer tries again.
LOOK = 1.0
#: What a load spends on measuring reads after it: a share of its time, seconds at most.
AFTER_SHARE, LONGEST_AFTER = 0.01, 1.0
#: Buckets per factor of two, of latencies in microseconds up to an hour: each is 4.4 % wide.
PER_OCTAVE, OCTAVES = 16, 32


def _waits(latency: float) -> int:
    """As how many reads one counts: while the probe waited, readers who come every `EVERY` seconds would have waited too."""
    return max(1, int(latency / EVERY))


class Histogram:
    """Latencies by size, in constant memory. A read longer than the pause between two reads counts as all that it kept away."""

    def __init__(self) -> None:
        self.counts = [0] * (PER_OCTAVE * OCTAVES)
        self.reads = 0

    def add(self, latency: float) -> None:
        self.reads += 1
        for number in range(_waits(latency)):
            us = max(1.0, (latency - number * EVERY) * 1e6)
            self.counts[min(int(math.log2(us) * PER_OCTAVE), len(self.counts) - 1)] += 1

    def quantile_ms(self, share: float) -> float:
        """The latency that *share* of the reads did not exceed, milliseconds, at most 4.4 % too high."""
        sums = list(accumulate(self.counts))
        bucket = bisect_left(sums, math.ceil(share * sums[-1]))
        return round(math.pow(2.0, (bucket + 1) / PER_OCTAVE) / 1e3, 3)

    def summary(self) -> dict[str, float]:
        return {"reads": self.reads, "p50_ms": self.quantile_ms(0.5), "p99_ms": self.quantile_ms(0.99)}


@dataclass(slots=True)
class Controller:
    """Latencies in, the share of the time for writing out; pure. ``target``: seconds of p99, beyond the shortest read seen.

    The shortest read is the way to the store and back, which no pace makes shorter. Nor does a pace help against what made reads
    slow before the load: as many more may be slow.
    """

    target: float
    share: float = 1.0
    least: float = float("inf")
    _slow: int = 0
    _since: float = field(default=float("-inf"))
    _before: list[int] = field(default_factory=lambda: [0, 0])

    def idle(self, latency: float) -> None:
        """A read before the load took *latency* seconds."""
        self.least = min(self.least, latency)
        self._before[0] += _waits(latency)
        self._before[1] += self._slow_ones(latency)

    @property
    def allowed(self) -> float:
        """How many reads of a window may be slow."""
        reads, slow = self._before
        return (MAY_BE_SLOW + (slow / reads if reads >= ENOUGH_BEFORE else 0.0)) * WINDOW / EVERY

    def _slow_ones(self, latency: float) -> int:
        return max(0, min(_waits(latency), math.ceil((latency - self.least - self.target) / EVERY)))

    def read(self, latency: float, now: float) -> float:
        """A read was seen at *now*, which took *latency* seconds. Returns: the share from now on."""
        self.least = min(self.least, latency)
        if self._since == float("-inf"):
            self._since = now
        if now - self._since < SETTLING:
            return self.share
        self._slow += self._slow_ones(latency)
        if self._slow > self.allowed:
            return self._changed(max(LEAST_SHARE, self.share * SLOWER), now)
        if now - self._since >= WINDOW:
            return self._changed(min(1.0, self.share + FASTER), now)
        return self.share

    def behind(self, nbytes: int, now: float) -> float:
        """A replica is *nbytes* behind. Returns: the share from now on."""
        if nbytes <= MOST_BEHIND:
            return self.share
        return self._changed(max(LEAST_SHARE, self.share * SLOWER), now)

    def _changed(self, share: float, now: float) -> float:
        self.share, self._slow, self._since = share, 0, now
        return share


class Pacer:
    """Within it, writes to *store* are paced by its readers' latency, if it has a probe and a ``read_p99``.

    ``held_back``: seconds that the load took longer for it. ``probe``: by ``before``, ``during`` and ``after`` the load, the
    number of reads, and their ``p50_ms`` and ``p99_ms``; empty without a probe. A probe that fails never fails the load.
    """

    def __init__(self, store: OnlineStore, view: str) -> None:
        self.store, self.view = store, view
        self.held_back, self.probe = 0.0, {}  # type: float, dict[str, dict[str, float]]
        self.phases = {phase: Histogram() for phase in ("before", "during", "after")}
        self.brake, self.over, self.done = Brake(), threading.Event(), False
        self.began = self.looked = time.monotonic()
        self.refused = False

    def __enter__(self) -> Self:
        target = self.store.read_p99
        probe = None if target is None else self.store.open_probe(self.view)
        self.reader = probe
        if target is None or probe is None:
            return self
        self.before, self.store.brake = self.store.brake, self.brake
        self.thread = threading.Thread(
            target=self._watch, args=(probe, Controller(target)), name="materialize-probe", daemon=True
        )
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.reader is None:
            return
        try:
            if error is None and self.brake.began:
                self.done = True
                self.over.wait(min(LONGEST_AFTER, AFTER_SHARE * (time.monotonic() - self.began)))
        finally:
            self.over.set()
            self.brake.release()
            self.store.brake = self.before
            if error is not None:
                self.reader.close()  # a read under way ends
            self.thread.join()
            self.reader.close()
        self.held_back = round(self.brake.rested / self.store.parallel_writes, 3)
        metrics.held_back(self.held_back)
        self.probe = {phase: found.summary() for phase, found in self.phases.items() if found.reads}
        log.info("paced view=%s held_back=%.3f s, reads %s", self.view, self.held_back, self.probe)

    def _watch(self, probe: Probe, controller: Controller) -> None:
        """The probe's thread."""
        while not self.over.wait(EVERY):
            try:
                self._look(probe, controller)
            except OnlineStoreError as error:  # noqa: PERF203 - 200 a second
                self._cannot(error)
                self.over.wait(LOOK)

    def _cannot(self, error: OnlineStoreError) -> None:
        """An answer that does not come is met by the writers too, who know what to do; a refusal may be of the probe alone."""
        if isinstance(error, UnavailableError) or self.refused:
            return
        self.refused, self.brake.share = True, 1.0
        log.warning("view=%s is not paced while its reads cannot be measured: %s", self.view, error)

    def _look(self, probe: Probe, controller: Controller) -> None:
        latency, now = probe.read(), time.monotonic()
        phase = "after" if self.done else "during" if self.brake.began else "before"
        self.phases[phase].add(latency)
        if phase == "before":
            controller.idle(latency)
            self.began = now
        elif phase == "during":
            self.brake.share = controller.read(latency, now)
            if now - self.looked >= LOOK:
                self.looked, self.brake.share = now, controller.behind(probe.behind(), now)


def merged(probes: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """What several pieces saw, as one: by phase the sum of the reads, their p50 weighted by the reads, the worst p99."""
    phases: dict[str, dict[str, float]] = {}
    for probe in probes:
        for phase, found in probe.items():
            sofar = phases.setdefault(phase, {"reads": 0, "p50_ms": 0.0, "p99_ms": 0.0})
            reads = sofar["reads"] + found["reads"]
            p50 = (sofar["p50_ms"] * sofar["reads"] + found["p50_ms"] * found["reads"]) / reads
            phases[phase] = {
                "reads": reads,
                "p50_ms": round(p50, 3),
                "p99_ms": max(sofar["p99_ms"], found["p99_ms"]),
            }
    return phases
