"""The dense float64 counterpart of a mixture of experts: every token goes to its best expert, weighted by the gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.reference import Reference
from tests.support.zoo import VOCABULARY, WIDTH, gradients, make_batch

HIDDEN, EXPERTS, STEPS = 10, 4, 8
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "precondition_frequency": 3,
    "refresh": "sync",  # phases are counted over the experts that a rank holds, and the dense model holds all
    "max_preconditioner_dim": 8,
    "relative_epsilon": 1e-3,
    "eps": 1e-4,
}


def make_expert() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, 18), nn.GELU(), nn.Linear(18, HIDDEN))


class DenseMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, HIDDEN)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(make_expert() for _ in range(EXPERTS))
        self.leave = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        gates = torch.softmax(self.gate(h), dim=-1)
        chosen = F.one_hot(gates.argmax(-1), EXPERTS) * gates
        out = sum(chosen[..., n, None] * expert(h) for n, expert in enumerate(self.experts))
        return F.cross_entropy(self.leave(h + out).flatten(0, 1), targets.flatten())


def make_dense(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        return DenseMixture().to(dtype)


def expected(extra: dict[str, Any]) -> dict[str, Tensor]:
    model = make_dense(torch.float64)
    named = dict(model.named_parameters())
    undecayed = {n: {"weight_decay": 0.0} for n in named if n.endswith("bias")}
    reference = Reference(named, undecayed, exclude=("gate.weight",), **{**OPTIONS, **extra})
    for step in range(STEPS):
        reference.step(gradients(model, make_batch("wide", step)))
        for name, value in reference.values().items():
            named[name].data.copy_(value)
    return reference.values()
