"""Measures the time of an optimizer step on the small GPT: mean, median and slowest, and the ratio to torch AdamW's.

    python -m benchmarks.step_time [--preconditioner shampoo soap kl_shampoo] [--refresh sync staggered]
        [--formats full packed adamw half]

All optimizers get the same gradients, those of a model that AdamW trains on 512 tokens a step. They step one after
another, and each round starts with the next one, so that disturbances of the machine affect all alike. Times are CPU
times on a CPU, because machines are shared; on an accelerator they are times between two synchronisations. A window is
the number of steps between two refreshes of one block. "Slowest" is the slowest step of a window, and each number is
the median over the windows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from benchmarks.contestants import FORMATS, REFRESHES, RULES, Contestant, adamw, missing_peers, ours, peers
from benchmarks.gpt import Size, batch, build
from benchmarks.report import machine, mean, ratio_of_means, slowest, table

TOKENS = 512  # per step, to compute the gradients


def clock(device: torch.device) -> float:
    """Return seconds: CPU time of this process or, for an accelerator, wall time after the device has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Runner:
    """One contestant with a copy of the model, and the seconds of its steps."""

    def __init__(self, contestant: Contestant, model: nn.Module) -> None:
        self.name = contestant.name
        self.model = copy.deepcopy(model)
        self.optimizers = contestant.build(self.model)
        self.seconds: list[float] = []

    def step(self, source: nn.Module, counted: bool) -> None:
        """Step with copies of the source's gradients, because some optimizers change them."""
        for mine, theirs in zip(self.model.parameters(), source.parameters(), strict=True):
            assert theirs.grad is not None
            mine.grad = theirs.grad.clone()
        device = next(self.model.parameters()).device
        begin = clock(device)
        for optimizer in self.optimizers:
            optimizer.step()
        if counted:
            self.seconds.append(clock(device) - begin)


def run(
    contestants: Sequence[Contestant], size: Size, frequency: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of each counted step by contestant.

    The first two windows are not counted, because the preconditioners start in them.
    """
    model = build(size, device)
    runners = [Runner(c, model) for c in contestants]
    trainer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    for step in range((2 + rounds) * frequency):
        model.zero_grad()
        model(batch(size, TOKENS, step, device)).backward()
        first = step % len(runners)
        for runner in runners[first:] + runners[:first]:
            # Preconditioning starts at step `frequency`, counting after step 2 * frequency.
            runner.step(model, counted=step >= 2 * frequency)
        trainer.step()
    return {runner.name: runner.seconds for runner in runners}


def rows(seconds: dict[str, list[float]], base: str, frequency: int) -> list[list[object]]:
    """Return name, mean / median / slowest in milliseconds, mean over the base's, and slowest over its own median."""
    out: list[list[object]] = []
    for name, steps in seconds.items():
        median, worst = statistics.median(steps), slowest(steps, frequency)
        ratio = ratio_of_means(steps, seconds[base], frequency)
        out.append([name, 1e3 * mean(steps, frequency), 1e3 * median, 1e3 * worst, ratio, worst / median])
    return out


def named(contestant: Contestant, formats: str) -> Contestant:
    """The contestant with its formats of state in its name, unless they are the defaults."""
    return contestant if formats == "full" else replace(contestant, name=f"{contestant.name}, {formats}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--preconditioner", nargs="+", default=list(RULES), choices=RULES)
    made.add_argument("--refresh", nargs="+", default=list(REFRESHES), choices=REFRESHES)
    made.add_argument("--formats", nargs="+", default=["full"], choices=FORMATS, help="of state, as docs/memory.md")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--block", type=int, default=256)
    made.add_argument("--frequency", type=int, default=10)
    made.add_argument("--rounds", type=int, default=5, help="number of windows to measure")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--no-peers", action="store_true", help="only torch's AdamW and ours")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    contestants = [adamw(), adamw(fused=True)]
    contestants += [
        named(ours(rule, refresh, args.block, args.frequency, **FORMATS[formats]), formats)
        for rule in args.preconditioner
        for refresh in args.refresh
        for formats in args.formats
    ]
    if not args.no_peers:
        contestants += peers(args.block, args.frequency)
        for name in missing_peers():
            print(f"{name} is not installed and is left out")
    size = Size(layers=args.layers, width=args.width)
    seconds = run(contestants, size, args.frequency, args.rounds, torch.device(args.device))
    print(f"\nstep time; {machine()}\nblock {args.block}, frequency {args.frequency}, {args.rounds} windows\n")
    heads = ["optimizer", "mean ms", "median ms", "slowest ms", "mean / AdamW's", "slowest / median"]
    print(table(heads, rows(seconds, contestants[0].name, args.frequency)))


if __name__ == "__main__":
    main()
