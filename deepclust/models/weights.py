"""Reading tensors that were saved."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

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
