"""The runs of the FSDP2 and tensor-parallel tests, and the unsharded float64 run that each must equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.distributed.scenarios import STRICT
from tests.reference import Reference
from tests.zoo import gradients, make_batch, make_model


@dataclass(frozen=True)
class Run:
    """Model and options, and how they are sharded."""

    model: str = "odd"
    settings: str = "strict"
    dtype: str = "float32"
    steps: int = 9
    unused: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    layout: str = "rows"
    built_before: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def rule(self) -> dict[str, Any]:
        """Options of the update rule."""
        base = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3}
        base["max_preconditioner_dim"] = 8 if self.model == "odd" else 16
        return base | (STRICT if self.settings == "strict" else {}) | self.extra

    def options(self) -> dict[str, Any]:
        return self.rule() | {"factor_dtype": self.dtype, "root_dtype": self.dtype}


def expected(run: Run) -> dict[str, Tensor]:
    model = make_model(run.model, torch.float64)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = Reference(values, exclude=("embed.weight",), **run.rule())
    zeros = run.layout.startswith("fsdp1")  # which gives an unused parameter of a used unit zeros, as ZeRO does
    for step in range(run.steps):
        reference.step(gradients(model, make_batch(run.model, step, run.unused), zeros))
        for name, value in reference.values().items():
            values[name].data.copy_(value)
    return reference.values()
