"""What may pass by itself is tried again, a bounded number of times; everything else fails at once."""

import pytest

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.retry import ATTEMPTS, LONGEST_WAIT, with_retry


class Flaky:
    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_an_unavailable_store_is_tried_again_with_growing_waits():
    call, waits = Flaky(UnavailableError("a"), UnavailableError("b")), []

    assert with_retry(call, sleep=waits.append) == "done"
    assert call.calls == 3
    assert len(waits) == 2
    assert all(0 <= wait <= LONGEST_WAIT for wait in waits)


def test_the_last_error_says_how_often_and_that_nothing_is_lost():
    call = Flaky(*(UnavailableError("could not write 5 rows") for _ in range(ATTEMPTS)))

    with pytest.raises(UnavailableError, match=r"could not write 5 rows, attempt 4 of 4\. Nothing is lost"):
        with_retry(call, sleep=lambda _: None)
    assert call.calls == ATTEMPTS


@pytest.mark.parametrize("error", [OnlineStoreError("no"), ValueError("no")])
def test_another_error_is_not_tried_again(error):
    call = Flaky(error)

    with pytest.raises(type(error)):
        with_retry(call, sleep=lambda _: None)
    assert call.calls == 1


def test_a_store_that_waited_until_its_deadline_is_not_waited_for_again():
    waited = UnavailableError("could not write 5 rows")
    waited.waited = True
    call = Flaky(waited)

    with pytest.raises(UnavailableError, match=r"attempt 1 of 4"):
        with_retry(call, sleep=lambda _: None)
    assert call.calls == 1
