"""Which signals are a wish to stop."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_entropy.training.signals import Signals


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_a_wish_to_stop_unless_nohup_ignores_it(ignored):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else lambda *_: None)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.wanted is not ignored
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_second_signal_is_obeyed_at_once_but_a_terminal_may_close_twice(first):
    with Signals() as signals:
        for _ in range(2 if first == signal.SIGHUP else 1):
            os.kill(os.getpid(), first)
        assert signals.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_a_thread_which_python_hands_no_signals_training_goes_on_without():
    def entered():
        with Signals() as signals:
            return signals.stop()

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(entered).result() is False
    assert signal.getsignal(signal.SIGTERM) is before
