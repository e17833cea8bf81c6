"""What `make image` runs in the new image: the parameters' check, and the stage `prepare` on images made on the spot.

python -m tests.image
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.shared.operations import params
from tasks.shared.operations.params import overrides
from tasks.shared.operations.processes import dvc_runner


def main() -> None:
    """Run one stage in this container, and say what came of it."""
    values = params.load()
    for default in (Path(values.data.folder), Path(values.adapt.domains)):
        if not default.is_dir():  # before the images below make one: deps in dvc.yaml, without which no stage can run
            sys.exit(f"error: expected the folder {default}/ in the image, found none; see .dockerignore")
    random = np.random.default_rng(0)
    folder = Path("data/made")
    for index in range(40):
        path = folder / ("dark" if index % 2 else "light") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = 0 if index % 2 else 128
        Image.fromarray(random.integers(low, low + 128, (20, 24, 3), dtype=np.uint8)).save(path)
    print(overrides.apply(["data.source=folder", f"data.folder={folder}", "pretrain.shared.image_size=16"]))
    with dvc_runner.Workspace() as workspace:
        outcome = workspace.run_stage("prepare", on_line=print, env={"DEEPCLUST_TRACKING": "off"})
    print(f"prepare: {outcome.what}, {outcome.metrics}")
    subprocess.run([sys.executable, "-c", "import torch, torchvision, faiss"], check=True)
    print("the image works")


if __name__ == "__main__":
    main()
