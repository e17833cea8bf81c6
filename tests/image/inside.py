"""One container's part of the check: who it is, what it holds, a few steps of SwAV, and DVC stages on images made here.

python -m tests.image.inside prepare pretrain@swav
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deepclust import seeding
from deepclust.errors import DeepclustError
from deepclust.methods import swav
from deepclust.models import backbones
from deepclust.models.devices import default_device
from deepclust.training import loop
from tasks.shared.operations.params import overrides
from tasks.shared.operations.processes.dvc_runner import Workspace

FOLDER = Path("data/made")
TOOLS = ("pip", "pip3", "uv", "gcc", "cc", "g++", "c++", "clang", "make", "ruff", "mypy", "pytest")
MODULES = (
    "pip",
    "ensurepip",
    "uv",
    "mypy",
    "pytest",
    "playwright",
    "prefect_docker",
    "prefect_kubernetes",
    "pillow_heif",
)
SHORT = [
    "data.source=folder",
    f"data.folder={FOLDER}",
    "encoders=[swav]",
    "pretrain.shared.image_size=16",
    "pretrain.swav.epochs=1",
    "pretrain.swav.batch_size=16",
    "pretrain.swav.prototypes=12",
]


def main(stages: list[str]) -> None:
    """Say what this container is, and run the stages in the current folder."""
    print(f"user {os.getuid()}:{os.getgid()}, {torch.cuda.device_count()} GPU(s), Python {sys.version.split()[0]}")
    os.close(os.open(Path.home(), os.O_TMPFILE | os.O_WRONLY))  # raises where the home is not writable
    _holds_only_what_it_should()
    _train(_images())
    overrides.apply(SHORT)
    with Workspace() as workspace:
        for stage in stages:
            outcome = workspace.run_stage(stage, on_line=lambda line: None)
            print(f"{stage}: {outcome.what} in {outcome.seconds:.0f} s")


def _holds_only_what_it_should() -> None:
    found = [*filter(shutil.which, TOOLS), *filter(find_spec, MODULES)]
    if found:
        sys.exit(
            f"error: expected neither build tools nor what only developers need in the image, found {', '.join(found)}"
        )
    lock = Path("requirements.lock").read_text(encoding="utf-8")
    pins = {(_normal(name), version) for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE)}
    installed = {(_normal(package.name), package.version) for package in metadata.distributions(path=_libraries())}
    if others := installed - pins:
        sys.exit(f"error: expected only what requirements.lock pins, found {sorted(others)}; build the image anew")
    print(f"{len(installed)} packages, each as the lock pins it; no build tools")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _libraries() -> list[str]:
    return [path for path in sys.path if path.startswith(sys.prefix)]


def _images() -> np.ndarray:
    """Forty images, half of them dark; as files in class folders, and smaller as an array (N, 16, 16, 3)."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 128, (40, 24, 24, 3), dtype=np.uint8)
    pixels[::2] += 128
    for index, image in enumerate(pixels):
        path = FOLDER / ("dark" if index % 2 else "light") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return pixels[:, :16, :16]


def _train(images: np.ndarray) -> None:
    device, losses = default_device(), list[float]()
    config = swav.Config(epochs=2, batch_size=8, prototypes=12, freeze_prototypes_steps=2, queue_length=0)
    with seeding.seeded(0):
        method = swav.SwAV(*backbones.build("small", channels=3, image_size=16), config).to(device)
    loop.train(
        method,
        images,
        seed=0,
        precision="float32",
        normalise=lambda crops: crops - 0.5,
        device=device,
        on_step=lambda step: losses.append(float(step.loss)),
    )
    print(f"SwAV: {len(losses)} steps on {device.type}, loss {losses[0]:.2f} to {losses[-1]:.2f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DeepclustError, OSError) as error:
        sys.exit(f"error: {error}")
