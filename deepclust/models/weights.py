"""Saving tensors, and reading those that were saved."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepclust.errors import CheckpointError


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: If it is missing or damaged, or holds NaN or infinity.
    """
    if not path.is_file():
        raise CheckpointError(f"expected weights in {path}, found none")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors raises its own, undocumented types on damaged files
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"expected weights in {path}, got a damaged file ({line})") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"expected finite weights in {path}, got NaN or infinity in {name}")
    return tensors


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a module, whose they have to be exactly.

    Raises:
        RuntimeError: If names or shapes are not the module's, or integers stand for fractions, which torch would take.
    """
    for name, own in module.state_dict().items():
        if name in tensors and tensors[name].is_floating_point() != own.is_floating_point():
            raise RuntimeError(f"{name} is {tensors[name].dtype}, not {own.dtype}")
    module.load_state_dict(tensors, strict=True)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name to a safetensors file, which gets the mode that any new file gets, not safetensors' 0600.

    Raises:
        OSError: If the disk does not take them.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
