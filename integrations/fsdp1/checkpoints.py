"""accelerate's FSDP1 checkpoints (its ``save_state`` and the stock Trainer's), with Shampoo's state in a subfolder.

FSDP1's own optimizer state dict can only hold tensors in the shape of parameters (_optim_utils.py). Nothing else is
called on all ranks between the weights and the file that makes a Trainer's checkpoint complete. But accelerate's
``save_fsdp_optimizer`` and ``load_fsdp_optimizer`` (utils/fsdp_utils.py, 1.15) ask for that dict on all ranks, and
their frames hold the folder. So the state is written and read there, and FSDP1's dict only says where it is.
"""

from __future__ import annotations

from pathlib import Path

from shampoo_deepspeed.checkpoint import load_shampoo, save_shampoo
from shampoo_deepspeed.distributed.collectives import first_rank_that, job_group
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

from ..frames import frame_in_module

FOLDER = "shampoo"
ACCELERATE = "accelerate.utils.fsdp_utils"


def save_to_folder(optimizer: BlockOptimizer) -> bool:
    """Write the state into accelerate's folder if accelerate is saving; call it on all ranks.

    accelerate also asks for a state dict when it loads, as a template. Nothing is written then, because the present
    state will be replaced.

    Returns:
        Whether accelerate asks for the state dict.

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
    """Load the state from accelerate's folder if accelerate is loading; call it on all ranks.

    If the folder is missing, the optimizer's next step raises an error.

    Raises:
        CheckpointError: on all ranks, for a save that is incomplete or damaged, or does not fit.
    """
    folder = _folder("load_fsdp_optimizer", "input_dir")
    if folder is not None and first_rank_that(folder.is_dir(), job_group()) is not None:
        load_shampoo(optimizer, folder)


def _folder(function: str, argument: str) -> Path | None:
    """Return Shampoo's folder in that of this function of accelerate, or None if the function is not calling."""
    frame = frame_in_module(ACCELERATE, function)
    if frame is None:
        return None
    number = frame.f_locals["optimizer_index"]
    return Path(frame.f_locals[argument]) / (f"{FOLDER}_{number}" if number else FOLDER)
