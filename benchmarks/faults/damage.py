"""Ways to damage one file: of any kind, and of each format, harmless all of them.

Each takes the path of a whole file and leaves something else in its place.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tasks.shared.outputs import lineage

Damage = Callable[[Path], None]
_ORDER = ("prepare", "pretrain", "embed", "cluster", "linear", "adapt", "report")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def junk(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(512))


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def flipped_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)


def bad_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\xfa" + path.read_bytes())


# Arrays.


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    def damage(path: Path) -> None:
        np.save(path, change(np.load(path)))

    return damage


def objects(path: Path) -> None:
    """What only unpickling reads; inside are Nones."""
    np.save(path, np.full(3, None), allow_pickle=True)


def huge_header(path: Path) -> None:
    """A header that promises 10^15 rows."""
    array = np.load(path)
    with path.open("wb") as file:
        shape = (10**15, *array.shape[1:])
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.write(bytes(64))


def nan(path: Path) -> None:
    array = np.load(path)
    array[0] = np.nan
    np.save(path, array)


# JSON and tables.


def changed(change: Callable[[Any], Any]) -> Damage:
    """The JSON file with another value, which `change` gives back or makes in place."""

    def damage(path: Path) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        new = change(value)
        path.write_text(json.dumps(value if new is None else new, indent=2) + "\n", encoding="utf-8")

    return damage


def with_value(*keys: str, value: Any) -> Damage:
    """The JSON file with another value under some keys."""

    def change(whole: Any) -> None:
        for key in keys[:-1]:
            whole = whole[key]
        whole[keys[-1]] = value

    return changed(change)


def without(*keys: str) -> Damage:
    """The JSON file without some keys."""
    return changed(lambda whole: {key: value for key, value in whole.items() if key not in keys})


def deep(path: Path) -> None:
    """100,000 brackets, one in the other."""
    path.write_text("[" * 100_000 + "]" * 100_000, encoding="utf-8")


def _table(change: Callable[[list[list[str]]], Any]) -> Damage:
    def damage(path: Path) -> None:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
        change(rows)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8")

    return damage


def _text_for_numbers(rows: list[list[str]]) -> None:
    for row in rows[1:3]:
        row[:] = ["number" if cell.replace(".", "").replace("-", "").isdigit() else cell for cell in row]


def _renamed_columns(rows: list[list[str]]) -> None:
    rows[0][:] = [f"{name}_" for name in rows[0]]


def nul(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20] + b"\0" * 20)


def huge_cell(path: Path) -> None:
    """A cell beyond the limit of Python's csv."""
    path.write_text(path.read_text(encoding="utf-8") + "x" * 200_000 + "\n", encoding="utf-8")


# Tensors.


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        save_file(change(tensors) or tensors, path)

    return damage


def _nan_tensor(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 1)
    tensors[name] = torch.full_like(tensors[name], torch.nan)


def huge_tensor_header(path: Path) -> None:
    """A header that promises 2^60 bytes of JSON."""
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def _narrower(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:-1].contiguous() if tensor.dim() else tensor for name, tensor in tensors.items()}


ANY: Mapping[str, Damage] = {
    "empty": empty,
    "cut": cut,
    "junk": junk,
    "missing": missing,
    "a folder": folder,
    "a broken link": broken_link,
    "a link loop": link_loop,
    "one bit flipped": flipped_bit,
}
# Damage that leaves the format whole; tried with hashes that fit too, so that the content itself has to be checked.
CONTENT: Mapping[str, Mapping[str, Damage]] = {
    "npy": {
        "one row less": _array(lambda array: array[:-1]),
        "one axis more": _array(lambda array: array[None]),
        "flat": _array(lambda array: array.reshape(-1)),
        "text": _array(lambda array: np.full(len(array), "text")),
        "complex": _array(lambda array: array.astype(np.complex64)),
        "no rows": _array(lambda array: array[:0]),
        "Python objects": objects,
        "10^15 rows promised": huge_header,
    },
    "json": {
        "a list": changed(lambda value: [value]),
        "null": lambda path: path.write_text("null") and None,
        "no keys": changed(lambda value: {}),
        "texts for all values": changed(lambda value: dict.fromkeys(value, "text")),
        "nested 100,000 deep": deep,
        "not UTF-8": bad_utf8,
    },
    "csv": {
        "one row less": _table(list.pop),
        "other columns": _table(_renamed_columns),
        "text for numbers": _table(_text_for_numbers),
        "the header alone": _table(lambda rows: rows.__delitem__(slice(1, None))),
        "a huge cell": huge_cell,
        "NUL bytes": nul,
        "not UTF-8": bad_utf8,
    },
    "safetensors": {
        "NaN": _tensors(_nan_tensor),
        "other names": _tensors(lambda tensors: {f"{name}_": tensor for name, tensor in tensors.items()}),
        "one row less": _tensors(_narrower),
        "no tensors": lambda path: save_file({}, path),
        "integers": _tensors(lambda tensors: {name: tensor.to(torch.int32) for name, tensor in tensors.items()}),
        "2^60 bytes promised": huge_tensor_header,
    },
    "png": {},
}


def sign(work: Path = Path()) -> None:
    """Write every `lineage.json` anew, as if each stage had just written what is there."""
    for stage in _ORDER:
        top = work / "artifacts" / stage
        folders = [top] if stage in ("prepare", "report") else sorted(top.iterdir()) if top.is_dir() else []
        for place in folders:
            if place.is_dir():
                encoders = [] if place == top else [place.name]
                lineage.write(place, lineage.hashes(lineage.inputs(stage, *encoders)))


def put(path: Path, content: bytes | str) -> None:
    """Write a file, whatever was there, and the folders that it is in."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


def link(path: Path, target: str) -> None:
    """Put a symbolic link in the place of whatever was there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)
