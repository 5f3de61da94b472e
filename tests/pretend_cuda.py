"""A second device without a GPU: tensors that are on "cuda:0", hold their numbers on the CPU, and refuse to mix.

`with pretend_cuda():` everything that names the device "cuda" gives a `Pretended` tensor. What runs on it runs on the
CPU, so values, branches on values, gradients and optimisers are real and can be compared with a run on the CPU bit for
bit. What a GPU refuses is refused: operations on tensors of both devices, but for scalars of the CPU in elementwise
operations and CPU indices into a GPU tensor; `numpy()`; a `torch.Generator` of the other device.

How: to C++ a `Pretended` tensor is on "meta" (autograd asks the driver about a "cuda" one, as it does with PyTorch's
FakeTensorMode, which has no values besides). In Python its attribute says "cuda:0"; a function mode turns "cuda" in
arguments into "meta", and a dispatch mode runs each operation on what the tensors hold.

`waits` lists the places where the host would have waited for the GPU: a number is asked for, or a copy between host
and device does not say `non_blocking`, or is from memory that is not pinned.

Not seen: kernels that CUDA lacks or that round otherwise, autocast (it stays off), streams, memory, several devices.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
BETWEEN = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# what takes no scalar of the CPU beside tensors of a GPU
STRICT = {"cat", "stack", "mm", "bmm", "addmm", "gather", "scatter", "index_select", "embedding"}
# what the host waits for: it needs a number, or how many there are
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}
PlainGenerator = torch.Generator
waits: list[str] = []  # where the host has waited for the device, in this context
attention, run_backward = F.scaled_dot_product_attention, torch.autograd._engine_run_backward


class Pretended(Tensor):
    """A tensor "on the GPU"; `held` are its numbers, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, tensor: Tensor, requires_grad: bool = False, **_: Any) -> Any:
        if tensor.is_meta:  # accelerate builds empty networks with the class of the parameters
            return torch.nn.Parameter(tensor, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls,
            tensor.shape,
            strides=tensor.stride(),
            storage_offset=tensor.storage_offset(),
            dtype=tensor.dtype,
            device=META,
        )
        made.held = tensor
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def __reduce_ex__(self, protocol: Any) -> Any:  # a file of a GPU's tensors, read to the CPU
        return self.held.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class PretendedGenerator(PlainGenerator):
    """A `torch.Generator` that says where it is."""

    def __new__(cls, device: Any = "cpu") -> PretendedGenerator:
        made = super().__new__(cls, "cpu")
        made.where = torch.device(device)
        return made

    device = property(lambda self: self.where)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU and returns what is on the GPU as such."""
    there: list[Pretended] = []
    here: list[Tensor] = []

    def held(x: Any) -> Any:
        if isinstance(x, Pretended):
            there.append(x)
            return x.held
        if isinstance(x, Tensor):
            here.append(x)
        return type(x)(map(held, x)) if type(x) in (list, tuple) else x

    bare, named = [held(x) for x in args], {key: held(x) for key, x in kwargs.items()}
    device, on_gpu = kwargs.get("device"), bool(there)
    if device is None and not there and any(x.is_meta for x in here):
        return func(*args, **kwargs)  # what is on "meta" itself
    if device is not None:
        on_gpu, named["device"] = device.type != "cpu", CPU
    if there and here and func not in BETWEEN:
        _check(func, args, here)
    if there or (here and on_gpu):
        _note_wait(func, args, kwargs, on_gpu and bool(here), there)
    found = func(*bare, **named)
    known = {id(x.held): x for x in there}  # what works in place returns its argument

    def wrapped(y: Any) -> Any:
        if isinstance(y, Tensor):
            return known[id(y)] if id(y) in known else Pretended(y)
        return type(y)(map(wrapped, y)) if type(y) in (list, tuple) else y

    return wrapped(found) if on_gpu else found


def _note_wait(
    func: Any, args: tuple, kwargs: dict[str, Any], mixed: bool, there: list[Pretended]
) -> None:
    """Notes where the host waits for what this operation needs."""
    name = func.overloadpacket.__name__
    moves = func in BETWEEN and (mixed or _leaves(kwargs))
    pageable = mixed and not getattr(args[func is aten.copy_.default], "pinned", False)
    between = moves and (pageable or not _non_blocking(args, kwargs))
    indexed = [x for x in args[1] if x is not None] if name in INDEXING else []
    by_host = any(not isinstance(x, Pretended) for x in indexed)
    counted = any(x.dtype == torch.bool for x in indexed)
    if name in WAITING or between or by_host or counted:
        frames = [f for f in traceback.extract_stack() if "/stitchvm/" in f.filename]
        place = frames[-1] if frames else None
        where = f"{place.filename.rpartition('/stitchvm/')[2]}:{place.lineno}" if place else ""
        waits.append(f"{name} {where} {place.line if place else ''}")


def _leaves(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and device.type == "cpu"


def _non_blocking(args: tuple, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2] is True))


def _check(func: Any, args: tuple, here: list[Tensor]) -> None:
    """Raises what CUDA would for tensors of two devices."""
    name = func.overloadpacket.__name__
    if name in INDEXING:
        values = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, Pretended)]
        allowed = isinstance(args[0], Pretended) and all(x.ndim == 0 for x in values)
    elif name.startswith("_fused_"):
        allowed = False
    else:
        writes_here = name.endswith("_") and not isinstance(args[0], Pretended)
        allowed = all(x.ndim == 0 for x in here) and name not in STRICT and not writes_here
    if not allowed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


class _Operations(TorchDispatchMode):
    on = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(func, args, kwargs or {}) if self.on else func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Lets C++ see "meta" for "cuda", and does itself what C++ would refuse to do for a tensor on "meta"."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        if args and isinstance(args[0], Pretended):
            if func in (Tensor.tolist, Tensor.__repr__, Tensor.__format__):
                waits.append(f"{func.__name__}")
                return func(args[0].held, *args[1:], **kwargs)
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                return func(args[0], _places(args[1]), *args[2:])
            if func is Tensor.new_tensor:
                kwargs["device"] = kwargs.get("device") or CUDA
                return torch.tensor(*args[1:], **kwargs)
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy.")
            if func is Tensor.to and _is_meta(*args[1:2], kwargs.get("device")):
                return args[0].held.to(META)
        args, kwargs, meant = _devices(func, args, kwargs)
        if not meant:
            _check_generator(args, kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not meant:
            return _from_data(func, args, kwargs)
        self.operations.on = not meant
        try:
            return func(*args, **kwargs)
        finally:
            self.operations.on = True


def _is_meta(*places: Any) -> bool:
    names = [x for x in places if isinstance(x, (str, torch.device))]
    return any(torch.device(name) == META for name in names)


def _places(index: Any) -> Any:
    """Returns an index with tensors for its lists, which C++ would not look at for "meta"."""
    if isinstance(index, tuple):
        return tuple(_places(x) for x in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _devices(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any], bool]:
    """Returns the arguments with "meta" for "cuda", and whether "meta" itself was meant."""
    meant = False

    def turned(device: Any) -> Any:
        nonlocal meant
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        meant |= device.type == "meta"
        return META if device.type == "cuda" else device

    if kwargs.get("device") is not None:
        kwargs["device"] = turned(kwargs["device"])
    names = (str, int) if func is Tensor.to else ()
    args = tuple(
        turned(x) if isinstance(x, torch.device) or (k == 1 and isinstance(x, names)) else x
        for k, x in enumerate(args)
    )
    return args, kwargs, meant


def _check_generator(args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises what CUDA does for a generator of another device than the numbers it is to draw."""
    drawn = [x for x in (*args, *kwargs.values()) if isinstance(x, PlainGenerator)]
    on_gpu = kwargs.get("device") == META or any(isinstance(x, Pretended) for x in args)
    kind = "cuda" if on_gpu else "cpu"
    for generator in drawn:
        if generator.device.type != kind:
            raise RuntimeError(
                f"Expected a '{kind}' device type for generator but found '{generator.device.type}'"
            )


def _from_data(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Returns `torch.tensor(...)`, whose data C++ would not look at for "meta"."""
    device, data = kwargs.pop("device", None), args[0]
    if isinstance(data, Pretended):
        device = META if device is None else device
        found = data.to(kwargs.get("dtype") or data.dtype)
        found = found.detach().clone() if func is torch.tensor else found
    else:
        bare = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, data)
        found = func(bare, *args[1:], **kwargs)
    return found if device is None else found.to(device)


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Returns attention without asking which of CUDA's kernels there are."""
    if not isinstance(query, Pretended):
        return attention(query, *args, **kwargs)
    names = ("key", "value", "attn_mask", "dropout_p", "is_causal")
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    return aten._scaled_dot_product_attention_math(
        query, kwargs.pop("key"), kwargs.pop("value"), **kwargs
    )[0]


def _pinned(x: Tensor) -> Tensor:
    """Returns a copy that says of itself that it is in pinned memory."""
    x = x.clone()
    x.pinned = True
    return x


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed = enable_timing

    def record(self, stream: Any = "of the device that happens to be the current one") -> None:
        self.stream = stream

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, end: _Event) -> float:
        assert self.timed and end.timed
        return 1.0


def _of_a_gpu(answer: Any) -> Callable[..., Any]:
    """Returns a function of `torch.cuda` that takes a CUDA device, or none."""

    def asked(device: Any = None) -> Any:
        assert device is None or torch.device(device).type == "cuda", device
        return answer

    return asked


def _swap(one: Tensor, two: Tensor) -> None:
    """Makes a moved parameter the same object as before, as on a GPU; PyTorch's own insists that nobody holds it."""
    for name in ("__class__", "__dict__"):
        first, second = getattr(one, name), getattr(two, name)
        setattr(one, name, second)
        setattr(two, name, first)
    torch._C._swap_tensor_impl(one, two)


@contextmanager
def pretend_cuda() -> Iterator[torch.device]:
    """Returns the pretended device in a context in which it works; a Trainer's single device is this one."""
    operations, initialise = _Operations(), SingleDeviceStrategy.__init__

    def on_gpu(self: Any, device: Any = "cpu", *args: Any, **kwargs: Any) -> None:
        initialise(self, CUDA, *args, **kwargs)

    waits.clear()
    torch.__future__.set_swap_module_params_on_conversion(True)
    functions = _Functions(operations)

    def with_functions(*args: Any, **kwargs: Any) -> Any:  # for what is run again on the way back
        with functions:
            return run_backward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, operations, functions:
        patch.setattr(torch.autograd, "_engine_run_backward", with_functions)
        patch.setattr(torch.utils, "swap_tensors", _swap)
        patch.setattr(F, "scaled_dot_product_attention", _attention)
        patch.setattr(torch, "Generator", PretendedGenerator)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(Tensor, "pin_memory", _pinned)
        for name, answer in {
            "synchronize": None,
            "current_device": 0,
            "current_stream": None,
            "reset_peak_memory_stats": None,
            "max_memory_allocated": 2**30,
        }.items():
            patch.setattr(torch.cuda, name, _of_a_gpu(answer))
        patch.setattr(SingleDeviceStrategy, "__init__", on_gpu)
        patch.setattr(CPUAccelerator, "setup_device", lambda self, device: None)
        try:
            yield CUDA
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)


def back(x: Any) -> Any:
    """Returns nested data with its tensors on the CPU."""
    return tree_map(lambda y: y.detach().cpu() if isinstance(y, Tensor) else y, x)
