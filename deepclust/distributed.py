"""What several processes of one run do together. No other module calls `torch.distributed`.

On one process every function is the identity, so that no other module asks how many there are. All processes call the
same functions in the same order; no call may stand in a branch that only some of them take.

The order of every reduction is fixed, so that equal processes give equal bits and a resumed run those of an
uninterrupted one. That is why the gradients are averaged here and not by DistributedDataParallel, which forms its
buckets anew after the first step of a process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deepclust.errors import ConfigError, PeerError

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BUCKET = 1 << 23  # numbers that one all-reduce of gradients carries at most


@contextmanager
def group(*, seconds: float) -> Iterator[None]:
    """Join the processes that torchrun started, with gloo on the CPU and NCCL on GPUs; alone, do nothing.

    Args:
        seconds: How long a process waits for the others in any one call, before it gives up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=seconds)
    )
    yield
    # Not after an error: the other processes may never get here.
    dist.destroy_process_group()


_alone = threading.local()  # `here`: whether this thread works as if there were no other process


@contextmanager
def _without_others() -> Iterator[None]:
    _alone.here = True
    try:
        yield
    finally:
        _alone.here = False


def processes() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() and not getattr(_alone, "here", False) else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() and not getattr(_alone, "here", False) else 0


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files and reports."""
    return rank() == 0


def share(count: int, of: int | None = None) -> slice:
    """The consecutive rows of `count` that belong to process `of`, or to this one: as equal shares as can be."""
    of = rank() if of is None else of
    return slice(count * of // processes(), count * (of + 1) // processes())


def part(rows: Tensor, parts: int = 1) -> Tensor:
    """This process's rows of a batch that all processes know, itself in `parts` equal parts: its piece of each part.

    Raises:
        ConfigError: If the batch cannot be divided so.
    """
    pieces = parts * processes()
    if len(rows) % pieces:
        raise ConfigError(
            f"batch_size: expected a multiple of {processes()} processes × accumulate {parts}, got {len(rows)}; "
            "change batch_size or the number of processes"
        )
    return rows.view(parts, processes(), len(rows) // pieces, *rows.shape[1:])[:, rank()].flatten(0, 1)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over the processes, without gradient."""
    return _combined(tensor, dist.all_reduce)


def all_max(tensor: Tensor) -> Tensor:
    """Largest value over the processes, entry by entry, without gradient."""
    return _combined(tensor, dist.all_reduce, dist.ReduceOp.MAX)


def broadcast(tensor: Tensor) -> Tensor:
    """The main process's values."""
    return _combined(tensor, dist.broadcast, 0)


@torch.no_grad()
def _combined(tensor: Tensor, collective: Callable[..., object], *options: object) -> Tensor:
    if processes() == 1:
        return tensor
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    collective(result, *options)
    return result


@torch.no_grad()
def all_mean(tensor: Tensor) -> Tensor:
    """Mean over the processes, without gradient."""
    return all_sum(tensor) / processes() if processes() > 1 else tensor


@torch.no_grad()
def gather(rows: Tensor, count: int | None = None) -> Tensor:
    """The rows of all processes in their order, without gradient.

    Args:
        rows: As many on each process; or, with `count`, each process's `share` of so many.
        count: Rows in all.
    """
    if processes() == 1:
        return rows.detach()
    if count is None:
        count = len(rows) * processes()
    sizes = [len(range(count)[share(count, of)]) for of in range(processes())]
    assert len(rows) == sizes[rank()], f"expected {sizes[rank()]} rows of {count} on process {rank()}, got {len(rows)}"
    # Collectives need equal sizes: the shorter shares are padded.
    mine = rows.new_zeros(max(sizes), *rows.shape[1:])
    mine[: len(rows)] = rows.detach()
    everything = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everything, mine)
    return torch.cat([part_rows[:size] for part_rows, size in zip(everything, sizes, strict=True)])


def gather_bytes(mine: bytes) -> list[bytes]:
    """What each process gives, of any length, in their order."""
    if processes() == 1:
        return [mine]
    lengths = gather(torch.tensor([len(mine)])).tolist()
    padded = torch.frombuffer(bytearray(mine.ljust(max(*lengths, 1), b"\0")), dtype=torch.uint8)
    return [row.numpy().tobytes()[:length] for row, length in zip(gather(padded[None]), lengths, strict=True)]


@torch.no_grad()
def log_softmax(rows: Tensor) -> Tensor:
    """Log softmax of each column over the rows of all processes, without gradient."""
    if processes() == 1:
        return rows.log_softmax(0)
    largest = all_max(rows.amax(0))
    return rows - (largest + all_sum((rows - largest).exp().sum(0)).log())


@contextmanager
def together(*, every: float = 60.0) -> Iterator[Callable[[], None]]:
    """Fail on all processes if the body fails on one: for what only some of them do, such as writing a file.

    The body makes no collective calls but the one that it is given.

    Args:
        every: Seconds between two heartbeats; a fraction of what the group waits.

    Yields:
        A heartbeat: a body that may take longer on one process than the others wait calls it again and again. It
        raises PeerError as soon as another process has failed.

    Raises:
        PeerError: On those where it did not fail.
    """
    due = time.monotonic() + every

    def heartbeat() -> None:
        nonlocal due
        if processes() > 1 and time.monotonic() >= due:
            _meet(at_work=True)
            due = time.monotonic() + every

    try:
        yield heartbeat
    except PeerError:  # from the heartbeat: all processes know
        raise
    except BaseException:
        all_sum(torch.tensor([0.0, 1.0]))
        raise
    while _meet(at_work=False):
        pass


@contextmanager
def by_main(*, every: float = 60.0) -> Iterator[bool]:
    """Work that the main process does as if there were no others, which wait for it however long it takes.

    Args:
        every: Seconds between two signs that it is still at work; a fraction of what the group waits.

    Yields:
        Whether this is the main process. The others have nothing to do in the body.

    Raises:
        PeerError: As `together`.
    """
    main, over = is_main(), threading.Event()
    with together(), ThreadPoolExecutor(1) as thread:
        beats = thread.submit(_beat, over, every) if main and processes() > 1 else None
        try:
            with _without_others():
                yield main
        finally:
            over.set()
        if beats:
            beats.result()


def _beat(over: threading.Event, every: float) -> None:
    while not over.wait(every):
        _meet(at_work=True)


def _meet(*, at_work: bool) -> bool:
    """Whether a process is still at work in the body that they do together. Raises: PeerError."""
    working, failed = all_sum(torch.tensor([float(at_work), 0.0])).tolist()
    if failed:
        raise PeerError("stopped, because another process of this run failed; its own message says why")
    return bool(working)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; which parameters have one is the same on all."""
    if processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for _, same in groupby(gradients, key=lambda gradient: gradient.dtype):
        for bucket in _buckets(list(same)):
            flat = all_mean(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            sizes = [gradient.numel() for gradient in bucket]
            for gradient, mean in zip(bucket, torch.split(flat, sizes), strict=True):
                gradient.copy_(mean.view(gradient.shape))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(other.numel() for other in bucket) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def synchronise(module: nn.Module) -> None:
    """Let every batch normalisation in a module see the batch of all processes, in place; alone, do nothing.

    GPUs take torch's SyncBatchNorm, which refuses the CPU.
    """
    if processes() == 1:
        return
    for name, child in module.named_children():
        if type(child) in _PLAIN and any(tensor.is_cuda for tensor in child.buffers()):
            module.add_module(name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
        elif isinstance(child, _PLAIN):
            module.add_module(name, SyncBatchNorm.of(child))
        else:
            synchronise(child)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation over the batch of all processes, on any device; in eval mode the usual one.

    A process may have fewer rows than the others, or none.
    """

    @classmethod
    def of(cls, other: _BatchNorm) -> SyncBatchNorm:
        """One with the parameters and buffers of `other`, not copies; timm's have drop and activation inside too."""
        new = cls.__new__(cls)
        new.__dict__.update(other.__dict__)
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ConfigError(f"expected (batch, channels, …) to normalise, got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (batch, channels, …)."""
        output = self._synchronised(input) if self.training and processes() > 1 else super().forward(input)
        for child in self.children():
            output = child(output)
        return output

    def _synchronised(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean.to(self.running_mean), factor)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), factor)
        result: Tensor = output
        return result


class _Normalise(torch.autograd.Function):
    """Normalise by the statistics of all processes, through which gradients flow too."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(rows.dim()) if dim != 1]
        count = rows.new_tensor([rows.numel() // rows.shape[1]])
        mean = rows.sum(dims) / count.clamp(min=1)
        centred = (rows - _channels(mean, rows)).square().sum(dims)
        # Chan et al.: the parts' means and squared deviations give those of the whole without cancellation.
        parts = gather(torch.cat([count, mean, centred])[None])
        counts, means, deviations = parts.tensor_split([1, 1 + len(mean)], dim=1)
        total = counts.sum()
        if total < 2:
            raise ConfigError("expected at least two values a channel to normalise; enlarge the batch")
        mean = (counts * means).sum(0) / total
        variance = (deviations + counts * (means - mean).square()).sum(0) / total
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt(), total)
        ctx.mark_non_differentiable(mean, variance, total)
        output = F.batch_norm(rows, mean, variance, weight, bias, False, 0.0, eps).to(input.dtype)
        return output, mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        input, weight, mean, inverse, total = ctx.saved_tensors
        grad, rows = grad.to(mean.dtype), input.to(mean.dtype)
        dims = [dim for dim in range(rows.dim()) if dim != 1]
        normalised = (rows - _channels(mean, rows)) * _channels(inverse, rows)
        own_bias, own_weight = grad.sum(dims), (grad * normalised).sum(dims)
        # The others' losses depend on our rows through mean and variance.
        all_bias, all_weight = all_sum(torch.stack([own_bias, own_weight])) / total
        scale = inverse if weight is None else inverse * weight
        to_input = _channels(scale, rows) * (
            grad - _channels(all_bias, rows) - normalised * _channels(all_weight, rows)
        )
        has_weight = weight is not None
        return to_input.to(input.dtype), own_weight if has_weight else None, own_bias if has_weight else None, None


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as broadcast over (B, C, …)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
