"""Keeps worker processes busy with the first runs that the queue wants, one thread each, until nothing is left."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from benchmarks.convergence.results import Result, append, read
from benchmarks.convergence.training import Run

ROOT = Path(__file__).parents[2]


class Wanting(Protocol):
    """An experiment of any benchmark: a name, the checkout whose code runs, and the runs that are missing."""

    @property
    def title(self) -> str: ...
    @property
    def tree(self) -> str: ...
    def wanted(self, results: Sequence[Result], text: str) -> Iterable[Any]: ...


W = TypeVar("W", bound=Wanting)
Queue = Callable[[], Iterable[Wanting]]


@dataclass(frozen=True)
class Kind:
    """What a benchmark's runs are, and the module that does one when it reads it from standard input."""

    run: type
    program: str
    environment: Mapping[str, str] = field(default_factory=dict)  # of its process


CONVERGENCE = Kind(Run, "benchmarks.convergence.training")


@dataclass
class Worker:
    """A process that does one run."""

    run: Any
    title: str
    process: subprocess.Popen[str]
    errors: IO[str]

    def result(self) -> Result:
        """What it printed; if it failed, the end of its messages."""
        output = self.process.stdout.read() if self.process.stdout else ""
        self.errors.seek(0)
        messages = self.errors.read()
        self.errors.close()
        record: dict[str, Any]
        try:
            record = json.loads(output.splitlines()[-1])
        except (IndexError, ValueError):
            record = {"held_out": None, "error": messages[-2000:]}
        return Result(self.run, self.title, record)


def start(experiment: Wanting, run: Any, tokens: Path, logs: Path, kind: Kind) -> Worker:
    """A worker in the experiment's checkout, with the Python of its environment."""
    tree = Path(experiment.tree) if experiment.tree else ROOT
    own = tree / ".venv" / "bin" / "python"
    python = str(own) if experiment.tree and own.exists() else sys.executable
    own_environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(tree)}
    errors = (logs / f"worker_{os.getpid()}_{time.monotonic_ns()}.log").open("w+")
    Path(errors.name).unlink()  # it lives for as long as it is open
    process = subprocess.Popen(
        [python, "-m", kind.program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        cwd=tree,
        env={**os.environ, **own_environment, **kind.environment},
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps({"run": asdict(run), "tokens": str(tokens.resolve())}))
    process.stdin.close()
    return Worker(run, experiment.title, process, errors)


def work(
    queue: Queue,
    output: Path,
    tokens: Path,
    text: str,
    jobs: int,
    wait: bool = False,
    kind: Kind = CONVERGENCE,
) -> None:
    """Do what the queue wants, and look at it again after every run; with `wait`, go on when it is empty."""
    workers: list[Worker] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        while True:
            results = read(output, kind.run) if len(workers) < jobs else []
            while len(workers) < jobs:
                chosen = next_run(queue(), results, text, {w.run.key for w in workers})
                if chosen is None:
                    break
                workers.append(start(*chosen, tokens, output.parent, kind))
            if not workers and not wait:
                return
            time.sleep(0.5 if workers else 10)
            for worker in [w for w in workers if w.process.poll() is not None]:
                workers.remove(worker)
                result = worker.result()
                append(output, result)
                print(describe(result), flush=True)
                print(remaining(queue(), read(output, kind.run), text), flush=True)
    finally:
        for worker in workers:
            worker.process.terminate()


def next_run(experiments: Iterable[W], results: list[Result], text: str, under_way: set[str]) -> tuple[W, Any] | None:
    """The first run that is wanted and not under way."""
    for experiment in experiments:
        for run in experiment.wanted(results, text):
            if run.key not in under_way:
                return experiment, run
    return None


def describe(result: Result) -> str:
    """A finished run in one line."""
    run = result.run
    where = f"{run.cell}, {result.name}, lr {run.lr:g}, {run.steps} steps, seed {run.seed}"
    if "error" in result.record:
        return f"{where}: failed: {result.record['error'].strip().splitlines()[-1:]}"
    return f"{where}: held-out loss {result.loss:.4f}, {result.seconds():.0f} CPU s"


def remaining(experiments: Iterable[Wanting], results: list[Result], text: str) -> str:
    """How many runs are wanted now, and about how long they take by the CPU seconds of a step so far."""
    step: dict[tuple[Any, ...], list[float]] = {}
    for r in results:
        if "error" not in r.record and r.record["losses"]:
            tokens = r.run.batch * r.run.length
            for key in ((r.run.cell, r.name, tokens), (r.run.cell, tokens), ()):
                step.setdefault(key, []).append(r.seconds() / len(r.record["losses"]))
    wanted: dict[str, float] = {}
    for experiment in experiments:
        for run in experiment.wanted(results, text):
            tokens = run.batch * run.length
            keys = ((run.cell, experiment.title, tokens), (run.cell, tokens), ())
            known = next((step[key] for key in keys if key in step), [0.0])
            wanted[run.key] = statistics.median(known) * run.steps
    return f"  {len(wanted)} runs are known to be missing, about {sum(wanted.values()) / 60:.0f} CPU minutes"
