"""Interruption: a signal between two steps, on real signals to this process."""

from __future__ import annotations

import os
import signal

import pytest

from fbs_rl.interruption import Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    interruption = Interruption()
    with interruption.awaited():
        assert not interruption.asked
        os.kill(os.getpid(), number)
        assert interruption.asked
    assert signal.getsignal(number) is before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interruption().awaited():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before
