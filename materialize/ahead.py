"""Blocks in, the same blocks out, each of them made in the background while the one before it is used."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from materialize.timings import timed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["ahead"]

Block = TypeVar("Block")


def ahead(blocks: Iterator[Block], spent: Callable[[str, float], None]) -> Iterator[Block]:
    """The same *blocks*, none of which is None. Whoever leaves early does not wait for the one that is being read.

    *spent* is told how long reading a block took (``read``) and how long it was waited for (``wait_read``), seconds.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="materialize-read")
    read = timed(partial(next, blocks, None))
    try:
        coming = pool.submit(read)
        while True:
            asked = time.monotonic()
            found = coming.result()
            spent("wait_read", time.monotonic() - asked)
            spent("read", found.seconds)
            if found.result is None:
                return
            coming = pool.submit(read)
            yield found.result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
