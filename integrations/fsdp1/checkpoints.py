"""accelerate's FSDP1 checkpoints (its ``save_state`` and the stock Trainer's): Shampoo's state in a folder beside them.

FSDP1's own optimizer state dict has room for tensors in the shape of parameters only (_optim_utils.py), and nobody else
is called on all ranks between the weights and the file that makes a Trainer's checkpoint complete. But accelerate's
``save_fsdp_optimizer`` and ``load_fsdp_optimizer`` (utils/fsdp_utils.py, 1.15) ask on all ranks, and their frames know
the folder. So the state is written and read there, and FSDP1's dict carries a note that it is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from shampoo_deepspeed.checkpoint import load_shampoo, save_shampoo
from shampoo_deepspeed.distributed.process_groups import cpu_group
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

FOLDER = "shampoo"
ACCELERATE = "accelerate.utils.fsdp_utils"
NEAR = 24  # frames


def save_beside(optimizer: BlockOptimizer) -> bool:
    """Write the state where accelerate is saving, if it is; call it on all ranks.

    While accelerate loads it asks for a state dict too, as a template, and what is here will be replaced.

    Returns:
        Whether accelerate asks.

    Raises:
        CheckpointError: on all ranks, where one of them cannot write.
    """
    if _folder("load_fsdp_optimizer", "input_dir") is not None:
        return True
    folder = _folder("save_fsdp_optimizer", "output_dir")
    if folder is not None:
        save_shampoo(optimizer, folder)
    return folder is not None


def load_beside(optimizer: BlockOptimizer) -> None:
    """Load what a state dict says is beside it, where accelerate is loading; call it on all ranks.

    Where the folder is not there the optimizer goes on waiting for it, and its next step says so.

    Raises:
        CheckpointError: on all ranks, for a save that is incomplete or damaged, or does not fit.
    """
    folder = _folder("load_fsdp_optimizer", "input_dir")
    if folder is not None and _anyone_sees(folder):
        load_shampoo(optimizer, folder)


def _folder(function: str, argument: str) -> Path | None:
    """Where a function of accelerate that is calling us keeps Shampoo's state."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(NEAR):
        if frame is None:
            return None
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == ACCELERATE:
            number = frame.f_locals["optimizer_index"]
            return Path(frame.f_locals[argument]) / (f"{FOLDER}_{number}" if number else FOLDER)
        frame = frame.f_back
    return None


def _anyone_sees(folder: Path) -> bool:
    """Whether it is there on any rank, so that all do the same. A collective."""
    world = dist.group.WORLD
    if world is None:
        return folder.is_dir()
    words: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(words, folder.is_dir(), group=cpu_group(world))
    return any(words)
