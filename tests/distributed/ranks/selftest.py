"""Checks that fail in every way that the launcher must survive."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def add_up(value: int) -> int:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return int(total.item())


def fail_everywhere(_: object) -> None:
    raise ValueError("wrong on every rank")


def fail_on_rank_one(_: object) -> None:
    if dist.get_rank() == 1:
        raise ValueError("wrong on rank one only")
    dist.all_reduce(torch.ones(1))


def fail_late_on_rank_one(_: object) -> None:
    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 1:
        raise ValueError("wrong on rank one, and no one waits")


def hang_on_rank_one(_: object) -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def die_on_rank_one(_: object) -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))
