"""What a rank does in the checks of asynchronous saves: runs several jobs in one process, each with its own groups."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import TestCase
from unittest.mock import patch

import torch.distributed as dist
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo, wait_for_saves
from shampoo_deepspeed.checkpoint.save import write_checkpoint
from shampoo_deepspeed.distributed import process_groups
from shampoo_deepspeed.distributed.process_groups import timeout_of
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot

SAVED, END = 3, 6
WAIT = timedelta(seconds=60)  # for other ranks


def jobs(folder: Path) -> dict[str, Any]:
    """Run a job that saves, one that continues from there and saves again, and one that ends while a thread writes."""
    ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # the launch's own
    seen: dict[str, Any] = {}
    with job(folder, "first", ranks):
        params, optimizer = made()
        drive(optimizer, params, range(SAVED))
        seen["complete"] = [saved_meanwhile(params, optimizer, folder / "first")]
        of_first = [weakref.ref(group) for group in made_groups()]
    gc.collect()
    seen["left"] = sum(group() is not None for group in of_first)
    with job(folder, "second", ranks):
        again, other = made()
        drive(other, again, range(SAVED))
        load_shampoo(other, folder / "first")
        seen["complete"].append(saved_meanwhile(again, other, folder / "second"))
        seen["same"] = same_bits(snapshot(params), snapshot(again))
        seen["groups"] = len(process_groups._jobs)
        for group in made_groups():
            dist.barrier(group)  # they are this job's
        seen["timeouts"] = [timeout_of(group) for group in made_groups()]
    with TestCase().assertLogs("shampoo_deepspeed", "ERROR") as log:
        seen["raised"] = ended_too_early(folder, ranks)
    seen["log"] = log.output
    begin(folder, "launch", ranks)
    return seen


def made_groups() -> list[Any]:
    """The groups that the package has made in this job, of each kind."""
    return [process_groups.thread_group(), process_groups.group_of_ranks(range(dist.get_world_size()))]


def saved_meanwhile(params: list[nn.Parameter], optimizer: Shampoo, path: Path) -> bool:
    """Save while training continues; return whether the checkpoint is complete after waiting for all saves."""
    future = save_shampoo(optimizer, path, asynchronous=True)
    drive(optimizer, params, range(SAVED, END))
    wait_for_saves()
    return future.done() and (path / "manifest.json").is_file()


def ended_too_early(folder: Path, ranks: tuple[int, int]) -> str:
    """Return the error of `wait_for_saves` if the process group is destroyed before the thread writes."""
    may_write = threading.Event()

    def held(*arguments: Any) -> None:
        may_write.wait()
        write_checkpoint(*arguments)

    with patch("shampoo_deepspeed.checkpoint.save.write_checkpoint", held):
        with job(folder, "third", ranks):
            params, optimizer = made()
            drive(optimizer, params, range(1))
            save_shampoo(optimizer, folder / "third", asynchronous=True)
        may_write.set()
        try:
            wait_for_saves()
        except CheckpointError as error:
            wait_for_saves()  # what was raised is not raised again
            return str(error)
    return "nothing"


def made() -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(16, 12), parameter(8, 6, seed=1), parameter(6)]
    return params, shampoo(list(zip("abc", params, strict=True)), process_group=dist.group.WORLD)


@contextmanager
def job(folder: Path, name: str, ranks: tuple[int, int]) -> Iterator[None]:
    begin(folder, name, ranks)
    yield
    dist.destroy_process_group()


def begin(folder: Path, name: str, ranks: tuple[int, int]) -> None:
    rank, size = ranks
    method = f"file://{folder}/{name}.store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=WAIT)
