"""A long run in which everything is switched all the time: memory, threads and open files must stay as they were.

    python -m tests.torture.soak --steps 100000

A tiny model trains on random tokens. Layers are frozen and unfrozen, rates and other options change, state is saved (by
files, asynchronous ones too, and by state dicts) and loaded into the same and into new optimizers, gradients are not
finite, processes are forked, the model is evaluated. Resident memory is read after each round of all of these.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo, wait_for_saves
from tests.support.zoo import OddModel, make_batch, make_model
from tests.torture.figures import Figures

ROUND = 60  # steps in which everything happens at least once
OPTIONS: dict[str, Any] = {"lr": 1e-3, "max_preconditioner_dim": 8, "precondition_frequency": 4}
MODES = ("sync", "staggered", "background")
GROWTH = 0.01  # of resident memory, from the second quarter of the run to the last


@dataclass(frozen=True)
class Sample:
    """What the process holds after a round."""

    step: int
    resident: int
    threads: int
    files: int


class Soak:
    """The run: a model, its present optimizer, and what may happen between two steps."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.model = make_model("odd")
        assert isinstance(self.model, OddModel)
        self.mode = 0
        self.optimizer = self.made()
        self.events: list[Callable[[], None]] = [
            self.freeze, self.change_options, self.save_and_load, self.save_asynchronously, self.load_state_dict,
            self.copy, self.fork, self.evaluate, self.spoil, self.begin_anew,
        ]  # fmt: skip

    def made(self) -> Shampoo:
        self.mode += 1
        named = [(n, p) for n, p in self.model.named_parameters() if n != "frozen.weight"]
        return Shampoo(named, model=self.model, refresh=MODES[self.mode % len(MODES)], **OPTIONS)

    def round(self, first: int) -> None:
        order = self.random.sample(self.events, len(self.events))
        for step in range(first, first + ROUND):
            self.step(step)
            if step % (ROUND // len(order)) == 0:
                order[(step - first) // (ROUND // len(order))]()

    def step(self, step: int, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        (self.model(**make_batch("odd", step % 50, 1)) * factor).backward()
        self.optimizer.step()

    def freeze(self) -> None:
        layer = self.random.choice([self.model.get_submodule(name) for name in ("up", "down", "mix")])
        for p in layer.parameters():
            p.requires_grad_(not p.requires_grad)

    def change_options(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.random.uniform(0.0, 2e-3)
            group["weight_decay"] = self.random.choice([0.0, 0.1])
            group["eps"] = self.random.choice([1e-8, 1e-6])

    def save_and_load(self) -> None:
        save_shampoo(self.optimizer, self.folder / "waits")
        load_shampoo(self.optimizer, self.folder / "waits")

    def save_asynchronously(self) -> None:
        save_shampoo(self.optimizer, self.folder / "thread", asynchronous=True)
        self.step(0)
        wait_for_saves()

    def load_state_dict(self) -> None:
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def copy(self) -> None:
        copy.deepcopy(self.optimizer)

    def fork(self) -> None:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.ones(3).sum() == 3 else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, "the forked process failed"

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(**make_batch("odd", 51))
        self.model.train()

    def spoil(self) -> None:
        before = [p.detach().clone() for p in self.model.parameters()]
        self.step(0, float("nan"))
        assert all(torch.equal(p, b) for p, b in zip(self.model.parameters(), before, strict=True))

    def begin_anew(self) -> None:
        saved = self.optimizer.state_dict()
        self.optimizer = self.made()
        self.optimizer.load_state_dict(saved)


def soak(steps: int, folder: Path, seed: int = 0) -> list[Sample]:
    """Run so many steps, at least; return a sample for each round."""
    run, samples = Soak(folder, seed), []
    for first in range(0, steps, ROUND):
        run.round(first)
        samples.append(sample(first + ROUND))
    assert all(p.isfinite().all() for p in run.model.parameters())
    return samples


def sample(step: int) -> Sample:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(step, pages * os.sysconf("SC_PAGE_SIZE"), threading.active_count(), len(os.listdir("/proc/self/fd")))


def growth(samples: Sequence[Sample]) -> float:
    """Resident memory in the last quarter of the run over that in the second quarter, less one."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples[:1], samples[-quarter:]
    return fmean(s.resident for s in late) / fmean(s.resident for s in early) - 1.0


def faults(samples: Sequence[Sample]) -> list[str]:
    """What did not stay as it was."""
    found = []
    if growth(samples) > GROWTH:
        found.append(f"resident memory grew by {growth(samples):.2%}")
    quarter = max(1, len(samples) // 4)
    for what in ("threads", "files"):  # files of a checkpoint are open as long as a frozen parameter's state waits
        early = max(getattr(s, what) for s in samples[quarter : 2 * quarter] or samples[:1])
        late = max(getattr(s, what) for s in samples[2 * quarter :] or samples)
        if late > early:
            found.append(f"{what}: from {early} to {late}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(args.steps, Path(folder), args.seed)
    last = samples[-1]
    print(
        f"{last.step} steps: resident memory {last.resident / 2**20:.0f} MiB, grown by {growth(samples):+.3%}; "
        f"{last.threads} threads, {last.files} open files"
    )
    figures = Figures(last.step)
    for fault in faults(samples):
        figures.fault("others", fault)
    return figures.told()


if __name__ == "__main__":
    raise SystemExit(main())
