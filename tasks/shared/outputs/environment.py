"""What every process of the pipeline sets first: thread counts, and telemetry and bytecode files off.

The number of threads changes the last bits of a stage's results, so it follows from the machine alone: the flow runs
`parallel()` stages at once and each uses `cores / parallel()` threads, under `dvc repro` too. The processes of one
stage share them.
"""

from __future__ import annotations

import os
import sys

from threadpoolctl import threadpool_limits

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONDONTWRITEBYTECODE": "1",  # see tasks/__init__.py
}
WEEK = 7 * 24 * 3600  # seconds; whoever waits longer has mistyped, and torch's clocks overflow
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most() -> int:
    """How many threads, processes or stages at once make sense here: enough to repeat a larger machine's results."""
    return max(64, 4 * cores())


def parallel() -> int:
    """Stages that the flow runs at once: `DEEPCLUST_PARALLEL`, else two where there are two cores."""
    return _count("DEEPCLUST_PARALLEL", "stages at once", most()) or min(2, cores())


def threads(at_once: int | None = None) -> int:
    """Threads of a process: its share of its stage's `DEEPCLUST_THREADS`, by default of `cores / at_once`.

    Args:
        at_once: Stages that run at once; by default `parallel()`.
    """
    stage = _count("DEEPCLUST_THREADS", "threads", most()) or max(1, cores() // (at_once or parallel()))
    return max(1, stage // (_count("LOCAL_WORLD_SIZE", "processes", most()) or 1))  # set by torchrun


def collective_seconds() -> int:
    """How long a process waits for the others of its run: `DEEPCLUST_COLLECTIVE_SECONDS`, else five minutes."""
    return _count("DEEPCLUST_COLLECTIVE_SECONDS", "seconds", WEEK) or 300


def _count(variable: str, what: str, largest: int) -> int | None:
    """A number from 1 to `largest` from the environment, or None where it is not set.

    Anything else ends the process with one line and status 2: the flows read it at import.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    if text.isdecimal() and len(text) < 10 and 1 <= int(text) <= largest:
        return int(text)
    got = text if len(text) < 40 else f"{text[:40]}…"
    expected = f"expected {variable} to be a number of {what}, 1 to {largest}"
    print(f"error: {expected}; got {got!r}; mend or unset it", file=sys.stderr)
    sys.exit(2)


def prepare() -> None:
    """Set the thread counts, and switch telemetry and bytecode off, for later imports and for child processes."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in _THREADS:
        os.environ[name] = str(threads())
    collective_seconds()  # said now if it is absurd, not by the processes that wait


def limit_threads() -> None:
    """Set the thread count of libraries that are already loaded, which read the environment only then."""
    threadpool_limits(threads())
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads())
