"""One run: everything that determines it, the training, and what is recorded. Also the program of a worker process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.models import build_model
from benchmarks.convergence.recipes import Stepping, build_optimizers
from benchmarks.convergence.text import VOCABULARY, Corpus, load_corpus

HELD_OUT_TOKENS = 32_768


@dataclass(frozen=True)
class Run:
    """Everything that determines a run; two equal ones are the same experiment."""

    cell: str
    kind: str
    options: dict[str, Any]
    lr: float
    seed: int
    budget: float  # of `full_steps`; the schedule ends there
    full_steps: int = 300
    batch: int = 8
    length: int = 128
    warm_up: float = 0.1  # of the run's own steps
    text: str = ""
    version: str = field(default="")  # tells runs apart whose options are the same and whose code is not

    @property
    def steps(self) -> int:
        return max(1, round(self.budget * self.full_steps))

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up, then a straight line to zero, as a factor of the rate."""
    warm = max(1, round(warm_up * steps))
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm + 1)


class Clocked:
    """Steps of a model's optimizers under one schedule, their losses, and the CPU seconds of both.

    Args:
        steps: how many there will be.
        warm_up: the share of them in which rates grow.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Stepping], steps: int, warm_up: float) -> None:
        self._model, self._optimizers = model, optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._peaks = [(group, group["lr"]) for group in groups]
        self._steps, self._warm_up = steps, warm_up
        self.losses: list[float] = []
        self._model_seconds = self._optimizer_seconds = 0.0

    def step(self, forward: Callable[[], Tensor]) -> bool:
        """Take a step down the loss that ``forward`` computes; False if it is not finite."""
        for group, peak in self._peaks:
            group["lr"] = peak * schedule(len(self.losses), self._steps, self._warm_up)
        begin = time.process_time()
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        middle = time.process_time()
        for optimizer in self._optimizers:
            optimizer.step()
        self._model.zero_grad()
        self._optimizer_seconds += time.process_time() - middle
        self._model_seconds += middle - begin
        self.losses.append(loss.item())
        return math.isfinite(self.losses[-1])

    @property
    def record(self) -> dict[str, Any]:
        return {
            "losses": [round(x, 4) for x in self.losses if math.isfinite(x)],
            "model_seconds": round(self._model_seconds, 2),
            "optimizer_seconds": round(self._optimizer_seconds, 2),
        }


def train(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Loss on held-out documents, the training losses, and CPU seconds of the model and of the optimizer."""
    if run.text != corpus.digest:
        raise ValueError(f"the run is for text {run.text}, and the tokens are of {corpus.digest}")
    rows = corpus.rows(run.seed, run.length)
    model = build_model(run.cell, VOCABULARY, run.length, run.seed)
    optimizers = build_optimizers(run.kind, run.options, run.lr, model)
    clocked = Clocked(model, optimizers, run.steps, run.warm_up)
    finite = True
    for step in range(run.steps):
        picked = torch.arange(step * run.batch, (step + 1) * run.batch) % len(rows)
        finite = clocked.step(partial(_loss, model, rows[picked].long()))
        if not finite:
            break
    return {"held_out": _held_out_loss(model, corpus, run) if finite else None, **clocked.record}


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


@torch.no_grad()
def _held_out_loss(model: nn.Module, corpus: Corpus, run: Run) -> float | None:
    model.eval()
    rows = corpus.held_out_rows(HELD_OUT_TOKENS // run.length, run.length)
    found = [(len(b), model(input_ids=b, labels=b).loss.item()) for b in rows.long().split(16)]
    mean = sum(n * x for n, x in found) / sum(n for n, _ in found)
    return mean if math.isfinite(mean) else None


def commit() -> str:
    """The commit of the code that runs, with "-dirty" if files were changed since."""
    root = Path(__file__).parents[2]
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Read a run and the file of tokens from standard input, train, and print the record as the last line."""
    order = json.load(sys.stdin)
    torch.set_num_threads(1)
    run = Run(**order["run"])
    began = time.time()
    record = train(run, load_corpus(Path(order["tokens"])))
    record |= {"commit": commit(), "torch": torch.__version__, "began": round(began), "ended": round(time.time())}
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
