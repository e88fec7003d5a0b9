"""The runs of the FSDP2 and tensor-parallel tests, and the unsharded float64 run that each must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.options.parameter_names import matching
from tests.support.reference import Reference
from tests.support.scenarios import STRICT
from tests.support.zoo import gradients, make_batch, make_model

FROZEN = ("up.weight", "up.bias")


@dataclass(frozen=True)
class Run:
    """Model and options of a run, and how it is sharded."""

    model: str = "odd"
    settings: str = "strict"
    dtype: str = "float32"
    steps: int = 7
    unused: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    layout: str = "rows"
    built_before: bool = False
    given: str = "model"  # passed with named parameters; or only "names" or "parameters"
    apart: bool = False  # in every second step, alternately one half of the ranks leaves a layer unused
    frozen_steps: int = 0  # number of steps at the start in which the layer `up` is frozen
    resumed_at: int = 0  # the step before which a new optimizer takes over the state

    @property
    def fsdp1(self) -> bool:
        return self.layout.startswith(("fsdp1", "flat", "units"))

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def rule(self) -> dict[str, Any]:
        """Return the options of the update rule."""
        base = {"lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3}
        base["max_preconditioner_dim"] = 8 if self.model == "odd" else 16
        return base | (STRICT if self.settings == "strict" else {}) | self.extra

    def options(self) -> dict[str, Any]:
        return self.rule() | {"factor_dtype": self.dtype, "root_dtype": self.dtype}


def expected(run: Run, averages: bool = False) -> dict[str, Tensor]:
    """Return the final parameters of the reference, or their moving averages."""
    model = make_model(run.model, torch.float64)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = make_reference(run, values)
    # FSDP1 gives an unused parameter zeros, as ZeRO does, unless a whole unit is unused.
    zeros = run.fsdp1 and not run.layout.startswith("units")
    for step in range(run.steps):
        found = gradients(model, make_batch(run.model, step, run.unused), zeros)
        reference.step({n: None if step < run.frozen_steps and n in FROZEN else g for n, g in found.items()})
        for name, value in reference.values().items():
            values[name].data.copy_(value)
    return reference.averages() if averages else reference.values()


def replayed(run: Run, steps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Run the reference with the gradients that a run has seen, and return its parameters."""
    model = make_model(run.model, torch.float64)
    reference = make_reference(run, {n: p for n, p in model.named_parameters() if p.requires_grad})
    for seen in steps:
        reference.step({n: seen[n].double() for n in reference.params})
    return reference.values()


def make_reference(run: Run, values: Mapping[str, Tensor]) -> Reference:
    options = run.rule()
    spared = options.pop("no_decay", ())
    overrides: dict[str, dict[str, Any]] = {
        n: {"weight_decay": 0.0} for n in values if matching(spared, n, frozenset())
    }
    for rule in options.pop("rules", []):  # each rule of these tests names one parameter
        changed = {key: value for key, value in rule.items() if key != "match"}
        overrides[rule["match"]] = overrides.get(rule["match"], {}) | changed
    return Reference(values, overrides, ("embed.weight",), **options)
