"""Throw-away pipelines of shell commands, and what there is to know about processes."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.paths import ROOT

# prepare, embed per encoder, report. A file `broken` fails random; a file `slow` makes each take a minute.
_DVC = """
stages:
  prepare:
    cmd: sh stage.sh prepare artifacts/prepare
    params: [seed]
    outs: [artifacts/prepare]
  embed:
    foreach: ${encoders}
    do:
      cmd: sh stage.sh ${key} artifacts/embed/${key}
      deps: [artifacts/prepare]
      outs: ["artifacts/embed/${key}"]
      metrics: ["metrics/embed/${key}.json": {cache: false}]
  report:
    cmd: sh stage.sh report artifacts/report
    deps: [artifacts/embed]
    outs: [artifacts/report]
"""
_STAGE = """
mkdir -p $(dirname $2) metrics/embed state
echo $1 >>state/ran
if [ -e slow ]; then touch state/asleep; python -c 'import time; time.sleep(60)'; fi
if [ $1 != prepare ] && [ $1 != report ]; then
  if [ $1 = random ] && [ -e broken ]; then
    echo 'error: expected a whole, got a hole; mend it' >&2
    exit 2
  fi
  echo '{"dim": 3}' >metrics/embed/$1.json
fi
if [ $1 = report ]; then
  mkdir -p $2
  echo encoder,method,kind,algorithm,acc >$2/comparison.csv
  printf 'pixels,pixels,baseline,kmeans,0.51234\\nrandom,random,baseline,kmeans,0.25\\n' >>$2/comparison.csv
else
  echo whole >$2
fi
"""


def build(root: Path) -> None:
    """Make a git and DVC repository with the pipeline."""
    root.mkdir(parents=True, exist_ok=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_bytes((ROOT / ".dvc/config").read_bytes())
    params = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    encoders = "encoders: {pixels: pixels, random: random}\n"
    params = [encoders if line.startswith("encoders:") else line for line in params]
    (root / "params.yaml").write_text("".join(params), encoding="utf-8")
    (root / "domains").mkdir()
    (root / "dvc.yaml").write_text(_DVC, encoding="utf-8")
    (root / "stage.sh").write_text(_STAGE, encoding="utf-8")


def ran(root: Path) -> list[str]:
    """The stages whose commands were started, in order."""
    path = root / "state/ran"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def within(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder, without this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != psutil.Process().pid and process.cwd() == str(folder.resolve()):
                found.append(process)
    return found


def eventually(claim: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether a claim becomes true in time."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
