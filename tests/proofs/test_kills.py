"""Real runs against a real Valkey, killed with SIGKILL at random points, then finished: every key is what the table says."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from materialize.model import from_us
from tests.fault_proxy import Fault, FaultProxy
from tests.projects import Project
from tests.proofs import forked
from tests.proofs.oracle import Lake, facts_in_redis, wrong_keys
from tests.proofs.story import FIRST_US, STEP_US, Story

if TYPE_CHECKING:
    from pathlib import Path

    import redis

    from tests import servers

pytestmark = [pytest.mark.e2e, pytest.mark.server]

#: The seed of the first part, to see a failure again; told by every failure.
SEED = int(os.environ.get("MATERIALIZE_SEED", "1"))
PARTS = 4
ENTITIES, PADDING = 600, 100
#: Finished runs over one table, before the next table begins with an empty store.
WINDOWS = 10
#: Where a kill can hit while there is work; each must be hit, so that this proves something.
PLACES = ("before the first write", "between writes", "before the watermark", "after the watermark")
IDLE = "nothing to do"
#: What the request has in it, and no earlier one of a run, that moves the watermark, or claims it for a snapshot.
MOVE, CLAIM = b'{"counts":{"', b'{"counts":{}'


class Trial:
    """One table and its store in one database of a server."""

    def __init__(self, folder: Path, server: servers.Server, seed: int) -> None:
        self.rng, self.folder, self.server = random.Random(seed), folder, server
        self.project = Project(folder, server.url)
        self.story = Story(self.project.table.path, seed, entities=ENTITIES, padding=PADDING)
        self.story.commit()
        self.lake = Lake(self.story.table.path)
        server.client.flushall()
        #: What a whole run took and sent, as the last one did.
        self.seconds, self.bytes = 0.4, ENTITIES * (PADDING + 100)
        self.told: list[str] = []
        self.process: Any = None
        self.started = threading.Lock()

    @property
    def client(self) -> redis.Redis:
        return self.server.client

    def content(self) -> dict[bytes, bytes]:
        keys = list(self.client.scan_iter(count=5_000))
        return dict(zip(keys, self.client.mget(keys), strict=True)) if keys else {}

    def watermark(self, content: dict[bytes, bytes]) -> int | None:
        text = content.get(b"fs:spending:watermark")
        return None if text is None else json.loads(text)["version"]

    def check(self, content: dict[bytes, bytes]) -> None:
        """What holds at every moment: the store has everything that the watermark claims."""
        if (version := self.watermark(content)) is not None:
            behind = self.lake.behind(version, facts_in_redis(content, "spending", "fs"))
            assert not behind, f"{len(behind)} entities behind version {version}: {self.told}"

    def window(self) -> Counter[str]:
        """One or two commits; runs that are killed, one after the other; and one that finishes. Returns: where kills hit.

        A kill of a run that had nothing to do is none.
        """
        self.story.grow(self.rng.randint(1, 2))
        self.lake.refresh()
        states = [(True, self.content())]
        for _ in range(self.rng.randint(1, 5)):
            killed = self.killed()
            states.append((killed, self.content()))
            self.check(states[-1][1])
            if self.watermark(states[-1][1]) == self.lake.head:
                break
        self.finish()
        final = self.content()
        self.check(final)
        wrong = wrong_keys(self.lake, facts_in_redis(final, "spending", "fs"))
        assert not wrong, f"{dict(wrong)}: {self.told}"
        assert self.watermark(final) == self.lake.head, self.told
        hits = Counter(self.where(before, after, final) for (_, before), (killed, after) in pairwise(states) if killed)
        self.told.append(str(dict(hits)))
        del hits[IDLE]
        return hits

    def where(self, before: dict[bytes, bytes], after: dict[bytes, bytes], final: dict[bytes, bytes]) -> str:
        head = self.lake.head
        if self.watermark(after) == head:
            return IDLE if self.watermark(before) == head else "after the watermark"
        records = [{key: value for key, value in one.items() if b"{" in key} for one in (before, after, final)]
        if records[0] == records[2]:
            return IDLE
        if records[1] == records[2]:
            return "before the watermark"
        return "before the first write" if records[0] == records[1] else "between writes"

    def killed(self) -> bool:
        """Start a run and kill it by the clock, at a byte of its requests or of the replies, or around the watermark."""
        mode = self.rng.choices(["incremental", "rebuild", "backfill"], [7, 2, 1])[0]
        how = self.rng.choices(["clock", "up", "down", "move", "moved"], [3, 8, 3, 2, 2])[0]
        at = self.rng.randint(self.bytes // 8, self.bytes) if how == "up" else self.rng.randint(200, 200 + ENTITIES)
        wait = self.seconds * self.rng.uniform(0.1, 1.0) if how == "clock" else forked.SECONDS
        if how == "clock":
            faults = []
        elif how in ("up", "down"):
            faults = [Fault(how, at, "call", call=self.kill)]
        else:
            seen = CLAIM if mode == "rebuild" and self.rng.random() < 0.3 else MOVE
            faults = [Fault("up", 0, "call", seen=seen, call=self.kill if how == "move" else self.kill_when_moved)]
        with FaultProxy(self.server.port, faults) as proxy:
            self.project.configure(url=f"redis://127.0.0.1:{proxy.port}/0")
            with self.started:
                self.process = self.start(mode)
            self.process.join(wait)
            self.process.kill()
            code = forked.ended(self.process)
        self.told.append(f"{mode} killed by {how} at {at}: {code}")
        return code == -9

    def kill(self) -> None:
        with self.started:
            self.process.kill()

    def kill_when_moved(self) -> None:
        """Called before the watermark's move passes: the kill comes as soon as it is done, perhaps before its reply is read."""
        before = self.client.get("fs:spending:watermark")

        def watch() -> None:
            deadline = time.monotonic() + 1
            while self.client.get("fs:spending:watermark") == before and time.monotonic() < deadline:
                pass
            self.kill()

        threading.Thread(target=watch, daemon=True).start()

    def start(self, mode: str) -> Any:
        options = []
        if mode == "backfill":
            low = self.rng.randint(0, self.story.hour)
            moments = (FIRST_US + step * STEP_US for step in (low, low + 20))
            options = ["spending"]
            options += [
                one
                for pair in zip(("--start", "--end"), (from_us(us).isoformat() for us in moments), strict=True)
                for one in pair
            ]
        return forked.start(self.project.config, self.folder / "talk", mode, *options)

    def finish(self) -> None:
        self.project.configure(url=self.server.url)
        started = time.monotonic()
        process = forked.start(self.project.config, self.folder / "talk", "incremental", "--json")
        code = forked.ended(process)
        talk = (self.folder / "talk").read_text()
        assert code == 0, f"{talk}: {self.told}"
        self.seconds = time.monotonic() - started
        report = [line for line in talk.splitlines() if line[0] == "{"][-1]  # among what is logged
        self.bytes = max(20_000, json.loads(report)["bytes"])


@pytest.mark.parametrize("part", range(PARTS))
def test_no_key_is_wrong_after_a_kill_and_a_finished_run(
    tmp_path: Path, valkey: servers.Server, pytestconfig: pytest.Config, part: int
) -> None:
    wanted = pytestconfig.getoption("kills") / PARTS
    seed, hits, windows = 1_000_003 * part + SEED, Counter[str](), 0
    while hits.total() < wanted:
        trial = Trial(tmp_path / str(seed), valkey, seed)
        for _ in range(WINDOWS):
            try:
                hits += trial.window()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {error}") from error
            windows += 1
            if hits.total() >= wanted:
                break
        seed += 1
    print(f"\n{hits.total()} kills from seed {1_000_003 * part + SEED}, {windows} finished runs: {dict(hits)}")
    assert wanted < 50 or set(hits) == set(PLACES), hits
