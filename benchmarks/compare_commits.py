"""Checks that two versions of this package train to the same bits, and compares their CPU times.

    python benchmarks/compare_commits.py BEFORE AFTER

BEFORE and AFTER are the Python interpreters of two virtual environments, in each of which one version is installed.
Every framework (a single process, DDP, FSDP2, ZeRO 1, 2 and 3 on two ranks) trains with every preconditioner and every
refresh mode. The script uses only the public interface, so it runs with both versions. It prints one line per run with
the ratio of the CPU times of a step. It ends with status 1 if any parameter of any run differs in any bit.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RANKS = {"plain": 1, "ddp": 2, "fsdp2": 2, "zero1": 2, "zero2": 2, "zero3": 2}
RULES = list(product(("shampoo", "soap", "kl_shampoo"), ("sync", "staggered", "background")))
STEPS, MICRO_BATCH = 14, 4
OPTIONS: dict[str, Any] = {"lr": 3e-3, "precondition_frequency": 3, "max_preconditioner_dim": 24, "weight_decay": 0.1}


class Model(nn.Module):
    """Matrices of odd and even sizes that are cut into blocks, an embedding, norms and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 40)
        self.up = nn.Linear(40, 57)
        self.norm = nn.LayerNorm(57)
        self.down = nn.Linear(57, 40, bias=False)
        self.mix = nn.Conv1d(4, 6, 3, padding=1)
        self.lm_head = nn.Linear(40, 31)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.down(torch.tanh(self.norm(self.up(hidden))))
        hidden = hidden + self.mix(hidden.unflatten(-1, (4, 10)).flatten(0, 1)).mean(1, keepdim=True).mean()
        return nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), targets.flatten())


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return a rank's input tokens in a step, and the target tokens that follow them."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    text = torch.randint(31, (MICRO_BATCH, 9), generator=generator)
    return text[:, :-1], text[:, 1:]


def trained(framework: str, preconditioner: str, refresh: str, rank: int) -> tuple[dict[str, Tensor], float]:
    """Train, and return the final parameters and the CPU seconds of the optimizer's later steps."""
    import shampoo_deepspeed  # registers the optimizer

    torch.manual_seed(0)
    model: Any = Model()
    options = {**OPTIONS, "preconditioner": preconditioner, "refresh": refresh}
    if preconditioner == "soap":  # the basis of a rank-deficient factor matrix is not unique
        options["start_preconditioning_step"] = 6
    if framework.startswith("zero"):
        return with_deepspeed(model, framework, options, rank)
    if framework == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if framework == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    optimizer = shampoo_deepspeed.Shampoo(model.named_parameters(), model=model, **options)
    seconds = 0.0
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*batch(step, rank)).backward()
        begin = time.process_time()
        optimizer.step()
        seconds += time.process_time() - begin if step else 0.0
    found = {}
    for name, p in model.named_parameters():
        found[name.removeprefix("module.")] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    return found, seconds


def with_deepspeed(model: nn.Module, stage: str, options: dict[str, Any], rank: int) -> tuple[dict[str, Tensor], float]:
    """Do the same with a DeepSpeed engine and a JSON."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # DeepSpeed would compile it for a minute
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "Shampoo", "params": options},
        "zero_optimization": {"stage": int(stage[-1])},
    }
    linear = nn.functional.linear
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    seconds = 0.0
    for step in range(STEPS):
        engine.backward(engine(*batch(step, rank)))
        begin = time.process_time()
        engine.step()
        seconds += time.process_time() - begin if step else 0.0
    named = dict(engine.module.named_parameters())
    sharded = [p for p in named.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext():
        found = {name: p.detach().clone() for name, p in named.items()}
    engine.destroy()
    nn.functional.linear = linear  # undo ZeRO-3's replacement
    return found, seconds


def work(framework: str, rank: int, out: str) -> None:
    """Run one rank: all trainings under one framework."""
    torch.set_num_threads(1)
    if RANKS[framework] > 1:
        torch.distributed.init_process_group("gloo")
    found = {}
    for rule in RULES:
        found[rule] = trained(framework, *rule, rank)
    if rank == 0:
        torch.save(found, out)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run(python: str, framework: str, folder: Path) -> dict[tuple[str, str], tuple[dict[str, Tensor], float]]:
    """Return the results of all trainings under one framework, with the version of an interpreter."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(RANKS[framework])}
    out = str(folder / f"{framework}.pt")
    command = [python, os.path.abspath(__file__), "--worker", framework, "--out", out]
    ranks = []
    for rank in range(RANKS[framework]):
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([*command, "--rank", str(rank)], env=own, cwd=folder))
    if any([process.wait() for process in ranks]):
        raise RuntimeError(f"{framework}: a rank of {python} has failed")
    found: dict[tuple[str, str], tuple[dict[str, Tensor], float]] = torch.load(out)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interpreters", nargs="*", metavar="PYTHON", help="of the version before, and of that after")
    parser.add_argument("--frameworks", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.rank, given.out)
        return 0
    if len(given.interpreters) != 2:
        parser.error("two interpreters are needed")
    different = compared = 0
    with tempfile.TemporaryDirectory() as folder:
        for framework in given.frameworks:
            before, after = (run(python, framework, Path(folder)) for python in given.interpreters)
            for rule in RULES:
                (old, old_seconds), (new, new_seconds) = before[rule], after[rule]
                wrong = [name for name in old if not torch.equal(old[name], new[name])]
                compared, different = compared + 1, different + bool(wrong)
                result = f"DIFFERS in {', '.join(wrong)}" if wrong else f"equal in all {len(old)} parameters"
                print(f"{framework} {' '.join(rule)}: {result}; CPU time of steps {new_seconds / old_seconds:.2f}")
    print(f"{compared - different} of {compared} runs are equal to the bit")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
