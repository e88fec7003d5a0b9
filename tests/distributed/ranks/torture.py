"""What two ranks do in the torture of checkpoints: save as they divide the blocks, or meet a fault of the disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shampoo_deepspeed import save_shampoo
from tests.distributed.ranks.folders import shared_folder
from tests.support.stepping import drive
from tests.torture.disk import Trial, faults
from tests.torture.figures import KINDS, Figures
from tests.torture.small_runs import STEPS, made


def save(folder: str) -> None:
    """Save a run, the same run later, and one of another model."""
    params, optimizer = made(STEPS, dist.group.WORLD)
    save_shampoo(optimizer, Path(folder) / "saved")
    drive(optimizer, params, range(STEPS, STEPS + 2))
    save_shampoo(optimizer, Path(folder) / "other")
    foreign, optimizer = made(group=dist.group.WORLD)
    drive(optimizer, foreign[1:], range(2))
    save_shampoo(optimizer, Path(folder) / "foreign")


def disk(argument: tuple[str, int]) -> dict[str, Any]:
    """Every n-th fault of the disk of either rank, in saves of both kinds; returns what was tried and is at fault."""
    folder, every = argument
    if not folder:
        with shared_folder() as made_here:
            return disk((str(made_here), every))
    logging.getLogger("shampoo_deepspeed").setLevel(logging.CRITICAL)
    rank, figures = dist.get_rank(), Figures()
    trial = Trial(Path(folder), dist.group.WORLD)
    heard: list[tuple[str, str]] = []
    for asynchronous in (False, True):
        for hit in range(2):
            calls = shared(trial.calls(True, asynchronous, first=rank == 0))[hit]
            for number, fault in enumerate(faults(calls)):
                if number % every:
                    continue
                trial.prepare(True, first=rank == 0)
                said = trial.outcome(fault if rank == hit else None, asynchronous)
                there = trial.what_is_there(said[0], True)
                both = {how for how, _ in shared(said)}
                alike = ("", "") if len(both) == 1 else ("losses", f"the ranks say {sorted(both)}")
                after = trial.next_save()
                for how, text in (said, there, alike, after):
                    if how in KINDS:
                        heard.append((how, f"{fault.name} of rank {hit}, {asynchronous=}, rank {rank}: {text}"))
                figures.tried += 1
                figures.seen[f"on two ranks {said[0]} and {there[0]}"] += 1
    return {"tried": figures.tried, "seen": dict(figures.seen), "faults": heard}


def shared(value: Any) -> list[Any]:
    """What each rank has."""
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found
