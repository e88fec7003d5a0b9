"""accelerate's FSDP1 checkpoints (its ``save_state`` and the stock Trainer's): Shampoo's state in a folder of theirs.

FSDP1's own optimizer state dict has room for tensors in the shape of parameters only (_optim_utils.py), and nothing
else is called on all ranks between the weights and the file that makes a Trainer's checkpoint complete. But
accelerate's ``save_fsdp_optimizer`` and ``load_fsdp_optimizer`` (utils/fsdp_utils.py, 1.15) ask on all ranks, and their
frames know the folder. So the state is written and read there, and FSDP1's dict carries a note of it.
"""

from __future__ import annotations

from pathlib import Path

from shampoo_deepspeed.checkpoint import load_shampoo, save_shampoo
from shampoo_deepspeed.distributed.collectives import all_gather_objects, job_group
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from ..frames import frame_in_module

FOLDER = "shampoo"
ACCELERATE = "accelerate.utils.fsdp_utils"


def save_to_folder(optimizer: BlockOptimizer) -> bool:
    """Write the state into accelerate's folder if it is saving; call it on all ranks.

    While accelerate loads it asks for a state dict too, as a template, and what is here will be replaced.

    Returns:
        Whether accelerate asks.

    Raises:
        CheckpointError: on all ranks, if one of them cannot write.
    """
    if _folder("load_fsdp_optimizer", "input_dir") is not None:
        return True
    folder = _folder("save_fsdp_optimizer", "output_dir")
    if folder is not None:
        save_shampoo(optimizer, folder)
    return folder is not None


def load_from_folder(optimizer: BlockOptimizer) -> None:
    """Load the state from accelerate's folder if it is loading; call it on all ranks.

    If the folder is missing, the optimizer's next step raises an error.

    Raises:
        CheckpointError: on all ranks, for a save that is incomplete or damaged, or does not fit.
    """
    folder = _folder("load_fsdp_optimizer", "input_dir")
    if folder is not None and any(all_gather_objects(folder.is_dir(), job_group())):
        load_shampoo(optimizer, folder)


def _folder(function: str, argument: str) -> Path | None:
    """Where a function of accelerate that is calling us keeps Shampoo's state."""
    frame = frame_in_module(ACCELERATE, function)
    if frame is None:
        return None
    number = frame.f_locals["optimizer_index"]
    return Path(frame.f_locals[argument]) / (f"{FOLDER}_{number}" if number else FOLDER)
