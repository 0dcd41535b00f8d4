"""A CUDA device that is not there: shapes, devices and memory without numbers.

torch's fake tensors know their shape, type and device and hold nothing. With them, and with stand-ins for the streams,
events and counters that only a driver could give, every line of the CUDA paths runs on a machine without a GPU: what
would raise there raises here. Memory is counted as the allocator would: the bytes of all living storages, each rounded
up to its 512, FSDP's resized ones included. Workspaces of cuBLAS, and what fragmentation adds, are not.

Needs the CUDA build of torch (its operators have to be registered); the build for CPUs alone lacks some kernels.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.attention.varlen  # registers its operators
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

DEVICE_BYTES = 80 * 2**30
META, DEVICE = torch.device("meta"), torch.device("cuda", 0)
NAME = "no GPU (fake tensors)"
DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
"""Written over in place: nothing to do."""
ATTENTION, ATTENTION_BACKWARD = torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward


class Memory(TorchDispatchMode):
    """Bytes of the living storages on the device that is not there."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.now = self.peak = self.base = 0
        self.limit = limit
        """Bytes; where an operator goes beyond it, memory has run out."""
        self.sizes: dict[int, int] = {}
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1  # what a program reads of a number that is not there
        if func in DRAWS and isinstance(args[0], FakeTensor):
            return args[0]
        if func is torch.ops.aten.index_put.default and isinstance(args[0], FakeTensor):
            return args[0]  # the backward of indexing, which works in place on tensors that are there
        if func in (ATTENTION.default, ATTENTION_BACKWARD.default):
            refuse(*[x for x in args if isinstance(x, torch.Tensor) and x.dim() == 3])
        if func is torch.ops.aten.addmm.dtype_out:  # whose decomposition in torch 2.11 is wrong
            return kwargs["out"]
        if self.inside:  # a kernel that torch writes out in smaller ones, for shapes' sake
            return func(*args, **kwargs)
        self.inside = not any(isinstance(leaf, DTensor) for leaf in tree_leaves((args, kwargs)))
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = False
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda":
                self.see(leaf.untyped_storage())
        return out

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
            self.sizes[key] = 0
        self._count(key, storage.nbytes())

    def _count(self, key: int, size: int) -> None:
        size = -(-size // 512) * 512
        more = size - self.sizes[key]
        if more > 0 and self.now + more > self.limit:
            raise torch.OutOfMemoryError(f"{self.now} + {more} bytes of {self.limit}")
        self.sizes[key] = size
        self.now += more
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        if storage._cdata in self.sizes:
            self._count(storage._cdata, size)


def refuse(*inputs: torch.Tensor) -> None:
    """What flash attention's kernel refuses on a device, and its shapes alone do not show.

    Raises:
        RuntimeError: of queries, keys, values, outputs or their gradients.
    """
    for x in inputs:
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"FlashAttention only supports fp16 and bf16 data types, not {x.dtype}")
        if x.size(-1) > 256 or x.size(-1) != inputs[0].size(-1):
            raise RuntimeError(f"FlashAttention takes heads of one size up to 256, not {x.size(-1)}")


class _Stream:
    """Nothing runs, so nothing waits."""

    device = torch.device("cuda", 0)
    device_index, device_type, stream_id, cuda_stream = 0, 1, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Properties:
    """What is asked of a device."""

    name, total_memory, multi_processor_count, major, minor = NAME, DEVICE_BYTES, 132, 9, 0
    max_threads_per_multi_processor, warp_size, regs_per_multiprocessor = 2048, 32, 65536


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """With real tensors: what a program decides by."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> torch.Tensor:
    """`torch.tensor` asks the driver, a copy from the host does not; and none is one whose values are known."""
    device = torch.device(device) if device is not None else torch.empty(0).device
    made = TENSOR(data, device="cpu" if device.type == "cuda" else device, **options)
    if isinstance(made, FakeTensor):
        made.constant = None
    return made.to(device).requires_grad_(requires_grad)


def _numpy(tensor: torch.Tensor, *, force: bool = False) -> Any:
    return np.ones(tuple(tensor.shape)) if isinstance(tensor, FakeTensor) else NUMPY(tensor, force=force)


FAKE_DISPATCH = FakeTensor.__torch_dispatch__
HANDLERS = fake_tensor._DISPATCH_META_HANDLERS


def _device_of_nothing(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """torch's C++ side takes the tensors for ones without storage, so that it asks no driver for streams or guards."""
    return META if func is torch.ops.prim.device.default else FAKE_DISPATCH(func, types, args, kwargs)


NEW = FakeTensor.__new__


def _new(cls: type, mode: Any, elem: torch.Tensor, device: torch.device, *args: Any, **kwargs: Any) -> Any:
    """Where C++ makes one like another, it is on the device that the other was said to be on."""
    if device == META and torch.utils._device.CURRENT_DEVICE != META:
        device = DEVICE
    return NEW(cls, mode, elem, device, *args, **kwargs)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to` asks C++ where a tensor is."""
    copied = kwargs.pop("copy", False)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "cuda":
        device = DEVICE
    if isinstance(tensor, DTensor) or not (isinstance(tensor, FakeTensor) or device == DEVICE):
        return TO(tensor, *args, copy=copied, **kwargs)
    if not isinstance(tensor, FakeTensor):  # made in another thread, where tensors are real
        return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
    if not copied and device in (None, tensor.device) and dtype in (None, tensor.dtype):
        return tensor
    return torch.ops.aten._to_copy.default(
        tensor, dtype=dtype, device=device or tensor.device, non_blocking=non_blocking
    )


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """`Module.to` swaps fake parameters even with themselves; such as hold nothing have nothing to swap."""
    if not (isinstance(one, FakeTensor) and one.device == other.device and one.dtype == other.dtype):
        SWAP(one, other)


class _Silu(torch.autograd.Function):
    """One kernel each way, as on a device; without one, torch writes its backward out in eight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


TO, SWAP = torch.Tensor.to, torch.utils.swap_tensors
NUMPY, TENSOR = torch.Tensor.numpy, torch.tensor


@contextlib.contextmanager
def fake_cuda(limit: float = float("inf")) -> Iterator[Memory]:
    """Inside, ``torch.cuda`` has a device, tensors on it are fake, and the memory that they would take is counted.

    Args:
        limit: bytes of the device.
    """
    memory, stream = Memory(limit), _Stream()
    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        memory.resized(storage, size)
        return resize(storage, size)

    def reset(*_: Any) -> None:
        memory.peak = memory.now

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda other: None,
        "stream": lambda other: contextlib.nullcontext(),
        "memory_allocated": lambda device=None: memory.now,
        "max_memory_allocated": lambda device=None: memory.peak,
        "memory_reserved": lambda device=None: memory.now,
        "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": reset,
        "memory_stats": lambda device=None: {"num_alloc_retries": 0, "num_ooms": 0},
        "mem_get_info": lambda device=None: (DEVICE_BYTES - memory.now, DEVICE_BYTES),
        "get_device_properties": lambda device=None: Properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: NAME,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda self, stream: None))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self, device=None: self))
        stack.enter_context(mock.patch.object(torch.Tensor, "numpy", _numpy))
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", _to))
        stack.enter_context(mock.patch("torch.utils.swap_tensors", _swap))
        stack.enter_context(mock.patch("torch.nn.functional.silu", lambda x, inplace=False: _Silu.apply(x)))
        stack.enter_context(mock.patch.object(FakeTensor, "__new__", staticmethod(_new)))
        stack.enter_context(mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(_device_of_nothing)))
        stack.enter_context(mock.patch.dict(HANDLERS, {torch.ops.prim.device.default: lambda args: META}))
        on_device = property(lambda self: self.device.type == "cuda")
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", on_device, create=True))
        stack.enter_context(mock.patch.object(DTensor, "is_cuda", on_device, create=True))
        stack.enter_context(mock.patch.object(DTensor, "device", property(lambda self: self._local_tensor.device)))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None))
        for module in ("hbp.parallel.mesh", "hbp.train.measure.links"):
            name = f"{module}.init_device_mesh"
            stack.enter_context(mock.patch(name, _really(init_device_mesh)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(memory)
        yield memory
