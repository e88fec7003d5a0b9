"""Experiments: what a line of the queue asks for, and which of its runs are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.convergence.experiments import title_of
from benchmarks.convergence.results import Result
from benchmarks.finetuning.recipes import RECIPES, all_options
from benchmarks.finetuning.tasks import LENGTHS
from benchmarks.finetuning.training import METHODS, Run


@dataclass(frozen=True)
class Experiment:
    """A contestant on some tasks, by some methods, with some seeds and rates."""

    contestant: str
    tasks: tuple[str, ...] = ("handbook",)
    methods: tuple[str, ...] = ("full",)
    seeds: tuple[int, ...] = (0,)
    rates: tuple[float, ...] | None = None  # None: the recipe's
    options: dict[str, Any] = field(default_factory=dict)  # on top of the recipe's
    name: str = ""  # in the table
    version: str = ""
    tree: str = ""  # the checkout whose code runs; empty: this one
    steps: int = 40
    tokens: int = 512

    def __post_init__(self) -> None:
        allowed: dict[str, Collection[str]] = {"contestant": RECIPES, "tasks": LENGTHS, "methods": METHODS}
        for name, known in allowed.items():
            given = getattr(self, name)
            for value in (given,) if isinstance(given, str) else given:
                if value not in known:
                    raise ValueError(f"{name}: there is no {value!r}; there are {', '.join(known)}")

    @property
    def title(self) -> str:
        return title_of(self.name, self.contestant, self.options, self.version)

    def run(self, task: str, method: str, seed: int, lr: float, text: str) -> Run:
        recipe = RECIPES[self.contestant]
        options = all_options(recipe.kind, {**recipe.options, **self.options})
        shared = {"steps": self.steps, "tokens": self.tokens, "text": text, "version": self.version}
        return Run(task, method, recipe.kind, options, float(lr), seed, **shared)  # type: ignore[arg-type]

    def wanted(self, results: Sequence[Result], text: str) -> Iterator[Run]:
        """Runs that are missing: all rates of the first seed come first."""
        done = {result.run.key for result in results}
        rates = RECIPES[self.contestant].rates if self.rates is None else self.rates
        for seed in self.seeds:
            for task in self.tasks:
                for method in self.methods:
                    for lr in rates:
                        run = self.run(task, method, seed, lr, text)
                        if run.key not in done:
                            yield run
