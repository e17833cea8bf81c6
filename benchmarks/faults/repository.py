"""A git and DVC repository of its own, with the code and a pipeline that has run, for faults that need the real DVC."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.faults import running, workspace
from benchmarks.faults.running import ROOT
from benchmarks.faults.workspace import ENCODER, Failed

ROOMS = ("deepclust", "tasks", "flows")
DVC = [sys.executable, "-m", "dvc", "repro"]
FLOW = [sys.executable, "-m", "flows.pipeline"]
# What others write for themselves: DVC's locks, its objects, of which `dvc gc` removes the unused, Prefect's database.
_NOT_OURS = re.compile(
    r"\.git/|\.dvc/tmp/|\.dvc/cache/(runs/|files/md5/[0-9a-f]{2}/[0-9a-f]{30}(\.dir)?$)"
    r"|\.prefect/|mlflow\.db|mlartifacts/|.*__pycache__/|state/flow\.lock$"
)
_RANDOM = re.compile(r"[A-Za-z0-9_]{8}$")


def build(base: Path, folder: Path, home: Path) -> None:
    """Copy a workspace with its code into a new repository, and run the pipeline with one encoder there.

    Raises:
        Failed: If it fails.
    """
    work = workspace.copy(base, folder) / "work"
    (folder / "tmp").mkdir()
    for name in ("artifacts", "metrics", "plots", "state"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "mlflow.db").unlink(missing_ok=True)
    for room in ROOMS:  # with its bytecode, without which each process would start a second later
        shutil.copytree(ROOT / room, work / room)
    shutil.copy(ROOT / ".gitignore", work)
    (work / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", work / ".dvc")
    text = (work / "params.yaml").read_text(encoding="utf-8")
    text = re.sub(r"^encoders: .*$", f"encoders: {{{ENCODER}: {ENCODER}}}", text, flags=re.MULTILINE)
    (work / "params.yaml").write_text(text, encoding="utf-8")
    git = ["git", "-c", "user.name=name", "-c", "user.email=name@example.org"]
    for command in (["init", "-q"], ["add", *ROOMS, "dvc.yaml", "params.yaml", ".gitignore"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=work, check=True)
    for argv in (DVC, FLOW):
        status, said = finish(start(argv, folder, home, {}), folder, seconds=600)
        if status:
            raise Failed(f"{' '.join(argv)} ended with {status} undisturbed: {said[-3000:]}")


def start(argv: Sequence[str], folder: Path, home: Path, env: Mapping[str, str | None]) -> subprocess.Popen[bytes]:
    """Start a command in the repository, in a session of its own; what it says goes into `folder/log`."""
    ours = {
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "PYTHONPATH": str(folder / "work"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            argv,
            cwd=folder / "work",
            env=running.environment(folder, home, {**ours, **env}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], folder: Path, *, seconds: float) -> tuple[int | None, str]:
    """Exit status, None after so many seconds, and what was said."""
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
        process.kill()
        process.wait()
    return status, (folder / "log").read_text(encoding="utf-8", errors="replace")


def lock(work: Path) -> dict[str, Any]:
    """The stages of dvc.lock."""
    found: dict[str, Any] = YAML(typ="safe").load((work / "dvc.lock").read_text(encoding="utf-8"))["stages"]
    return found


def forget(work: Path, stage: str) -> None:
    """As if a stage had never run, of which DVC has the outputs in no cache of runs."""
    name, _, encoder = stage.partition("@")
    for path in workspace.outputs(name, encoder or None):
        place = work / path
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    whole = YAML(typ="safe").load((work / "dvc.lock").read_text(encoding="utf-8"))
    del whole["stages"][stage]
    writer = YAML()
    with (work / "dvc.lock").open("w", encoding="utf-8") as file:
        writer.dump(whole, file)
    shutil.rmtree(work / ".dvc/cache/runs", ignore_errors=True)


def left(folder: Path) -> set[str]:
    """Files of the repository and its temporary folder, without what is not ours; random endings as `*`."""
    work = folder / "work"
    files = {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file() or path.is_symlink()}
    kept = {name for name in files if not _NOT_OURS.match(name)}
    temporary = (path.name for path in (folder / "tmp").iterdir())
    return kept | {f"tmp/{_RANDOM.sub('*', name)}" for name in temporary}
