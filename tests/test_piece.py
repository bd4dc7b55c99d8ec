"""A piece that is given up in the middle."""

import threading

import pytest

from materialize.ahead import ahead


def test_whoever_leaves_early_does_not_wait_for_the_read_in_the_background():
    reading, go = threading.Event(), threading.Event()

    def blocks():
        yield "first"
        reading.set()
        go.wait(10)
        yield "second"

    def leave():
        for _ in ahead(blocks(), lambda *_: None):
            assert reading.wait(10)
            raise KeyboardInterrupt

    timer = threading.Timer(2, go.set)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            leave()
        waited = go.is_set()
    finally:
        timer.cancel()
        go.set()

    assert not waited
