"""Seconds and bytes of a checkpoint: saving, saving in the background, and loading, on any number of ranks.

    python -m benchmarks.checkpoints [--state-gb 1] [--rounds 3] [--folder DIR]
    torchrun --nproc-per-node 2 -m benchmarks.checkpoints

"held up" is how long a save in the background keeps the caller, and "copy" how long copying the state in memory takes.
A load is `load_shampoo`, which checks the files, and the first step of a new process, less another new process's first
step. "again" is a load into an optimizer that has state, and what its next step takes longer.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.ranks import free_port
from benchmarks.report import machine, table
from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo

WIDTH, BLOCK = 1024, 256
OPTIONS: dict[str, Any] = {
    "preconditioner": "shampoo",
    "max_preconditioner_dim": BLOCK,
    "start_preconditioning_step": 10**6,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-gb", type=float, default=1.0, help="state of all ranks together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    parser.add_argument("--new", choices=("load", "step"), help="only a first step, with a load or without")
    given = parser.parse_args(arguments)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if given.new:
        print(first_step(given.state_gb, Path(given.folder) if given.new == "load" else None))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    made = [given.folder or tempfile.mkdtemp(prefix="shampoo-checkpoints-")]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    folder = Path(made[0])
    rows = measured(given.state_gb, given.rounds, folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        print(machine())
        print(table(("what", "median"), rows))
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(state_gb: float, rounds: int, folder: Path) -> list[tuple[str, str]]:
    """The rows of the table."""
    path = folder / "saved"
    medians = in_one_process(state_gb, rounds, path, folder / "background")
    new = {what: [in_new_process(what, state_gb, path) for _ in range(rounds)] for what in ("load", "step")}
    medians["load"] = statistics.median(new["load"]) - statistics.median(new["step"])
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return [*((name, f"{found:.3f} s") for name, found in medians.items()), ("bytes", f"{nbytes:,}")]


def in_one_process(state_gb: float, rounds: int, path: Path, background: Path) -> dict[str, float]:
    """Median seconds of what is done again and again, by name."""
    torch.manual_seed(0)
    params, optimizer = build(state_gb)
    step(params, optimizer)
    times: dict[str, list[float]] = {}
    futures = []

    def save_in_the_background() -> None:
        futures.append(save_shampoo(optimizer, background, asynchronous=True))

    for number in range(rounds):
        times.setdefault("step", []).append(timed(lambda: step(params, optimizer)))
        times.setdefault("save", []).append(timed(lambda: save_shampoo(optimizer, path)))
        times.setdefault("save in the background, held up", []).append(timed(save_in_the_background))
        futures[-1].result()
        times.setdefault("copy", []).append(timed(lambda: copied(optimizer)))
        times.setdefault("load again", []).append(timed(lambda: load_shampoo(optimizer, path)))
        times["load again"][number] += timed(lambda: step(params, optimizer)) - times["step"][number]
    return {name: statistics.median(found) for name, found in times.items()}


def in_new_process(what: str, state_gb: float, path: Path) -> float:
    """Seconds of a first step in a new process of each rank."""
    given = ["--new", what, "--state-gb", str(state_gb), "--folder", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    if dist.is_initialized():
        found = [free_port()]  # of the first rank, whose process listens on it
        dist.broadcast_object_list(found)
        environment["MASTER_PORT"] = str(found[0])
    command = [sys.executable, "-m", "benchmarks.checkpoints", *given]
    text = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(text.split()[-1])


def first_step(state_gb: float, path: Path | None) -> float:
    """Seconds of a first step, and of the load before it if a checkpoint is given."""
    torch.manual_seed(0)
    params, optimizer = build(state_gb)

    def first() -> None:
        if path is not None:
            load_shampoo(optimizer, path)
        step(params, optimizer)

    return timed(first)


def build(state_gb: float) -> tuple[list[nn.Parameter], Shampoo]:
    """Parameters of 1024 x 1024 with this much state together, and their optimizer."""
    count = max(1, round(state_gb * 1e9 / state_bytes(1)))
    params = [nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(count)]
    group = dist.group.WORLD if dist.is_initialized() else None
    named = [(f"layers.{number}.weight", p) for number, p in enumerate(params)]
    return params, Shampoo(named, process_group=group, **OPTIONS)


def state_bytes(count: int) -> int:
    """Bytes of the state of this many parameters."""
    params = [nn.Parameter(torch.zeros(WIDTH, WIDTH)) for _ in range(count)]
    optimizer = Shampoo([(str(n), p) for n, p in enumerate(params)], **OPTIONS)
    step(params, optimizer)
    return sum(t.nbytes for unit in optimizer.units for stack in unit.stacks for t in stack.tensors.values())


def step(params: Sequence[nn.Parameter], optimizer: Shampoo) -> None:
    """One step with constant gradients."""
    for p in params:
        p.grad = torch.full_like(p, 1e-2)
    optimizer.step()


def copied(optimizer: Shampoo) -> object:
    """A copy of this rank's blocks in memory."""
    return [t.clone() for unit in optimizer.units for stack in unit.stacks for t in stack.tensors.values()]


def timed(work: Callable[[], object]) -> float:
    """Seconds of the slowest rank, which all ranks begin together."""
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


if __name__ == "__main__":
    main()
