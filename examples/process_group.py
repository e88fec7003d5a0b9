"""Joins this process to the others that torchrun started, for the plain torch loops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def process_group(use_cpu: bool) -> Iterator[tuple[torch.device, int, int]]:
    """This rank's device, its rank and the number of ranks; the process group lasts as long as the context."""
    if "RANK" not in os.environ:
        raise SystemExit("start with a launcher, on one device too: torchrun --nproc_per_node 1 ...")
    device = torch.device("cpu")
    accelerator = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(dist.get_default_backend_for_device(device))
    try:
        yield device, dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def mean_over_ranks(loss: torch.Tensor, ranks: int) -> float:
    """The loss of the global batch; every rank must call it."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / ranks
