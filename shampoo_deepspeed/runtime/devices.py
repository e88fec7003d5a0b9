"""Which device computes, which is current, where a process group can move tensors, and copies to and from the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Accelerators that have all solvers and float64, so that blocks of shards on the CPU are computed there unasked.
ABLE = ("cuda", "xpu")


class Arriving:
    """Values of an accelerator on their way to the CPU. Nothing waits until ``read``.

    Args:
        values: 1-D tensor on an accelerator; it is copied at once, and may change afterwards.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.Event(values.device)
        self._event.record(torch.accelerator.current_stream(values.device))

    @property
    def arrived(self) -> bool:
        """Whether ``read`` would wait for nothing."""
        return self._event.query()

    def read(self) -> list[float]:
        """The values; waits for that copy only, not for what was queued since."""
        self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make this device the thread's current one.

    Torch moves objects between an accelerator's ranks through the current device. In a job that never calls
    ``set_device`` this would be the first device for all ranks.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(device)
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


def communication_device(group: dist.ProcessGroup | None, home: torch.device) -> torch.device:
    """The device for moving tensors of ``home`` in this group: an accelerator's group moves CPU tensors through it."""
    if home.type != "cpu":
        return home
    accelerator = current_accelerator(group)
    return home if accelerator is None or "cpu" in dist.get_backend_config(group) else accelerator


def current_accelerator(group: dist.ProcessGroup | None = None) -> torch.device | None:
    """The accelerator that this process uses, None if it has none; a group that is bound to one knows it best."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    bound = getattr(group, "bound_device_id", None)
    return bound or torch.device(accelerator.type, torch.accelerator.current_device_index())


def device_of_blocks(wanted: str, shards: torch.device, group: dist.ProcessGroup | None) -> torch.device:
    """Where blocks are kept and computed whose shards lie on this device.

    Args:
        wanted: the option ``compute_device``.
        group: the ranks that hold the shards.

    Raises:
        ValueError: for a device that does not exist, or that is neither the shards' nor an accelerator for the CPU's.
    """
    if wanted == "shard":
        return shards
    accelerator = current_accelerator(group) if shards.type == "cpu" else None
    if wanted == "auto":
        return shards if accelerator is None or accelerator.type not in ABLE else accelerator
    named = torch.device(wanted)
    if named.type == shards.type and named.index in (None, shards.index):
        return shards
    if accelerator is None or named.type != accelerator.type:
        raise ValueError(f"auto, shard or {str(shards)!r}, where the shards lie")
    if named.index is None:
        return accelerator
    if named.index >= torch.accelerator.device_count():
        raise ValueError(f"one of the {torch.accelerator.device_count()} devices of type {named.type!r} that there are")
    return named


def has_float64(device: torch.device) -> bool:
    """Whether a device can compute in float64; Apple's cannot, nor can some of Intel's. Nothing is read from it."""
    if device.type in ("cpu", "meta"):
        return True
    try:
        torch.ones((), dtype=torch.float64, device=device).mul_(0.5)
    except (TypeError, RuntimeError) as error:
        if not any(word in str(error) for word in ("float64", "fp64", "double")):
            raise  # such as a lack of memory
        return False
    return True


class Staging:
    """Copies between the CPU and an accelerator through pinned memory, on a stream of their own.

    The CPU waits in ``Copy.arrive`` at most, and only for what goes to it.
    """

    def __init__(self, accelerator: torch.device) -> None:
        self._accelerator = accelerator
        self._stream = torch.Stream(accelerator)

    def begin(self, values: Tensor, work: dist.Work | None = None) -> Copy:
        """Start to copy a contiguous tensor to the other side.

        Args:
            values: a pinned tensor, or one on the accelerator.
            work: the collective that fills it, if one does.
        """
        leaves = values.device.type != "cpu"
        ready, done = torch.Event(self._accelerator), torch.Event(self._accelerator)
        ready.record(torch.accelerator.current_stream(self._accelerator))
        with self._stream:
            if leaves:  # what is pinned is there already, and need not wait for what the device computes now
                self._stream.wait_event(ready)
            if work is not None:
                work.wait()  # only this stream waits
            place = torch.device("cpu") if leaves else self._accelerator
            copied = torch.empty(values.shape, dtype=values.dtype, device=place, pin_memory=leaves)
            copied.copy_(values, non_blocking=True)
            done.record(self._stream)
        return Copy(copied, values, done)


class Copy(NamedTuple):
    """A copy under way; ``source`` must live until it has arrived."""

    values: Tensor
    source: Tensor
    done: torch.Event

    def arrive(self) -> Tensor:
        """The values, for use at once: the CPU waits for its own, the accelerator's current stream for others."""
        if self.values.device.type == "cpu":
            self.done.synchronize()
        else:
            stream = torch.accelerator.current_stream(self.values.device)
            stream.wait_event(self.done)
            self.values.record_stream(stream)
        return self.values
