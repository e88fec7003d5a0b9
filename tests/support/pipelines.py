"""The layers of DeepSpeed's pipelines in the tests, and their micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Each stage has an optimizer of its own, which would stagger its refreshes by itself.
SYNC = {"refresh": "sync"}


class Stage(nn.Module):
    """A layer of a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def stage_data(accumulate: int) -> list[tuple[Tensor, Tensor]]:
    """Return the micro-batches of a step, the same ones in each step, so that they are learned."""
    rows = torch.Generator().manual_seed(51)
    return [(x, x.flip(0)) for x in torch.randn(accumulate, 8, 8, generator=rows)]
