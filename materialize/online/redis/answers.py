"""What Redis and its driver answer instead of doing what was asked: what it means, who acts, and how long it is waited for."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from redis import exceptions as driver

from materialize.errors import OnlineStoreError, StoreFullError, UnavailableError
from materialize.model import mask_credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from materialize.online.redis.address import Address

__all__ = ["FULL", "LOST", "PASSING", "REFUSED", "TRANSIENT", "Patience", "passes", "translated"]

#: The operator acts. Asked before the others: AuthenticationError is a ConnectionError.
REFUSED = (
    driver.AuthenticationError,
    driver.AuthenticationWrongNumberOfArgsError,
    driver.AuthorizationError,
    driver.NoPermissionError,
)
#: The server has no memory and evicts nothing.
FULL = (driver.OutOfMemoryError,)
#: What a server says while it starts, is failed over, moves slots or runs a long script: it passes by itself.
PASSING = (
    driver.BusyLoadingError,
    driver.ClusterDownError,
    driver.MasterDownError,
    driver.NoScriptError,
    driver.ReadOnlyError,
    driver.TryAgainError,
)
#: The same without a class of the driver's own, by the first word: a long script, and too few replicas for min-replicas-to-write.
PASSING_WORDS = ("BUSY ", "NOREPLICAS ")
#: What a server of a cluster says to a client that takes it for a single one. MovedError is an AskError.
CLUSTERED = (driver.AskError, driver.ClusterCrossSlotError)
#: No answer: whether the call took effect is not known.
LOST = (driver.ConnectionError, driver.TimeoutError, OSError)
TRANSIENT = (*LOST, *PASSING)
#: Seconds of the first wait at most, doubled up to the longest; each is drawn between half of it and all (jitter).
FIRST_WAIT, LONGEST_WAIT = 0.02, 1.0


def passes(error: BaseException, *, lost: bool) -> bool:
    """Whether *error* is worth waiting for. *lost*: so are lost connections, because another server may take over."""
    if isinstance(error, REFUSED):
        return False
    if isinstance(error, LOST) and not isinstance(error, PASSING):
        return lost
    return isinstance(error, PASSING) or str(error).startswith(PASSING_WORDS)


class Patience:
    """The time that one call may wait, whatever it waits for and however often."""

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.clock, self.sleep, self.draw = clock, sleep, draw
        self.began = clock()
        self.until = self.began + seconds
        self.longest = FIRST_WAIT
        self.waits = 0

    @property
    def over(self) -> bool:
        return self.clock() >= self.until

    def wait(self) -> bool:
        """Wait a while, longer each time; whether there was time left for it."""
        pause = self.pause()
        if pause is None:
            return False
        self.sleep(pause)
        return True

    def pause(self) -> float | None:
        """How many seconds to wait now, longer each time, for who waits in another way; None when no time is left."""
        left = self.until - self.clock()
        if left <= 0:
            return None
        pause = min(self.draw(self.longest / 2, self.longest), left)
        self.longest = min(2 * self.longest, LONGEST_WAIT)
        self.waits += 1
        return pause


@contextmanager
def translated(
    doing: str, address: Address, patience: Patience | None = None, figures: Callable[[], str] = str
) -> Iterator[None]:
    """Turn the driver's errors into ours, once, naming what was done and where, and how long *patience* waited.

    *figures*: asked for the memory that a full server has and uses, a sentence.
    """
    try:
        yield
    except REFUSED as error:
        raise OnlineStoreError(
            f"could not {doing} {address.location}: {_first_line(error)}. "
            "Nothing was written. Check the user, the password and the ACL in the store's URL or connection."
        ) from None
    except FULL as error:
        full = StoreFullError(
            f"could not {doing} {address.location}: {_first_line(error)}. {figures()}Any part of the batch may be written; "
            "the watermark stays. Give the store more memory and run again: the next run goes on from what is there."
        )
        full.patience = address.patience
        raise full from None
    except (*TRANSIENT, driver.RedisError) as error:
        found = f"could not {doing} {address.location}: {_first_line(error)}"
        if isinstance(error, CLUSTERED):
            raise OnlineStoreError(
                f"{found}, found a server of a cluster, expected one that has all keys. Nothing was read or written. "
                "Use redis+cluster:// or rediss+cluster:// in the store's URL."
            ) from None
        if not passes(error, lost=True):
            raise OnlineStoreError(f"{found}. Ask the store's operator; running again is harmless.") from None
        if patience is None or not patience.waits:
            raise UnavailableError(f"{found} (waited at most {address.timeout:g} s)") from None
        unavailable = UnavailableError(
            f"{found} (still so after {patience.clock() - patience.began:.1f} s and {patience.waits + 1} attempts)"
        )
        unavailable.waited = True
        raise unavailable from None


def _first_line(error: BaseException) -> str:
    return mask_credentials(str(error).partition("\n")[0]) or type(error).__name__
