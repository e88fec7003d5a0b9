"""The small optimizer that the torture of checkpoints saves and loads, and how a load ends."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of
from tests.torture.figures import Hang, at_most

STEPS = 3
SECONDS = 20.0  # within which each load and each save must end
NAMES = ("w", "v", "b")


def made(steps: int = 0, group: dist.ProcessGroup | None = None) -> tuple[list[nn.Parameter], Shampoo]:
    """Two matrices, the larger of two blocks, and a vector, with every kind of stored tensor."""
    params = [parameter(8, 6), parameter(12, 6, seed=1), parameter(6, seed=2)]
    named = list(zip(NAMES, params, strict=True))
    optimizer = shampoo(named, momentum=0.9, **({} if group is None else {"process_group": group}))
    drive(optimizer, params, range(steps))
    return params, optimizer


def fresh(path: Path, group: dist.ProcessGroup | None = None) -> tuple[list[nn.Parameter], Shampoo]:
    """A new optimizer that has loaded a checkpoint."""
    params, optimizer = made(group=group)
    load_shampoo(optimizer, path)
    return params, optimizer


def stepped(params: list[nn.Parameter], optimizer: Shampoo) -> list[Any]:
    """Weights and state after one more step."""
    drive(optimizer, params, range(STEPS, STEPS + 1))
    if dist.is_initialized():
        optimizer.consolidate_state_dict()
    return [snapshot(params), state_of(optimizer)]


def resumed(path: Path, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Weights and state of a new optimizer after a load and a step."""
    return stepped(*fresh(path, group))


def ending(action: Callable[[], Any], expected: Iterable[Any], words: Iterable[str]) -> tuple[str, str]:
    """How something ends that gives the expected result or raises a CheckpointError; what it says.

    Returns:
        "equal" or "error", or of `figures.KINDS` the fault.
    """
    try:
        with at_most(SECONDS):
            result = action()
    except CheckpointError as error:
        text = str(error)
        if not any(word in text for word in words) or any(not c.isprintable() for c in text.replace("\n", "")):
            return "others", f"names no file and no field: {text!r}"
        return "error", text
    except Hang:
        return "hangs", "no end in time"
    except BaseException:
        return "bare", traceback.format_exc()
    for name in expected:
        if same_bits(result, name):
            return "equal", ""
    return "silent", "other weights or state, and no error"
