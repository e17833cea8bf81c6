"""A new method is one file, one line in the registry and its section; docs/architecture.md tells how."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.tasks import small_run

FILE = '''
from deepclust.config import Positive, config
from deepclust.methods.parts import base, options


@config
class Config(options.TrainedConfig):
    """Its options."""

    margin: Positive = 1.0
    """How far apart two views may be."""


class Pull(base.Method):
    name = "pull"
    config: Config

    def __init__(self, backbone, feature_dim, config):
        super().__init__(backbone, config)

    def loss(self, views, indices, generator):
        first, second = (self.backbone(view) for view in views)
        return ((first - second).abs().mean() - self.config.margin).relu(), {}
'''
RUN = """
import runpy, sys
for words in ("tasks.sizes", "tasks.prepare", "tasks.pretrain pull", "tasks.params show pull"):
    sys.argv = words.split()
    runpy.run_module(sys.argv[0], run_name="__main__")
"""
SECTION = "  pull: {epochs: 1, batch_size: 16, hidden_dim: 0, dim: 8, margin: 0.5}\n"


def test_a_new_method_is_a_file_a_line_and_a_section(tmp_path: Path) -> None:
    for folder in ("deepclust", "tasks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    small_run.build(tmp_path, count=40)
    (tmp_path / "deepclust/methods/pull.py").write_text(FILE)
    registry = tmp_path / "deepclust/methods/__init__.py"
    registry.write_text(registry.read_text().replace("METHODS = {\n", 'METHODS = {\n    "pull": "Pull",\n'))
    params = tmp_path / "params.yaml"
    text = params.read_text().replace("  random: {}\n", f"  random: {{}}\n{SECTION}")
    params.write_text(text.replace("encoders: {", "encoders: {pull: pull, ", 1))

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DEEPCLUST_TRACKING": "off"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "artifacts/pretrain/pull/encoder.json").read_text())["method"] == "pull"
    assert "    margin: 0.5  # How far apart two views may be.\n" in done.stdout
