"""Signals in: the first one stops in order, and everything is as it was afterwards."""

import os
import pickle
import signal
import threading

import pytest

from materialize.stop import Stopped, stop_on


def test_the_first_signal_stops_and_tells_how_far_it_came():
    def run():
        with stop_on(signal.SIGINT, signal.SIGTERM) as count:
            count(3_000)
            count(500)
            signal.raise_signal(signal.SIGTERM)
            count(1)

    with pytest.raises(Stopped, match=r"^stopped by SIGTERM after 3,500 rows\. The watermark stays"):
        run()


def test_a_second_signal_kills_at_once():
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
        with stop_on(signal.SIGINT, signal.SIGTERM):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGTERM)
                os._exit(0)

    _, status = os.waitpid(child, 0)

    assert os.WTERMSIG(status) == signal.SIGTERM


def test_the_handlers_of_before_are_back_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on(signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) is not before[1]

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on(signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(signal.SIGINT)
            found = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)

    assert found == signal.SIG_IGN


def test_outside_the_main_thread_it_only_counts():
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with stop_on(signal.SIGTERM) as count:
            count(1)
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert found == [before]


def test_it_survives_pickling():
    copy = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, 7)))

    assert (copy.number, copy.rows) == (signal.SIGTERM, 7)
