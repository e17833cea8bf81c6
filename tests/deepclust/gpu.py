"""A GPU that is not there: real numbers on the CPU, in tensors that say they are on a GPU.

torch's own fake tensors have no numbers, so they refuse whatever depends on some. These have them: every line of the
library runs. Tensors of both devices in one operation are an error, as on a GPU. Reads by the host, sizes that depend
on a tensor, and copies to the GPU that are not `non_blocking` make the host wait: they are written down.

The backward pass needs the device's own thread: `backward` gives every parameter that it would reach a small gradient.
Only a GPU can tell whether a kernel exists or is deterministic; those that wait inside are listed in `_WAITING`.
"""

import sys
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = {_aten._to_copy, _aten.copy_}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
_JOINING = {_aten.cat, _aten.stack}
# Operations whose kernel makes the host wait: for a number, for the size of the result, or for a solver's verdict.
_WAITING = {
    *(_aten._local_scalar_dense, _aten.equal, _aten.nonzero, _aten.masked_select, _aten.bincount, _aten._unique2),
    *(_aten.unique_dim, _aten.unique_consecutive, _aten.repeat_interleave, _aten._linalg_eigh),
}


class _OnGpu(Tensor):
    """A tensor that says it is on the GPU; `host` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host):
        where = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, host.size(), **where, dtype=host.dtype, device=DEVICE)
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: a tensor of the pretended GPU outlived it")


class Gpu(TorchDispatchMode):
    """Runs every operation on the CPU, and watches.

    Attributes:
        reads: The library's function of each read by the host, as file and name.
        uploads: Likewise of each copy to the GPU that waits for it.
    """

    def __init__(self):
        super().__init__()
        self.reads = []
        self.uploads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # elsewhere such operations come in their parts
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        operation = func.overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(isinstance(tensor, _OnGpu) for tensor in tensors)
        if on_gpu and operation not in _COPIES:
            _check_devices(operation, args, tensors)
        if on_gpu and _waits(operation, args, kwargs):
            self.reads.append(_where())
        if _uploads(operation, args, kwargs):
            self.uploads.append(_where())
        to_gpu = on_gpu if operation != _aten.copy_ else isinstance(args[0], _OnGpu)
        if kwargs.get("device") is not None:
            to_gpu = _asks_for_gpu(kwargs)
            kwargs["device"] = torch.device("cpu")
        generator = kwargs.get("generator")
        assert generator is None or generator.device.type == (DEVICE.type if to_gpu else "cpu"), f"{func}: generator"
        host_args, host_kwargs = tree_map(_host, (args, kwargs))
        with _disable_current_modes():
            result = func(*host_args, **host_kwargs)
        if not to_gpu:
            return result
        result = tree_map(lambda leaf: _OnGpu(leaf) if isinstance(leaf, Tensor) else leaf, result)
        return return_and_correct_aliasing(func, args, kwargs, result)


def _host(leaf):
    return leaf.host if isinstance(leaf, _OnGpu) else leaf


def _check_devices(operation, args, tensors):
    others = [tensor for tensor in tensors if _on_cpu(tensor)]
    if operation in _INDEXING and isinstance(args[0], _OnGpu):
        indices = [index for index in args[1] if index is not None]
        others = [tensor for tensor in others if not any(tensor is index for index in indices)]
    # A single number of the CPU's goes along with a kernel's arguments, but for those that copy memory.
    others = [tensor for tensor in others if tensor.ndim > 0 or operation in _JOINING]
    assert not others, f"{_where()}: {operation} of tensors on the GPU with one on the CPU, {tuple(others[0].shape)}"


def _waits(operation, args, kwargs):
    if operation == _aten.copy_:
        return _on_cpu(args[0])
    if operation == _aten._to_copy:
        return kwargs.get("device") is not None and not _asks_for_gpu(kwargs)
    if operation in _INDEXING:
        # A mask is counted first, but where a single value fills it.
        masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        return masks and not (operation != _aten.index and args[2].numel() == 1)
    return operation in _WAITING


def _uploads(operation, args, kwargs):
    if operation in _INDEXING:
        # `rows[indices] = True`, too, has to bring its number to the GPU.
        values = () if operation == _aten.index else (args[2],)
        given = [tensor for tensor in (*args[1], *values) if tensor is not None]
        return isinstance(args[0], _OnGpu) and any(_on_cpu(tensor) for tensor in given)
    if operation == _aten.copy_:
        return isinstance(args[0], _OnGpu) and _on_cpu(args[1]) and not (len(args) > 2 and args[2])
    waits = operation == _aten._to_copy and not kwargs.get("non_blocking")
    return waits and _on_cpu(args[0]) and _asks_for_gpu(kwargs)


def _asks_for_gpu(kwargs):
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE.type


def _on_cpu(tensor):
    return not isinstance(tensor, _OnGpu)


def _where():
    """The library's function that runs, as file and name."""
    frame = sys._getframe()
    while not frame.f_globals.get("__name__", "").startswith("deepclust."):
        if frame.f_back is None:
            return "test"
        frame = frame.f_back
    name, _, _ = frame.f_code.co_qualname.partition(".<locals>")
    return f"{frame.f_globals['__name__'].rpartition('.')[2]}.{name}"


def _backward(loss):
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
        if hasattr(node, "variable"):
            leaf = node.variable
            gradient = torch.full_like(leaf, 1e-3)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def moved(module):
    """A module's parameters and buffers on the pretended GPU, in place, as `module.to` has them."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(parameter.detach().to(DEVICE), parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(DEVICE)
    return module


@contextmanager
def pretended():
    """Pretend that there is a GPU, in the block only; tensors made on it are of no use outside."""
    gpu = Gpu()
    with pytest.MonkeyPatch.context() as patch:
        # A machine with a GPU of its own passes the same tests.
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 34, 1 << 34))
        patch.setattr(Tensor, "backward", _backward)
        patch.setattr(torch.backends.cudnn, "enabled", False)  # its batch normalisation is an operation of its own
        # Only in torch's fake mode does nothing look for the driver; it sees no operation, as ours is above it.
        with FakeTensorMode(), gpu:
            yield gpu
