"""A device that does not exist: its numbers are computed on the CPU, its rules are those of a GPU.

A PyTorch backend of its own (PrivateUse1), so autograd, modules, optimisers and PEFT treat it as a device. An operation
raises where it mixes devices and CUDA would not have it: every tensor has to be on the device, except numbers (tensors
without dimensions, of which elementwise kernels take those of the CPU) and indices into a tensor of the device.

`Meter` counts kernels, and host synchronisations by their reason: what waits until the device has done all that was
asked of it. Each of these costs a GPU the time in which nothing is queued.

Registering the device changes the process for good, so it is done by `register` and only in processes of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
DEVICE = torch.device("cpu")            # until `register`
COPIES = {"copy_", "_to_copy"}
INDEXES = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}
NUMBERS = {*COPIES, "fill", "fill_", "masked_fill", "masked_fill_", "index_put", "index_put_", "where"}
COUNTING = {       # their result's size, or what they return, is known on the device only
    "nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "repeat_interleave", "histc",
}
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "is_same_size"}


class Meter:
    """What was asked of the device since `reset`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    @property
    def waited(self) -> int:
        return self.waits.total()


meter = Meter()


class Pinned(Tensor):
    """Memory of the CPU from which a device reads by itself: a copy that is not waited for does not stop the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class OnDevice(Tensor):
    """A tensor of the device; its numbers are in `there`, which nobody but the device looks at."""

    there: Tensor

    @staticmethod
    def __new__(cls, there: Tensor) -> OnDevice:
        made: Any = Tensor._make_wrapper_subclass(
            cls, there.shape, strides=there.stride(), storage_offset=there.storage_offset(), dtype=there.dtype,
            device=DEVICE,
        )
        made.there = there
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy: copy it to host memory first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        self.numpy()

    def tolist(self) -> Any:
        return self.detach().to("cpu").tolist()

    @property
    def data(self) -> Any:
        return super().data

    @data.setter
    def data(self, other: OnDevice) -> None:       # the way in which modules change the dtype of their weights
        Tensor.data.__set__(self, other)           # type: ignore[attr-defined]
        self.there = other.there

    def untyped_storage(self) -> Any:
        return self.there.untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"


class Backend:
    """What torch asks the module of a device. It has no random state: nobody may want to know or change it."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


def register() -> torch.device:
    """Make the device known to this process, for good."""
    global DEVICE
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Backend())
    DEVICE = torch.device(NAME, 0)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    aten.impl("copy_", lambda *args: _run(torch.ops.aten.copy_.default, args, {}), "PrivateUse1")
    _kept.extend((everything, aten))
    Tensor.pin_memory = lambda self, *_: self.as_subclass(Pinned)      # type: ignore[assignment, method-assign]
    return DEVICE


_kept: list[Any] = []       # a library takes its kernels along when it goes


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """Of what operations take and give: tensors and lists of them."""
    if isinstance(tree, list | tuple):
        return type(tree)([mapped(function, x) for x in tree])
    return function(tree)


def tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what the device was asked, if it may be asked that."""
    name = func.overloadpacket.__name__
    given = tensors([args, [*kwargs.values()]])
    known = {id(x.there): [x] for x in given if isinstance(x, OnDevice)}
    if known and not all(isinstance(x, OnDevice) for x in given):
        _check(func, name, args, kwargs)
    _count(func, name, args, kwargs)
    where = kwargs.get("device")
    inner, settings = mapped(_there, args), {key: mapped(_there, value) for key, value in kwargs.items()}
    if where is not None:
        settings["device"] = torch.device("cpu")
    out = func(*inner, **settings)
    if where is not None and torch.device(where).type != NAME:
        return out                                            # it has left the device
    if name == "copy_" and not isinstance(args[0], OnDevice):
        return args[0]
    return mapped(lambda x: (known.get(id(x)) or [OnDevice(x)])[0] if isinstance(x, Tensor) else x, out)


def _there(x: Any) -> Any:
    return x.there if isinstance(x, OnDevice) else x.as_subclass(Tensor) if isinstance(x, Pinned) else x


def _check(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Raises RuntimeError, as CUDA does, where an operation is given tensors of two devices."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    on_device = [key for key, value in given.items() if any(isinstance(x, OnDevice) for x in tensors(value))]
    if name in COPIES:
        return
    for key, value in given.items():
        for x in tensors(value):
            if isinstance(x, OnDevice):
                continue
            number = x.dim() == 0 and key not in written and (torch.Tag.pointwise in func.tags or name in NUMBERS)
            index = name in INDEXES and key == "indices" and "self" in on_device
            if not (number or index):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {func} got {key} on {x.device} "
                    f"and {', '.join(on_device)} on {DEVICE}"
                )


def _count(func: Any, name: str, args: Any, kwargs: Any) -> None:
    if name in COPIES:
        target, source = (args[0], args[1]) if name == "copy_" else (kwargs.get("device"), args[0])
        here = isinstance(source, OnDevice)
        there = isinstance(target, OnDevice) if name == "copy_" else _stays(target, here)
        waits_not = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        if here and not there:
            meter.waits["download"] += 1
        elif there and not here and not (waits_not and isinstance(source, Pinned)):
            meter.waits["upload"] += 1
    elif name in COUNTING:
        meter.waits[name] += 1
    elif name in INDEXES:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                meter.waits["mask as index"] += 1
            elif index is not None and not isinstance(index, OnDevice):
                meter.waits["upload"] += 1
    if name not in FREE and not func.is_view:
        meter.kernels[name] += 1


def _stays(target: Any, here: bool) -> bool:
    return here if target is None else torch.device(target).type == NAME
