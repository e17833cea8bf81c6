"""What an artifact was made from, by hash, so that artifacts that do not belong together are refused.

Beside its outputs each stage writes `lineage.json`, with the SHA-256 of each of them and of the artifacts that it read.
dvc.yaml says which those are. Their hashes come from their own `lineage.json`, so that a file is hashed once when it is
written, and once by each command that reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from deepclust.config import Hash, Side
from deepclust.errors import CheckpointError
from tasks.shared.operations import provenance
from tasks.shared.operations.text import warn
from tasks.shared.outputs import layout, read

FILE = "lineage.json"
_STATED = dict.fromkeys(("outputs", "inputs", "reported"), dict[str, Hash])


class Lineage(NamedTuple):
    """Hashes of an artifact's files, and of the artifacts that it was made from.

    Attributes:
        outputs: SHA-256 of each file, by its path in the folder.
        inputs: SHA-256 of each artifact that the stage read, by its path in the workspace.
        reported: SHA-256 of the stage's metrics and curve, which are in git, by their paths in the workspace.
    """

    outputs: dict[str, str]
    inputs: dict[str, str]
    reported: dict[str, str]


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
        DataError: If a `lineage.json` is damaged.
    """
    return {path.as_posix(): found for path in paths if (found := _hash(path))}


def write(folder: Path, made_from: dict[str, str], reported: Mapping[Path, str] = MappingProxyType({})) -> None:
    """Write the lineage of a folder's files into it.

    Args:
        folder: Holds a stage's outputs.
        made_from: `hashes` of what the stage read.
        reported: The text of what the stage writes beside the folder.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    outputs = {file.relative_to(folder).as_posix(): _file_hash(file) for file in files}
    texts = {path.as_posix(): hashlib.sha256(text.encode()).hexdigest() for path, text in reported.items()}
    text = json.dumps(Lineage(outputs, made_from, texts)._asdict(), indent=2, ensure_ascii=False)
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def check(paths: Iterable[Path]) -> None:
    """Refuse artifacts that are not as they were written, or were made from others than those that are there now.

    Of the artifacts themselves every file is hashed, and the images too where an artifact is an encoder's description
    of them. Of those that they were made from, directly or at some remove, `lineage.json` is compared. An artifact that
    is absent is passed over, and so is one of an earlier version, which has no `lineage.json`: of that there is a
    warning.

    Raises:
        DataError: With the stage to run again, if a file is damaged or missing.
        CheckpointError: With the stages to run again, if artifacts do not belong together.
    """
    paths = list(paths)
    for path in paths:
        if known := _read(folder := _folder(path)):
            files = {folder / name: value for name, value in known.outputs.items()}
            _compare({file: value for file, value in files.items() if file.is_relative_to(path)})
            for images in described(path):  # which the path itself names, so it has to be whole
                _compare({file: value for file, value in files.items() if file.is_relative_to(images)})
    stale: list[Path] = []  # upstream first
    changed: dict[Path, list[str]] = {}  # an artifact: the stages that read another one in its place
    unknown: list[str] = []
    for folder in _with_upstream(paths):
        sources, known = inputs(*folder.parts[1:]), _read(folder)
        if known is None:
            unknown.append(layout.stage_of(folder))
        stated = known.inputs if known else {}
        others = [_folder(Path(path)) for path, now in hashes(sources).items() if stated.get(path, now) != now]
        for other in dict.fromkeys(others):
            changed.setdefault(other, []).append(layout.stage_of(folder))
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
            f"`dvc repro --single-item {' '.join(map(layout.stage_of, stale))}`"
        )


def check_reported(paths: Iterable[Path]) -> None:
    """Refuse metrics and curves of other runs than those that wrote the artifacts; without these, all are taken.

    Raises:
        DataError: With the stage to run again.
    """
    for folder in dict.fromkeys(map(_folder, paths)):
        if known := _read(folder):
            _compare({Path(name): value for name, value in known.reported.items()})


def described(path: Path) -> list[Path]:
    """The folder of images that an encoder's description is of; none for another path. Raises: DataError."""
    if path.parent != layout.statistics("").parent or not path.is_file():
        return []
    return [layout.images(read.record(path, {"image_size": Side})["image_size"])]


def _compare(stated: Mapping[Path, str]) -> None:
    for file, value in stated.items():
        if not file.is_file():
            raise read.damaged(file, f"expected {file}, found none")
        if (found := _file_hash(file)) != value:
            what = f"expected {file} as {layout.stage_of(file)} wrote it (SHA-256 {value[:12]}…)"
            raise read.damaged(file, f"{what}, got another content ({found[:12]}…)")


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
    if not (folder / FILE).exists():
        return None
    found = Lineage(**read.record(folder / FILE, _STATED))
    for name in [*found.outputs, *found.reported]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise read.damaged(folder / FILE, f"expected paths inside in {folder / FILE}, got {name}")
    return found


def _file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
