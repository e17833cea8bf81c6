"""A stage's outputs: all of them or none, however it ends."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.shared.outputs import layout, lineage, stage
from tests.paths import ROOT
from tests.pipelines import eventually


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUST_TRACKING", "off")
    monkeypatch.setattr(sys, "argv", ["tasks.pretrain", "pixels"])
    return tmp_path


def _write(content: str) -> dict[str, str]:
    with stage.running("pretrain") as running:
        (running.folder / "encoder").write_text(content)
        running.metrics({"content": content})
        running.curve([{"step": 1}], ["step"])
    return _files()


def _files() -> dict[str, str]:
    tops = (layout.ARTIFACTS, layout.METRICS, layout.PLOTS)
    files = [(top, path) for top in tops for path in top.rglob("*") if path.is_file() and path.name != lineage.FILE]
    return {path.relative_to(top).as_posix(): path.read_text() for top, path in files}


def test_folder_metrics_and_curve_are_replaced_together_or_on_a_full_disk_not_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write("older")
    assert _write("old") == {
        "pretrain/pixels/encoder": "old",
        "pretrain/pixels.json": '{\n  "content": "old"\n}\n',
        "pretrain/pixels.csv": "step\n1\n",
    }
    before, write = _files(), Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        if ".csv" in path.name:  # the last that is written
            write(path, "st")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit) as stop:
        _write("new")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: No space left on device: ")
    assert _files() == before


def test_a_terminated_stage_leaves_nothing_behind_without_tracking(here: Path) -> None:
    code = (
        "import time\nfrom tasks.shared.outputs import stage\nwith stage.running('pretrain') as here:\n"
        "    (here.folder / 'encoder').touch()\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "pixels"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert eventually((here / "artifacts/pretrain/.pixels.partial/encoder").exists)
    process.terminate()
    assert process.wait(20) == 143
    assert list((here / "artifacts/pretrain").iterdir()) == []
