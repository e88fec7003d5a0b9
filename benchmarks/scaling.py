"""Measures CPU time of a step on 1, 2 and 4 ranks, and time and balance of the plan on 8 to 1,024 ranks.

    python -m benchmarks.scaling [--ranks 1 2 4] [--frameworks fsdp2 ddp] [--plot docs/plan_time.png]

Steps are those of the small GPT with staggered refreshes. A rank's number is the CPU time of its step, without the time
that it waits. Bytes moved are compared with the plan's. Plans are the planner's, for Llama-3 shapes under FSDP2. The
planner computes every rank's part; in a run, each rank computes only its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from benchmarks.gpt import Size, batch, build
from benchmarks.ranks import run_on_ranks
from benchmarks.report import figure, machine, mean, table
from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.estimate import estimate
from shampoo_deepspeed.estimate.model_shapes import parameters_of
from shampoo_deepspeed.options.config import ShampooConfig

FRAMEWORKS = ("fsdp2", "ddp")
MODELS = ("llama-3-8b", "llama-3-70b")
FREQUENCY = 10


class Rank(NamedTuple):
    """One rank's CPU seconds of each step, its load in the plan, and moved and planned bytes of a step."""

    seconds: list[float]
    load: float
    moved: int
    planned: int


def train(framework: str, width: int, block: int, rounds: int) -> Rank:
    """Train on one rank and measure it."""
    size = Size(width=width)
    model: nn.Module = build(size)
    options: dict[str, Any] = {"refresh": "staggered", "precondition_frequency": FREQUENCY}
    if framework == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for layer in cast(nn.ModuleList, model.layers):
            fully_shard(layer)
        fully_shard(model)
    optimizer = Shampoo(
        model.named_parameters(), model=model, lr=1e-3, max_preconditioner_dim=block, bucket_mb=1.0, **options
    )
    seconds = []
    for step in range((2 + rounds) * FREQUENCY):
        model.zero_grad()
        model(batch(size, 256, step * dist.get_world_size() + dist.get_rank())).backward()
        dist.barrier()
        begin = time.process_time()
        optimizer.step()
        if step >= 2 * FREQUENCY:
            seconds.append(time.process_time() - begin)
    stats = optimizer.comm_stats()
    load = sum(unit.plan.loads[unit.rank] for unit in optimizer.units)
    moved, planned = (stats[f"{p}bytes_sent"] + stats[f"{p}bytes_received"] for p in ("", "planned_"))
    return Rank(seconds, load, moved, planned)


def step_rows(
    frameworks: Sequence[str], counts: Sequence[int], width: int, block: int, rounds: int
) -> list[list[object]]:
    out: list[list[object]] = []
    for framework in frameworks:
        alone: float | None = None
        for count in counts:
            ranks: list[Rank] = run_on_ranks(count, train, framework, width, block, rounds)
            means = [mean(rank.seconds, FREQUENCY) for rank in ranks]
            alone = max(means) if alone is None else alone
            loads = [rank.load for rank in ranks]
            out.append(
                [
                    f"{framework}, {count} rank{'s' if count > 1 else ''}",
                    1e3 * max(means),
                    max(means) / alone,
                    max(means) / statistics.fmean(means),
                    f"{max(loads) / statistics.fmean(loads):.3f}",
                    max(rank.moved for rank in ranks) / 2**20,
                    "equal" if all(rank.moved == rank.planned for rank in ranks) else "DIFFERENT",
                ]
            )
    return out


def plan_rows(models: Sequence[str], counts: Sequence[int]) -> list[list[object]]:
    """Return model, ranks and, for both refresh modes, CPU seconds of the plan and the slowest load over the mean."""
    out: list[list[object]] = []
    for model in models:
        parameters = parameters_of(model)
        for count in counts:
            row: list[object] = [model, count]
            for refresh in ("sync", "staggered"):
                begin = time.process_time()
                made = estimate(parameters, count, "fsdp2", ShampooConfig.from_options({"refresh": refresh}))
                row += [time.process_time() - begin, f"{made.imbalance:.3f}"]
            out.append(row)
    return out


def draw(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Plot seconds of a plan against ranks."""
    made, (panel,) = figure(path)
    for model in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == model]
        for column, refresh, style in ((2, "sync", "-"), (4, "staggered", "--")):
            panel.plot([r[1] for r in own], [r[column] for r in own], style, marker="o", label=f"{model}, {refresh}")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("ranks (FSDP2)")
    panel.set_ylabel("CPU seconds of a plan for all ranks")
    panel.legend(frameon=False)
    made.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4], help="rank counts of the measured steps")
    parser.add_argument("--frameworks", nargs="+", default=list(FRAMEWORKS), choices=FRAMEWORKS)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="number of windows of steps to measure")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--plan-ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"\nscaling; {machine()}\nwidth {args.width}, block {args.block}, staggered, frequency {FREQUENCY}\n")
    if args.ranks:
        heads = ["framework", "slowest rank's CPU ms a step", "over 1 rank's", "slowest / mean", "in the plan"]
        heads += ["MiB moved by a rank", "and planned"]
        print(table(heads, step_rows(args.frameworks, args.ranks, args.width, args.block, args.rounds)), flush=True)
    rows = plan_rows(args.models, args.plan_ranks)
    heads = ["model", "ranks", "sync: plan CPU s", "slowest / mean", "staggered: plan CPU s", "slowest / mean"]
    print(f"\n{table(heads, rows)}")
    if args.plot:
        draw(args.plot, rows)
        print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
