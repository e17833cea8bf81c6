"""The pipeline with several training seeds in throw-away workspaces side by side: mean ± std of every number.

    python benchmarks/seeds.py --seeds 0 1 2
    python benchmarks/seeds.py --seeds 0 --recipe recipes/fashion-mnist-long.yaml --override 'encoders=[pixels, swav]'

Each workspace is a copy of the repository's files with a seed of its own; the stages run as DVC would run them, as many
chains at once as the flow runs stages. `--keep DIR` keeps the workspaces, and a second call with it goes on where the
first stopped, with the code of then. Accuracies are on the test images; recipes are not to be chosen by them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tasks.shared.outputs import environment, layout

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ("pretrain", "embed", "cluster", "linear")
COLUMNS = {
    "ACC": ("cluster", "acc"),
    "NMI": ("cluster", "nmi"),
    "ARI": ("cluster", "ari"),
    "k-means ACC": ("cluster", "algorithms", "kmeans", "acc"),
    "k-means NMI": ("cluster", "algorithms", "kmeans", "nmi"),
    "kNN 20": ("linear", "knn"),
    "linear": ("linear", "linear"),
    "kNN held out": ("linear", "knn_heldout"),
    "linear held out": ("linear", "linear_heldout"),
    "RankMe": ("embed", "rankme"),
}


def workspace(folder: Path, seed: int, recipe: Path | None, edits: list[str]) -> Path:
    """A copy of the repository's files with its own parameters; an existing one with the same parameters is kept.

    Raises:
        SystemExit: If there is one with others.
    """
    root = folder / f"seed{seed}"
    fresh = folder / f".seed{seed}.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    _copy(fresh)
    if recipe:
        overrides.apply_recipe(recipe, fresh / layout.PARAMS)
    overrides.apply([f"seed={seed}", *edits], fresh / layout.PARAMS)
    data = params.load(fresh / layout.PARAMS).data
    if data.source == "folder":  # relative to the repository, as everywhere else
        overrides.apply([f"data.folder={json.dumps(str(ROOT / data.folder))}"], fresh / layout.PARAMS)
    if not root.exists():
        fresh.rename(root)
    elif (root / layout.PARAMS).read_bytes() != (fresh / layout.PARAMS).read_bytes():
        raise SystemExit(f"error: {root} was made with other parameters; remove it or name another folder")
    shutil.rmtree(fresh, ignore_errors=True)
    return root


def _copy(root: Path) -> None:
    """The repository's files, without results."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("metrics/", "plots/", ".dvc/", "dvc.")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


def run(root: Path, stage: str, encoder: str | None) -> float:
    """Run a stage in a workspace, unless its metrics are there already; the seconds that it took, 0 if they are.

    Raises:
        SystemExit: With the stage's last lines, if it fails.
    """
    if (root / layout.metrics(stage, encoder)).exists():
        return 0.0
    started = time.perf_counter()
    log = root / "logs" / f"{stage}-{encoder}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as lines:
        done = subprocess.run(
            [sys.executable, "-m", f"tasks.{stage}", *([encoder] if encoder else [])],
            cwd=root,
            env=os.environ | {"DEEPCLUST_TRACKING": "off", "PYTHONPATH": str(root)},
            stdout=lines,
            stderr=subprocess.STDOUT,
        )
    seconds = time.perf_counter() - started
    print(f"{root.name} {stage} {encoder or ''}: {seconds:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        raise SystemExit(
            f"{root.name}: {stage} {encoder} failed:\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        )
    return seconds


def chain(root: Path, encoder: str) -> None:
    """All stages of one encoder, one after the other."""
    for stage in CHAIN:
        run(root, stage, encoder)


def number(root: Path, encoder: str, stage: str, *names: str) -> float | None:
    """A metric of a workspace, or None where there were no labels."""
    value: Any = json.loads((root / layout.metrics(stage, encoder)).read_text(encoding="utf-8"))
    for name in names:
        value = (value or {}).get(name)
    return value["mean"] if isinstance(value, dict) else value


def cell(values: list[float | None]) -> str:
    """Mean ± standard deviation over the seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    digits = 1 if max(known) > 1 else 3
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(prog="python benchmarks/seeds.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", type=Path, help="a file of recipes/, applied over params.yaml")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="edits of params.yaml")
    parser.add_argument("--keep", type=Path, help="a folder for the workspaces; else they are removed")
    arguments = parser.parse_args()
    environment.prepare()
    os.chdir(ROOT)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="deepclust-seeds-"))
    try:
        roots = [workspace(folder.resolve(), seed, arguments.recipe, arguments.override) for seed in arguments.seeds]
        for root in roots:
            run(root, "sizes", None)
            run(root, "prepare", None)
        encoders = params.load(roots[0] / layout.PARAMS).encoders
        with ThreadPoolExecutor(environment.parallel()) as pool:
            # The longest chains last would leave a core idle: the trained ones come last in `encoders`, so start there.
            for done in [pool.submit(chain, root, encoder) for encoder in reversed(encoders) for root in roots]:
                done.result()
        print(f"| encoder | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
        for encoder in encoders:
            cells = [cell([number(root, encoder, *where) for root in roots]) for where in COLUMNS.values()]
            print(f"| {encoder} | {' | '.join(cells)} |")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
