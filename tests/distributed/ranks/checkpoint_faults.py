"""Faults of one rank's file system or memory while all ranks save or load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.save import share_of
from shampoo_deepspeed.state.block_codec import AS_IN_MEMORY
from tests.distributed.ranks.folders import shared_folder
from tests.support.stepping import drive, parameter, shampoo

SAVING = {
    "prepare": "shampoo_deepspeed.checkpoint.save.share_of",
    "data": "os.pwrite",
    "sync": "os.fsync",
}
# Faults of the first rank, whose answer the others wait for.
FIRST = {
    "folder": "shampoo_deepspeed.checkpoint.save.uuid.uuid4",
    "commit": "shampoo_deepspeed.checkpoint.save._complete",
    "lock": "shampoo_deepspeed.checkpoint.save.FolderLock.acquire",
    "clearing": "pathlib.Path.is_file",
}
LOADING = {
    "manifest": "shampoo_deepspeed.checkpoint.manifest._content",
    "damage": "shampoo_deepspeed.checkpoint.tensor_files.TensorFiles.verify",
}


def broken(*_: Any) -> None:
    """Raise an error like those of a file system."""
    raise OSError(5, "Input/output error")


def wrong(*_: Any) -> None:
    """Raise an error that no file system raises."""
    raise ValueError("Input/output error of another kind")


def raised_by(call: Callable[[], Any], place: str, rank: int = 1, how: Callable[..., None] = broken) -> str:
    """Return the error that this rank gets from a call in which a function fails on one rank."""
    try:
        if dist.get_rank() == rank:
            with patch(place, how):
                call()
        else:
            call()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def faults(_: None) -> dict[str, Any]:
    """Return this rank's error for each fault, and the steps in the checkpoint that exists in the end."""
    params = [parameter(8, 6), parameter(8, 6, seed=1)]
    named = [("a", params[0]), ("b", params[1])]
    optimizer = shampoo(named, process_group=dist.group.WORLD)
    heard: dict[str, Any] = {}
    with shared_folder() as folder:
        drive(optimizer, params, range(1))
        save_shampoo(optimizer, folder)
        drive(optimizer, params, range(1, 2))
        for name, place in SAVING.items():
            heard[name] = raised_by(lambda: save_shampoo(optimizer, folder), place)
            heard[f"{name} in the background"] = raised_by(lambda: in_the_background(optimizer, folder), place)
        heard["wrong"] = raised_by(lambda: save_shampoo(optimizer, folder), SAVING["prepare"], how=wrong)
        for name, place in FIRST.items():
            heard[name] = raised_by(lambda: save_shampoo(optimizer, folder), place, rank=0)
        for name, place in LOADING.items():
            heard[name] = raised_by(lambda: load_shampoo(optimizer, folder), place)
        heard["parameters"] = len(share_of(optimizer, AS_IN_MEMORY).parameters)
        heard["loaded"] = load_shampoo(optimizer, folder).loaded
        drive(optimizer, params, range(2, 3))
        save_shampoo(optimizer, folder)
        heard["left"] = len(list(folder.iterdir()))
    return heard | {"steps": optimizer.units[0].steps}


def in_the_background(optimizer: Shampoo, folder: Path) -> None:
    """Save in the background; the failure is raised by the future, and again by the next call."""
    future = save_shampoo(optimizer, folder, asynchronous=True)
    try:
        future.result()
    except CheckpointError:
        load_shampoo(optimizer, folder)  # raises it
        raise AssertionError("what failed was not raised") from None
