"""Faults of what DVC records and restores: objects of its cache, edits while a stage runs under it; by the real DVC."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults import repository
from benchmarks.faults.cases import DONE, LINE, Case, Ended, Reference
from benchmarks.faults.damage import ANY, put
from benchmarks.faults.inputs import key
from benchmarks.faults.surroundings import while_running
from benchmarks.faults.workspace import ENCODER

_PATIENCE = 120.0  # several stages may have to run
_LOST = {
    f"artifacts/pretrain/{ENCODER}": "encoder.safetensors",
    f"artifacts/embed/{ENCODER}": "train.npy",
    f"artifacts/linear/{ENCODER}": "classifier.json",
}


def _here() -> dict[str, str]:
    """The environment in a copy of the repository; what is recorded now is kept beside it."""
    shutil.copy("dvc.lock", "../dvc.lock")
    return {
        "PYTHONPATH": str(Path.cwd()),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "DVC_SITE_CACHE_DIR": str(Path("../site").absolute()),
    }


def _damaged_cache(
    folder: str, file: str, damage: Callable[[Path], None], *, forgotten: bool, verify: bool
) -> Callable[[], dict[str, str]]:
    """Damage a file's object in the cache and remove the artifact, which DVC then has to restore from there."""

    def make() -> dict[str, str]:
        found = _here()
        hashed = Path(folder) if not file else Path(folder, file)
        objects = Path(".dvc/cache/files/md5")
        if file:
            md5 = hashlib.md5(hashed.read_bytes()).hexdigest()
            target = objects / md5[:2] / md5[2:]
        else:
            outs = repository.lock(Path())[folder.removeprefix("artifacts/").replace("/", "@")]["outs"]
            md5 = next(out["md5"] for out in outs if out["path"] == folder)
            target = objects / md5[:2] / md5[2:]
        damage(target)
        if forgotten:
            shutil.copytree(".dvc/cache/runs", "../runs")
            repository.forget(Path(), folder.removeprefix("artifacts/").replace("/", "@"))
            shutil.copytree("../runs", ".dvc/cache/runs")
        else:
            shutil.rmtree(folder)
        if verify:
            command = [sys.executable, "-m", "tasks.verify"]
            subprocess.run(command, env=os.environ | found, stdout=subprocess.DEVNULL, check=False)
        return found

    return make


def _as_recorded(work: Path, ended: Ended, _: Reference | None) -> str:
    """The same dvc.lock as before, and artifacts that have the hashes it states."""
    if ended.status:
        return ""
    then = repository.lock(work.parent)
    now = repository.lock(work)
    if different := [stage for stage in then if now.get(stage) != then[stage]]:
        return f"dvc.lock differs in {', '.join(different)}"
    for folder, file in _LOST.items():
        path = work / folder / file
        md5 = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "missing"
        if not (work / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).is_file():
            return f"{folder}/{file} is not what DVC has under its hash"
    return ""


def _not_recorded(work: Path, ended: Ended, _: Reference | None) -> str:
    if not (work.parent / "changed").exists():
        return "the stage ended before anything was changed"
    return "recorded as if nothing had changed" if ended.status == 0 else ""


def cases() -> Iterator[Case]:
    """All of them."""
    commands = {"dvc": ["dvc", "repro"], "flow": ["flows.pipeline"]}
    checked = {"dvc": ", after tasks.verify", "flow": ""}  # the flow checks by itself
    some = ("one bit flipped", "cut", "empty", "missing")
    for name in some:
        for folder, file in {**_LOST, f"artifacts/cluster/{ENCODER}": ""}.items():
            for forgotten in (False, True):
                for command in commands if folder.startswith("artifacts/pretrain") else ["dvc"]:
                    what = f"{folder}/{file}" if file else f"the list of {folder}"
                    how = "looked up by its run" if forgotten else "checked out"
                    yield Case(
                        fault=f"DVC's cache: the object of {what} is {name}, {how}{checked[command]}",
                        command=command,
                        argv=commands[command],
                        make=_damaged_cache(folder, file, ANY[name], forgotten=forgotten, verify=command == "dvc"),
                        right=DONE,
                        check=_as_recorded,
                        longest=_PATIENCE,
                        real=True,
                        base="repo",
                        loose=True,
                    )
    edits: dict[str, Callable[[], object]] = {
        "its parameters change": key("batch_size", "7", "embed"),
        "its code changes": lambda: put(Path("tasks/embed/extra.py"), "# new\n"),
    }
    for name, edit in edits.items():

        def make(edit: Callable[[], object] = edit) -> dict[str, str]:
            found = _here()
            repository.forget(Path(), f"embed@{ENCODER}")
            while_running("embed", edit)()
            return found

        yield Case(
            fault=f"meanwhile: {name}, under DVC",
            command="dvc",
            argv=commands["dvc"],
            make=make,
            right=LINE,
            check=_not_recorded,
            longest=_PATIENCE,
            real=True,
            base="repo",
            loose=True,
        )
