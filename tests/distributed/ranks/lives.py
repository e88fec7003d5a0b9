"""What a rank does in the torture by kill -9: resumes the newest complete save, trains on, and saves all the time.

It appends what it does to its own file: `resumed 6`, `step 7 <checksum>`, `saved 8`, `refused <error>`, `end`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo, wait_for_saves
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.distributed.frameworks import LayoutError
from tests.distributed.ranks.moves import Training, framework, rank, train
from tests.support.moves import Move

EVERY = 2  # steps between saves
KINDS = ("waits", "asynchronous", "one_tag")


@dataclass(frozen=True)
class Life(Move):
    """A run in a folder that it resumes from, with a kind of saves, up to a step."""

    kind: str = "waits"
    end: int = 30
    refresh: str = "staggered"

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"refresh": self.refresh}


def live(life: Life) -> None:
    """Resume, train and save up to the end of the life."""
    with framework(life, None) as training, (Path(life.folder) / f"rank{rank()}.txt").open("a") as notes:

        def note(text: str) -> None:
            notes.write(f"{text}\n")
            notes.flush()

        saves = (Zero if life.target.startswith("zero") else Plain)(life, training, note)
        try:
            begun = saves.resume()
        except (CheckpointError, LayoutError, RuntimeError, EOFError, UnpicklingError) as error:
            note(refused(error))  # the last two come from files that DeepSpeed was overwriting
            return
        note(f"resumed {begun}")
        for step in range(begun, life.end):
            try:
                train(training, range(step, step + 1))
            except CheckpointError as error:  # an engine that was given a finished optimizer is known at its first step
                if step > begun:
                    raise
                note(refused(error))
                return
            note(f"step {step + 1} {saves.checksum()}")
            if (step + 1) % EVERY == 0:
                saves.save(step + 1)
        wait_for_saves()
        saves.note_finished()
        note("end")


def refused(error: Exception) -> str:
    return f"refused {type(error).__name__}: {' '.join(str(error).split())}"


@dataclass
class Saves:
    """How a way of training saves and resumes weights and state together."""

    life: Life
    training: Training
    note: Callable[[str], None]
    pending: dict[int, Future[Any]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.life.folder)

    @property
    def optimizer(self) -> Shampoo:
        return self.training.optimizer

    def place(self, step: int) -> Path:
        return self.folder / ("only" if self.life.kind == "one_tag" else f"step{step}")

    def note_finished(self) -> None:
        for step in [step for step, future in self.pending.items() if future.done()]:
            self.pending.pop(step).result()
            self.note(f"saved {step}")

    def save_state(self, step: int, path: Path) -> None:
        """Save Shampoo's state, and note each save that is complete by now."""
        if self.life.kind == "asynchronous":
            self.pending[step] = save_shampoo(self.optimizer, path, asynchronous=True)
        else:
            save_shampoo(self.optimizer, path)
            self.note(f"saved {step}")
        self.note_finished()


class Plain(Saves):
    """Weights in a file of each rank and step, written before the state."""

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.training.model.named_parameters():
            yield name, getattr(p, "to_local", lambda p=p: p)().detach()

    def checksum(self) -> int:
        return checksum([tensor for _, tensor in self.named()])

    def save(self, step: int) -> None:
        file = self.weights(step)
        torch.save({name: tensor.clone() for name, tensor in self.named()}, file.with_suffix(".aside"))
        os.replace(file.with_suffix(".aside"), file)
        agree()  # all ranks have written theirs
        self.save_state(step, self.place(step))

    def weights(self, step: int) -> Path:
        return self.folder / f"weights{step}.{rank()}.pt"

    def resume(self) -> int:
        saved = {step: path for path in self.folder.glob("*/manifest.json") if (step := step_of(path.parent))}
        if not saved:
            return 0
        newest = max(saved)
        kept = torch.load(self.weights(newest), weights_only=True)
        with torch.no_grad():
            for name, tensor in self.named():
                tensor.copy_(kept[name])
        load_shampoo(self.optimizer, saved[newest].parent)
        return newest


class Zero(Saves):
    """DeepSpeed's own checkpoints; asynchronous ones of the state in addition, which then replace what they hold."""

    def checksum(self) -> int:
        return checksum(list(self.training.whole().values()))

    def save(self, step: int) -> None:
        tag = self.place(step).name
        self.training.model.save_checkpoint(str(self.folder), tag=tag, client_state={"step": step})
        if self.life.kind == "asynchronous":
            self.save_state(step, self.folder / f"own{step}")
        else:
            self.note(f"saved {step}")

    def resume(self) -> int:
        if not (self.folder / "latest").exists():
            return 0
        _, client = self.training.model.load_checkpoint(str(self.folder))
        step: int = client["step"]
        own = self.folder / f"own{step}"
        if (own / "manifest.json").exists():
            load_shampoo(self.optimizer, own)
        return step


def step_of(path: Path) -> int:
    """The step of a complete checkpoint."""
    return max(int(record["steps"]) for record in Manifest.read(path).parameters.values())


def checksum(tensors: list[Tensor]) -> int:
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found


def agree() -> None:
    if dist.is_initialized():
        dist.barrier()
