"""Turn a torch file of another project into a safetensors file that an encoder of method `pretrained` loads.

python -m tasks.convert FILE.pth [--out FILE.safetensors] [--backbone NAME] [--overwrite]

No code of the file is run. The layouts that are known are in docs/weights.md. The file appears only when a backbone has
loaded it, and its metadata say which.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from deepclust import methods
from deepclust.errors import ConfigError
from tasks.model import export
from tasks.shared.operations.messages import errors_as_one_line
from tasks.shared.operations.text import say
from tasks.shared.outputs import environment

_SUFFIX = ".safetensors"
_SUFFIXES = re.compile(r"(\.(pth|pt|ckpt|bin|tar))+$")


def main() -> None:
    """Convert a file, and print what it was and the command that names an encoder of it."""
    arguments = _arguments()
    file: Path = arguments.file
    with errors_as_one_line():
        environment.prepare()
        out: Path = arguments.out or file.with_name(_SUFFIXES.sub("", file.name) + _SUFFIX)
        if out.suffix != _SUFFIX:
            raise ConfigError(f"expected a name that ends in {_SUFFIX} for --out, got {out}; rename it")
        export.check({"--out": out}, {}, overwrite=arguments.overwrite)
        from deepclust import conversion  # imports torch, which takes seconds: mistakes in the arguments come first

        found = conversion.convert(conversion.read(file), arguments.backbone)
        with export.whole(out) as partial:
            conversion.save(found, partial)
            with partial.open("rb") as written:
                sha256 = hashlib.file_digest(written, "sha256").hexdigest()
            size = partial.stat().st_size
    said = ", ".join(f"{key} {value}" for key, value in found.description.items())
    say(
        f"layout: {found.layout}",
        f"encoder: {said}",
        f"kept: {len(found.tensors)} tensors",
        "left out: " + (", ".join(f"{name} ({number})" for name, number in found.left_out.items()) or "nothing"),
        *(f"note: {note}" for note in found.notes),
        f"{out}: {size / 1e6:.1f} MB, SHA-256 {sha256}",
        "to use it: " + _command(out, found.description["backbone"], sha256),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.convert", description="Turn weights of another project into a file for `pretrained`."
    )
    parser.add_argument("file", type=Path, metavar="FILE.pth", help="a file of torch.save; see docs/weights.md")
    parser.add_argument("--out", type=Path, help="write the weights here (.safetensors); by default beside FILE")
    parser.add_argument("--backbone", metavar="NAME", help="what the weights are of, where names and shapes do not say")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that --out names")
    return parser.parse_args()


def _command(out: Path, backbone: str, sha256: str) -> str:
    """The command that puts an encoder of these weights into params.yaml, with every option of its section."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", out.stem).lstrip("-_")[:55] or "converted"
    name += "-weights" if name in methods.METHODS else ""
    options: dict[str, Any] = {"weights": str(out), "backbone": backbone, "sha256": sha256}
    for field in dataclasses.fields(methods.config_class("pretrained")):
        if field.default is not dataclasses.MISSING:
            options.setdefault(field.name, field.default)
    section = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in options.items())
    words = ["python", "-m", "tasks.overrides", f"encoders.{name}=pretrained", f"pretrain.{name}={{{section}}}"]
    return shlex.join(words)
