"""State on disk that a run goes on from: a folder for each step, whole or not there, and nothing in it that is code.

A step's folder holds its tensors (safetensors), the tree that they hang in (JSON) and a manifest with the size and
SHA-256 of both, and in every version its own SHA-256: so a newer version can be told from damage.
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
from collections.abc import Iterator, Mapping
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
_SAVED = re.compile(r"step-(\d{8,})|\.step-(\d{8,})\.old")
_REFUSED = (torch.complex128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)  # safetensors writes two, reads none


@dataclass(frozen=True)
class Saved:
    """State as it was saved after `step` steps of `processes` processes; its tensors are on the CPU."""

    step: int
    processes: int
    state: Any


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
        body["files"] = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        with self._disk(f"to save step {step}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            try:
                self._write(f"step-{step:08d}", files | {_MANIFEST: _sealed(body)})
            except OSError:
                self._tidy()
                raise
            kept = [path for at, path in self._found() if at <= step and path not in self._damaged][: self._keep]
            for path in [path for _, path in self._found() if path not in kept]:
                self._remove(path)

    def newest(self) -> Saved | None:
        """The newest whole state, None if there is none at all; a damaged one is named on stderr and passed over.

        Raises:
            CheckpointError: If all are damaged, or the newest whole one is of another run or a newer version.
        """
        wrong: list[str] = []
        with self._disk("to list all"):
            found = self._found()
        for step, path in found:
            try:
                return self._read(path, step)
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:  # whatever damage does to JSON; safetensors raises its own, undocumented types
                self._damaged.add(path)
                wrong.append(f"{path.name} is damaged, {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                print(f"warning: passed over a state in {self.folder}: {wrong[-1]}", file=sys.stderr)
        if wrong:
            raise CheckpointError(
                f"expected a whole state in {self.folder}, got none ({'; '.join(wrong)}); bring one back from a copy, "
                "or remove the folder to begin anew"
            )
        return None

    def clear(self) -> None:
        """Remove all states, the newest last; CheckpointError if the disk refuses."""
        with self._disk("to remove all"):
            self._tidy()
            for _, path in reversed(self._found()):
                self._remove(path)

    def _read(self, path: Path, step: int) -> Saved:
        body = json.loads(raw := (path / _MANIFEST).read_bytes())
        _must(_sealed({key: body[key] for key in body.keys() - {"sha256"}}) == raw, f"{_MANIFEST} was changed")
        if body["version"] > VERSION:
            raise CheckpointError(
                f"expected {path} of version {VERSION} or older, got {body['version']}; upgrade deepclust"
            )
        _must(body["step"] == step and body["files"].keys() == {_TREE, _TENSORS}, f"{_MANIFEST} is of something else")
        own, got = self._fingerprint, body["fingerprint"]
        other = {part: f"of other {part}" for part in own | got if own.get(part) != got.get(part)}
        if "method" in other:
            other["method"] = f"of another method (expected {own.get('method')}, got {got.get('method')})"
        if other:
            raise CheckpointError(
                f"expected this run's state in {path}, got one {', '.join(other.values())}; go back to what it was "
                "begun with, or remove the folder to begin anew"
            )
        content = {}
        for name in (_TREE, _TENSORS):  # our own names: none that a file gives is ever opened
            size, expected = (path / name).stat().st_size, body["files"][name]
            _must(size == expected["bytes"], f"{name} has {size} bytes, not {expected['bytes']}")
            content[name] = (path / name).read_bytes()
            _must(_sha256(content[name]) == expected["sha256"], f"{name} was changed")
        tensors = load_tensors(content.pop(_TENSORS))
        state = _decoded(json.loads(content[_TREE]), tensors)
        _must(not tensors, f"{_TENSORS} holds more than {_TREE} names")
        return Saved(step, body["processes"], state)

    def _write(self, name: str, files: Mapping[str, bytes]) -> None:
        final, partial, old = (self.folder / found for found in (name, f".{name}.partial", f".{name}.old"))
        partial.mkdir()
        for file_name, data in files.items():
            (partial / file_name).write_bytes(data)
            _sync(partial / file_name)
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
        for path in self.folder.glob(".step-*.partial"):
            shutil.rmtree(path)
        for step, path in self._found():
            if path.name.startswith("."):
                final = self.folder / f"step-{step:08d}"
                self._remove(path) if final.exists() else path.rename(final)

    def _remove(self, path: Path) -> None:
        partial = path.rename(self.folder / f".{path.name.lstrip('.')}.partial")  # never half there under its own name
        shutil.rmtree(partial)

    def _found(self) -> list[tuple[int, Path]]:
        """Steps and their folders, newest first; of one step, the one saved last first."""
        paths = list(self.folder.iterdir()) if self.folder.exists() else []
        found = [(int(match[1] or match[2]), path) for path in paths if (match := _SAVED.fullmatch(path.name))]
        return sorted(found, key=lambda item: (item[0], item[1].name), reverse=True)

    @contextlib.contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"expected {what} of the states in {self.folder}, got: {error.strerror or error}; make room or mend "
                "the disk and start again: the newest whole one is gone on from"
            ) from error


def restore_like(loaded: Tensor, like: Tensor) -> Tensor:
    """The values and dtype of `loaded` in the memory format and on the device of `like`, of the same shape."""
    if loaded.shape != like.shape:
        raise CheckpointError(
            f"expected a saved tensor of shape {tuple(like.shape)}, got {tuple(loaded.shape)}; remove the saved states"
        )
    return torch.empty_like(like, dtype=loaded.dtype, requires_grad=False).copy_(loaded)


def _encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON of a tree: scalars as they are, all else a dict of one entry. Copies go into `tensors`."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return {"float": struct.pack(">d", value).hex()}
    if isinstance(value, list | tuple):
        return {"list": [_encoded(item, tensors, f"{where}[{at}]") for at, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str | int) and not isinstance(key, bool) for key in value):
        return {"dict": [[key, _encoded(item, tensors, f"{where}[{key!r}]")] for key, item in value.items()]}
    if isinstance(value, Tensor) and value.layout == torch.strided and value.dtype not in _REFUSED:
        name, own = str(len(tensors)), value.detach().resolve_conj().resolve_neg()
        tensors[name] = own.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"tensor": name}
    raise TypeError(f"{where}: expected a dict with keys str or int, a list, scalar or dense tensor, got {type(value)}")


def _decoded(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of `_encoded`'s JSON; takes each tensor out of `tensors`, once."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "dict":
        return {key: _decoded(item, tensors) for key, item in content}
    if kind == "list":
        return [_decoded(item, tensors) for item in content]
    return {"tensor": tensors.pop, "float": lambda digits: struct.unpack(">d", bytes.fromhex(digits))[0]}[kind](content)


def _sealed(body: Mapping[str, Any]) -> bytes:
    seal = _sha256(json.dumps(body, sort_keys=True).encode())
    return json.dumps({**body, "sha256": seal}, indent=2, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _must(holds: bool, wrong: str) -> None:
    if not holds:
        raise ValueError(wrong)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
