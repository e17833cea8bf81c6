"""What `make` would do, asked without doing it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the files that `make setup` depends on."""
    for name in ("pyproject.toml", "requirements.lock", "requirements-cpu.in"):
        (tmp_path / name).touch()
    return tmp_path


def test_setup_takes_the_lock_from_the_usual_index(clone: Path) -> None:
    (sync,) = [line for line in _make(clone, "setup").stdout.splitlines() if "uv pip sync" in line]
    assert sync.endswith("--require-hashes  requirements.lock")


def test_the_cpu_build_has_a_lock_of_its_own_from_the_index_that_is_named(clone: Path) -> None:
    printed = _make(clone, "setup", "TORCH=cpu", "INDEX=it's").stdout
    assert "--constraints requirements.lock --index 'it'\\''s' --index-strategy unsafe-best-match -o" in printed
    (sync,) = [line for line in printed.splitlines() if "uv pip sync" in line]
    assert sync.endswith("--require-hashes --index 'it'\\''s' --index-strategy unsafe-best-match requirements-cpu.lock")


def test_what_setup_was_told_holds_for_later_commands(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "build.mk").write_text("TORCH ?= cpu\nINDEX ?= here\n")
    (clone / "requirements-cpu.lock").touch()
    assert "--index 'here' --index-strategy unsafe-best-match requirements-cpu.lock" in _make(clone, "pipeline").stdout
    assert "requirements-cpu" not in _make(clone, "pipeline", "TORCH=cuda").stdout


def test_an_image_is_built_from_the_lock_that_is_asked_for(clone: Path) -> None:
    assert "--build-arg PINS=requirements.lock --build-arg INDEX='' " in _joined(_make(clone, "image"))
    told = _joined(_make(clone, "image", "TORCH=cpu", "INDEX=here"))
    assert "--build-arg PINS=requirements-cpu.lock --build-arg INDEX='here' " in told


def test_an_index_without_the_build_it_is_for_is_refused_and_of_earlier_none_is_left(clone: Path) -> None:
    refused = _make(clone, "setup", "INDEX=here")
    assert refused.returncode == 2
    assert refused.stderr.endswith("got TORCH=cuda, which comes from the usual index; add TORCH=cpu.  Stop.\n")
    (clone / ".venv").mkdir()
    (clone / ".venv" / "build.mk").write_text("TORCH ?= cpu\nINDEX ?= here\n")
    assert "--build-arg INDEX='' " in _joined(_make(clone, "image", "TORCH=cuda"))


def test_another_build_of_torch_is_refused_in_one_line(clone: Path) -> None:
    refused = _make(clone, "setup", "TORCH=rocm")
    assert refused.returncode == 2
    assert refused.stderr.endswith("*** expected TORCH=cuda or TORCH=cpu, got TORCH=rocm.  Stop.\n")


def _joined(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.replace("\\\n\t", "")
