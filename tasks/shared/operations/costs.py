"""What a stage cost: clock readings, kept under state/, since no output of a stage may hold one.

A reading names the outputs that it belongs to, so it is never shown beside others.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepclust import files
from deepclust.config import Count, Hash, Seconds
from deepclust.errors import CheckpointError
from tasks.shared.outputs import environment, layout, lineage

_STATED = {
    "outputs": Hash,
    "seconds": Seconds,
    "processor_seconds": Seconds,
    "threads": Count,
    "processor": str,
}
_OPTIONAL = {"images": Count, "embedding_seconds": Seconds}


class Clock:
    """Seconds since it was made, by the wall and of this process's processor time.

    It may belong to the saved state of a run, whose parts then add up; what came after the last checkpoint of a run
    that was killed is made again, and counted once.
    """

    def __init__(self) -> None:
        self._wall, self._processor = -time.monotonic(), -time.process_time()

    def state_dict(self) -> dict[str, float]:
        """`seconds` and `processor_seconds` so far."""
        return {
            "seconds": self._wall + time.monotonic(),
            "processor_seconds": self._processor + time.process_time(),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Add what an earlier part of the run took."""
        self._wall += state["seconds"]
        self._processor += state["processor_seconds"]


def identity(stage: str, encoder: str | None = None) -> str | None:
    """Hash of a stage's outputs as they are now, of their `lineage.json`; None if there are none."""
    try:
        return hashlib.sha256((layout.out(stage, encoder) / lineage.FILE).read_bytes()).hexdigest()
    except OSError:
        return None


def record(stage: str, encoder: str | None, measured: dict[str, Any]) -> dict[str, Any]:
    """A reading of the outputs that are there now.

    Args:
        stage: Name without its encoder.
        encoder: Of the stage, or None where it runs once.
        measured: What a `Clock` says, and what else the stage has measured: `images`, `embedding_seconds`.
    """
    machine = {"threads": environment.threads(), "processor": _processor()}
    return {"outputs": identity(stage, encoder)} | measured | machine


def reading(stage: str, encoder: str | None = None) -> dict[str, Any] | None:
    """What the outputs that are there now cost; None where that is not known."""
    try:
        found = files.record(layout.cost(stage, encoder), _STATED, _OPTIONAL)
    except (CheckpointError, OSError):
        return None
    return found if found["outputs"] == identity(stage, encoder) else None


def _processor() -> str:
    """Name of the GPU, or of the processor where there is none."""
    torch = sys.modules.get("torch")  # a stage that has not loaded it has used no GPU
    if torch and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    with suppress(OSError):
        if found := re.search(
            r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        ):
            return found[1].strip()
    return platform.processor() or platform.machine()
