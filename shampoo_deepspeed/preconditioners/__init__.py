"""Preconditioners: one small class each, all with the interface of `Preconditioner`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.preconditioners.shampoo import ShampooPreconditioner
from shampoo_deepspeed.verdict import Verdict


class Preconditioner(Protocol):
    """Mathematics of a stack of equal blocks. Stateless: all state is in the dict that each method gets.

    ``state`` maps names to tensors with the block as first dim; methods change them in place.
    """

    def new_state(self, count: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """State of ``count`` blocks that have not seen a gradient."""
        ...

    def accumulate(self, state: dict[str, Tensor], gradients: Tensor, verdict: Verdict) -> None:
        """Take the gradients [B, *shape] of one step into the statistics."""
        ...

    def refresh(self, state: dict[str, Tensor], step: int) -> list[int]:
        """Recompute what is applied from the statistics; gives the rows that failed and were left as they were."""
        ...

    def apply(self, state: dict[str, Tensor], moments: Tensor) -> Tensor:
        """The preconditioned direction of first moments [B, *shape]."""
        ...


def build(config: ShampooConfig) -> Preconditioner:
    """The preconditioner that the options ask for."""
    return ShampooPreconditioner(config)
