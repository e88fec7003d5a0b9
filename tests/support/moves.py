"""The moves of the checkpoint tests: which framework continues a run of which, and the uninterrupted float64 run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support.reference import Reference
from tests.support.scenarios import STRICT
from tests.support.zoo import gradients, make_batch, make_model

HALF, STEPS = 5, 9
RANKS = {
    "single": 1,
    "ddp": 2,
    "fsdp1": 2,
    "fsdp2": 2,
    "zero1": 2,
    "zero2": 2,
    "zero3": 2,
    "fsdp2_4ranks": 4,
    "hsdp": 4,
}
RULE: dict[str, Any] = {
    "lr": 5e-3,
    "weight_decay": 0.1,
    "precondition_frequency": 3,
    "max_preconditioner_dim": 8,
    "momentum": 0.5,
    "ema_decay": 0.8,
}


@dataclass(frozen=True)
class Move:
    """A run that moves: ``folder`` holds what ``source`` has saved; ``target`` is the framework that runs now."""

    source: str
    target: str
    settings: str
    folder: str

    @property
    def options(self) -> dict[str, Any]:
        return rule(self.settings)

    @property
    def name(self) -> str:
        return f"{self.source}_to_{self.target}_{self.settings}"


def rule(settings: str) -> dict[str, Any]:
    return RULE | (STRICT if settings == "strict" else {})


@cache
def unbroken(settings: str) -> dict[str, Tensor]:
    """Return the parameters after all steps of one float64 run, and their averages under ``averaged``'s names."""
    model = make_model("odd", torch.float64)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = Reference(values, exclude=("embed.weight",), **rule(settings))
    for step in range(STEPS):
        reference.step(gradients(model, make_batch("odd", step), False))
        for name, value in reference.values().items():
            values[name].data.copy_(value)
    return reference.values() | averaged(reference.averages())


def averaged(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return averages under names of their own."""
    return {f"average of {name}": value for name, value in values.items()}
