"""`python -m benchmarks`: short forms of all benchmarks of speed, memory and training, in five minutes.

Run it on an otherwise idle machine. For longer forms and options, see `python -m benchmarks.step_time --help`, and
likewise end_to_end, slow_link, memory, scaling, many_ranks and convergence. benchmarks.accelerator is for GPUs and is
included if there is one. benchmarks.exactness, which measures how exact runs are, takes longer and is not included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import end_to_end, many_ranks, memory, scaling, slow_link, step_time
from benchmarks.convergence import command as convergence


def main() -> None:
    """Run them one after another, because each needs the machine for itself; standard error shows which one runs."""
    tiny = ["--cells", "llama-tiny", "gpt2-tiny", "--seeds", "0", "--budgets", "1", "--steps", "100"]
    tiny += ["--contestants", "adamw", "muon", "default", "soap", "kl", "--rates", "3e-3", "--no-walk"]
    tiny += ["--output", "bench_output/convergence/short.jsonl"]
    plans = ["--plan-ranks", "8", "64", "1024", "--models", "llama-3-8b"]
    runs: list[tuple[Callable[[list[str]], object], list[str]]] = [
        (step_time.main, ["--rounds", "2"]),
        (end_to_end.main, ["--tokens", "512", "8192", "--rounds", "1"]),
        (slow_link.main, ["--buckets", "1", "8", "--steps", "15"]),
        (memory.main, ["--preconditioner", "shampoo", "soap"]),
        (scaling.main, ["--ranks", "1", "2", "--rounds", "1", *plans]),
        (many_ranks.main, ["--ranks", "64", "--model", "llama-3.2-1b"]),
        (convergence.main, tiny),
    ]
    if torch.cuda.is_available():
        from benchmarks import accelerator  # needs Transformers

        solvers = ["--solver", "eigh", "coupled_newton"]
        runs.append((accelerator.main, ["--size", "350m", "--block", "1024", *solvers, "--rounds", "1"]))
    one_after_another(runs)


def one_after_another(runs: Sequence[tuple[Callable[[list[str]], object], list[str]]]) -> None:
    """Call each function with its arguments, and announce it with its number and the time so far."""
    begin = time.monotonic()
    for number, (run, arguments) in enumerate(runs, 1):
        name = run.__module__.removeprefix("benchmarks.")
        minutes = (time.monotonic() - begin) / 60
        text = f"[{number}/{len(runs)}] {name} {' '.join(arguments)} (after {minutes:.0f} min)"
        print(text, file=sys.stderr, flush=True)
        run(arguments)


if __name__ == "__main__":
    main()
