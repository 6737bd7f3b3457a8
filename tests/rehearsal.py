"""A device to rehearse on where there is no GPU: tensors that say "cuda:0" and compute on the CPU.

Inside :func:`rehearsing` an operator that mixes such tensors with ordinary CPU tensors raises, as on a GPU (0-dim tensors and
CPU indices excepted), factories with ``device="cuda"`` make them, ``.numpy()`` refuses, and :class:`Counts` says how many
operators were launched, how often the host waited for a value, and how often it sent one. No CUDA kernels, streams or graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
#: Operators that may take tensors of both devices.
MIXING = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
#: Operators that take CPU indices into a device tensor.
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
#: Operators whose result the host must wait for.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


@dataclass
class Counts:
    """What a GPU would have been asked.

    Args:
        operators: launches on the device.
        synchronisations: times that the host waited for the device: for a value of it, or to send it one out of memory that is
            not pinned.
        copies: values sent from the host to the device.
    """

    operators: int = 0
    synchronisations: int = 0
    copies: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.operators - other.operators,
            self.synchronisations - other.synchronisations,
            self.copies - other.copies,
        )


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device; ``inner`` is the CPU tensor that computes."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device("meta"),
            dispatch_device=True,
        )
        out.inner = inner
        return out

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _State:
    """The counts of the rehearsal that runs, and whether torch's own Python code asks a tensor for its device."""

    counts = Counts()
    hidden = 0


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


def _tensors(*parts: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operator on the CPU tensors behind its arguments, with the rules of a device."""
    if func is torch.ops.prim.device.default:
        # Torch's own wrappers of operators only know what a subclass is when it looks like a meta tensor.
        return torch.device("meta") if _State.hidden else DEVICE
    name, tensors = func._schema.name, _tensors(args, kwargs)
    mine = [t for t in tensors if isinstance(t, OnDevice)]
    others = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    device = kwargs.get("device")
    wanted = None if device is None else torch.device(device)
    if mine and others and name not in MIXING and not _indexes(name, args):
        shapes = [tuple(t.shape) for t in others]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} mixes cuda:0 with cpu {shapes}")
    there = wanted.type in ("cuda", "meta") if wanted is not None else bool(mine)
    if mine or there:
        _State.counts.operators += not _is_view(func)
        _State.counts.synchronisations += name in WAITING
    inner = {
        key: torch.device("cpu") if key == "device" and wanted is not None else value for key, value in kwargs.items()
    }
    out = func(*tree_map(_inner, args), **tree_map(_inner, inner))
    if name == "aten::_local_scalar_dense" or name == "aten::equal":
        return out
    for tensor in mine:
        if tensor.inner is out:
            # In place: the same object comes back, unless its shape changed.
            return tensor if tensor.size() == out.size() else OnDevice(out)
    if name == "aten::copy_":
        return args[0]
    return tree_map(lambda t: OnDevice(t) if isinstance(t, torch.Tensor) and there else t, out)


def _is_view(func: Any) -> bool:
    """Whether an operator only looks at memory another way, which launches nothing."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _indexes(name: str, args: Any) -> bool:
    """CPU indices into a device tensor are allowed; values on the CPU are not, unless they are single."""
    if name not in INDEXING or not isinstance(args[0], OnDevice):
        return False
    values = args[2] if len(args) > 2 else None
    return not isinstance(values, torch.Tensor) or isinstance(values, OnDevice) or values.dim() == 0


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _plainly(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return func(*args, **kwargs)


def _send(func: Callable[..., Any], *args: Any, **kwargs: Any) -> OnDevice:
    """A tensor made on the CPU and sent to the device."""
    _State.counts.copies += 1
    _State.counts.synchronisations += 1 + sum(isinstance(leaf, OnDevice) for leaf in tree_leaves(args))
    return OnDevice(_plainly(func, *tree_map(_inner, args), **kwargs))


def _to(tensor: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
    """``Tensor.to``: between the devices, and between types."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for value in rest:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, str | torch.device):
            device = value
    target = tensor.device if device is None else torch.device(device)
    there, here = isinstance(tensor, OnDevice), _inner(tensor)
    new = _plainly(here.to, dtype=dtype or here.dtype, copy=kwargs.get("copy", False))
    if target.type == "cuda":
        if there:
            _State.counts.operators += new is not here
            return tensor if new is here else OnDevice(new)
        _State.counts.copies += 1
        _State.counts.synchronisations += not (kwargs.get("non_blocking") and hasattr(here, "pinned"))
        return OnDevice(new)
    _State.counts.synchronisations += there
    return new.clone() if there and new is here else new


def _index(index: Any) -> Any:
    """Lists as indices are sent to the device."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return _send(torch.tensor, list(index)) if isinstance(index, list | range) else index


class _Functions(TorchFunctionMode):
    """What torch's Python layer does before an operator is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        mine = isinstance(first, OnDevice)
        if func is torch.Tensor.pin_memory:
            # A machine without a GPU has no such memory.
            copy = _plainly(first.clone)
            copy.pinned = True
            return copy
        if func is torch.nn.functional.scaled_dot_product_attention:
            known = {isinstance(t, OnDevice) for t in _tensors(args, kwargs)}
            if known == {True, False}:
                raise RuntimeError("Expected all tensors to be on the same device: scaled_dot_product_attention")
            if known == {True}:
                _State.counts.operators += 1
                return OnDevice(_plainly(func, *tree_map(_inner, args), **tree_map(_inner, kwargs)))
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return _to(first, "cpu" if func is torch.Tensor.cpu else DEVICE)
        if func == torch.Tensor.device.__get__:
            return DEVICE if mine else func(*args, **kwargs)
        if func == torch.Tensor.is_cuda.__get__:
            return mine or func(*args, **kwargs)
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "cuda":
            rest = {key: value for key, value in kwargs.items() if key != "device"}
            return first if mine else _send(func, *args, **rest)
        if mine:
            if func in (torch.Tensor.numpy, torch.Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            if func is torch.Tensor.tolist:
                _State.counts.synchronisations += 1
                return first.inner.tolist()
            if func is torch.Tensor.data_ptr:
                return first.inner.data_ptr()
            if func is torch.Tensor.new_tensor:
                own = {key: value for key, value in kwargs.items() if key not in ("device", "dtype")}
                return _send(torch.tensor, *args[1:], dtype=kwargs.get("dtype", first.dtype), **own)
            if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                args = (first, _index(args[1]), *args[2:])
        if not any(isinstance(t, OnDevice) for t in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        _State.hidden += 1
        try:
            return func(*args, **kwargs)
        finally:
            _State.hidden -= 1


@contextlib.contextmanager
def rehearsing() -> Iterator[Counts]:
    """The rehearsal device exists for the length of the block; yields what it counts."""
    outer, _State.counts = _State.counts, Counts()
    with (
        mock.patch.object(torch.cuda, "_initialized", True),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: _waited()),
        _Operators(),
        _Functions(),
    ):
        try:
            yield _State.counts
        finally:
            _State.counts = outer


def _waited() -> None:
    _State.counts.synchronisations += 1


def to_device(module: torch.nn.Module) -> torch.nn.Module:
    """``module`` with its parameters and buffers on the rehearsal device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(OnDevice(parameter.data), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module
