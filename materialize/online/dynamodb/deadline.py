"""A request of a model server in, its answer out until a deadline: botocore makes one attempt, and the next ones are made here."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, TypeVar

from botocore import exceptions as driver

from materialize.online.dynamodb.client import SERVER_ERROR, THROTTLES

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Deadline"]

Result = TypeVar("Result")

#: Seconds of the first pause between two attempts, doubled with each, with full jitter.
FIRST_PAUSE = 0.01


class Deadline:
    """The time of one call, for all its requests.

    botocore's timeouts are those of its client and cannot be shortened, so another attempt is made only when as much time is left
    as the last one took.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.until = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(self.until - time.monotonic(), 0.0)

    def keep(self, request: Callable[[], Result]) -> Result:
        """What *request* returns. Raises botocore's error when it does not pass, or not in time."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                return request()
            except (driver.ClientError, driver.HTTPClientError, driver.ConnectionError) as error:
                wait = pause * random.random()  # noqa: S311 - jitter
                if not _passes(error) or self.left <= time.monotonic() - began + wait:
                    raise
            time.sleep(wait)
            pause *= 2


def _passes(error: Exception) -> bool:
    if not isinstance(error, driver.ClientError):
        return True
    code = error.response["Error"]["Code"].removesuffix("Exception")
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return code in THROTTLES or status >= SERVER_ERROR
