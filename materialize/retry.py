"""Run a call again while the online store is not available, for a bounded number of attempts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import tenacity

from materialize import metrics
from materialize.errors import StoreChangedError, StoreFullError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ATTEMPTS", "with_retry"]

Result = TypeVar("Result")

#: Attempts in one process; what takes longer is left to the scheduler's own retries.
ATTEMPTS = 4
#: Seconds before the second attempt; doubles, with full jitter, up to the maximum.
FIRST_WAIT, LONGEST_WAIT = 0.2, 5.0


def _count(state: tenacity.RetryCallState) -> None:
    if state.outcome is not None and (error := state.outcome.exception()):
        metrics.retried(error)


def with_retry(call: Callable[[], Result], *, sleep: Callable[[float], None] = time.sleep) -> Result:
    """What *call* returns; it must be harmless to repeat. Raises its last UnavailableError, and any other error at once.

    A store that is full is asked again for as long as its error says.
    A store with a deadline of its own (Redis) has waited for it when it raises: such an error is not tried again here, so that the
    deadline is what is waited in all, and not four times of it.
    """

    def enough(state: tenacity.RetryCallState) -> bool:
        error = None if state.outcome is None else state.outcome.exception()
        if isinstance(error, StoreFullError):
            return state.idle_for + state.upcoming_sleep > error.patience
        return state.attempt_number >= ATTEMPTS

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=enough,
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT),
        sleep=sleep,
        before_sleep=_count,
        reraise=True,
    )
    try:
        return retrying(call)
    except StoreChangedError:
        raise
    except UnavailableError as error:
        raise UnavailableError(
            f"{error}, attempt {retrying.statistics['attempt_number']} of {ATTEMPTS}. Nothing is lost: the watermark stays. Run again when the store answers."
        ) from None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, UnavailableError):
        return not error.waited and not isinstance(error, StoreChangedError)
    return isinstance(error, StoreFullError)
