"""What every process of the pipeline sets before it works: threads, and the libraries' telemetry switched off.

How many threads a stage computes with changes the last bits of its results, so it is a function of the machine alone:
the flow runs `parallel()` stages at once and each uses `cores / parallel()` threads, under `dvc repro` too.
"""

import os
import sys

from threadpoolctl import threadpool_limits

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel() -> int:
    """Stages that the flow runs at once: `DEEPCLUST_PARALLEL`, else two where there are two cores."""
    return int(os.environ.get("DEEPCLUST_PARALLEL") or min(2, cores()))


def threads() -> int:
    """Threads a stage computes with: `DEEPCLUST_THREADS`, else the cores shared among the parallel stages."""
    return int(os.environ.get("DEEPCLUST_THREADS") or max(1, cores() // parallel()))


def prepare() -> None:
    """Set the thread counts and switch telemetry off, for libraries imported later and for child processes."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in _THREADS:
        os.environ[name] = str(threads())


def limit_threads() -> None:
    """Bring the libraries that are already loaded to the thread count: they read the environment only when loading."""
    threadpool_limits(threads())
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads())
