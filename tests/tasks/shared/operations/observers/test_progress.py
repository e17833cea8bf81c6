"""Progress as a log and as a bar."""

import io
import re

import pytest

from tasks.shared.operations.observers.progress import Progress


def test_a_log_gets_plain_lines_with_rate_loss_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("tasks.shared.operations.observers.progress.time.monotonic", lambda: now[0])
    log = io.StringIO()
    with Progress(1000, "swav", file=log) as progress:
        for _ in range(10):
            now[0] += 5
            progress.update(100, 2.5)
    lines = log.getvalue().splitlines()
    assert len(lines) == 5, "100 images every 5 s and a line every 10 s; nothing twice at the end"
    assert lines[0] == "swav:  20%, 200 of 1000 images, 20 images/s, loss 2.5000, 0:40 left"
    assert lines[-1] == "swav: 100%, 1000 of 1000 images, 20 images/s, loss 2.5000, 0:50 in all"
    assert "\r" not in log.getvalue()


def test_a_terminal_gets_one_bar_with_rate_and_loss() -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with Progress(512, "pcl", file=terminal) as progress:
        progress.update(256, 1.25)
        progress.update(256, 1.0)
    assert re.search(r"\rpcl: 100%.*512.*images/s.*loss=1.0000[^\r]*$", terminal.getvalue())
