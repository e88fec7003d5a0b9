"""One run: everything that determines it, the training, and what is recorded. Also the program of a worker process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.models import build_model
from benchmarks.convergence.recipes import build_optimizers
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


def train(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Loss on held-out documents, the training losses, and CPU seconds of the model and of the optimizer."""
    if run.text != corpus.digest:
        raise ValueError(f"the run is for text {run.text}, and the tokens are of {corpus.digest}")
    rows = corpus.rows(run.seed, run.length)
    model = build_model(run.cell, VOCABULARY, run.length, run.seed)
    optimizers = build_optimizers(run.kind, run.options, run.lr, model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    losses: list[float] = []
    model_seconds = optimizer_seconds = 0.0
    for step in range(run.steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, run.steps, run.warm_up)
        picked = torch.arange(step * run.batch, (step + 1) * run.batch) % len(rows)
        batch = rows[picked].long()
        begin = time.process_time()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        middle = time.process_time()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        optimizer_seconds += time.process_time() - middle
        model_seconds += middle - begin
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return {
        "held_out": _held_out_loss(model, corpus, run) if math.isfinite(losses[-1]) else None,
        "losses": [round(x, 4) for x in losses if math.isfinite(x)],
        "model_seconds": round(model_seconds, 2),
        "optimizer_seconds": round(optimizer_seconds, 2),
    }


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
