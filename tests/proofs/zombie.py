"""A writer that stands still: runs in on stdin, one JSON object per line; on stdout what became of each, also when it was stopped meanwhile.

``stop`` of a run: the process stops itself (SIGSTOP, all threads) at that step, counted from 0, before and after each write and each look at
the watermark; None: it never does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from typing import Any

from materialize import pipeline, watermark
from materialize.errors import MaterializeError
from materialize.lease import CELL, Terms
from materialize.model import Interval
from materialize.online.redis import RedisStore
from materialize.pipeline import Run
from tests.tables import NOW, T0, Table


class StandingStill(RedisStore):
    """The store, stopping its process at step *stop*. Renewals of the lease are no steps: they come by time."""

    stop: int | None = None
    steps = 0

    def _step(self) -> None:
        if self.steps == self.stop:
            self.steps += 1
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            self.steps += 1

    def merge(self, *arguments: Any, **options: Any) -> Any:
        self._step()
        done = super().merge(*arguments, **options)
        self._step()
        return done

    def replace(self, *arguments: Any, **options: Any) -> Any:
        self._step()
        done = super().replace(*arguments, **options)
        self._step()
        return done

    def read_cell(self, view: str, name: str) -> bytes | None:
        if name != watermark.WATERMARK:
            return super().read_cell(view, name)
        self._step()
        done = super().read_cell(view, name)
        self._step()
        return done

    def compare_and_set_cell(self, view: str, name: str, expected: bytes | None, new: bytes) -> bool:
        if name == CELL:
            return super().compare_and_set_cell(view, name, expected, new)
        self._step()
        done = super().compare_and_set_cell(view, name, expected, new)
        self._step()
        return done


def outcome(asked: dict[str, Any], view: Any) -> str:
    """Do the run. Returns: ``done``, or the name of its error's class."""
    run = Run("default", asked["run_id"], lambda: NOW, lease=Terms(seconds=asked["seconds"]))
    with StandingStill(asked["url"]) as store:
        store.stop = asked["stop"]
        try:
            if asked["mode"] == "backfill":
                pipeline.backfill(view, store, run, Interval(T0, T0 + timedelta(days=1)))
            else:
                getattr(pipeline, asked["mode"])(view, store, run)
        except MaterializeError as error:
            return type(error).__name__
    return "done"


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        print(outcome(asked, Table(asked["table"]).view), flush=True)


if __name__ == "__main__":
    main()
