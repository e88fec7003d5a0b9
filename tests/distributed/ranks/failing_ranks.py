"""What a rank does in the torture of collectives: the last rank dies, hangs or is late in the n-th one of a phase."""

from __future__ import annotations

import atexit
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shampoo_deepspeed import load_shampoo, save_shampoo, wait_for_saves
from tests.distributed.ranks.lives import checksum
from tests.distributed.ranks.moves import Training, framework
from tests.support.moves import Move
from tests.support.zoo import make_batch, micro_batches

TIMEOUT = 4.0  # seconds, of the job's process group
LATE = 0.4
PHASES = ("first step", "step", "save", "asynchronous save", "load", "resumed step")
COLLECTIVES = [
    "all_to_all_single", "all_reduce", "all_gather_object", "gather_object", "broadcast_object_list", "broadcast",
    "barrier", "new_group", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor",
]  # fmt: skip


@dataclass(frozen=True)
class Case(Move):
    """A way of training, and what the last rank does in which collective of a phase; nothing if `what` is empty."""

    phase: str = ""
    number: int = 0
    what: str = ""


@dataclass
class Watch:
    """Counts this rank's collectives in the present phase, and fails in the case's one."""

    case: Case
    fails: bool
    phase: str = ""
    count: int = 0

    def before(self) -> None:
        self.count += 1
        if not self.fails or self.phase != self.case.phase:
            return
        if self.case.what == "late":
            time.sleep(LATE)
        elif self.count == self.case.number:
            if self.case.what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # hangs


def run(case: Case) -> None:
    """Go through all phases; write what was seen into the rank's file, and end the process as the interpreter does."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    method = f"file://{case.folder}/store"
    seconds = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=seconds)
    seen: dict[str, Any] = {"counts": {}, "error": "", "seconds": 0.0}
    watch = Watch(case, rank == size - 1 and bool(case.what))
    begun = time.monotonic()
    try:
        with watched(watch), framework(case, None) as training:
            for phase, work in phases(training, Path(case.folder)).items():
                forward_and_backward(training)
                dist.barrier()
                watch.phase, watch.count, begun = phase, 0, time.monotonic()
                work()
                seen["counts"][phase] = watch.count
            watch.phase = ""
            seen["weights"] = checksum([p.detach() for _, p in sorted(training.whole().items())])
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["seconds"] = time.monotonic() - begun
    (Path(case.folder) / f"rank{rank}.aside").write_text(json.dumps(seen))
    os.replace(Path(case.folder) / f"rank{rank}.aside", Path(case.folder) / f"rank{rank}.json")
    if case.what in ("", "late"):
        return
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    os._exit(0)


def phases(training: Training, folder: Path) -> dict[str, Callable[[], None]]:
    optimizer = training.optimizer

    def save_by_a_thread() -> None:
        save_shampoo(optimizer, folder / "thread", asynchronous=True)
        wait_for_saves()

    work: tuple[Callable[[], Any], ...] = (
        optimizer.step, optimizer.step, lambda: save_shampoo(optimizer, folder / "saved"), save_by_a_thread,
        lambda: load_shampoo(optimizer, folder / "saved"), optimizer.step,
    )  # fmt: skip
    return dict(zip(PHASES, work, strict=True))


def forward_and_backward(training: Training) -> None:
    training.optimizer.zero_grad()
    (piece,) = micro_batches(make_batch("odd", 0), dist.get_rank(), dist.get_world_size())
    training.model(**piece).backward()


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let the watch see every collective that this process asks torch.distributed for by name, on any thread."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def replaced(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            watch.before()
            return original(*args, **kwargs)

        return call

    for name, original in originals.items():
        setattr(dist, name, replaced(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
