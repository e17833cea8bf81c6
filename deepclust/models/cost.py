"""What an image costs an encoder, estimated without computing anything, so that it is the same on every machine.

The seconds are those of one core of a server (AMD EPYC, AVX-512) in float32, eval mode, channels last. `MACS` and
`ELEMENTS` were fitted, the largest relative error made least, to batches of 128 (up to 64 pixels) or 64; `CALLS` to
single images. Milliseconds of an image, and the estimate as a share of them:

small               28 px  0.26  1.28    resnet50               224 px  131  .94
small               64 px  1.55  1.04    tf_efficientnet_lite0  160 px   19  .89
medium              64 px   5.1  1.01    tf_efficientnet_lite0  224 px   38  .84
resnet18, stem 3×3  64 px    51  1.04    vit_tiny_patch16       224 px   39  1.06
resnet18           224 px    45  1.02    mobilenetv3_small_100  224 px  5.0  1.24
                                         convnext_atto          224 px   26  .77
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

MACS = 2.0e-11
"""Seconds of a multiply-add."""
ELEMENTS = 1.1e-9
"""Seconds of an element that an operation writes: what is slow in depthwise convolutions and normalisations."""
CALLS = 1.0e-5
"""Seconds of an operation, whatever the size of the batch."""


class Cost(NamedTuple):
    """What a forward pass of one image takes.

    Attributes:
        macs: Multiply-adds of convolutions and matrix products.
        elements: Elements that all operations write.
        calls: Operations.
    """

    macs: int
    elements: int
    calls: int

    def seconds(self, batch_size: int) -> float:
        """Seconds an image on one core of the reference machine, in batches of so many."""
        return MACS * self.macs + ELEMENTS * self.elements + CALLS * self.calls / batch_size


def of(encoder: nn.Module, shape: tuple[int, int, int]) -> Cost:
    """The cost of an encoder for an image of a shape (channels, height, width).

    It runs on the device `meta`, where tensors have shapes and no values. The encoder is copied and never changed.
    """
    counter = _Counter()
    copied = copy.deepcopy(encoder).eval().to("meta")
    with torch.no_grad(), counter:
        copied(torch.zeros(1, *shape, device="meta"))
    return Cost(counter.macs, counter.elements, counter.calls)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what every operation does while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs, self.elements, self.calls = 0, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        flops: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.macs += flops(*args, **kwargs, out_val=made) // 2
        self.elements += sum(_written(func, made))
        self.calls += 1
        return made


def _written(func: Any, made: Any) -> Iterator[int]:
    """Sizes of the tensors that an operation writes; a view of another tensor writes nothing."""
    returned = made if isinstance(made, tuple | list) else [made]
    for value, declared in zip(returned, func._schema.returns, strict=False):
        if isinstance(value, Tensor) and (declared.alias_info is None or declared.alias_info.is_write):
            yield value.numel()
