"""Every test runs without telemetry and on a stage's number of threads; `seed` repeats a test at several seeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tasks.shared.outputs import environment

environment.prepare()
# What a script starts in the background ignores SIGINT, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["services"]  # they need a container engine: `make test-services` names the folder
_SEEDS = [int(seed) for seed in os.environ.get("DEEPCLUST_TEST_SEEDS", "0,1,2").split(",")]


@pytest.fixture(autouse=True)
def tracking_address() -> Iterator[None]:
    """Puts back what mlflow.set_tracking_uri writes into the environment, where the next test would find it."""
    name = "MLFLOW_TRACKING_URI"
    before = os.environ.get(name)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


@pytest.fixture(params=_SEEDS)
def seed(request: pytest.FixtureRequest) -> int:
    """A fixed seed, or one of those that `python -m tests.fresh_seeds` draws."""
    number: int = request.param
    return number
