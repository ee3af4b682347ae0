"""Which signals are a wish to stop."""

import os
import signal

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
