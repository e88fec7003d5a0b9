"""One run: everything that determines it, the training, and what is recorded. Also the program of a worker process."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.convergence.recipes import Stepping, build_optimizers
from benchmarks.convergence.training import Clocked, commit
from benchmarks.convergence.variants import Around
from benchmarks.finetuning.evaluation import figures
from benchmarks.finetuning.tasks import ATTENTION, LENGTHS, Tasks, load_tasks
from benchmarks.memory import held_bytes
from shampoo_deepspeed import Shampoo

EVALUATIONS = 4  # of a run, at even distances
WEIGHT_DECAY = 0.0
METHODS = ("full", "lora8", "lora32")


@dataclass(frozen=True)
class Run:
    """Everything that determines a run; two equal ones are the same experiment."""

    task: str
    method: str
    kind: str
    options: dict[str, Any]
    lr: float
    seed: int
    steps: int = 40
    tokens: int = 512  # of a step, padding included
    warm_up: float = 0.1
    text: str = ""
    version: str = ""  # tells runs apart whose options are the same and whose code is not

    @property
    def cell(self) -> str:
        return f"{self.task} {self.method}"

    @property
    def length(self) -> int:
        return LENGTHS[self.task]

    @property
    def batch(self) -> int:
        return max(1, self.tokens // self.length)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def prepared(folder: Path, method: str, seed: int) -> nn.Module:
    """The pre-trained model, all of whose weights are trained, or those of new adapters on all linear layers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION)
    if method == "full":
        return model.train()
    from peft import LoraConfig, get_peft_model

    rank = int(method.removeprefix("lora"))
    adapters = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, adapters).train()


class Displacement:
    """How far a model's matrices have moved from where they were: ||W - W0|| / ||W0|| over all of them together."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.lora = any("lora_" in name for name in self.before)

    @torch.no_grad()
    def read(self) -> float:
        moved, norms = self._of_adapters() if self.lora else self._of_weights()
        return math.sqrt(moved / norms)

    def _of_weights(self) -> tuple[float, float]:
        now = dict(self.model.named_parameters())
        matrices = {name: p for name, p in self.before.items() if p.ndim > 1}
        moved = sum(float((now[name] - p).square().sum()) for name, p in matrices.items())
        return moved, sum(float(p.square().sum()) for p in matrices.values())

    def _of_adapters(self) -> tuple[float, float]:
        """Of the layers with adapters; an adapter begins at zero, as its B does."""
        moved = norms = 0.0
        layers: Iterable[Any] = self.model.modules()
        for layer in layers:
            if hasattr(layer, "get_delta_weight") and "default" in getattr(layer, "lora_A", {}):
                delta: Tensor = layer.get_delta_weight("default")
                moved += float(delta.square().sum())
                norms += float(layer.base_layer.weight.square().sum())
        return moved, norms


def state_bytes(optimizers: list[Stepping]) -> int:
    """Bytes of all states."""
    total = 0
    for each in optimizers:
        optimizer = each.optimizer if isinstance(each, Around) else each
        if isinstance(optimizer, Shampoo):
            total += held_bytes(optimizer)
        else:
            states = optimizer.state.values()
            total += sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
    return total


def train(run: Run, tasks: Tasks, model: nn.Module) -> dict[str, Any]:
    """Figures at even distances and at the end, training losses, displacement, seconds and memory."""
    if run.text != tasks.digest:
        raise ValueError(f"the run is for text {run.text}, and the tokens are of {tasks.digest}")
    task = tasks.tasks[run.task]
    start = Displacement(model)
    optimizers = build_optimizers(run.kind, run.options, run.lr, model, WEIGHT_DECAY)
    clocked = Clocked(model, optimizers, run.steps, run.warm_up)
    when = {round(run.steps * n / EVALUATIONS) for n in range(1, EVALUATIONS + 1)}
    curve: list[dict[str, float]] = []
    finished = False
    for step in range(run.steps):
        ids, labels = task.batch(run.seed, step, run.batch)

        def forward(ids: Tensor = ids, labels: Tensor = labels) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss: Tensor = model(input_ids=ids, labels=labels).loss
            return loss

        if not clocked.step(forward):
            break
        if step + 1 in when:
            curve.append({"step": step + 1, **figures(model, task, tasks.known)})
            finished = step + 1 == run.steps and math.isfinite(curve[-1]["loss"])
    return {
        "held_out": curve[-1]["loss"] if finished else None,
        "start": tasks.start[run.task],
        "curve": [point for point in curve if all(map(math.isfinite, point.values()))],
        "displacement": round(start.read(), 6) if finished else None,
        **clocked.record,
        "state_mb": round(state_bytes(optimizers) / 1e6, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    """Read a run and the file of tokens from standard input, train, and print the record as the last line."""
    from examples.pretrained import NAME

    order = json.load(sys.stdin)
    torch.set_num_threads(1)
    run = Run(**order["run"])
    file = Path(order["tokens"])
    began = time.time()
    model = prepared(file.with_name(NAME), run.method, run.seed)
    record = train(run, load_tasks(file), model)
    record |= {"commit": commit(), "torch": torch.__version__, "began": round(began), "ended": round(time.time())}
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
