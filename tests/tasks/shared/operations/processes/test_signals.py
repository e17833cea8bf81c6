"""SIGTERM as an orderly exit."""

from __future__ import annotations

import signal

import pytest

from tasks.shared.operations.processes import signals


def test_the_outermost_handler_of_sigterm_is_the_only_one() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.sigterm_exits():
        ours = signal.getsignal(signal.SIGTERM)
        with signals.sigterm_exits():
            assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
        with pytest.raises(SystemExit) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == signals.TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) is before
