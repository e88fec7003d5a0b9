"""How far training has moved the weights, for a Trainer's logs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

DISPLACEMENT = "displacement"  # in logs


class Squares(NamedTuple):
    """||W - W_0||^2 and ||W_0||^2, with which ranks that hold different parts of W can be put together."""

    moved: float
    begun: float


class Displacement(TrainerCallback):
    """Measures ||W - W_0|| / ||W_0||: how far training has moved the trainable weights from where it began.

    A ``ShampooTrainer`` with this callback has ``displacement`` in its training logs, with any optimizer. With a stock
    Trainer, ``history`` holds it, with its ``"step"``. W are the weights that this rank holds; under FSDP and ZeRO-3 it
    holds parts. W_0 are those with which ``train()`` begins, also if it resumes; the host's memory keeps a copy.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self._weights: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: nn.Module | None = None, **__: Any
    ) -> None:
        assert model is not None
        trained = [p for p in model.parameters() if p.requires_grad]
        self._weights = [(p, local(p).to("cpu", copy=True)) for p in trained]

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float] | None = None, **__: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            found = logs[DISPLACEMENT] if DISPLACEMENT in logs else self.measured()
            self.history.append({"step": state.global_step, DISPLACEMENT: found})

    def measured(self) -> float:
        """The displacement now; copies the first weights to the device, one parameter at a time."""
        moved, begun = self.squares()
        return math.sqrt(moved / begun) if begun > 0.0 else 0.0

    def squares(self) -> Squares:
        """The squares of which the displacement is made."""
        moved, begun = 0.0, 0.0
        for parameter, first in self._weights:
            now = local(parameter).float()
            before = first.to(now.device).float()
            moved += float((now - before).norm()) ** 2
            begun += float(before.norm()) ** 2
        return Squares(moved, begun)


def local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter."""
    held: Any = getattr(parameter, "ds_tensor", parameter)  # under ZeRO-3 the parameter itself is empty
    to_local = getattr(held, "to_local", None)  # of a DTensor
    found: Tensor = held if to_local is None else to_local()
    return found.detach()
