"""Errors of a device that a refresh survives: blocks keep what they have, and the failure counts like any other."""

from __future__ import annotations

import torch

# What the messages of solver and product libraries, and of allocators, contain. Torch has no type for them.
SOLVERS = ("cusolver", "cublas", "hipsolver", "hipblas", "rocsolver", "rocblas", "magma", "onemkl", "onednn")
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


def survivable(error: RuntimeError) -> bool:
    """Whether the device can go on after this error: there was no memory, or a library did not solve its task.

    An ``AcceleratorError``, such as an illegal access, spoils all that the device computes later.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.linalg.LinAlgError)):
        return True
    if isinstance(error, getattr(torch, "AcceleratorError", ())):
        return False
    text = str(error).lower()
    return any(name in text for name in (*SOLVERS, *NO_MEMORY))


def free_cached_memory(device: torch.device) -> None:
    """Give the memory that torch caches back to the device, so that pieces of another size fit."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
