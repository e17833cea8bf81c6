"""What a stage works from, compared at its end with what it was at its beginning.

DVC records parameters, code and inputs as they are when a stage has ended. If they are edited while it runs, they would
be recorded with the results of the earlier ones, and the stage would count as up to date.

    before = snapshot.take("embed", "swav", params.read(), method="swav")
    ...
    before.check()

This can only refuse, never change an output.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deepclust.errors import ConfigError, StageError
from tasks.shared.operations import params, provenance
from tasks.shared.operations.text import printable
from tasks.shared.outputs import layout, lineage

_SHOWN = 3  # changes that an error names
_FOLDER = re.compile(r"\$\{([\w.]+)\}")  # a dep in dvc.yaml that params.yaml names


@dataclass(frozen=True)
class Snapshot:
    """Parameters, code and inputs of a stage, as dvc.yaml states them.

    Attributes:
        stage: Name without its encoder.
        encoder: Of the stage, or None where it runs once.
        method: Of the encoder, or an empty string.
        values: Parameters by their dotted names in params.yaml.
        files: A hash of the content of each file of code, metrics and plots; size and time of each file under
            `artifacts/`; for each folder of images, a hash over names, sizes and times. To read the images again would
            cost as much as the stage.
        recorded: SHA-256 of files under `artifacts/`, as `lineage.json` states it, for those that are only touched.
    """

    stage: str
    encoder: str | None
    method: str
    values: dict[str, str]
    files: dict[str, str]
    recorded: dict[str, str]

    def check(self) -> None:
        """Compare with what is there now.

        Raises:
            StageError: With what has changed.
        """
        try:
            now = _take(self.stage, self.encoder, params.read(), method=self.method)
        except ConfigError as error:
            raise self._refusal(str(error)) from error
        changed = [
            f"{name} ({self.values.get(name, 'absent')} → {now.values.get(name, 'absent')})"
            for name in _differing(self.values, now.values)
        ]
        changed += [path for path in _differing(self.files, now.files) if not self._is_touched(path)]
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            raise self._refusal(f"these have changed: {', '.join(map(printable, changed[:_SHOWN]))}{more}")

    def _is_touched(self, path: str) -> bool:
        """Whether a file whose time has changed has the content that was recorded."""
        return path in self.recorded and self.recorded[path] == _content(Path(path))

    def _refusal(self, why: str) -> StageError:
        return StageError(
            f"expected parameters, code and inputs to stay while {provenance.stage_name(self.stage, self.encoder)} "
            f"runs, but {why}; nothing was written: run it again, as it is now or after undoing that"
        )


def take(stage: str, encoder: str | None, raw: Mapping[str, Any], *, method: str) -> Snapshot:
    """What a stage works from, as it is now.

    Args:
        stage: Name without its encoder.
        encoder: Of the stage, or None where it runs once.
        raw: What params.yaml says.
        method: Of the encoder, or an empty string.

    Raises:
        StageError: If code was edited while this process was loading it.
        DataError: If a `lineage.json`, or an encoder's description of its images, is damaged.
    """
    _refuse_edited(stage, _code(stage, method))
    return _take(stage, encoder, raw, method=method)


def _take(stage: str, encoder: str | None, raw: Mapping[str, Any], *, method: str) -> Snapshot:
    deps = [dep.replace("${key}", encoder or "") for dep in provenance.deps(stage)]
    keys = [key.replace("${key}", encoder or "") for key in provenance.param_keys(stage)]
    if any("${item}" in dep for dep in deps):
        keys.append(f"encoders.{encoder}")
    files = {file: _content(provenance.ROOT / file) for file in _code(stage, method)}
    artifacts: list[Path] = []
    for dep in deps:
        if dep.startswith(f"{layout.ARTIFACTS}/"):
            places = [dep, *map(str, lineage.described(Path(dep)))]
            artifacts += [file for place in places for _, inside in _walk(place) for file in inside]
        elif dep in (str(layout.METRICS), str(layout.PLOTS)):
            files |= {str(file): _content(file) for _, inside in _walk(dep) for file in inside}
        elif stated := _FOLDER.fullmatch(dep):
            follow = bool(_get(raw, "data.follow_links"))
            files |= {folder: _states(inside) for folder, inside in _walk(str(_get(raw, stated[1])), follow=follow)}
    values = {name: text for key in keys for name, text in provenance.flatten(_get(raw, key), key).items()}
    files |= {str(file): _content(file) if file.name == lineage.FILE else _state(file) for file in artifacts}
    return Snapshot(stage, encoder, method, values, files, lineage.hashes(artifacts))


def _code(stage: str, method: str) -> list[str]:
    """The files of code that a stage depends on, without those that an editor hides beside them."""
    files = [file for dep in provenance.code_deps(stage, method) for file in provenance.source_files(dep)]
    return [file for file in files if not Path(file).name.startswith(".")]


def _differing(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [name for name in before | now if before.get(name) != now.get(name)]


def _get(raw: Any, key: str) -> Any:
    """A value of params.yaml by its dotted name; None where there is none."""
    for part in key.split("."):
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def _walk(root: str, *, follow: bool = False) -> Iterator[tuple[str, list[Path]]]:
    """A file, or each folder below one, with its files in order; hidden ones are no inputs, nor is a folder twice."""
    if Path(root).is_file():
        yield root, [Path(root)]
    entered = set()
    for folder, folders, names in os.walk(root, followlinks=follow):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(real)
        yield folder, [Path(folder, name) for name in sorted(names) if not name.startswith(".")]


def _content(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return "absent"


def _state(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:  # a broken link too
        return "absent"
    return f"{found.st_size} {found.st_mtime_ns}"


def _states(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(os.fsencode(f"{file.name}\0{_state(file)}\0"))
    return total.hexdigest()


def _refuse_edited(stage: str, code: Iterable[str]) -> None:
    """Refuse code that is newer than this process, which may have loaded it before.

    Where it runs inside another program, as in the tests, nobody knows when it was loaded. Linux states when a process
    began to the second.
    """
    if f"tasks.{stage}" not in sys.orig_argv:
        return
    began = psutil.Process().create_time() + 1
    newer = [file for file in code if began < (provenance.ROOT / file).stat().st_mtime <= time.time()]
    if newer:
        raise StageError(f"expected code that stays as it is while it is loaded, but {newer[0]} was edited; run again")
