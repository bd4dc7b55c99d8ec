"""Background writes: all counted, bounded, and an error reaches the caller."""

import threading

import numpy as np
import pytest

from materialize.errors import OnlineStoreError, UnavailableError
from materialize.online.memory import MemoryStore
from materialize.order import STALE, WRITTEN
from materialize.testing import Row, make_batch
from materialize.writer import Writer


class Store(MemoryStore):
    parallel_writes = 2


def batch(rows):
    return make_batch([Row(b"%d" % number) for number in range(rows)])


def test_every_batch_is_counted_by_outcome_and_bytes():
    progress = []
    with Writer(Store(), progress.append) as writer:
        for rows in (3, 4, 0, 5):
            writer.submit(batch(rows), lambda part: np.arange(len(part.keys), dtype=np.uint8) % 3)

    assert writer.outcomes.tolist() == [5, 4, 3]
    assert progress == [3, 4, 0, 5]
    assert writer.nbytes == sum(batch(rows).keys.nbytes + batch(rows).values.nbytes for rows in (3, 4, 0, 5))


def test_no_more_than_the_stores_share_runs_at_once_and_one_batch_waits():
    running, most, submitted, gate = [], [], [], threading.Semaphore(0)

    def write(part):
        running.append(part)
        gate.acquire(timeout=10)
        most.append(len(running))
        running.pop()
        return np.ones(len(part.keys), dtype=np.uint8)

    def submit_all(writer):
        for number in range(8):
            writer.submit(batch(1), write)
            submitted.append(number)

    with Writer(Store(), lambda _: None) as writer:
        thread = threading.Thread(target=submit_all, args=(writer,))
        thread.start()
        thread.join(0.3)
        assert len(submitted) == 3
        gate.release(8)
        thread.join(10)

    assert max(most) == 2
    assert writer.outcomes.tolist() == [0, 8, 0]


def test_a_write_is_tried_again_when_the_store_did_not_answer():
    answers = iter([UnavailableError("could not write"), np.ones(4, dtype=np.uint8)])

    def write(_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with Writer(Store(), lambda _: None) as writer:
        writer.submit(batch(4), write)

    assert writer.outcomes.tolist() == [0, 4, 0]


def test_an_error_of_a_background_write_reaches_the_caller():
    def write(_):
        raise OnlineStoreError("full")

    def submit_all():
        with Writer(Store(), lambda _: None) as writer:
            for _ in range(10):
                writer.submit(batch(1), write)

    with pytest.raises(OnlineStoreError, match="full"):
        submit_all()


def test_an_error_of_the_caller_is_not_hidden_by_the_writer():
    def submit_and_fail():
        with Writer(Store(), lambda _: None) as writer:
            writer.submit(batch(1), lambda part: np.ones(len(part.keys), dtype=np.uint8))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        submit_and_fail()


def test_a_caller_that_fails_waits_for_what_is_under_way_and_begins_nothing_more():
    begun, done, progress, go = [], [], [], threading.Event()

    def write(part):
        begun.append(len(part.keys))
        if len(part.keys) == 2:
            raise UnavailableError("could not write")
        go.wait(10)
        done.append(len(part.keys))
        return np.ones(len(part.keys), dtype=np.uint8)

    def submit_and_stop():
        with Writer(Store(), progress.append) as writer:
            for rows in (1, 2, 3):
                writer.submit(batch(rows), write)
            while len(begun) < 2:
                threading.Event().wait(0.001)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        submit_and_stop()

    assert begun == [1, 2]
    assert done == progress == [1]


def test_each_batch_goes_by_its_own_call():
    merged, replaced = [], []

    def call(seen, outcome):
        def write(part):
            seen.append(len(part.keys))
            return np.full(len(part.keys), outcome, dtype=np.uint8)

        return write

    with Writer(Store(), lambda _: None) as writer:
        for rows in (1, 2, 3):
            writer.submit(batch(rows), call(merged, STALE))
            writer.submit(batch(rows + 10), call(replaced, WRITTEN))

    assert (sorted(merged), sorted(replaced)) == ([1, 2, 3], [11, 12, 13])
    assert writer.outcomes.tolist() == [6, 36, 0]
