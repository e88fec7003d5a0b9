"""Which device is current, and where a process group can move tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


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
    accelerator = torch.accelerator.current_accelerator()
    if home.type != "cpu" or accelerator is None or "cpu" in dist.get_backend_config(group):
        return home
    return torch.device(accelerator.type, torch.accelerator.current_device_index())
