"""What an artifact was made from, by hash, so that artifacts that do not belong together are refused.

Beside its outputs each stage writes `lineage.json`, with the SHA-256 of each of them and of the artifacts that it read.
dvc.yaml says which those are. Their hashes come from their own `lineage.json`, so that a file is hashed once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deepclust.errors import CheckpointError
from tasks.shared.operations import provenance
from tasks.shared.operations.text import warn
from tasks.shared.outputs import layout

FILE = "lineage.json"


class Lineage(NamedTuple):
    """Hashes of an artifact's files, and of the artifacts that it was made from.

    Attributes:
        outputs: SHA-256 of each file, by its path in the folder.
        inputs: SHA-256 of each artifact that the stage read, by its path in the workspace.
    """

    outputs: dict[str, str]
    inputs: dict[str, str]


def inputs(stage: str, *encoders: str) -> list[Path]:
    """The artifacts that a stage depends on in dvc.yaml: files, or folders that one run of a stage wrote.

    Args:
        stage: Name without its encoder.
        encoders: The stage's encoder, or all encoders whose artifacts it reads.
    """
    found: list[Path] = []
    for dep in (Path(dep) for dep in provenance.deps(stage)):
        if dep.is_relative_to(layout.ARTIFACTS):
            whole = dep if dep.parts[1] in layout.ONCE or len(dep.parts) > 2 else dep / "${key}"
            found += [Path(str(whole).replace("${key}", encoder)) for encoder in encoders]
    return list(dict.fromkeys(found))


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Hashes of artifacts by their paths, without those that are absent or have no `lineage.json`.

    Raises:
        CheckpointError: If a `lineage.json` is damaged.
    """
    return {path.as_posix(): found for path in paths if (found := _hash(path))}


def write(folder: Path, made_from: dict[str, str]) -> None:
    """Write the lineage of a folder's files into it.

    Args:
        folder: Holds a stage's outputs.
        made_from: `hashes` of what the stage read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    outputs = {file.relative_to(folder).as_posix(): _file_hash(file) for file in files}
    text = json.dumps(Lineage(outputs, made_from)._asdict(), indent=2, ensure_ascii=False)
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def check(paths: Iterable[Path]) -> None:
    """Refuse artifacts that were made, directly or at some remove, from others than those that are there now.

    What is absent is not compared, nor is an artifact of an earlier version, which has no `lineage.json`: of that there
    is a warning.

    Raises:
        CheckpointError: With the stages to run again, if artifacts do not belong together or a `lineage.json` is
            damaged.
    """
    stale: list[Path] = []  # upstream first
    changed: dict[Path, list[str]] = {}  # an artifact: the stages that read another one in its place
    unknown: list[str] = []
    for folder in _with_upstream(paths):
        sources, known = inputs(*folder.parts[1:]), _read(folder)
        if known is None:
            unknown.append(_stage(folder))
        stated = known.inputs if known else {}
        others = [_folder(Path(path)) for path, now in hashes(sources).items() if stated.get(path, now) != now]
        for other in dict.fromkeys(others):
            changed.setdefault(other, []).append(_stage(folder))
        if others or any(_folder(path) in stale for path in sources):
            stale.append(folder)
    if unknown:
        warn(
            f"whether the artifacts of {', '.join(unknown)} belong together is not known, since an earlier "
            f"version made them; `dvc repro {' '.join(unknown)}` makes them anew"
        )
    if stale:
        since = "; ".join(f"{path} has changed since {', '.join(stages)} ran" for path, stages in changed.items())
        raise CheckpointError(
            f"expected artifacts that belong together, but {since}; run "
            f"`dvc repro --single-item {' '.join(map(_stage, stale))}`"
        )


def _with_upstream(paths: Iterable[Path]) -> list[Path]:
    """The folders of artifacts that are there, and of all that they are made from, upstream first."""
    found: list[Path] = []
    for folder in map(_folder, paths):
        if folder not in found and folder.is_dir():
            found += [path for path in _with_upstream(inputs(*folder.parts[1:])) if path not in found]
            found.append(folder)
    return found


def _folder(path: Path) -> Path:
    """What one run of a stage wrote, and so the place of its `lineage.json`."""
    return Path(*path.parts[: 2 if path.parts[1] in layout.ONCE else 3])


def _stage(folder: Path) -> str:
    return "@".join(folder.parts[1:])


def _hash(path: Path) -> str | None:
    """Of a file its own, of a folder that over the names and hashes of its files."""
    folder = _folder(path)
    if (known := _read(folder)) is None:
        return None
    if (name := path.relative_to(folder).as_posix()) in known.outputs:
        return known.outputs[name]
    inside = {name: value for name, value in known.outputs.items() if (folder / name).is_relative_to(path)}
    return hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest() if inside else None


def _read(folder: Path) -> Lineage | None:
    try:
        value = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Lineage(dict(value["outputs"]), dict(value["inputs"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / FILE} is damaged; run `dvc repro {_stage(folder)}`") from error


def _file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
