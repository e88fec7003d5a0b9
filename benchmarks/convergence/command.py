"""`python -m benchmarks.convergence`: which experiments to run, and what to print of their results."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import benchmarks.convergence as package
from benchmarks.convergence import quick
from benchmarks.convergence.analysis import draw, report
from benchmarks.convergence.experiments import BUDGETS, Experiment, followed
from benchmarks.convergence.loop import remaining, work
from benchmarks.convergence.models import CELLS
from benchmarks.convergence.recipes import RECIPES
from benchmarks.convergence.results import read
from benchmarks.convergence.text import default_text, load_corpus, make_corpus

FOLDER = Path("bench_output/convergence")


def standard(args: argparse.Namespace) -> list[Experiment]:
    """Rates are searched with the first seed at every budget; the other seeds take them from there."""
    first, *others = args.seeds
    made = []
    for cell in args.cells:
        for name in args.contestants:
            # AdamW's whole budget is what the others are compared with.
            budgets = tuple(b for b in sorted(args.budgets, reverse=True) if b == 1.0 or RECIPES[name].kind != "adamw")
            shared: dict[str, Any] = {"cells": (cell,), "budgets": budgets, "steps": args.steps}
            rates = tuple(args.rates) if args.rates else None
            made.append(Experiment(name, seeds=(first,), rates=rates, walk=args.walk, **shared))
            if others:
                made.append(Experiment(name, seeds=tuple(others), rates="best", walk=False, **shared))
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--output", type=Path, default=FOLDER / "results.jsonl", help="where finished runs are")
    made.add_argument("--cache", type=Path, default=FOLDER, help="folder of the tokens")
    made.add_argument("--text", help="a folder of text files")
    made.add_argument("--queue", type=Path, help="a file of experiments, instead of the five options that follow")
    made.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS)[:4])
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--contestants", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    made.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    made.add_argument("--rates", nargs="+", type=float, help="where the search begins, instead of each recipe's own")
    made.add_argument("--no-walk", dest="walk", action="store_false", help="only these rates, even if the edge is best")
    made.add_argument("--steps", type=int, default=300, help="AdamW's whole budget")
    made.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time")
    made.add_argument("--wait", action="store_true", help="with --queue: wait for more lines when all is done")
    made.add_argument("--report", action="store_true", help="run nothing")
    made.add_argument("--quick", action="store_true", help="ten minutes: compare the default with the record")
    made.add_argument("--remember", action="store_true", help="with --quick: make these losses the record")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then print the table and draw the picture."""
    args = parser().parse_args(arguments)
    if args.report:
        return _print(args.output)
    tokens = make_corpus(args.text or default_text(), args.cache)
    text = load_corpus(tokens).digest
    if args.quick:
        return _quick(args, tokens, text)
    experiments = followed(Experiment, args.queue) if args.queue else partial(standard, args)
    print(f"text {text}; {remaining(experiments(), read(args.output), text).strip()}", flush=True)
    work(experiments, args.output, tokens, text, args.jobs, args.wait and args.queue is not None)
    return _print(args.output)


def _print(output: Path) -> int:
    results = read(output)
    print(report(results))
    if results:
        picture = output.with_suffix(".png")
        draw(results, picture)
        print(f"\nplot: {picture}, data: {output}")
    return 0


def _quick(args: argparse.Namespace, tokens: Path, text: str) -> int:
    output = args.output.with_name("quick.jsonl")
    output.unlink(missing_ok=True)  # the code may have changed since
    work(lambda: quick.EXPERIMENTS, output, tokens, text, args.jobs)
    results = read(output)
    if args.remember:
        quick.remember(results)
    message, good = quick.compare(results)
    print(message)
    return 0 if good else 1
