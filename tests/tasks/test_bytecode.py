"""No command leaves bytecode in the checkout: on a full disk Python may leave half a file, and read it later."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

# How a worker of Prefect's, which `make serve` starts, gets at a flow.
_LOAD = "from prefect.flows import load_flow_from_entrypoint as load; load('flows/pipeline.py:pretrain_and_eval')"
_SERVE = f"import flows, subprocess, sys; subprocess.run([sys.executable, '-c', {_LOAD!r}], check=True)"


def test_commands_stages_and_flows_write_no_bytecode_but_of_the_tiny_file_that_forbids_it(tmp_path: Path) -> None:
    for name in ("deepclust", "tasks", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "params.yaml", tmp_path)
    variables = os.environ | {"PYTHONPATH": str(tmp_path), "DEEPCLUST_TRACKING": "off"}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)  # which this process has set

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)

    assert run("-m", "tasks.params", "show").returncode == 0
    assert run("-m", "tasks.embed", "pixels").stderr.startswith("error: expected ")
    assert run("-c", _SERVE).returncode == 0
    written = {path.relative_to(tmp_path).parts: path.stat().st_size for path in tmp_path.rglob("*.pyc")}
    # A file of less than a block is written whole or not at all.
    assert all(parts[1:-1] == ("__pycache__",) and parts[-1].startswith("__init__.") for parts in written), written
    assert all(size < 512 for size in written.values())
