"""A simulated device: tensors that say `cuda:0` and compute on the CPU, and a record of each read by the CPU.

With it, the code for accelerators runs on machines without one, so tests can find mixtures of devices and waits for the
device. It has no streams: work that is put on a stream runs at once.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shampoo_deepspeed.algorithm import background as worker
from shampoo_deepspeed.engine import agreement
from shampoo_deepspeed.runtime import metrics

DEVICE = torch.device("cuda", 0)
PACKAGE = ("/shampoo_deepspeed/", "/integrations/")
# Functions that bring a value to the CPU, or make the CPU wait for a shape.
READS = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero", "masked_select",
    "unique", "equal",
}  # fmt: skip
MOVES = {"copy_", "to", "__setitem__", "_foreach_copy_", "set_"}  # may have tensors of two devices
TO_HOST = {"cpu", "numpy", "tolist", "item"}


class Device:
    """A record of reads by the CPU, and of operations on tensors of two devices."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.mixed: list[str] = []


class OnDevice(Tensor):
    """A tensor of the device; its values are in the CPU's memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def record_stream(self, stream: Any) -> None:
        """Do nothing: there are no streams."""


class Mode(TorchFunctionMode):
    """A context in which tensors that are created for the device are on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_NOTED = Device()


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    with torch._C.DisableTorchFunctionSubclass():
        if func == Tensor.device.__get__ and isinstance(args[0], OnDevice):
            return DEVICE
        if func in (Tensor.grad.__set__, Tensor.grad.__get__, Tensor.data.__set__):  # type: ignore[attr-defined, union-attr]
            return func(*args)
        tensors = list(_tensors((args, kwargs)))
        asked = _asked_for(name, args, kwargs)
        home = any(isinstance(t, OnDevice) for t in tensors)
        _note(name, args, tensors, home, asked)
        given = [torch.device("cpu") if isinstance(a, torch.device) else a for a in args]
        named = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
        out = func(*given, **named)
    ends_there = (asked == "cuda" or (asked is None and home)) and name not in TO_HOST
    return _marked(out) if ends_there else out


def _asked_for(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the type of the device that a call names, if it names one."""
    devices = [a for a in (*args, kwargs.get("device")) if isinstance(a, (torch.device, str))]
    devices = [d for d in devices if not isinstance(d, str) or d.partition(":")[0] in ("cpu", "cuda")]
    if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
        return "cuda" if isinstance(args[1], OnDevice) else "cpu"
    return torch.device(devices[0]).type if devices else None


def _note(name: str, args: tuple[Any, ...], tensors: list[Tensor], home: bool, asked: str | None) -> None:
    others = [t for t in tensors if not isinstance(t, OnDevice)]
    if home and others and name not in MOVES and any(t.ndim for t in others):
        _NOTED.mixed.append(f"{name} {_where()}")
    picks = args[1] if name in ("__getitem__", "__setitem__") and len(args) > 1 else ()
    waits = any(isinstance(i, list) or _is_mask(i) for i in (picks if isinstance(picks, tuple) else (picks,)))
    between = name in ("copy_", "__setitem__", "_foreach_copy_") and others
    left = name == "to" and asked == "cpu"
    if home and (name in READS or waits or between or left):
        _NOTED.reads.append(f"{name} {_where()}")


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.bool


def _where() -> str:
    """Return the line of the package that is running."""
    ours = [f for f in traceback.extract_stack() if any(part in f.filename for part in PACKAGE)]
    return f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "outside the package"


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for item in found:
            yield from _tensors(item)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))


def _marked(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out if isinstance(out, OnDevice) else out.as_subclass(OnDevice)
    if isinstance(out, tuple):
        marked: Iterable[Any] = [_marked(item) for item in out]
        named = hasattr(out, "_fields") or type(out).__module__ == "torch.return_types"
        return type(out)(marked) if not hasattr(out, "_fields") else type(out)(*marked) if named else tuple(marked)
    return [_marked(item) for item in out] if isinstance(out, list) else out


class _StepFlags:
    """Like `StepFlags`, whose copy to the CPU does not delay the step."""

    def __init__(self, flags: Tensor) -> None:
        self._flags = flags.clone()

    def read(self) -> list[float]:
        with torch._C.DisableTorchFunctionSubclass():
            values: list[float] = self._flags.as_subclass(Tensor).tolist()
        return values


class _Stream(contextlib.AbstractContextManager["_Stream"]):
    def __init__(self, *_: Any) -> None:
        self.wait_event = self.synchronize = lambda *_: None

    def __exit__(self, *_: object) -> None:
        return None


def simulate(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Simulate the device within `Mode()` from now on, and return its record."""
    run = worker._run

    def in_mode(*arguments: Any) -> Any:  # a mode applies to one thread only
        with Mode() if arguments[3] is not None else contextlib.nullcontext():
            return run(*arguments)

    def event(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(record=lambda *_: None, synchronize=lambda: None, query=lambda: True)

    monkeypatch.setattr(worker, "_run", in_mode)
    monkeypatch.setattr(worker, "_stream", _Stream)
    monkeypatch.setattr(agreement, "StepFlags", _StepFlags)
    monkeypatch.setattr(metrics.Stopwatch, "span", lambda self, device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(torch.accelerator, "current_stream", _Stream)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: None)
    # On a machine with a real device, its initialisation must run again afterwards.
    monkeypatch.setattr(worker, "_load_linear_algebra", worker._load_linear_algebra.__wrapped__)
    _NOTED.__init__()  # type: ignore[misc]
    return _NOTED
