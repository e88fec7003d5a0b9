"""`python -m benchmarks.finetuning`: which experiments to run, and what to print of their results."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

import benchmarks.finetuning as package
from benchmarks.convergence.experiments import followed
from benchmarks.convergence.loop import Kind, remaining, work
from benchmarks.convergence.results import read
from benchmarks.finetuning.analysis import draw, report
from benchmarks.finetuning.experiments import Experiment
from benchmarks.finetuning.recipes import RECIPES
from benchmarks.finetuning.sources import unpacked
from benchmarks.finetuning.tasks import LENGTHS, load_tasks, make_tasks
from benchmarks.finetuning.training import METHODS, Run

FOLDER = Path("bench_output/finetuning")
# Gradients as large as the model come and go in every step: a heap that keeps its pages saves a third of the time.
KIND = Kind(
    Run,
    "benchmarks.finetuning.training",
    {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)},
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.finetuning",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--output", type=Path, default=FOLDER / "results.jsonl", help="where finished runs are")
    made.add_argument("--cache", type=Path, default=FOLDER, help="folder of the model, the packages and the tokens")
    made.add_argument("--data", type=Path, help="where the Debian packages are unpacked")
    made.add_argument("--queue", type=Path, help="a file of experiments, instead of the options that follow")
    made.add_argument("--contestants", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    made.add_argument("--tasks", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    made.add_argument("--methods", nargs="+", choices=METHODS, default=["full"])
    made.add_argument("--seeds", nargs="+", type=int, default=[0])
    made.add_argument("--rates", nargs="+", type=float, help="instead of each recipe's own")
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    made.add_argument("--wait", action="store_true", help="with --queue: wait for more lines when all is done")
    made.add_argument("--report", action="store_true", help="run nothing")
    return made


def standard(args: argparse.Namespace) -> list[Experiment]:
    """Every contestant on every task by every method."""
    return [
        Experiment(
            name,
            tasks=tuple(args.tasks),
            methods=tuple(args.methods),
            seeds=tuple(args.seeds),
            rates=tuple(args.rates) if args.rates else None,
            steps=args.steps,
        )
        for name in args.contestants
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table and draw the picture."""
    args = parser().parse_args(arguments)
    if args.report:
        return _print(args.output)
    tasks = _tasks(args)
    text = load_tasks(tasks).digest
    experiments = followed(Experiment, args.queue) if args.queue else partial(standard, args)
    print(f"text {text}; {remaining(experiments(), read(args.output, Run), text).strip()}", flush=True)
    work(experiments, args.output, tasks, text, args.jobs, args.wait and args.queue is not None, KIND)
    return _print(args.output)


def _tasks(args: argparse.Namespace) -> Path:
    from examples.pretrained import smollm2

    return make_tasks(unpacked(args.data, args.cache), smollm2(args.cache), args.cache)


def _print(output: Path) -> int:
    results = read(output, Run)
    print(report(results))
    if results:
        picture = output.with_suffix(".png")
        draw(results, picture)
        print(f"\nplot: {picture}, data: {output}")
    return 0
