"""Which version of the code this process runs: what a flow and the workers of its stages compare."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tasks.shared.operations.processes.dvc_runner import StageError

ROOT = Path(__file__).parents[1]
_ROOMS = ("deepclust", "flows", "tasks")


def fingerprint(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the sources and of requirements.lock, in hex."""
    files = sorted(file for room in _ROOMS for file in (root / room).rglob("*.py"))
    digest = hashlib.sha256()
    for file in [*files, root / "requirements.lock"]:
        content = file.read_bytes() if file.exists() else b""
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def check(expected: str) -> None:
    """Refuse to run a stage for a flow of another version.

    Raises:
        StageError: If `expected` is not the fingerprint of the code that runs here.
    """
    if (found := fingerprint()) != expected:
        raise StageError(
            f"expected the flow's version of the code, {expected[:12]}, got {found[:12]} in {ROOT}; give both the same "
            "code and requirements.lock, and start the flow again"
        )
