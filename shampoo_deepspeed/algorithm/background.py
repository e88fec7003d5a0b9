"""One background thread, which computes refreshes while the next forward and backward run.

On an accelerator it runs on its own stream. Its results do not depend on timing: its inputs do not change before
it is done, and it reads no process-wide precision switch (see ``precision.independent_of_switches``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.linalg.precision import independent_of_switches
from shampoo_deepspeed.runtime.metrics import RefreshMeter


class Refresh:
    """A refresh of neighbouring rows of a stack, running on the thread.

    Args:
        compute: the function to run there, given a list for condition numbers. The tensors that it reads must not
            change before ``result`` has returned.
        first: the row of the stack that is its row 0.
        device: device of these tensors; on an accelerator the work queued on the current stream is done first.
    """

    def __init__(self, compute: Callable[[list[Tensor]], RefreshResult], first: int, device: torch.device) -> None:
        self.first = first
        self.meter = RefreshMeter()
        self._device = device
        ready = None
        if device.type != "cpu":
            _load_linear_algebra(device)
            ready = torch.Event(device)
            ready.record(torch.accelerator.current_stream(device))
        self._work = partial(_run, compute, self.meter, device, ready)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._future = _executor().submit(self._work, torch.get_num_threads())

    def result(self) -> RefreshResult:
        """Wait until it is done and return the result; every call raises what the thread has raised.

        A forked process has no thread of its parent's, and starts again what was under way there: the tensors are as
        they were. Only the process counts, as even a future that is done may hold its lock at the fork.
        """
        if self._process != os.getpid():
            self._begin()
        result = self._future.result()
        if self._device.type != "cpu":
            for tensor in result.tensors.values():  # their memory belongs to the other stream
                tensor.record_stream(torch.accelerator.current_stream(self._device))
        return result


def _run(
    compute: Callable[[list[Tensor]], RefreshResult],
    meter: RefreshMeter,
    device: torch.device,
    ready: torch.Event | None,
    threads: int,
) -> RefreshResult:
    if torch.get_num_threads() != threads:  # OpenMP keeps this number for each thread
        torch.set_num_threads(threads)
    with torch.no_grad(), independent_of_switches():
        if ready is None:
            with meter.refreshing(device) as conditions:
                return compute(conditions)
        # A new thread starts on the first device. Leaving a stream's context returns to it, which takes memory on CUDA.
        torch.accelerator.set_device_index(device)
        stream = _stream(device)
        with stream:
            stream.wait_event(ready)
            with meter.refreshing(device) as conditions:
                result = compute(conditions)
        stream.synchronize()
        return result


@cache
def _executor() -> ThreadPoolExecutor:
    """The one thread; the interpreter's exit waits for what it has begun."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="shampoo-refresh")


@cache
def _stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


@cache
def _load_linear_algebra(device: torch.device) -> None:
    """Load torch's solvers, which otherwise happens at first use and fails if two threads use them at once."""
    torch.linalg.eigh(torch.eye(2, device=device, dtype=torch.float32))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_executor.cache_clear)  # threads do not survive a fork
