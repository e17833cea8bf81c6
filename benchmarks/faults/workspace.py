"""One tiny workspace in which every stage has run, copied for each case, and what a command leaves in it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.faults import running
from benchmarks.faults.running import ROOT, Command, Job
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import layout

ENCODER = "swav"
ENCODERS = ("pixels", ENCODER)
STAGES = ("pretrain", "embed", "cluster", "linear", "adapt")
NEW = "new"  # images for `assign`
EDITS = [
    "data.source=folder",
    "data.folder=images",
    "pretrain.shared.image_size=16",
    "pretrain.pixels.image_size=16",
    "data.max_skipped=0.05",
    f"encoders=[{', '.join(ENCODERS)}]",
    "pretrain.checkpoint={every_steps: 1, every_seconds: null, keep: 3}",
    "pretrain.swav.epochs=2",
    "pretrain.swav.batch_size=16",
    "pretrain.swav.prototypes=12",
    "pretrain.swav.queue_length=0",
    "cluster.seeds=2",
    "cluster.other_k=[4]",
    "cluster.silhouette_images=30",
    "linear.iterations=20",
    "adapt.images=30",
    "adapt.classifiers=[linear, clusters]",
    "adapt.adapters=[source, bn, t3a]",
    "adapt.settings=[reset]",
    "adapt.corruptions=[contrast]",
    "adapt.batch_sizes=[16]",
    "report.map_images=12",
]


class Failed(Exception):
    """The undisturbed workspace could not be made."""


def build(folder: Path, home: Path, *, store: bool) -> None:
    """Make images and parameters in `folder/work`, and run every stage there.

    Args:
        folder: Where.
        home: Home folder of the commands.
        store: Whether MLflow's store is made too, which takes seconds.

    Raises:
        Failed: If a stage fails.
    """
    work = folder / "work"
    work.mkdir(parents=True)
    pictures(work / "images", 72, seed=0)
    pictures(work / "domains/dark", 12, seed=1, top=120)
    pictures(work / NEW, 25, seed=2, classes=False)
    shutil.copy(ROOT / layout.PARAMS, work)
    overrides.apply(EDITS, work / layout.PARAMS)
    shutil.copy(ROOT / "dvc.yaml", work)
    for argv in _stages():
        _run(Job(folder=folder, command=Command(argv=argv)), home)
    shutil.rmtree(work / layout.STATE, ignore_errors=True)
    _run(Job(folder=folder, command=Command(argv=["tasks.params", "check"]), before=_store if store else dict), home)


def build_cut(base: Path, folder: Path, home: Path, cut_off: Callable[[], None]) -> None:
    """The same, with pretraining killed in the middle and nothing of it in artifacts/.

    Args:
        base: The whole workspace.
        folder: Where to make it.
        home: Home folder of the commands.
        cut_off: Has the process killed.
    """
    copy(base, folder)
    job = Job(folder=folder, command=Command(argv=["tasks.pretrain", ENCODER]), before=cut_off)
    _run(job, home, status=-signal.SIGKILL)
    for path in outputs("pretrain", ENCODER):
        place = folder / "work" / path
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    for partial in half_written(folder):
        shutil.rmtree(folder / partial, ignore_errors=True)


def _run(job: Job, home: Path, *, status: int = 0) -> None:
    job.longest = 120
    [(_, ended)] = running.run([job], at_once=1, home=home)
    if ended.status != status:
        raise Failed(f"{' '.join(job.command.argv)} ended with {ended.status}: {ended.err or ended.out}")


def _store() -> None:
    """Make MLflow's store without runs."""
    from mlflow import MlflowClient

    MlflowClient("sqlite:///mlflow.db").search_experiments(max_results=1)


def _stages() -> list[list[str]]:
    """Every stage's module and arguments, upstream first."""
    inner = [[f"tasks.{stage}", encoder] for stage in STAGES for encoder in ENCODERS]
    return [["tasks.sizes"], ["tasks.prepare"], *inner, ["tasks.report"]]


def pictures(folder: Path, count: int, *, seed: int, top: int = 180, classes: bool = True) -> None:
    """Noise with a bright stripe whose place is the class, in class folders or flat."""
    random = np.random.default_rng(seed)
    for index in range(count):
        kind = index % 3
        picture = random.integers(0, 60, (18, 18, 3))
        picture[:, 6 * kind : 6 * kind + 6] += top
        path = folder / (f"kind{kind}" if classes else "") / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(path)


def copy(base: Path, folder: Path) -> Path:
    """A copy of `base/work` in a new folder for a case; nothing in it is shared."""
    shutil.copytree(base / "work", folder / "work", symlinks=True)
    return folder


def hashes(work: Path, tops: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file under some paths of a workspace, without what differs from run to run."""
    found = {}
    for top in tops:
        place = work / top
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        for path in files:
            # Hashes, also of inputs that a case has damaged and signed again; clock readings.
            if path.name not in ("lineage.json", layout.COSTS.name):
                found[path.relative_to(work).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def outputs(stage: str, encoder: str | None = None) -> list[str]:
    """Where a stage writes."""
    paths = [layout.out(stage, encoder), layout.metrics(stage, encoder)]
    if encoder and stage in ("pretrain", "adapt"):
        paths.append(layout.curve(stage, encoder))
    return [path.as_posix() for path in paths]


def half_written(folder: Path) -> list[str]:
    """Partial and temporary files in the folder of a case."""
    found = [path for path in (folder / "work").rglob("*") if path.name.endswith((".partial", ".tmp"))]
    found += list((folder / "tmp").iterdir()) if (folder / "tmp").is_dir() else []
    return sorted(os.path.relpath(path, folder) for path in found)
