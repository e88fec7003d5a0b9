"""Preconditioners: one small class each, all with the interface of `Preconditioner`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.preconditioners.kl_shampoo import KLShampooPreconditioner
from shampoo_deepspeed.preconditioners.renewed import Renewed
from shampoo_deepspeed.preconditioners.shampoo import ShampooPreconditioner
from shampoo_deepspeed.preconditioners.soap import SOAPPreconditioner
from shampoo_deepspeed.verdict import Verdict


class Preconditioner(Protocol):
    """Mathematics of a stack of equal blocks. Stateless: all state is in the dict that each method gets.

    ``state`` maps names to tensors with the block as first dim; methods change them in place.
    """

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """State of ``count`` blocks that have not seen a gradient; ``dtype`` is that of moments and directions."""
        ...

    def accumulate(self, state: dict[str, Tensor], gradients: Tensor, verdict: Verdict) -> None:
        """Take the gradients [B, *shape] of one step into the statistics."""
        ...

    def refresh(self, state: dict[str, Tensor], step: int, moments: Tensor) -> list[int]:
        """Recompute what is applied from the statistics: ``compute`` and ``install`` in one."""
        ...

    def compute(self, state: dict[str, Tensor], step: int) -> Renewed:
        """The part of a refresh that takes long: reads factor matrices and bases and changes nothing."""
        ...

    def install(self, state: dict[str, Tensor], renewed: Renewed, moments: Tensor) -> list[int]:
        """The rest of it; gives the rows that failed and were left as they were.

        ``moments`` [B, *shape] are the first moments that will be applied in this step.
        """
        ...

    def apply(self, state: dict[str, Tensor], gradients: Tensor, moments: Tensor, verdict: Verdict) -> Tensor:
        """The preconditioned direction of first moments [B, *shape], linear in them, as a new tensor; rows that were
        never refreshed give anything finite. Called once in each step from the first refresh on."""
        ...


_CLASSES: dict[str, Callable[[ShampooConfig], Preconditioner]] = {
    "shampoo": ShampooPreconditioner,
    "soap": SOAPPreconditioner,
    "kl_shampoo": KLShampooPreconditioner,
}


def build(config: ShampooConfig) -> Preconditioner:
    """The preconditioner that the options ask for."""
    return _CLASSES[config.preconditioner](config)
