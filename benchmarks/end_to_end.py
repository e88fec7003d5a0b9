"""Compares the time of whole training with torch AdamW's: forward, backward and step of the small GPT.

    python -m benchmarks.end_to_end [--tokens 512 2048 8192]

After each forward and backward pass, every optimizer steps on its gradients. The ratio is pass (median) plus our mean
step, over pass plus AdamW's mean step. Both use the same pass. It is far longer than the step, so with two passes,
noise would hide the difference. On a CPU, times are CPU times.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch

from benchmarks.contestants import RULES, adamw, ours
from benchmarks.gpt import Size, batch, build
from benchmarks.report import machine, mean, table
from benchmarks.step_time import Runner, clock

WARM = 512  # tokens of a step that is not counted


def measure(
    rules: Sequence[str],
    refresh: str,
    tokens: int,
    size: Size,
    block: int,
    frequency: int,
    rounds: int,
    device: torch.device,
) -> tuple[float, dict[str, list[float]]]:
    """Return the seconds of a forward and backward pass, and of each counted step by optimizer."""
    model = build(size, device)
    runners = [Runner(c, model) for c in (adamw(), *(ours(rule, refresh, block, frequency) for rule in rules))]
    trainer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    passes = []
    for step in range((2 + rounds) * frequency):
        counted = step >= 2 * frequency  # by then all preconditioners have started
        tokens_now = batch(size, tokens if counted else min(tokens, WARM), step, device)
        model.zero_grad()
        begin = clock(device)
        model(tokens_now).backward()
        if counted:
            passes.append(clock(device) - begin)
        first = step % len(runners)
        for runner in runners[first:] + runners[:first]:
            runner.step(model, counted)
        trainer.step()
    return statistics.median(passes), {runner.name: runner.seconds for runner in runners}


def rows(tokens: int, one_pass: float, steps: dict[str, list[float]], frequency: int) -> list[list[object]]:
    """Return a line for each optimizer: tokens, pass, mean step, and the whole over AdamW's."""
    (_, base), *others = steps.items()
    whole = one_pass + mean(base, frequency)
    out: list[list[object]] = []
    for name, seconds in others:
        step = mean(seconds, frequency)
        more = (one_pass + step) / whole - 1.0
        out.append([name, tokens, 1e3 * one_pass, 1e3 * mean(base, frequency), 1e3 * step, f"{more:+.1%}"])
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="per step; multiples of 64")
    parser.add_argument("--preconditioner", nargs="+", default=["shampoo", "soap"], choices=RULES)
    parser.add_argument("--refresh", default="staggered")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="number of windows to measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    lines: list[list[object]] = []
    for tokens in args.tokens:
        found = measure(
            args.preconditioner,
            args.refresh,
            tokens,
            Size(width=args.width),
            args.block,
            args.frequency,
            args.rounds,
            torch.device(args.device),
        )
        lines += rows(tokens, *found, args.frequency)
    print(f"\nend to end; {machine()}\nblock {args.block}, frequency {args.frequency}\n")
    heads = ["optimizer", "tokens", "forward + backward ms", "AdamW's step ms", "mean step ms", "whole over AdamW's"]
    print(table(heads, lines))


if __name__ == "__main__":
    main()
