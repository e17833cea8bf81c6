"""State on disk that a run goes on from: a folder for each step, whole or not there, and nothing in it that is code.

A step's folder holds its tensors (safetensors), the tree that they hang in (JSON) and a manifest with the size and
SHA-256 of both, and in every version its own SHA-256: a newer version can be told from damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from deepclust.errors import CheckpointError

VERSION = 1
_MANIFEST, _TREE, _TENSORS = "manifest.json", "state.json", "tensors.safetensors"
# A step that is saved again is `.old` until the new one stands in its place; it counts like the step itself.
_SAVED, _PARTIAL = re.compile(r"(?:step-(\d{8,})|\.step-(\d{8,})\.old)"), re.compile(r"\.step-\d{8,}\.partial")
_UNREADABLE = (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)  # safetensors writes them and can not read them


@dataclass(frozen=True)
class Saved:
    """State as it was saved after `step` steps of `processes` processes; its tensors are on the CPU."""

    step: int
    processes: int
    state: Any


class _Damaged(Exception):
    """What is wrong with one step's folder."""


class Store:
    """The newest states of one run.

    Args:
        folder: Where they are; made when the first is saved.
        fingerprint: What the run is, in named parts; a state of another fingerprint is refused.
        keep: Number of states that stay, at least one.
    """

    def __init__(self, folder: Path, *, fingerprint: Mapping[str, str], keep: int) -> None:
        assert keep >= 1
        self.folder, self._fingerprint, self._keep = folder, dict(fingerprint), keep
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Any, *, processes: int = 1) -> None:
        """Save a step, then remove those beyond `keep`, and later ones: they are of a run that was gone back in.

        To be called by one process at a time; it puts right what a killed one left half done.

        Args:
            step: Steps done.
            state: A tree of dicts (keys str or int), lists, tuples, str, int, float, bool, None and tensors. Tuples
                come back as lists, tensors contiguous.
            processes: Number of processes of the run.

        Raises:
            CheckpointError: If the disk refuses; the states saved before stay whole.
            TypeError: If the tree holds anything else.
        """
        tensors: dict[str, Tensor] = {}
        files = {_TREE: json.dumps(_encoded(state, tensors, "state")).encode(), _TENSORS: save_tensors(tensors)}
        body = {"version": VERSION, "step": step, "processes": processes, "fingerprint": self._fingerprint}
        entries = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            self._write(f"step-{step:08d}", files | {_MANIFEST: _sealed(body | {"files": entries})})
            kept = [path for at, path in self._found() if at <= step and path not in self._damaged][: self._keep]
            for path in [path for _, path in self._found() if path not in kept]:
                self._remove(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._tidy()
            raise CheckpointError(
                f"expected to save step {step} in {self.folder}, got: {error.strerror or error}; make room or mend the "
                "disk and start again, the run goes on from the newest state that is whole"
            ) from error

    def newest(self) -> Saved | None:
        """The newest whole state, None if there is none at all; a damaged one is named on stderr and passed over.

        Raises:
            CheckpointError: If all are damaged, or the newest whole one is of another run or a newer version.
        """
        wrong = []
        for step, path in self._found():
            try:
                manifest = _manifest(path, step)
                self._check(manifest["fingerprint"], path)
                return Saved(step, manifest["processes"], _state(path, manifest["files"]))
            except _Damaged as error:
                self._damaged.add(path)
                wrong.append(f"{path.name} is damaged: {error}")
                print(f"warning: {self.folder}: {wrong[-1]}; the one before is taken", file=sys.stderr)
        if wrong:
            raise CheckpointError(
                f"expected a whole state in {self.folder}, got none ({'; '.join(wrong)}); bring one back from a copy, or "
                "remove the folder to begin anew"
            )
        return None

    def clear(self) -> None:
        """Remove all states, the newest last.

        Raises:
            CheckpointError: If the disk refuses.
        """
        try:
            self._tidy()
            for _, path in reversed(self._found()):
                self._remove(path)
        except OSError as error:
            raise CheckpointError(
                f"expected to remove the states in {self.folder}, got: {error.strerror or error}; remove it by hand"
            ) from error

    def _write(self, name: str, files: Mapping[str, bytes]) -> None:
        final, partial, old = (self.folder / found for found in (name, f".{name}.partial", f".{name}.old"))
        partial.mkdir()
        for file_name, data in files.items():
            with (partial / file_name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(partial)
        if final.exists():  # a folder can not be renamed onto one that is not empty
            final.rename(old)
            _sync(self.folder)
        partial.rename(final)
        _sync(self.folder)
        self._damaged.discard(final)
        if old.exists():
            self._remove(old)

    def _tidy(self) -> None:
        """Remove what is half written, and put back what was moved away for a step that never came."""
        for path in [path for path in self._listed() if _PARTIAL.fullmatch(path.name)]:
            shutil.rmtree(path)
        for step, path in [found for found in self._found() if found[1].name.startswith(".")]:
            final = self.folder / f"step-{step:08d}"
            if final.exists():
                self._remove(path)
            else:
                path.rename(final)

    def _remove(self, path: Path) -> None:
        partial = self.folder / f".step-{path.name.strip('.step-old')}.partial"  # never half there and named a state
        path.rename(partial)
        shutil.rmtree(partial)

    def _listed(self) -> list[Path]:
        try:
            return list(self.folder.iterdir()) if self.folder.exists() else []
        except OSError as error:
            raise CheckpointError(
                f"expected a folder of states in {self.folder}, got: {error.strerror}; take another or mend it"
            ) from error

    def _found(self) -> list[tuple[int, Path]]:
        """Steps and their folders, newest first; of one step, the one saved last first."""
        found = [(match, path) for path in self._listed() if (match := _SAVED.fullmatch(path.name))]
        steps = [(int(match[1] or match[2]), path) for match, path in found]
        return sorted(steps, key=lambda item: (item[0], item[1].name), reverse=True)

    def _check(self, got: Mapping[str, str], path: Path) -> None:
        own = self._fingerprint
        differ = [part for part in own | dict(got) if own.get(part) != got.get(part)]
        named = [
            f"of another method (expected {own.get(part)}, got {got.get(part)})"
            if part == "method"
            else f"of other {part}"
            for part in differ
        ]
        if named:
            raise CheckpointError(
                f"expected the state of this run in {path}, got one {', '.join(named)}; go back to what it was begun "
                "with, or remove the folder to begin anew"
            )


def restore_like(loaded: Tensor, like: Tensor) -> Tensor:
    """The values and dtype of `loaded` in the memory format and on the device of `like`, of the same shape."""
    if loaded.shape != like.shape:
        raise CheckpointError(
            f"expected a saved tensor of shape {tuple(like.shape)}, got {tuple(loaded.shape)}; it is another model's"
        )
    return torch.empty_like(like, dtype=loaded.dtype, requires_grad=False).copy_(loaded)


def _manifest(path: Path, step: int) -> dict[str, Any]:
    try:
        raw = (path / _MANIFEST).read_bytes()
        body = json.loads(raw)
        del body["sha256"]
        sealed = _sealed(body)
    except OSError as error:
        raise _Damaged(f"can not read {_MANIFEST}, {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damaged(f"{_MANIFEST} is no manifest") from error
    if sealed != raw:
        raise _Damaged(f"{_MANIFEST} is not as it was written")
    if isinstance(body.get("version"), int) and body["version"] > VERSION:
        raise CheckpointError(
            f"expected {path} in format {VERSION} or older, got format {body['version']}; upgrade deepclust"
        )
    if body.get("version") != VERSION or body.get("step") != step or set(body.get("files", ())) != {_TREE, _TENSORS}:
        raise _Damaged(f"{_MANIFEST} does not belong to this step")
    return dict(body)


def _state(path: Path, files: Mapping[str, Mapping[str, Any]]) -> Any:
    content = {}
    for name in (_TREE, _TENSORS):  # our own names, never ones that the files give
        try:
            size = (path / name).stat().st_size
            if size != files[name]["bytes"]:
                raise _Damaged(f"{name} has {size} bytes instead of {files[name]['bytes']}")
            content[name] = (path / name).read_bytes()
        except OSError as error:
            raise _Damaged(f"can not read {name}, {error.strerror}") from error
        if _sha256(content[name]) != files[name]["sha256"]:
            raise _Damaged(f"{name} is not as it was written")
    try:
        tensors = load_tensors(content.pop(_TENSORS))
        state = _decoded(json.loads(content[_TREE]), tensors)
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own, undocumented types
        raise _Damaged(f"{_TREE} and {_TENSORS} hold no state, {' '.join(str(error).split())[:100]}") from error
    if tensors:
        raise _Damaged(f"{_TENSORS} holds {len(tensors)} tensors that {_TREE} does not name")
    return state


def _encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON for a tree: scalars as they are, all else as a dict of one entry. Fills `tensors`, each a copy."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype in _UNREADABLE:
            raise TypeError(f"{where}: expected a dense tensor of a usual dtype, got {value.layout} of {value.dtype}")
        copy = value.detach().resolve_conj().resolve_neg()
        tensors[str(len(tensors))] = copy.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"{where}: expected keys str or int, got {key!r}")
        return {"dict": [[key, _encoded(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_encoded(item, tensors, f"{where}[{at}]") for at, item in enumerate(value)]}
    if isinstance(value, float):
        return {"float": struct.pack(">d", value).hex()}
    if value is None or isinstance(value, str | bool | int):
        return value
    raise TypeError(
        f"{where}: expected a dict, list, str, int, float, bool, None or tensor, got {type(value).__name__}"
    )


def _decoded(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of `_encoded`'s JSON; takes what it needs out of `tensors`."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors.pop(content)
    if kind == "dict":
        return {key: _decoded(item, tensors) for key, item in content}
    if kind == "list":
        return [_decoded(item, tensors) for item in content]
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    raise ValueError(f"unknown kind {kind}")


def _sealed(body: Mapping[str, Any]) -> bytes:
    seal = _sha256(json.dumps(body, sort_keys=True).encode())
    return (json.dumps({**body, "sha256": seal}, indent=2, sort_keys=True) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
