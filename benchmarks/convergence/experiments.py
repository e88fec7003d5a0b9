"""Experiments: what a line of the queue asks for, and which runs it wants next, given the results so far."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.convergence.models import CELLS
from benchmarks.convergence.recipes import RECIPES, all_options
from benchmarks.convergence.results import Result, best
from benchmarks.convergence.training import Run

BUDGETS = (0.25, 0.3, 0.35, 0.4, 0.5, 1.0)
LADDER = (1.2, 2.0, 3.0, 5.0, 8.0)  # a decade of rates
MOST_RATES = 9  # of one search

E = TypeVar("E")


@dataclass(frozen=True)
class Experiment:
    """A contestant, in some cells with some seeds and budgets, at given rates or in search of the best one."""

    contestant: str
    cells: tuple[str, ...] = ("llama-4m",)
    seeds: tuple[int, ...] = (0,)
    budgets: tuple[float, ...] = (1.0,)
    rates: tuple[float, ...] | str | None = None  # None: the recipe's; "best": the best known of a near budget
    walk: bool = True  # try the next rate for as long as the best one is at the edge
    options: dict[str, Any] = field(default_factory=dict)  # on top of the recipe's
    name: str = ""  # in the table
    version: str = ""
    tree: str = ""  # the checkout whose code runs; empty: this one
    steps: int = 300
    batch: int = 8
    length: int = 128

    def __post_init__(self) -> None:
        if self.contestant not in RECIPES:
            raise ValueError(f"no recipe {self.contestant!r}; there are {', '.join(RECIPES)}")
        unknown = [cell for cell in self.cells if cell not in CELLS]
        if unknown:
            raise ValueError(f"no cell {unknown[0]!r}; there are {', '.join(CELLS)}")

    @property
    def title(self) -> str:
        return title_of(self.name, self.contestant, self.options, self.version)

    def run(self, cell: str, seed: int, budget: float, lr: float, text: str) -> Run:
        recipe = RECIPES[self.contestant]
        return Run(
            cell=cell,
            kind=recipe.kind,
            options=all_options(recipe.kind, {**recipe.options, **self.options}),
            lr=float(lr),
            seed=seed,
            budget=float(budget),
            full_steps=self.steps,
            batch=self.batch,
            length=self.length,
            text=text,
            version=self.version,
        )

    def wanted(self, results: Sequence[Result], text: str) -> Iterator[Run]:
        """Runs that are missing and can start now. A walk goes on once the rates before it are finished."""
        done = {result.run.key for result in results}
        for cell in self.cells:
            for seed in self.seeds:
                for budget in self.budgets:
                    for lr in self._rates(results, self.run(cell, seed, budget, 0.0, text)):
                        run = self.run(cell, seed, budget, lr, text)
                        if run.key not in done:
                            yield run

    def _rates(self, results: Sequence[Result], target: Run) -> Sequence[float]:
        alike = [r for r in results if searched_together(r.run, target)]
        if self.rates == "best":
            start = _best_known(alike, target)
        else:
            start = RECIPES[self.contestant].rates if self.rates is None else tuple(map(float, self.rates))
        tried = {r.run.lr: r.loss for r in alike if r.run.seed == target.seed and r.run.budget == target.budget}
        if not self.walk or any(lr not in tried for lr in start):
            return start
        further = next_rate(tried)
        return [] if further is None else [further]


def title_of(name: str, contestant: str, options: Mapping[str, Any], version: str) -> str:
    """A contestant in the table: its name, or what it is and its own options."""
    own = " ".join(f"{option}={value}" for option, value in options.items())
    title = name or f"{contestant} {own}".strip()
    return f"{title} @{version}" if version else title


def searched_together(run: Run, other: Run) -> bool:
    """Whether two runs are of one contestant in one cell: they differ in rate, seed and budget at most."""
    free = {"lr", "seed", "budget"}
    return all(getattr(run, f.name) == getattr(other, f.name) for f in fields(Run) if f.name not in free)


def _best_known(alike: Sequence[Result], target: Run) -> tuple[float, ...]:
    """The best rate at the nearest budget that has results, of the first seed there; nothing if there are none."""
    groups: dict[tuple[float, int], list[Result]] = {}
    for result in alike:
        distance = abs(math.log(result.run.budget / target.budget))
        groups.setdefault((distance, result.run.seed), []).append(result)
    found = best(groups[min(groups)]) if groups else None
    return () if found is None else (found.run.lr,)


def next_rate(losses: dict[float, float]) -> float | None:
    """The rate past the edge if the best one lies there: the upper edge first; None once the best lies within.

    If all runs diverged, that is the next lower rate.
    """
    if not losses or len(losses) >= MOST_RATES:
        return None
    tried = sorted(losses)
    lowest = min(tried, key=lambda lr: losses[lr])
    if math.isinf(losses[lowest]):
        return neighbour(tried[0], -1)
    if lowest == tried[-1]:
        return neighbour(lowest, +1)
    if lowest == tried[0]:
        return neighbour(lowest, -1)
    return None


def neighbour(lr: float, direction: int) -> float:
    """The next rate of the ladder above (+1) or below (-1), at a distance of a fifth at least."""
    decade = math.floor(math.log10(lr))
    rungs = [float(f"{digit:g}e{decade + d}") for d in (-1, 0, 1) for digit in LADDER]
    if direction > 0:
        return min(rung for rung in rungs if rung >= 1.2 * lr)
    return max(rung for rung in rungs if rung * 1.2 <= lr)


def parse(kind: type[E], line: str) -> E:
    """An experiment, a dataclass, from a line of JSON."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"no field {unknown[0]!r}; there are {', '.join(sorted(known))}")
    fixed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return kind(**fixed)


def followed(kind: type[E], file: Path) -> Callable[[], list[E]]:
    """What reads a queue again at each call, and prints a message for a wrong line once."""
    reported: set[str] = set()

    def read() -> list[E]:
        found, wrong = read_queue(kind, file)
        for message in wrong:
            if message not in reported:
                reported.add(message)
                print(f"{file}, {message}", flush=True)
        return found

    return read


def read_queue(kind: type[E], file: Path) -> tuple[list[E], list[str]]:
    """The experiments of a queue file, the most urgent first, and a message for each line that is wrong."""
    experiments, wrong = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            experiments.append(parse(kind, line))
        except (ValueError, TypeError) as error:
            wrong.append(f"line {number}: {error}")
    return experiments, wrong
