"""A simulated accelerator: tensors that say `cuda:0` and compute on the CPU, and a record of what a real one punishes.

With it, the code for accelerators runs on machines without one. It works below autograd, where torch's own devices do:
each operator that reaches a tensor's device is seen, also those inside of torch's Python and C++ functions. It records

- reads: the CPU waits for a value or a shape, for a copy in either direction, or for an event that has not passed;
- mixed: an operator has tensors of two devices, or a CPU tensor is given to a collective of the accelerator's group;
- how many operators ran that launch work, and how many bytes were allocated, which may be limited.

It can lack float64, and any operator can fail. A copy into pinned memory is under way until an event that was recorded
after it is waited for, or until the device catches up; meanwhile the memory holds NaN. There are no streams: work that
is put on a stream runs at once. What another thread waits for is recorded apart, as it delays no step.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shampoo_deepspeed.algorithm import background
from tests.support.reference import Options, low

DEVICE, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
CPU = torch.device("cpu")
PACKAGE = ("/shampoo_deepspeed/", "/integrations/")
aten = torch.ops.aten
SCALARS = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}
# The CPU must know how many elements these have.
SHAPES = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::repeat_interleave", "aten::bincount",
}  # fmt: skip
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}  # may have tensors of two devices
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by lists of tensors
# These launch nothing.
NOT_COUNTED = {"aten::detach", "aten::alias", "aten::empty", "aten::empty_like", "aten::new_empty"}


@dataclass
class Device:
    """The record, and what the device lacks.

    Args:
        limit: the number of bytes that fit.
        float64: whether it has this dtype.
        group: a process group that can move the accelerator's tensors only, as NCCL's.
        failing: what operators raise, by their names.
    """

    reads: list[str] = field(default_factory=list)
    reads_of_threads: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)
    live: int = 0
    peak: int = 0
    limit: int = 1 << 62
    current: int = 0
    float64: bool = True
    group: dist.ProcessGroup | None = None
    failing: dict[str, Exception] = field(default_factory=dict)
    holders: Counter[int] = field(default_factory=Counter)
    pinned: dict[int, weakref.ref[Any]] = field(default_factory=dict)
    under_way: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def read(self, what: str) -> None:
        """Record that the CPU waits."""
        own = threading.current_thread() is threading.main_thread()
        (self.reads if own else self.reads_of_threads).append(f"{what} {_where()}")

    def catch_up(self, count: int | None = None) -> None:
        """Let all copies that are under way arrive, or the first ones, as during the next forward pass."""
        arrived, self.under_way = self.under_way[:count], self.under_way[len(self.under_way[:count]) :]
        for target, content in arrived:
            target.copy_(content)

    def hold(self, inner: Tensor) -> int:
        """Count one more tensor that uses this memory, and return the memory's address."""
        storage = inner.untyped_storage()
        address = storage.data_ptr()
        if not self.holders[address]:
            if self.live + storage.nbytes() > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes")
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        self.holders[address] += 1
        return address

    def drop(self, address: int, size: int) -> None:
        """Count one tensor less."""
        self.holders[address] -= 1
        if not self.holders[address]:
            del self.holders[address]
            self.live -= size


NOTED = Device()


class OnDevice(Tensor):
    """A tensor of the device; `held_values` are its values, in the CPU's memory.

    For torch's C++ it is a tensor of the CPU with its own dispatch, so methods that look at its device there are
    replaced here.
    """

    held_values: Tensor
    ordinal: int
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, index: int = 0) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=CPU
        )
        made.held_values, made.ordinal = inner, index
        device, address, size = NOTED, NOTED.hold(inner), inner.untyped_storage().nbytes()
        weakref.finalize(made, device.drop, address, size).atexit = False
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.ordinal)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        device, dtype, non_blocking, copy = _parsed(args, kwargs)
        device = self.device if device is None else device
        if device == self.device and not copy and dtype in (None, self.dtype):
            return self
        return aten._to_copy.default(self, dtype=dtype or self.dtype, device=device, non_blocking=non_blocking)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        found: Tensor = self.to(CPU)
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        """Do nothing: there are no streams."""

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def _new(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(Tensor, name)(self, *args, **{"device": self.device, **kwargs})

    new_empty = functools.partialmethod(_new, "new_empty")
    new_zeros = functools.partialmethod(_new, "new_zeros")
    new_ones = functools.partialmethod(_new, "new_ones")
    new_full = functools.partialmethod(_new, "new_full")
    new_tensor = functools.partialmethod(_new, "new_tensor")

    def __deepcopy__(self, memo: Any) -> Any:
        made = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({self.held_values}, device={self.device})"


class Mode(TorchDispatchMode):
    """A context in which tensors that are created for the device are on it."""

    def __enter__(self) -> Any:
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor would otherwise look for the device before it asks
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def on_device(tensor: Tensor) -> OnDevice:
    """A copy of a CPU tensor on the device, of which no record is made."""
    return OnDevice(tensor.detach().clone())


def values_of(tensor: Tensor) -> Tensor:
    """The values of a tensor of either device, of which no record is made."""
    return tensor.held_values.clone() if isinstance(tensor, OnDevice) else tensor.detach().clone()


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator as the device would."""
    name = func._schema.name
    here = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnDevice)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if asked is not None and asked.type == "meta":
        return func(*args, **kwargs)  # shapes without memory, on no device
    target = _target(asked, here)
    if here or target.type != "cpu":
        _note(func, name, args, kwargs, here, target)
    if name in NOTED.failing and (here or target.type != "cpu"):
        raise NOTED.failing[name]
    if name == "aten::copy_" and _blocks_not(args, kwargs) and _lands_later(args):
        return args[0]
    plain, named = tree_map_only(OnDevice, lambda t: t.held_values, (args, kwargs))
    if asked is not None:
        named["device"] = CPU
    pins = named.pop("pin_memory", None)
    made = _computed(func, plain, named)
    if pins:
        _pin(made)
    if func in SCALARS or target.type == "cpu":
        return _with_same(made, args, kwargs) if here else made
    return _with_same(made, args, kwargs, target.index or 0)


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result on the CPU. Products are in TF32 if the switch says so, or of bfloat16 with float32 sums."""
    if func is aten.bmm.dtype:
        return torch.bmm(args[0].to(args[2]), args[1].to(args[2]))
    if func is aten.bmm.default and args[0].dtype == torch.float32 and _in_tf32():
        high = Options(matmul_precision="high")
        return torch.bmm(low(args[0], high), low(args[1], high))
    if func is aten.baddbmm_.default and args[1].dtype == torch.float32 and _in_tf32():
        high = Options(matmul_precision="high")
        return func(args[0], low(args[1], high), low(args[2], high), **kwargs)
    return func(*args, **kwargs)


def _in_tf32() -> bool:
    products = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):
        return bool(products.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def _target(asked: torch.device | None, here: list[OnDevice]) -> torch.device:
    """The device of an operator's results."""
    if asked is not None:
        return torch.device("cuda", NOTED.current) if asked.type == "cuda" and asked.index is None else asked
    return here[0].device if here else CPU


def _with_same(made: Any, args: Any, kwargs: Any, index: int | None = None) -> Any:
    """The results, with arguments that were changed in place as they were given; others on the device, if asked."""
    given = {id(t.held_values): t for t in tree_leaves((args, kwargs)) if isinstance(t, OnDevice)}

    def marked(tensor: Tensor) -> Tensor:
        if id(tensor) in given:
            return given[id(tensor)]
        if index is None or isinstance(tensor, OnDevice):
            return tensor
        if tensor.dtype == torch.float64 and not NOTED.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return OnDevice(tensor, index)

    return tree_map_only(Tensor, marked, made)


def _note(func: Any, name: str, args: Any, kwargs: Any, here: list[OnDevice], target: torch.device) -> None:
    """Record an operator, and what is wrong with it."""
    if name not in NOT_COUNTED and not func.is_view:
        NOTED.operators[name] += 1
    others = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not isinstance(t, OnDevice)]
    if name.startswith("c10d::"):
        _note_collective(name, args, others)
        return
    if name in COPIES:
        _note_copy(name, args, kwargs, here, target)
        return
    if name in INDEXED:
        others = [t for t in others if all(t is not index for index in args[1])]  # moved there; see `_has_mask`
    if any(t.ndim for t in others) or len({t.ordinal for t in here}) > 1:
        NOTED.mixed.append(f"{name} {_where()}")
    if func in SCALARS or name in SHAPES or _has_mask(name, args):
        NOTED.read(name)


def _note_copy(name: str, args: Any, kwargs: Any, here: list[OnDevice], target: torch.device) -> None:
    """Record a copy between devices that the CPU waits for: any but one that does not block, of pinned memory."""
    tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    lies = {t.device.type for t in tensors} | ({target.type} if name == "aten::_to_copy" else set())
    if len(lies) == 1:
        return
    on_cpu = [t for t in tensors if t.device.type == "cpu"]
    if not _blocks_not(args, kwargs) or not on_cpu or not all(is_pinned(t) for t in on_cpu):
        NOTED.read(name)


def _blocks_not(args: Any, kwargs: Any) -> bool:
    """Whether a copy was asked not to block."""
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2] is True))


def _note_collective(name: str, args: Any, others: list[Tensor]) -> None:
    """Record a collective of the accelerator's group that has a CPU tensor."""
    groups = [dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)]
    if others and NOTED.group is not None and any(g.group_name == NOTED.group.group_name for g in groups):
        NOTED.mixed.append(f"{name} {_where()}")


def _is_group(found: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(found._type())


def _has_mask(name: str, args: Any) -> bool:
    """Whether elements are chosen by a mask, whose size the CPU must read; filling them with one value needs none."""
    if name not in INDEXED:
        return False
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    fills = len(args) > 2 and args[2].numel() == 1 and len(masks) == len([i for i in args[1] if i is not None]) == 1
    lists = [i for i in args[1] if i is not None and not isinstance(i, OnDevice)]  # moved to the device first
    return bool(lists) or (bool(masks) and not fills)


def _lands_later(args: Any) -> bool:
    """Put a copy into pinned memory on its way, if it is one."""
    target, source = args[0], args[1]
    if isinstance(target, OnDevice) or not isinstance(source, OnDevice) or not is_pinned(target):
        return False
    NOTED.under_way.append((target, source.held_values.to(target.dtype, copy=True)))
    target.fill_(torch.nan if target.is_floating_point() else 0)
    return True


def _pin(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    NOTED.pinned[storage.data_ptr()] = weakref.ref(storage)
    tensor._keeps_pinned = storage  # type: ignore[attr-defined]


def is_pinned(tensor: Tensor) -> bool:
    """Whether a CPU tensor is in memory that the device can copy from and to by itself."""
    known = NOTED.pinned.get(tensor.untyped_storage().data_ptr())
    return known is not None and known() is not None


def _parsed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool, bool]:
    """(device, dtype, non_blocking, copy) of `Tensor.to`."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    rest = list(args)
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
        device, dtype = other.device, other.dtype
    if rest and isinstance(rest[0], (str, torch.device)):
        device = torch.device(rest.pop(0))
    if rest and isinstance(rest[0], torch.dtype):
        dtype = rest.pop(0)
    flags = [*rest, False, False]
    device = None if device is None else torch.device(device)
    return device, dtype, bool(kwargs.get("non_blocking", flags[0])), bool(kwargs.get("copy", flags[1]))


def _where() -> str:
    """The line of the package that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in PACKAGE):
            file = "/".join(frame.f_code.co_filename.split("/")[-2:])
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the package"


class Event:
    """An event of the device's queue: it has passed when the copies before it have arrived."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def record(self, *_: Any) -> None:
        """Be recorded after all that is under way now."""
        self._last = NOTED.under_way[-1] if NOTED.under_way else None

    def _place(self) -> int:
        """How many copies that are under way come before it."""
        return next((n + 1 for n, item in enumerate(NOTED.under_way) if item is self._last), 0)

    def synchronize(self) -> None:
        """Wait for it."""
        if not self.query():
            NOTED.read("event")
            NOTED.catch_up(self._place())

    def query(self) -> bool:
        """Whether it has passed."""
        return not self._place()

    def wait(self, *_: Any) -> None:
        """Let a stream wait for it."""

    def elapsed_time(self, _: Any) -> float:
        """Milliseconds between this event and a later one."""
        return 0.0


class _Stream(contextlib.AbstractContextManager["_Stream"]):
    def __init__(self, *_: Any) -> None:
        self.wait_event = self.synchronize = lambda *_: None

    def __exit__(self, *_: object) -> None:
        return None


def simulate(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Simulate the device within `Mode()` from now on, and return its record."""
    work = background._run

    def in_mode(*arguments: Any) -> Any:  # a mode applies to one thread only
        with Mode() if arguments[3] is not None else contextlib.nullcontext():
            return work(*arguments)

    def to_current(device: Any) -> None:
        NOTED.current = device if isinstance(device, int) else torch.device(device).index or 0

    monkeypatch.setattr(background, "_run", in_mode)
    monkeypatch.setattr(background, "_stream", _Stream)
    monkeypatch.setattr(background, "_load_linear_algebra", lambda device: None)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))  # an H100's
    accelerator: dict[str, Any] = {
        "current_stream": _Stream,
        "set_device_index": to_current,
        "current_device_index": lambda: NOTED.current,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "is_available": lambda: True,
        "device_count": lambda: 2,
    }
    for name, stand_in in accelerator.items():
        monkeypatch.setattr(torch.accelerator, name, stand_in)
    for attribute, fresh in vars(Device()).items():
        setattr(NOTED, attribute, fresh)
    return NOTED


def as_nccl(monkeypatch: pytest.MonkeyPatch, group: dist.ProcessGroup) -> None:
    """Let a group move tensors of the simulated device only, as one of NCCL does; gloo moves them in fact."""
    NOTED.group = group
    config, place = dist.get_backend_config, distributed_c10d._get_object_coll_device

    def config_of(asked: dist.ProcessGroup | None = None) -> str:
        return "cuda:nccl" if asked in (None, group) else config(asked)

    def place_of(asked: dist.ProcessGroup | None = None) -> str:
        return f"cuda:{NOTED.current}" if asked in (None, group) else place(asked)

    monkeypatch.setattr(dist, "get_backend_config", config_of)
    monkeypatch.setattr(distributed_c10d, "_get_object_coll_device", place_of)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))  # torch's broadcast asks


@contextlib.contextmanager
def quiet(device: Device) -> Iterator[None]:
    """Record nothing within the context, as for a test's own reads."""
    reads, mixed, operators = list(device.reads), list(device.mixed), device.operators.copy()
    yield
    device.reads, device.mixed, device.operators = reads, mixed, operators
